"""Export of a model: write the files, check them with the library that reads them, describe and upload them."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmssl.apps.export.formats import find_format, format_names
from mmssl.errors import UserError
from mmssl.inference import Model

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


def export(model: Model, kind: str, out: Path, **options: Any) -> Exported:
    """Write a model for another library, load it with that library, and compare the features.

    Args:
        kind: one of `format_names()`, or the dotted path of a module of your own.
        out: a folder that is empty or does not exist.
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
        _write_card(model, kind, form.usage(out.name), out)
        difference = form.difference(model, out)
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
            f"features that {form.LABEL} computes differ by {difference:.2g}, so nothing was written; report this model"
        )
    return Exported(out, difference, form.usage(str(out)))


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

Vision tower: {vision.name}. Text tower: {model.text.encoder.config.model_type}. {model.config.embed_dim} dimensions.
Weights: {"; ".join(model.notes) or "trained with mmssl"}.

Licence: mmssl {version("mmssl")}, which wrote these files, is under Apache-2.0. The weights are under the terms of
whoever trained them and of the weights they were trained from: say here which.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _empty(out: Path, created: bool) -> None:
    """Remove the files that were written into an empty folder."""
    for path in out.iterdir() if out.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    if created and out.exists():
        out.rmdir()
