"""Images of an evaluation: the examples and searches that it wrote, maps of the examples, and the map of all images."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.apps.explain import DEFAULT, image_maps, overlay
from mmssl.apps.report.run_reader import Name, RunRecord, first_captions, read_table
from mmssl.apps.report.space import Space, draw_space, uri
from mmssl.apps.report.wording import brief
from mmssl.data.transforms import DecodeError
from mmssl.errors import UserError
from mmssl.evaluate import datasets, encode, open_dataset, prompts
from mmssl.inference import Model
from mmssl.plotting import shrink
from mmssl.types import Sample

GUESSES = 3
"""Classes shown of an example."""
MAP_SIDE = 128
"""Longest side of a map, in pixels."""
FILE = "examples.json"


@dataclass(frozen=True)
class Shown:
    """An image on the page."""

    uri: str
    words: str
    """Alternative text."""
    right: bool | None = None


@dataclass(frozen=True)
class Example:
    """A classified image with its maps."""

    sample: Sample
    """Without the image."""
    image: Shown
    classes: tuple[str, str]
    """The predicted class and the right one."""
    label: str
    guesses: list[tuple[str, float]]
    """The best classes with their probabilities."""
    right: bool
    maps: list[tuple[str, Shown]] = field(default_factory=list)
    """Class name and the map of the places that match it."""


@dataclass(frozen=True)
class Search:
    """A query and its results."""

    query: str | Shown
    found: list[Any]
    """Images (Shown), or pairs of a text and True if it is correct."""


@dataclass(frozen=True)
class Gallery:
    """The images of one evaluation on the page, with notes if something is missing."""

    method: str = ""
    """Method of the maps of the examples; empty without maps."""
    examples: list[Example] = field(default_factory=list)
    by_text: list[Search] = field(default_factory=list)
    by_image: list[Search] = field(default_factory=list)
    space: Space | None = None
    notes: list[str] = field(default_factory=list)


def read_gallery(folder: Path) -> Gallery:
    """The examples and searches in the folder of an evaluation's tables."""
    path = folder / FILE
    if not path.is_file():
        return Gallery(notes=["No examples.json: mmssl eval RUN DATA --out RUN/NAME writes one, with example images."])
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["kind"] == "classification":
            return Gallery(examples=[_example(folder, example) for example in tree["examples"]])
        captions = first_captions(read_table(folder / "ranks.csv"))
        return Gallery(
            by_text=[
                Search(brief(s["caption"]), [_captioned(folder, image, captions, right) for image, right in s["found"]])
                for s in tree["by_caption"]
            ],
            by_image=[
                Search(_captioned(folder, s["image"], captions), [(brief(text), right) for text, right in s["found"]])
                for s in tree["by_image"]
            ],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Gallery(notes=[f"{path} cannot be shown ({error!r}); evaluate again to write it anew."])


def add_maps(gallery: Gallery, run: RunRecord, key: str, model: Model, limit: int, method: str = DEFAULT) -> Gallery:
    """Draw the maps of the examples with `method`, and the map of up to `limit` images of `DATASET/TASK`."""
    rows = read_table(run.tables[key] / "predictions.csv")
    ranks = read_table(run.tables[key] / "ranks.csv")
    if not rows and not ranks:
        return replace(gallery, notes=[*gallery.notes, "This evaluation kept no table of its samples for a map."])
    try:
        dataset = _open_evaluated(run, key, [row["shard"] for row in rows or ranks])
        return replace(
            gallery,
            method=method,
            examples=_with_maps(gallery.examples, model, datasets.class_templates(dataset), method),
            space=draw_space(
                model,
                {(row["shard"], row["key"]): row["label"] for row in rows} or first_captions(ranks),
                {(row["shard"], row["key"]): row["class1"] for row in rows},
                limit,
            ),
        )
    except (UserError, DecodeError) as error:
        return replace(gallery, notes=[*gallery.notes, f"Maps cannot be drawn: {error}"])


def _open_evaluated(run: RunRecord, key: str, shards: Sequence[str]) -> datasets.Dataset:
    """The dataset of `DATASET/TASK`, as configured or by the shards that the evaluation's tables name."""
    name = key.rsplit("/", 1)[0]
    configured = run.config.evaluate.suites.get(name) if run.config is not None else None
    if configured is not None and Path(configured.data).is_dir():
        return open_dataset(configured.data, name=name)
    return open_dataset(list(dict.fromkeys(shards)), name=name)


def _example(folder: Path, example: Mapping[str, Any]) -> Example:
    image, label = example["image"], brief(example["label"])
    return Example(
        sample=Sample(image["id"], image["shard"], image["key"], b"", {}),
        image=_thumbnail(folder, image, f"an image of the class {label}"),
        classes=(example["best"][0][0], example["label"]),
        label=label,
        guesses=[(brief(name), score) for name, score in example["best"][:GUESSES]],
        right=example["right"],
    )


def _captioned(
    folder: Path, image: Mapping[str, Any], captions: Mapping[Name, str], right: bool | None = None
) -> Shown:
    verdict = "" if right is None else "right: " if right else "wrong: "
    caption = captions.get((image["shard"], image["key"]), image["key"])
    return _thumbnail(folder, image, verdict + brief(caption), right)


def _thumbnail(folder: Path, image: Mapping[str, Any], words: str, right: bool | None = None) -> Shown:
    coded = base64.b64encode((folder / image["thumbnail"]).read_bytes()).decode()
    return Shown(f"data:image/webp;base64,{coded}", words, right)


def _with_maps(examples: list[Example], model: Model, templates: prompts.Templates, method: str) -> list[Example]:
    """The examples with the maps of the predicted and the correct class, if their image still exists."""
    names = sorted({name for example in examples for name in example.classes})
    if not names:
        return []
    weights = dict(zip(names, encode.class_weights(model, names, templates), strict=True))
    images = {s.id: model.view(s.image) for s in datasets.read_images(example.sample for example in examples)}
    return [
        replace(e, maps=_draw_maps(model, images[e.sample.id], {name: weights[name] for name in e.classes}, method))
        if e.sample.id in images
        else e
        for e in examples
    ]


def _draw_maps(model: Model, pixels: Tensor, texts: Mapping[str, Tensor], method: str) -> list[tuple[str, Shown]]:
    """The maps of an image, pixels [3, S, S], for the embedding [D] of each class name."""
    images = pixels.expand(len(texts), -1, -1, -1).to(model.device)
    maps = image_maps(model.encoder, images, torch.stack(list(texts.values())).to(model.device), method)
    found = []
    for name, heat in zip(texts, maps.cpu(), strict=True):
        small = shrink(overlay(pixels, heat).permute(1, 2, 0).numpy(), MAP_SIDE)
        found.append((brief(name), Shown(uri(small), f"the places that match {brief(name)}")))
    return found
