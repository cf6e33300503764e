"""Datasets: a folder in CLIP_benchmark's WebDataset layout, a flat folder, or any pattern of shards.

FOLDER/classnames.txt                            one name per line; line 1 is class 0
FOLDER/zeroshot_classification_templates.txt     one template per line, `{c}` for the name
FOLDER/classnames.fr.txt, FOLDER/zeroshot_classification_templates.fr.txt     the same in another language
FOLDER/queries.json                              queries by an image and a text
FOLDER/dataset_type.txt                          `retrieval` or `multilabel`; missing: classification
FOLDER/test/nshards.txt, FOLDER/test/0.tar ...   or flat: FOLDER/test-*.tar or FOLDER/val-*.tar

Labelled images that are no shards (a folder per class, a table) are packed once into such a folder.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, Literal

from mmssl.data import expand, iter_samples
from mmssl.data.shards import BadSample, image_ranges
from mmssl.errors import UserError
from mmssl.evaluate.prompts import DEFAULT_TEMPLATES, Templates, read_classnames, read_templates
from mmssl.files import open_regular, write_json
from mmssl.types import Sample

Kind = Literal["classification", "multilabel", "retrieval"]

CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
KIND_FILE = "dataset_type.txt"
QUERIES_FILE = "queries.json"
_IMAGE_NUMBER = re.compile(r"#\d+$")
TEST = "test"
"""The split that is read from a folder."""
PACKED, PACKED_SOURCE, PACKED_LABEL = "images", "source.json", "label"
"""Folder of packed images beside that of the features; the file that names their source; the field of their labels."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """The shards of a dataset, and its classes."""

    name: str
    """Short name for tables and files."""
    shards: tuple[str, ...]
    """Paths or URLs, in reading order."""
    kind: Kind
    """The kind of evaluation that the dataset supports."""
    classnames: tuple[str, ...] | None
    """Class names in the order of the labels. None: taken from the labels."""
    classnames_source: str
    """The file of the class names, for messages."""
    templates: Templates | None
    """Prompt templates that came with the data. None: the default."""
    train: tuple[str, ...] | None
    """The shards of the training split, if any."""
    label: str | None
    """The field that holds the label: `cls`, or an entry of the JSON member. None: `cls`, or else `label`."""
    slice_by: tuple[str, ...] = ()
    """Metadata fields to break accuracies down by."""
    values_may_differ: bool = False
    """The class names lie beside the shards, and the user named the field of the labels, which may be other ones."""
    queries: Path | None = None
    """The file of queries by an image and a text."""

    @cached_property
    def positions(self) -> dict[str, int]:
        """Class name -> index; the first one where a name occurs twice."""
        names = self.classnames if self.classnames is not None else ()
        return {name: index for index, name in reversed(list(enumerate(names)))}


def open_dataset(
    spec: str | Path | Sequence[str],
    *,
    name: str | None = None,
    classnames: str | Path | Sequence[str] | None = None,
    templates: str | Path | Templates | None = None,
    label: str | None = None,
    slice_by: Sequence[str] = (),
    language: str | None = None,
) -> Dataset:
    """Find shards, class names and templates.

    Args:
        spec: a folder, or a pattern (or list of patterns) of shards.
        name: default: from the folder or the file names.
        classnames: a file, `imagenet`, or the names themselves. Default: classnames.txt beside the shards.
        templates: a file, `openai-imagenet`, `simple-imagenet`, or the templates themselves.
            Default: the file beside the shards.
        label: the field that holds the label. Default: `cls`, or else `label`. If none of its values is a number or a
            name of classnames.txt, its values are the classes.
        slice_by: metadata fields to break accuracies down by.
        language: use the files of this language, as `classnames.fr.txt`; it is added to the name.
    Raises:
        UserError: no shard matches, or a file is missing or malformed.
    """
    shards, home = _find(spec)
    found_names = _beside(home, CLASSNAMES_FILE, language) if classnames is None else None
    classnames = found_names if classnames is None else classnames
    if templates is None:
        templates = _beside(home, TEMPLATES_FILE, language)
    own_name = name if name is not None else _name(spec, shards)
    return Dataset(
        name=own_name if language is None else f"{own_name}-{language}",
        shards=tuple(shards),
        kind=_kind(home),
        classnames=read_classnames(classnames)
        if isinstance(classnames, str | Path)
        else (None if classnames is None else tuple(classnames)),
        classnames_source=str(classnames) if isinstance(classnames, str | Path) else "the class names given",
        templates=read_templates(templates) if isinstance(templates, str | Path) else templates,
        train=_train_shards(spec),
        label=label,
        slice_by=tuple(slice_by),
        values_may_differ=found_names is not None and label not in (None, "cls"),
        queries=_beside(home, QUERIES_FILE, None),
    )


def open_images(
    source: str | Path, *, label: str | None = None, bad_samples: float = 0.1, **options: Any
) -> Dataset | None:
    """A dataset from a folder of images per class, splits of such folders, or tables.

    The images are packed into the user's cache, as they are. The folder depends on the content: changed images are
    packed again. Nothing is ever removed.

    Args:
        label: column of the labels of a table. Default: found by its name.
        bad_samples: largest fraction of images that may be unusable; of fewer than 100, it is that of 100.
        options: of `open_dataset`.

    Returns:
        None if the source is no such data.

    Raises:
        UserError: a table has no labels, images are unusable, or the cache cannot be written.
    """
    from mmssl.data.packing import open_labelled, pack  # a training does not load the packing
    from mmssl.evaluate import feature_cache

    place = Path(source)
    splits = open_labelled(place, label)
    if splits is None:
        return None
    words = repr([str(place.resolve()), label, *((name, records.identity()) for name, records in splits.items())])
    home = (
        feature_cache.default_folder().with_name(PACKED) / hashlib.blake2b(words.encode(), digest_size=12).hexdigest()
    )
    for name, records in splits.items():
        account = pack(records, home / name, splits={name: 1.0}).account
        if account.used == 0:
            raise UserError(f"no usable image in {source}: {account.text()}")
        account.limit(bad_samples, "raise that limit: --bad-samples")
        if account.omitted:
            _log.warning("%s: %s", source, "; ".join(account.causes()))
    write_json(home / PACKED_SOURCE, {"source": str(place.resolve()), "label": label})
    spec = str(home) if "test" in splits else f"{escape(str(home))}/*/*.tar"
    chosen = {"name": place.resolve().stem, **{name: value for name, value in options.items() if value is not None}}
    return open_dataset(spec, label=PACKED_LABEL, **chosen)


def find_datasets(folder: str | Path) -> dict[str, Path]:
    """Every dataset in or under a folder, by its path relative to it (slashes as dashes), in name order.

    Raises:
        UserError: no dataset is found, or two have the same name.
    """
    root = Path(folder)
    found: dict[str, Path] = {}
    for path in sorted([root, *root.rglob("*")]):
        # The shards of PATH/test may themselves be named test-*.tar.
        part_of_another = path != root and path.name == TEST and _is_dataset(path.parent, TEST)
        if not path.is_dir() or part_of_another or not _is_dataset(path, TEST):
            continue
        name = path.name if path == root else "-".join(path.relative_to(root).parts)
        if name in found:
            raise UserError(f"datasets {found[name]} and {path} are both named {name!r}; evaluate them separately")
        found[name] = path
    if not found:
        raise UserError(
            f"no dataset under {folder}; a dataset is a folder with {' or '.join(_patterns(TEST))}, or a folder with a "
            "folder of images per class"
        )
    return found


def training_split(dataset: Dataset) -> Dataset:
    """The same dataset with its training shards in place of its own.

    Raises:
        UserError: it has no training split.
    """
    if dataset.train is None:
        raise UserError(
            f"dataset {dataset.name!r} has no training split; give a folder with train/*.tar or train-*.tar"
        )
    return replace(dataset, shards=dataset.train, train=None)


def read(dataset: Dataset, on_bad: Callable[[BadSample], None] = lambda bad: None) -> Iterator[Sample]:
    """Every usable sample in order, once for each of its images and numbered anew; the others go to `on_bad`."""
    found = iter_samples(dataset.shards, need_text=False, on_bad=on_bad)
    for number, row in enumerate(image for sample in found for image in sample.each_image()):
        yield row if row.id == number else replace(row, id=number)


def sample_numbers(rows: Sequence[Sample]) -> list[int]:
    """The number of the sample, from 0, to which each row of `read` belongs: neighbours with keys KEY, KEY#1, ... and
    the same fields are images of one."""
    numbers: list[int] = []
    for place, row in enumerate(rows):
        before = rows[place - 1] if place else None
        same = (
            before is not None
            and row.key != _sample_key(row)
            and (row.shard, _sample_key(row), row.fields) == (before.shard, _sample_key(before), before.fields)
        )
        numbers.append((numbers[-1] if numbers else -1) + (not same))
    return numbers


def _sample_key(row: Sample) -> str:
    return _IMAGE_NUMBER.sub("", row.key)


def read_images(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The same samples with their images, in the order of the dataset, without those that no longer exist.

    Local shards are read at the images only, others from beginning to end.
    """
    shards: dict[str, dict[str, Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.id):
        shards.setdefault(sample.shard, {})[sample.key] = sample
    for shard, wanted in shards.items():
        images = _local_images(shard, wanted) if Path(shard).is_file() else _streamed_images(shard, wanted)
        yield from (replace(wanted[key], image=image) for key, image in images)


def _local_images(shard: str, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    with open_regular(shard) as file:
        status = os.fstat(file.fileno())
        ranges = image_ranges(shard, status.st_mtime_ns, status.st_size)
        for key in keys:
            if key in ranges:
                start, size = ranges[key]
                file.seek(start)
                yield key, file.read(size)


def _streamed_images(shard: str, keys: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    missing = set(keys)
    for sample in iter_samples([shard], need_text=False, on_bad=lambda bad: None):
        for row in sample.each_image():
            if row.key in missing:
                missing.discard(row.key)
                yield row.key, row.image
        if not missing:
            return


def class_templates(dataset: Dataset) -> Templates:
    """The dataset's own prompt templates, or the default."""
    return dataset.templates if dataset.templates is not None else DEFAULT_TEMPLATES


def _find(spec: str | Path | Sequence[str]) -> tuple[list[str], Path | None]:
    """The shards, and the folder that may hold class names and templates."""
    if isinstance(spec, str | Path) and Path(spec).is_dir():
        home = Path(spec)
        return expand(_folder_shards(home, TEST)), home
    shards = expand(str(spec) if isinstance(spec, Path) else spec)
    folders = {str(Path(shard).parent) for shard in shards}
    folder = Path(folders.pop()) if len(folders) == 1 and "://" not in shards[0] else None
    if folder is not None and folder.name == TEST and not (folder / CLASSNAMES_FILE).is_file():
        folder = folder.parent
    return shards, folder


def _beside(home: Path | None, file: str, language: str | None) -> Path | None:
    """The file beside the shards, in the given language if any; None where it is missing.

    Raises:
        UserError: the file of that language is missing.
    """
    if language is not None:
        file = f"{Path(file).stem}.{language}.txt"
    if home is not None and (home / file).is_file():
        return home / file
    if language is not None:
        raise UserError(f"no {file} in {home or 'the folder of the shards'} for language {language!r}; write it there")
    return None


def _folder_shards(home: Path, split: str) -> list[str]:
    count = home / split / "nshards.txt"
    if count.is_file():
        text = count.read_text(encoding="utf-8").strip()
        if not text.isdecimal() or int(text) < 1:
            raise UserError(f"{count} must hold the number of shards, found {text[:40]!r}")
        return [str(home / split / f"{number}.tar") for number in range(int(text))]
    for pattern in _patterns(split):
        shards = sorted(home.glob(pattern))
        if shards:
            return [str(shard) for shard in shards]
    raise UserError(
        f"no dataset in {home}: neither {' nor '.join(_patterns(split))} exists; "
        f"give a pattern of shards, such as {home}/*.tar, or a folder with a folder of images per class"
    )


def _train_shards(spec: str | Path | Sequence[str]) -> tuple[str, ...] | None:
    if not (isinstance(spec, str | Path) and Path(spec).is_dir() and _is_dataset(Path(spec), "train")):
        return None
    if not any(any(Path(spec).glob(pattern)) for pattern in _patterns("train")):
        return None  # train/nshards.txt alone: the shards were not downloaded
    return tuple(expand(_folder_shards(Path(spec), "train")))


def _patterns(split: str) -> tuple[str, ...]:
    """Patterns of the shards of a split in a folder; `val` stands in for a missing `test`."""
    return (f"{split}/*.tar", f"{split}-*.tar", *(["val-*.tar"] if split == "test" else []))


def _is_dataset(folder: Path, split: str) -> bool:
    return any(any(folder.glob(pattern)) for pattern in (f"{split}/nshards.txt", *_patterns(split)))


def _kind(home: Path | None) -> Kind:
    if home is None or not (home / KIND_FILE).is_file():
        return "classification"
    word = (home / KIND_FILE).read_text(encoding="utf-8").strip().lower()
    known: dict[str, Kind] = {
        "classification": "classification",
        "multilabel": "multilabel",
        "retrieval": "retrieval",
    }
    if word not in known:
        raise UserError(f"{home / KIND_FILE} says {word!r}; it must be one of {', '.join(known)}")
    return known[word]


def _name(spec: str | Path | Sequence[str], shards: Sequence[str]) -> str:
    """The folder's name; for a pattern also the common part of the shards' names: `emoji-val-unseen-style`."""
    if isinstance(spec, str | Path) and Path(spec).is_dir():
        return Path(spec).resolve().name
    stems = [Path(shard).name.removesuffix(".tar").rstrip("0123456789-_.") for shard in shards]
    parts = (Path(shards[0]).parent.name, stems[0] if len(set(stems)) == 1 else "")
    return "-".join(part for part in parts if part) or "data"
