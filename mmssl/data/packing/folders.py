"""Folders of images with their captions beside them."""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.records import (
    MANIFEST,
    Fields,
    RecordError,
    Records,
    as_text,
    captions_as_fields,
    read_file,
    record_key,
)
from mmssl.data.shards import IMAGES, image_ranges
from mmssl.data.shards.account import Account
from mmssl.data.shards.urls import ARCHIVES
from mmssl.errors import UserError

_TEXTS = ("txt", "caption")
"""Extensions of captions, in order of preference."""
_SIDECARS = (*_TEXTS, "json")
_JUNK_FOLDERS = {"__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "lost+found"}
_JUNK_HIDDEN = {".git", ".svn", ".hg", ".ipynb_checkpoints", ".cache", ".thumbnails", ".venv"}
_DOCUMENTS = ("readme", "license", "licence", "changelog", "requirements", "notice", "copying", "classes", "labels")
"""Beginnings of the names of texts that are no captions."""
_CONVERT = "convert them to JPEG or PNG, for example with ImageMagick: magick mogrify -format jpg *.{0}"


@dataclass(frozen=True)
class _ImageFile:
    """One image of a folder, with paths relative to the folder."""

    path: str
    texts: tuple[tuple[str, str], ...]
    """Extension and path of each caption or JSON file beside it."""


@dataclass
class _Listing:
    """The content of a folder."""

    images: list[_ImageFile] = field(default_factory=list)
    defects: list[tuple[str, RecordError]] = field(default_factory=list)
    """Place and error of what looks like a pair and is none."""
    stamps: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, size and time of change of every image and caption."""


class FolderRecords(Records):
    """Images anywhere below a folder, each with NAME.txt or NAME.json next to it.

    Linked folders are followed. Hidden files and those of file managers are no pairs.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: no image below the folder can be used.
        """
        self._folder = folder
        found = _list(folder)
        self._images = sorted(found.images, key=lambda image: Path(image.path).parts)
        self._defects = sorted(found.defects, key=lambda defect: defect[0])
        self._stamps = sorted(found.stamps)
        if not self._images:
            account = Account()
            for place, error in self._defects:
                account.leave_out(error.cause, f"{place} ({error})", remedy=error.remedy)
            lost = f"; {'; '.join(account.causes())}" if self._defects else ""
            raise UserError(f"{folder} contains no images; the extensions are {', '.join(IMAGES)}{lost}")

    def keys(self) -> list[str]:
        return _unique_keys([image.path for image in self._images])

    def defects(self) -> list[tuple[str, RecordError]]:
        return self._defects

    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for stamp in self._stamps:
            digest.update(repr(stamp).encode())
        return digest.hexdigest()

    def load(self, number: int) -> tuple[bytes, Fields]:
        image = self._images[number]
        beside = {extension: self._folder / path for extension, path in reversed(image.texts)}
        fields = _read_json(beside["json"]) if "json" in beside else {}
        text = next((beside[extension] for extension in _TEXTS if extension in beside), None)
        if text is not None:
            fields["txt"] = as_text(read_file(text), text.name)
        else:
            found = values.caption_field(fields)
            if found is None:
                stem = Path(image.path).stem
                names = f"{stem}.txt and a caption in {stem}.json are both missing"
                raise RecordError("no caption", names, "write the caption of NAME.jpg to NAME.txt")
            fields |= captions_as_fields(values.captions(fields[found]), found)
        return read_file(self._folder / image.path), fields


def holds_pairs(folder: Path) -> bool:
    """True if an image with a caption beside it lies in the folder itself."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    split = [(stem, last.lower()) for stem, _, last in (name.rpartition(".") for name in names)]
    texts = {stem for stem, last in split if last in _SIDECARS}
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


def _list(folder: Path) -> _Listing:
    """Everything below a folder that is a pair, or looks like one."""
    found = _Listing()
    for place, files in _walk(folder, found.defects):
        names: dict[str, list[tuple[str, os.DirEntry[str]]]] = {}
        is_packed = any(entry.name == MANIFEST for entry in files)
        for entry in files:
            stem, dot, extension = entry.name.rpartition(".")
            if dot and stem and not entry.name.startswith("._"):
                names.setdefault(stem, []).append((extension.lower(), entry))
            if entry.name.lower().endswith(ARCHIVES) and not is_packed:
                found.defects += _samples_of(folder, f"{place}{entry.name}")
        _add_folder(found, place, names)
    return found


def _add_folder(found: _Listing, place: str, names: dict[str, list[tuple[str, os.DirEntry[str]]]]) -> None:
    """Add the files of one folder, grouped by their names without extension."""
    lonely: list[str] = []
    before = len(found.images)
    for stem, members in names.items():
        members.sort(key=lambda member: member[1].name)
        texts = tuple((extension, f"{place}{entry.name}") for extension, entry in members if extension in _SIDECARS)
        others = [member for member in members if member[0] not in _SIDECARS]
        hidden = stem.startswith(".") or any(part.startswith(".") for part in place.split("/"))
        for extension, entry in others:
            _add_file(found, f"{place}{entry.name}", extension, entry, texts, hidden)
        if not others and not hidden and any(extension in _TEXTS for extension, _ in texts):
            lonely.append(texts[0][1])
        if any(extension in IMAGES for extension, _ in others):
            found.stamps += (_stamp(path, entry) for (_, path), (_, entry) in _sidecars(texts, members))
    if len(found.images) > before:
        for path in lonely:
            if not Path(path).name.lower().startswith(_DOCUMENTS):
                remedy = "put the image beside its caption, under the same name"
                found.defects.append((path, RecordError("no image beside the caption", remedy=remedy)))


def _sidecars(
    texts: tuple[tuple[str, str], ...], members: list[tuple[str, os.DirEntry[str]]]
) -> Iterator[tuple[tuple[str, str], tuple[str, os.DirEntry[str]]]]:
    return zip(texts, [member for member in members if member[0] in _SIDECARS], strict=True)


def _add_file(
    found: _Listing,
    path: str,
    extension: str,
    entry: os.DirEntry[str],
    texts: tuple[tuple[str, str], ...],
    hidden: bool,
) -> None:
    """Add an image, or what looks like one because a text of its name lies beside it."""
    if extension in IMAGES and not hidden:
        stamp = _stamp(path, entry)
        if stamp[1] < 0:
            error = RecordError("the link leads to no file", str(Path(entry.path).readlink()), "restore the file")
            found.defects.append((path, error))
            return
        found.images.append(_ImageFile(path, texts))
        found.stamps.append(stamp)
    elif texts and hidden and extension in IMAGES:
        remedy = "rename it, without a dot in front"
        found.defects.append((path, RecordError("the file or its folder is hidden", remedy=remedy)))
    elif texts and not hidden and not entry.name.lower().endswith(ARCHIVES):
        cause = f".{extension} files beside a caption are not read as images"
        found.defects.append((path, RecordError(cause, remedy=_CONVERT.format(extension))))


def _stamp(path: str, entry: os.DirEntry[str]) -> tuple[str, int, int]:
    """Path, size and time of change of a file; a size of -1 for a link that leads nowhere."""
    try:
        status = entry.stat()
    except OSError:
        return path, -1, 0
    return path, status.st_size, status.st_mtime_ns


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


def _walk(folder: Path, defects: list[tuple[str, RecordError]]) -> Iterator[tuple[str, list["os.DirEntry[str]"]]]:
    """Each folder below a folder once, as its relative path with a slash behind it and its files.

    Linked folders come last, and each real folder counts once, so that circles of links end.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque[str]()
    while folders or links:
        place = folders.popleft() if folders else links.popleft()
        files: list[os.DirEntry[str]] = []
        try:
            status = (folder / place).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder / place) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.is_dir():
                        files.append(entry)
                    elif entry.name not in _JUNK_FOLDERS and entry.name not in _JUNK_HIDDEN:
                        (links if entry.is_symlink() else folders).append(f"{place}{entry.name}/")
        except OSError as error:
            reason = error.strerror or str(error)
            defects.append((place, RecordError("a folder cannot be read", f"{place}: {reason}", "allow reading it")))
        yield place, files
