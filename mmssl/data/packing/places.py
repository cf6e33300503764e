"""Where the images of a table lie: the folder to which its paths are relative, and the file that a cell names."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmssl.data.packing import values
from mmssl.data.packing.folders import holds_pairs
from mmssl.data.packing.records import RecordError, read_file
from mmssl.data.shards import IMAGES
from mmssl.data.shards.joining import spelling

_TWINS = {"jpg": ("jpg", "jpeg"), "jpeg": ("jpg", "jpeg"), "tif": ("tif", "tiff"), "tiff": ("tif", "tiff")}
"""Extension -> the ways in which it is written."""


class Places:
    """The folders in which the images of a table lie."""

    def __init__(self, folder: Path, sample: Mapping[str, Sequence[Any]], image: str) -> None:
        """
        Args:
            folder: the table's own.
            sample: column -> its values in the first rows.
            image: the image column.
        """
        self._own = folder
        self._names: dict[Path, dict[str, list[str]]] = {}
        self.folder, self.column = self._find_place(sample, image)
        """The folder to which paths are relative, and the column that names the folder of each image in it, or None.

        Paths are relative to the folder of the table, unless none of the first ones exists there. Then another column
        may name the folders, as in Karpathy's splits. Else most of them lie in the current folder, in a folder beside
        the table, in the folder above it, or in another folder of that, perhaps two folders deep.
        """

    def describe(self) -> str:
        """Words for messages; none if the images lie where the table does."""
        if self.column is not None:
            return f", images in {self.folder} in folders of column {self.column!r}"
        return f", images in {self.folder}" if self.folder != self._own else ""

    def path(self, cell: str, inner: Any) -> Path:
        """The path that a cell means. `inner`: the cell of `column`, if there is one."""
        place = self.folder / inner.strip() if isinstance(inner, str) else self.folder
        return place / values.image_path(cell, place)

    def find(self, cell: str, inner: Any) -> Path:
        """The file that a cell names, whether it exists or not.

        A missing one may be spelled otherwise: in another case or form of accents, or with an extension that ROCO and
        others leave out.

        Raises:
            RecordError: several files may be meant.
        """
        path = self.path(cell, inner)
        if _is_file(path):
            return path
        found = self._alike(path)
        if len(found) > 1:
            remedy = "write the name of the file as it is"
            raise RecordError("the path fits several files", f"{path}: {', '.join(found[:3])}", remedy)
        return path.parent / found[0] if found else path

    def read(self, cell: str, inner: Any) -> bytes:
        """The file that a cell names: looked for as in `find` only if its path cannot be read.

        Raises:
            RecordError: it cannot be read, or several files may be meant.
        """
        path = self.path(cell, inner)
        try:
            return read_file(path)
        except RecordError:
            found = self.find(cell, inner)
            if found == path:
                raise
            return read_file(found)

    def _alike(self, path: Path) -> list[str]:
        """Names of files that a path may mean, spelled otherwise."""
        listed = self._listed(path.parent)
        return [name for other in _spellings(path.name) for name in listed.get(other, ())]

    def _listed(self, folder: Path) -> dict[str, list[str]]:
        """Spelling -> names of the files of a folder, listed once: tables may miss thousands of files."""
        if folder not in self._names:
            names: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for name in sorted(entry.name for entry in entries if entry.is_file()):
                        names.setdefault(spelling(name), []).append(name)
            except (OSError, ValueError):  # none, or not to be read, or its name is no name
                names = {}
            self._names[folder] = names
        return self._names[folder]

    def _find_place(self, sample: Mapping[str, Sequence[Any]], image: str) -> tuple[Path, str | None]:
        """The folder and the column, from the first rows."""
        cells = {n: cell for n, cell in enumerate(sample[image]) if isinstance(cell, str) and not values.is_web(cell)}
        paths = {n: cell for n, cell in cells.items() if 0 < len(cell) <= values.LONGEST_PATH}
        bare = not any(map(values.is_image, paths.values()))  # names without extension
        if bare:
            paths = {n: cell for n, cell in paths.items() if _is_name(cell)}

        def exist(places: Mapping[int, Path]) -> Iterator[bool]:
            for n, place in places.items():
                path = place / values.image_path(paths[n], place)
                yield _is_file(path) or (bare and len(self._alike(path)) == 1)

        def most_in(places: Mapping[int, Path]) -> bool:
            return 2 * sum(exist(places)) > len(paths)

        if not paths or any(exist(dict.fromkeys(paths, self._own))):
            return self._own, None
        above = self._own.absolute().parent
        for base in (self._own, above):
            for name, folders in sample.items():
                inner = {n: base / folders[n].strip() for n in paths if name != image and _is_name(folders[n])}
                if most_in(inner):
                    return base, name
        for place in _candidates(self._own, above):
            if most_in(dict.fromkeys(paths, place)) and not self._is_another(place):
                return place, None
        return self._own, None

    def _is_another(self, place: Path) -> bool:
        """True for a folder elsewhere whose images have captions beside them: it is a dataset of its own."""
        return not place.absolute().is_relative_to(self._own.absolute()) and holds_pairs(place)


def _is_name(cell: Any) -> bool:
    """True for a cell that may be the name of a folder."""
    return isinstance(cell, str) and 0 < len(cell.strip()) <= 255 and "\n" not in cell


def _candidates(folder: Path, above: Path) -> Iterator[Path]:
    """Folders in which the images of a table may lie, besides its own; the likelier ones first."""
    yield Path.cwd()
    beside = _folders_in(folder)
    yield from beside
    yield above
    others = [place for place in _folders_in(above) if place != folder.absolute()]
    yield from others
    for place in (*beside, *others):
        yield from _folders_in(place)


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # none, or not to be read
        return []


def _spellings(name: str) -> list[str]:
    """Spellings of a name with the usual other forms of its extension, or with one that it lacks."""
    stem, _, extension = name.rpartition(".")
    if extension.lower() not in IMAGES:
        return [spelling(f"{name}.{other}") for other in IMAGES]
    return [spelling(f"{stem}.{other}") for other in _TWINS.get(extension.lower(), (extension,))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        return False
