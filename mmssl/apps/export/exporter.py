"""Export of a model: write the files, check them with the library that reads them, describe and upload them."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from mmssl.apps.export import head
from mmssl.apps.export.formats import find_format, format_names
from mmssl.apps.export.reader import Reader, largest_difference
from mmssl.errors import UserError
from mmssl.evaluate import datasets, labels, suite
from mmssl.evaluate.tasks import main_metrics
from mmssl.inference import Model, probabilities

if TYPE_CHECKING:
    from mmssl.apps.finetune import Classifier

TOLERANCE = 1e-5
"""Largest accepted absolute difference of any entry of the features, which are unit vectors."""


@dataclass(frozen=True)
class Exported:
    """An exported folder."""

    folder: Path
    difference: float
    """Largest difference between the other library's features and the model's."""
    usage: str
    """Python code that loads the folder."""
    classify: head.Classify | None = None
    """Images to probabilities with the exported files, if there is a head."""


def export(model: Model, kind: str, out: Path, *, classifier: "Classifier | None" = None, **options: Any) -> Exported:
    """Write a model for another library, load it with that library, and compare the features.

    Args:
        kind: one of `format_names()`, or the dotted path of a module of your own.
        out: a folder that is empty or does not exist.
        classifier: write its head too, and compare probabilities. Its model is `model`.
        options: of the format: `opset` and `pixels` for onnx.

    Raises:
        UserError: the format is unknown or cannot store this model (then nothing is written), a package is missing,
            the folder is not empty or cannot be written, or the features differ by more than TOLERANCE.
    """
    form = find_format(kind)
    problems = form.problems(model)
    if problems:
        able = [name for name in format_names() if not find_format(name).problems(model)]
        others = f"; choose from {', '.join(able)}" if able else ""
        raise UserError(f"this model cannot be written as {kind}: {'; '.join(problems)}{others}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder; give another one")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; give another folder")
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        form.write(model, out.resolve(), **options)
        theirs, usages = form.reader(model, out), [form.usage]
        difference, classify = largest_difference(model, theirs), None
        if classifier is not None and difference <= TOLERANCE:
            own = getattr(form, "write_classifier", None)
            classify = head.write_head(classifier, out, theirs) if own is None else own(classifier, out)
            usages.append(getattr(form, "classifier_usage", head.usage))
            difference = max(difference, head.largest_difference(classifier, classify))
        if model.calibration is not None and kind != "timm":  # there one tower is written, so nothing is compared
            probabilities.write_calibration(out, model.calibration)
        _write_card(model, kind, _join(usages, out.name), out)
    except BaseException as error:
        _empty(out, created)
        if isinstance(error, OSError | SafetensorError):
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"--out {out} cannot be written: {reason}; free some space, or give another folder"
            ) from None
        raise
    if not difference <= TOLERANCE:
        _empty(out, created)
        raise UserError(
            f"numbers that {form.LABEL} computes differ by {difference:.2g}, so nothing was written; report this model"
        )
    return Exported(out, difference, _join(usages, str(out)), classify)


@dataclass(frozen=True)
class Measured:
    """The main metric of an evaluation, by the model and by its exported form."""

    name: str
    """DATASET/TASK METRIC."""
    ours: float
    theirs: float

    def line(self) -> str:
        """The result in one line."""
        return f"{self.name}: {self.theirs:.4f} exported, {self.ours:.4f} before ({self.theirs - self.ours:+.4f})"


def measure(
    model: Model, kind: str, folder: Path, dataset: datasets.Dataset, options: suite.SuiteOptions | None = None
) -> Measured:
    """Evaluate a model and its export, and write the result into the folder's README.md.

    Args:
        dataset: its kind decides the task: zero-shot classification or retrieval.

    Raises:
        UserError: the dataset cannot be evaluated.
    """
    plan = {dataset.name: (dataset, suite.default_task(dataset))}
    settings = replace(options or suite.SuiteOptions(), draw=False, logit_scale=model.logit_scale)
    found = []
    for encoder in (model, find_format(kind).reader(model, folder)):
        ((name, metrics),) = suite.run(encoder, plan, None, settings).items()
        metric = main_metrics(name.rpartition("/")[2])[0]
        found.append(float(metrics[metric]))
    return _noted(Measured(f"{name} {metric}", *found), folder)


def measure_classifier(
    classifier: "Classifier", exported: Exported, dataset: datasets.Dataset, options: suite.SuiteOptions | None = None
) -> Measured:
    """The same for the accuracy of a classifier that was exported with its head.

    Raises:
        UserError: the dataset cannot be evaluated, or has other classes.
    """
    assert exported.classify is not None
    found: list[float] = []
    label = partial(labels.sample_label, dataset)
    for classify in (classifier.probabilities, exported.classify):
        encoder = suite.DatasetEncoder(Reader(classify, classifier.model.encode_text), options or suite.SuiteOptions())
        encoded = suite.usable_images(encoder.encode(dataset, dataset.name, [label]), label)
        suite.report_bad(dataset.name, encoded, encoder.options)
        names, indices = labels.class_indices(dataset, encoded.samples)
        strange = sorted(set(names) - set(classifier.labels))
        if strange:
            raise UserError(f"{dataset.name} has classes that the classifier lacks: {', '.join(strange[:3])}")
        wanted = torch.tensor([classifier.labels.index(name) for name in names])[indices]
        found.append(float((encoded.features.argmax(1) == wanted).float().mean()))
    return _noted(Measured(f"{dataset.name} acc1", *found), exported.folder)


def _noted(measured: Measured, folder: Path) -> Measured:
    """Add a measurement to README.md."""
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(f"\nMeasured on {measured.line()}.\n")
    return measured


def push(folder: Path, name: str, private: bool = False) -> str:
    """Upload an exported folder to the Hugging Face hub; the folder does not change. Returns its address.

    Args:
        name: USER/MODEL; created if it does not exist.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    from mmssl.apps.export.to_open_clip import CONFIG, rename

    is_open_clip = (folder / CONFIG).is_file()
    api = HfApi()
    try:
        if is_open_clip:
            rename(folder, name)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name, commit_message="Upload by mmssl")
    except Exception as error:  # network failures have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} is written, but could not be pushed to {name}: {reason}; log in with: hf auth login"
        ) from None
    finally:
        if is_open_clip:
            rename(folder, str(folder.resolve()))
    return str(address)


