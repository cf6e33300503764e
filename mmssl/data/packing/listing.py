"""The content of a folder: images with the captions beside them, and whatever else seems to offer pairs."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmssl.data.packing.records import MANIFEST, Defects, RecordError
from mmssl.data.shards import IMAGES
from mmssl.data.shards.account import CLOSED, UNOPENED
from mmssl.data.shards.joining import CAPTION_NAMES, spelling
from mmssl.data.shards.urls import ARCHIVES, table_suffix

TEXTS = ("txt", "caption")
"""Extensions of captions, in order of preference."""
SIDECARS = (*TEXTS, "json")
_NUMBER = re.compile(r"\d{1,4}")
_NUMBERED = re.compile(r"\.\d{1,4}(\.[^./]+)$")
"""The end of the path of one of several images."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables of Hugging Face's ImageFolder, beside their images."""
_JUNK_FOLDERS = {"__MACOSX", "@eaDir", "__pycache__", "$RECYCLE.BIN", "lost+found"}
_JUNK_HIDDEN = {".git", ".svn", ".hg", ".ipynb_checkpoints", ".cache", ".thumbnails", ".venv"}
_DOCUMENTS = ("readme", "license", "licence", "changelog", "requirements", "notice", "copying", "classes", "labels")
"""Beginnings of the names of texts that are no captions."""
_CONTAINERS = ("zip", "7z", "rar", "xlsx", "xls", "ods", "sqlite", "sqlite3", "pkl", "pickle", "feather")
"""Extensions of archives and tables that are not read. Others, such as embeddings and weights, hold no pairs."""
_CONVERT = "convert them to JPEG or PNG, for example with ImageMagick: magick mogrify -format jpg *.{0}"
_REPORTED = 1_000
"""Files between two reports of progress."""

Progress = Callable[[int], None]
"""Called with the number of files, or of rows of a table, that are read so far."""


@dataclass(frozen=True)
class ImageFile:
    """One image of a folder, with paths relative to the folder."""

    path: str
    texts: tuple[tuple[str, str], ...]
    """Extension and path of each caption or JSON file beside it."""
    more: tuple[str, ...] = ()
    """Further images of the same name: NAME.1.jpg beside NAME.0.jpg."""
    captions: tuple[str, ...] = ()
    """Numbered captions: NAME.0.txt, NAME.1.txt."""

    @property
    def name(self) -> str:
        """The path that gives its key: without the number of the first of several images."""
        return _NUMBERED.sub(r"\1", self.path) if self.more else self.path


