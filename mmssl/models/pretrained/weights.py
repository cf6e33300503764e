"""Reading weights from files, and saying what of them fits."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl.errors import UserError


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file or a torch file (tensors only: nothing in it can run).

    Raises:
        UserError: no weights can be read from the file.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} holds no weights that can be read safely: {one_line(error)}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict (names -> tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a whole state dict; a classifier head in it is allowed to be left over.

    Raises:
        UserError: weights are missing, or have another shape; names the first ones.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state]
    shapes = [
        f"{k} {tuple(state[k].shape)} against {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or shapes:
        raise UserError(
            f"{where} does not fit the tower: {len(own) - len(missing) - len(shapes)} of {len(own)} weights match; "
            f"missing: {', '.join(missing[:3]) or 'none'}; other shape: {', '.join(shapes[:2]) or 'none'}"
        )
    module.load_state_dict({k: state[k] for k in own})


def one_line(error: BaseException) -> str:
    """An error of a library, cut to one line."""
    return " ".join(str(error).split())[:300]