def _join(usages: Sequence[Callable[[str], str]], folder: str) -> str:
    return "\n".join(usage(folder) for usage in usages)


def _write_card(model: Model, kind: str, usage: str, folder: Path) -> None:
    """Write README.md: the code that loads the folder, the preprocessing of images, and the licence."""
    vision = model.self_contained().vision
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in model.vision.statistics)
    fit = "shorter side resized and the centre cut out" if vision.fit == "shortest" else "both sides resized"
    text = f"""# An image-text encoder ({kind})

```python
{usage}
```

Images: {vision.image_size} x {vision.image_size} pixels, {vision.interpolation}, {fit}, values from 0 to 1,
mean {mean}, deviation {std}. Captions: at most {model.tokenizer.max_tokens} tokens.
Features are compared by cosine similarity; times {model.logit_scale:.4g} they are logits.
{_match_code(model, kind)}
Vision tower: {vision.name}. Text tower: {model.text.encoder.config.model_type}. {model.config.embed_dim} dimensions.
Weights: {"; ".join(model.notes) or "trained with mmssl"}.

Licence: mmssl {version("mmssl")}, which wrote these files, is under Apache-2.0. The weights are under the terms of
whoever trained them and of the weights they were trained from: say here which.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _match_code(model: Model, kind: str) -> str:
    """Of a calibrated model the code that turns a similarity into a probability."""
    if model.calibration is None or kind == "timm":
        return ""
    return f"""
calibration.json was fitted on {model.calibration.samples:,} held-out images. It turns the cosine similarity of an
image and a text into the probability that they match, if a match is as likely as not beforehand:

```python
import json, math
from pathlib import Path

calibration = json.loads(Path("calibration.json").read_text())

def match(similarity):
    return 0.5 + 0.5 * math.tanh((calibration["match_scale"] * similarity + calibration["match_bias"]) / 2)
```

Calibrate again if the weights change.
"""


def _empty(out: Path, created: bool) -> None:
    """Remove the files that were written into an empty folder."""
    for path in out.iterdir() if out.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if created and out.exists():
        out.rmdir()