@dataclass
class Listing:
    """The content of a folder, with paths relative to it."""

    images: list[ImageFile] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    """Tars, compressed or not; beside images without the shards that `pack` wrote."""
    tables: list[str] = field(default_factory=list)
    """Files with the extension of a table that are no caption of an image."""
    defects: Defects = field(default_factory=list)
    """Place and error of what looks like a pair and is none."""
    alone: dict[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """Extension and path of the texts of each name without an image beside them; by path without extension."""
    stamps: list[tuple[str, int, int]] = field(default_factory=list)
    """Path, size and time of change of every image and caption."""

    def pair(self) -> ImageFile | None:
        """An image with a caption beside it, if there is one."""
        return next((image for image in self.images if image.texts), None)

    def metadata(self) -> list[str]:
        """Tables that describe the images beside them."""
        return [path for name in _METADATA for path in self.tables if path.rpartition("/")[2].lower() == name]


@dataclass
class _Name:
    """The files of one name in one folder, by their lower-case extensions."""

    images: list[tuple[str, os.DirEntry[str]]] = field(default_factory=list)
    """Images, and other files that are neither texts nor archives."""
    texts: list[tuple[str, os.DirEntry[str]]] = field(default_factory=list)
    more: list[os.DirEntry[str]] = field(default_factory=list)
    """Further numbered images."""
    captions: list[os.DirEntry[str]] = field(default_factory=list)
    """Numbered captions."""


def list_folder(folder: Path, progress: Progress | None = None) -> Listing:
    """Everything below a folder that is a pair, or looks like one. Linked folders are followed.

    A caption belongs to the image with its name, also if it is called NAME.jpg.txt, or if the names differ in case or
    in the form of their accents, or if both are alone in a folder and it is called caption.txt or the like.
    """
    found, count = Listing(), 0
    packed: list[str] = []
    for place, files in _walk(folder, found.defects):
        names: dict[str, _Name] = {}
        is_packed = any(entry.name == MANIFEST for entry in files)
        for entry in files:
            stem, dot, extension = entry.name.rpartition(".")
            if entry.name.lower().endswith(ARCHIVES) and not entry.name.startswith("._"):
                (packed if is_packed else found.archives).append(f"{place}{entry.name}")
            elif dot and stem and not entry.name.startswith("._"):
                name = names.setdefault(stem, _Name())
                (name.texts if extension.lower() in SIDECARS else name.images).append((extension.lower(), entry))
            count += 1
            if progress is not None and count % _REPORTED == 0:
                progress(count)
        _join_numbers(names)
        _join_names(names)
        _add_folder(found, place, names)
    if not found.images:  # else they were packed from these images
        found.archives = sorted([*found.archives, *packed])
    return found


def _join_numbers(names: dict[str, _Name]) -> None:
    """Join NAME.0.jpg and NAME.1.jpg with NAME.txt or NAME.json, and NAME.0.txt and NAME.1.txt with NAME.jpg."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    for stem in names:
        base, _, number = stem.rpartition(".")
        if base in names and _NUMBER.fullmatch(number):
            numbered.setdefault(base, []).append((int(number), stem))
    for base, found in numbered.items():
        owner, parts = names[base], [(stem, names[stem]) for _, stem in sorted(found)]
        if owner.texts and not owner.images:
            joined = [(stem, name.images[0]) for stem, name in parts if _is_one_image(name)]
            owner.images, owner.more = [member for _, member in joined[:1]], [entry for _, (_, entry) in joined[1:]]
        elif owner.images and not any(extension in TEXTS for extension, _ in owner.texts):
            joined = [(stem, name.texts[0]) for stem, name in parts if not name.images and name.texts[0][0] in TEXTS]
            owner.captions = [entry for _, (_, entry) in joined]
        else:
            continue
        for stem, _ in joined:
            del names[stem]


def _is_one_image(name: _Name) -> bool:
    return not name.texts and len(name.images) == 1 and name.images[0][0] in IMAGES


def _join_names(names: dict[str, _Name]) -> None:
    """Give texts whose name is not exactly that of an image to the image that they belong to."""
    images = {stem: name for stem, name in names.items() if any(extension in IMAGES for extension, _ in name.images)}
    alone = {stem: name for stem, name in names.items() if not name.images}
    waiting = {stem: name for stem, name in images.items() if not name.texts}
    if not alone or not waiting:
        return
    files = {entry.name: stem for stem, name in waiting.items() for _, entry in name.images}
    spellings: dict[str, list[str]] = {}
    for stem in waiting:
        spellings.setdefault(spelling(stem), []).append(stem)
    for stem, name in alone.items():
        exact, alike = files.get(stem), spellings.get(spelling(stem), [])
        lone = len(images) == len(alone) == len(waiting) == 1 and stem.lower() in CAPTION_NAMES
        owner = exact or (alike[0] if len(alike) == 1 else None) or (next(iter(waiting)) if lone else None)
        if owner is not None and not waiting[owner].texts:
            waiting[owner].texts = name.texts
            del names[stem]


def _add_folder(found: Listing, place: str, names: dict[str, _Name]) -> None:
    """Add the files of one folder."""
    lonely: list[str] = []
    before = len(found.images)
    for stem, name in names.items():
        name.texts.sort(key=lambda member: member[1].name)
        name.images.sort(key=lambda member: member[1].name)
        texts = tuple((extension, f"{place}{entry.name}") for extension, entry in name.texts)
        hidden = stem.startswith(".") or any(part.startswith(".") for part in place.split("/"))
        first = len(found.images)
        for extension, entry in name.images:
            _add_file(found, f"{place}{entry.name}", extension, entry, texts, hidden)
        if name.more or name.captions:
            more, captions = (tuple(f"{place}{entry.name}" for entry in part) for part in (name.more, name.captions))
            found.images[first:] = [replace(image, more=more, captions=captions) for image in found.images[first:]]
            found.stamps += (_stamp(f"{place}{entry.name}", entry) for entry in (*name.more, *name.captions))
        if any(extension in IMAGES for extension, _ in name.images):
            found.stamps += (_stamp(f"{place}{entry.name}", entry) for _, entry in name.texts)
        elif not name.images and not hidden:
            found.tables += (path for _, path in texts if table_suffix(path))
            lonely += [path for extension, path in texts if extension in TEXTS][:1]
            found.alone[f"{place}{stem}"] = texts
    if len(found.images) > before:
        for path in lonely:
            if not Path(path).name.lower().startswith(_DOCUMENTS):
                remedy = "put the image beside its caption, under the same name"
                found.defects.append((path, RecordError("no image beside the caption", remedy=remedy)))


def _add_file(
    found: Listing,
    path: str,
    extension: str,
    entry: os.DirEntry[str],
    texts: tuple[tuple[str, str], ...],
    hidden: bool,
) -> None:
    """Add an image, a table, or what looks like an image because a text of its name lies beside it."""
    if extension in IMAGES and not hidden:
        stamp = _stamp(path, entry)
        if stamp[1] < 0:
            error = RecordError("the link leads to no file", str(Path(entry.path).readlink()), "restore the file")
            found.defects.append((path, error))
            return
        found.images.append(ImageFile(path, texts))
        found.stamps.append(stamp)
    elif not hidden and table_suffix(entry.name) is not None:
        found.tables.append(path)
    elif not hidden and extension in _CONTAINERS:
        remedy = "unpack it, or save its table as CSV in UTF-8"
        found.defects.append((path, RecordError(UNOPENED, f".{extension}", remedy)))
    elif texts and hidden and extension in IMAGES:
        remedy = "rename it, without a dot in front"
        found.defects.append((path, RecordError("the file or its folder is hidden", remedy=remedy)))
    elif texts and not hidden:
        cause = f".{extension} files beside a caption are not read as images"
        found.defects.append((path, RecordError(cause, remedy=_CONVERT.format(extension))))


def _stamp(path: str, entry: os.DirEntry[str]) -> tuple[str, int, int]:
    """Path, size and time of change of a file; a size of -1 for a link that leads nowhere."""
    try:
        status = entry.stat()
    except OSError:
        return path, -1, 0
    return path, status.st_size, status.st_mtime_ns


def _walk(folder: Path, defects: Defects) -> Iterator[tuple[str, list["os.DirEntry[str]"]]]:
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
            defects.append((place, RecordError(CLOSED, f"{place}: {reason}", "allow reading it")))
        yield place, files
