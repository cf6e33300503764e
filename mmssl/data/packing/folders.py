"""Folders of images with their captions beside them."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.columns import field_values, listed
from mmssl.data.packing.listing import SIDECARS, TEXTS, ImageFile, Listing, list_folder
from mmssl.data.packing.records import (
    Defects,
    Fields,
    Images,
    RecordError,
    Records,
    as_text,
    captions_as_fields,
    read_file,
    record_key,
)
from mmssl.data.shards import IMAGES, image_ranges
from mmssl.data.shards.account import Account
from mmssl.data.shards.joining import match_names
from mmssl.errors import UserError
from mmssl.types import CAPTION_FIELDS

_TRIED = 20
"""Texts of other folders that are read to tell whether they are captions."""
_FOLDER = "folder"
"""Field of every image: the first folder of its path, such as `train` of `train/cats/1.jpg`."""


class FolderRecords(Records):
    """Images anywhere below a folder, each with NAME.txt or NAME.json next to it.

    Linked folders are followed. Hidden files and those of file managers are no pairs.
    """

    def __init__(self, folder: Path, listing: Listing | None = None, need_captions: bool = True) -> None:
        """
        Args:
            listing: the content of the folder, if it is known.
            need_captions: refuse images without a caption. False: their caption is empty.

        Raises:
            UserError: no image below the folder can be used.
        """
        self._folder = folder
        self._need_captions = need_captions
        found = listing or list_folder(folder)
        self._images = sorted(found.images, key=lambda image: image.path.split("/"))
        samples = (defect for path in found.archives for defect in _samples_of(folder, path))
        self._defects = sorted([*found.defects, *samples], key=lambda defect: defect[0])
        self._stamps = sorted(found.stamps)
        if not self._images:
            account = Account()
            for place, error in self._defects:
                account.leave_out(error.cause, f"{place} ({error})", remedy=error.remedy)
            lost = f"; {'; '.join(account.causes())}" if self._defects else ""
            raise UserError(f"{folder} contains no images; the extensions are {', '.join(IMAGES)}{lost}")

    def keys(self) -> list[str]:
        return _unique_keys([image.name for image in self._images])

    def defects(self) -> Defects:
        return [*self._defects, *self.beside]

    def values(self, field: str) -> list[Any]:
        return field_values(str(self._folder), field, map(self._fields, self._images))

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for stamp in self._stamps:
            digest.update(repr(stamp).encode())
        return digest.hexdigest()

    def load(self, number: int) -> tuple[Images, Fields]:
        image = self._images[number]
        beside = {extension: self._folder / path for extension, path in reversed(image.texts)}
        fields = _read_json(beside["json"]) if "json" in beside else {}
        text = next((beside[extension] for extension in TEXTS if extension in beside), None)
        if text is not None:
            fields["txt"] = as_text(read_file(text), text.name)
        elif image.captions:
            paths = [self._folder / path for path in image.captions]
            fields |= captions_as_fields([as_text(read_file(path), path.name) for path in paths], "captions")
        else:
            found = values.caption_field(fields)
            if found is None and not self._need_captions:
                return (read_file(self._folder / image.path),), {**fields, "txt": ""}
            if found is None:
                stem = Path(image.path).stem
                names = f"{stem}.txt and a caption in {stem}.json are both missing"
                if fields:
                    names = f"{stem}.json has {listed(list(fields))}, none of {', '.join(CAPTION_FIELDS)}"
                raise RecordError("no caption", names, "write the caption of NAME.jpg to NAME.txt")
            fields |= captions_as_fields(values.captions(fields[found]), found)
        return tuple(read_file(self._folder / path) for path in (image.path, *image.more)), fields

    def _fields(self, image: ImageFile) -> Mapping[str, Any]:
        """The fields of an image's .json, if there is one that can be read, and the name of its first folder."""
        first, slash, _ = image.path.partition("/")
        fields: dict[str, Any] = {_FOLDER: first} if slash else {}
        for extension, path in image.texts:
            if extension == "json":
                with suppress(RecordError):  # `load` names it
                    fields |= _read_json(self._folder / path)
        return fields


def join_apart(folder: Path, found: Listing) -> None:
    """Give texts in other folders to the images with their names, as with `images/1.jpg` and `captions/1.txt`.

    Where a name has several images or texts, nothing is joined; neither where most texts are no words, such as boxes.
    """
    names = list(found.alone)
    images = {number: os.path.splitext(image.path)[0] for number, image in enumerate(found.images)}  # noqa: PTH122
    matches = [(image, names[text]) for image, text, _ in match_names(images, dict(enumerate(names)))]
    tried = [_holds_words(folder, found.alone[name]) for _, name in matches[:_TRIED]]
    if 2 * sum(tried) <= len(tried):
        return
    for image, name in matches:
        texts = found.alone.pop(name)
        found.images[image] = dataclasses.replace(found.images[image], texts=texts)
        found.stamps += ((path, (status := (folder / path).stat()).st_size, status.st_mtime_ns) for _, path in texts)
    used = {path for image, _ in matches for _, path in found.images[image].texts}
    found.tables = [path for path in found.tables if path not in used]
    found.defects = [(place, error) for place, error in found.defects if place not in used]


def _holds_words(folder: Path, texts: Sequence[tuple[str, str]]) -> bool:
    """True if a file holds words, rather than numbers."""
    extension, path = texts[0]
    with suppress(RecordError):
        if extension == "json":
            return values.is_caption(_read_json(folder / path))
        return values.is_caption(as_text(read_file(folder / path), path))
    return False


def _samples_of(folder: Path, path: str) -> Iterator[tuple[str, RecordError]]:
    """One defect per sample of an archive that lies among the images; one for an archive that cannot be read."""
    error = RecordError(
        "a shard lies among the images", path, "pack it by itself: mmssl shards pack SHARD.tar --out FOLDER"
    )
    shard = folder / path
    status = shard.stat()
    keys = image_ranges(str(shard), status.st_mtime_ns, status.st_size) if path.lower().endswith(".tar") else {}
    yield from ((f"{path}:{key}", error) for key in keys)
    if not keys:
        yield path, error


def holds_pairs(folder: Path) -> bool:
    """True if an image with a caption beside it lies in the folder itself."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    split = [(stem, last.lower()) for stem, _, last in (name.rpartition(".") for name in names)]
    texts = {stem for stem, last in split if last in SIDECARS}
    return any(last in IMAGES and stem in texts for stem, last in split)


def _unique_keys(paths: Sequence[str]) -> list[str]:
    """Keys of files, equal for equal names without extension. Names that differ only in dots get keys of their own."""
    keys: dict[str, str] = {}
    used: set[str] = set()
    for path in paths:
        stem = os.path.splitext(path)[0]  # noqa: PTH122
        if stem not in keys:
            key = record_key(stem)
            numbered = (f"{key}_{number}" for number in itertools.count(2))
            keys[stem] = next(name for name in itertools.chain([key], numbered) if name not in used)
            used.add(keys[stem])
    return [keys[os.path.splitext(path)[0]] for path in paths]  # noqa: PTH122


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("the .json is damaged", f"{path.name}: {error}", "write valid JSON") from None
    if not isinstance(tree, dict):
        raise RecordError("the .json is not a JSON object", path.name, "write {...} with a caption")
    return tree
