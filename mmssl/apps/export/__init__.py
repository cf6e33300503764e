"""A trained model as files that other libraries open, each checked by that library on the way out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from mmssl.apps.export import to_onnx, to_open_clip, to_sentence_transformers, to_timm, to_transformers
from mmssl.apps.export.card import write_card
from mmssl.errors import UserError
from mmssl.inference import Model

__all__ = ["FORMATS", "TOLERANCE", "Exported", "Format", "export"]

TOLERANCE = 1e-5
"""Features of the library that reads the files may differ by so much from ours, in any entry of a unit vector."""


@dataclass(frozen=True)
class Format:
    """One kind of files."""

    problems: Callable[[Model], list[str]]
    """What of a model the format cannot hold, a few words each."""
    write: Callable[[Model, Path], None]
    """Write the files into a folder that exists."""
    difference: Callable[[Model, Path], float]
    """Load them with the other library and compare features: the largest absolute difference."""
    lines: Callable[[str], str]
    """Three lines of Python that load the folder."""


FORMATS = {
    "open_clip": Format(to_open_clip.problems, to_open_clip.write, to_open_clip.difference, to_open_clip.lines),
    "hf": Format(to_transformers.problems, to_transformers.write, to_transformers.difference, to_transformers.lines),
    "sentence-transformers": Format(
        to_sentence_transformers.problems,
        to_sentence_transformers.write,
        to_sentence_transformers.difference,
        to_sentence_transformers.lines,
    ),
    "onnx": Format(to_onnx.problems, to_onnx.write, to_onnx.difference, to_onnx.lines),
    "timm": Format(to_timm.problems, to_timm.write, to_timm.difference, to_timm.lines),
}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    difference: float
    """Largest difference between the other library's features and ours."""
    lines: str
    """Python that loads it."""


def export(model: Model, kind: str, out: Path) -> Exported:
    """Write a model in one of FORMATS, load it with the library that the format is for, and compare features.

    Raises:
        UserError: the format is unknown or cannot hold this model (nothing is written then), a package is missing, the
            folder is not empty or cannot be written, or the features differ by more than TOLERANCE.
    """
    if kind not in FORMATS:
        raise UserError(f"no export format {kind!r}; there are {', '.join(FORMATS)}")
    form = FORMATS[kind]
    problems = form.problems(model)
    if problems:
        able = [name for name, other in FORMATS.items() if name != kind and not other.problems(model)]
        others = f"; it can be written as {', '.join(able)}" if able else ""
        raise UserError(f"this model cannot be written as {kind}: {'; '.join(problems)}{others}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is no folder; choose another place")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        form.write(model, out.resolve())
        write_card(model, kind, form.lines(out.name), out)
        difference = form.difference(model, out)
    except BaseException as error:
        _empty(out, created)
        if isinstance(error, OSError | SafetensorError):
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"--out {out} cannot be written: {reason}; free some space, or pick another folder"
            ) from None
        raise
    if not difference <= TOLERANCE:
        _empty(out, created)
        raise UserError(f"as {kind} its features differ by {difference:.2g}, so nothing was written; report this model")
    return Exported(out, difference, form.lines(str(out)))


def _empty(out: Path, created: bool) -> None:
    """Take back what was written into a folder that was empty."""
    for path in out.iterdir() if out.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if created and out.exists():
        out.rmdir()
