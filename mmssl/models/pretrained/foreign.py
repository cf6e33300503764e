"""Folders from elsewhere: read without a network or questions, in no more memory than their weights need."""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from mmssl.errors import UserError, one_line, panics_as_user_errors
from mmssl.system import without_network

_FACTORIES = frozenset(
    (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace, torch.eye)
)
"""Functions that make a tensor of a given size."""
_SPARE_ELEMENTS, _SPARE_TENSORS = 1 << 24, 20_000
"""Elements and tensors beside the weights: buffers, initial values, and a probe of the tower."""
_COPIES = 4
"""Times that the weights may be made: random, loaded, converted."""
_CONFIGS = ("config.json", "open_clip_config.json")
_DEPTH = re.compile(r"layer|depth|block|stage")
"""Keys of a configuration that count layers. Libraries make lists of so many entries before the first layer."""
_MAX_DEPTH = 10_000
_MAX_FILES = 10_000
_MAX_JSON = 256 << 20
"""Bytes of a JSON file: tokenizers of 250,000 words have 20 MB."""
_WEIGHTS = (".bin", ".pt", ".pth", ".npz", ".ckpt", ".h5", ".msgpack")


@contextmanager
def reading(folder: Path, kind: str = "model") -> Iterator[None]:
    """Read a model or tokenizer folder with other libraries inside the block.

    The block cannot reach the network or ask a question, and cannot build more than the weights in the folder need.

    Args:
        kind: word for the folder in messages.

    Raises:
        UserError: the folder tries one of these, or a library raises any error.
    """
    try:
        elements, tensors = _weights(folder)
        for name in _CONFIGS:
            if (folder / name).is_file():
                _check_depth(folder / name, read_json(folder / name))
        budget = _Budget(folder, _COPIES * elements + _SPARE_ELEMENTS, _COPIES * tensors + _SPARE_TENSORS)
        closed = without_network(f"{folder} needs the network, which a folder may not use")
        with closed, _hub_offline(), budget, panics_as_user_errors(f"{folder} is not a usable {kind}"):
            yield
    except UserError:
        raise
    except Exception as error:  # libraries raise any kind on damaged folders
        reason = one_line(error) or "no reason given"
        raise UserError(f"{folder} is not a usable {kind}: {type(error).__name__}: {reason}") from error


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Files that a folder names on the hub are taken from the cache or not at all, without attempts to fetch them."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def read_json(path: Path) -> Any:
    """The content of a JSON file of a folder from elsewhere.

    Raises:
        UserError: it cannot be read, is too large, or is no JSON.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise UserError(f"{path} has more than {_MAX_JSON >> 20} MiB; it is no file of a model")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None


def _weights(folder: Path) -> tuple[int, int]:
    """Elements and tensors in the weights of a folder. No file of it may block a reader, or be too large to parse.

    Raises:
        UserError: a file is a named pipe, a socket or a device, a JSON file is too large, or a header is damaged.
    """
    elements, tensors = 0, 0
    for count, path in enumerate(_files(folder)):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; remove it")
        if count > _MAX_FILES:
            raise UserError(f"{folder} has more than {_MAX_FILES:,} files; give the folder of the model alone")
        if path.suffix == ".json" and status.st_size > _MAX_JSON:
            raise UserError(f"{path} has more than {_MAX_JSON >> 20} MiB; it is no file of a model")
        if path.suffix == ".safetensors":
            more, names = _header(path)
            elements, tensors = elements + more, tensors + names
        elif path.suffix in _WEIGHTS:
            elements += status.st_size  # at least one byte each
    return elements, tensors


def _check_depth(path: Path, tree: Any) -> None:
    """Raises UserError if a configuration names more layers than any model has."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        if isinstance(value, int) and value > _MAX_DEPTH and _DEPTH.search(str(key)):
            raise UserError(f"{path}: {key} is {value:,}; no model has so many layers")
        _check_depth(path, value)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(place) / name for name in sorted(files))


def _header(path: Path) -> tuple[int, int]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return sum(_product(file.get_slice(name).get_shape()) for name in names), len(names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} has no readable weights: {one_line(error)}; copy it again") from None


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Budget(TorchFunctionMode):
    """Refuses tensors beyond a number of elements and of tensors, before they take memory."""

    def __init__(self, folder: Path, elements: int, tensors: int) -> None:
        super().__init__()
        self._folder, self._elements, self._tensors = folder, elements, tensors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            self._elements -= func(*args, **{**kwargs, "device": "meta", "out": None, "pin_memory": False}).numel()
            self._tensors -= 1
            if self._elements < 0 or self._tensors < 0:
                raise UserError(
                    f"{self._folder} describes a far larger model than its weights are; its configuration and its "
                    "weights do not belong together"
                )
        return func(*args, **kwargs)
