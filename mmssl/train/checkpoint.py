"""Checkpoints: folders of safetensors and JSON with checksums, written under a temporary name and renamed.

A folder `checkpoints/step-000001000/` holds model.safetensors (towers, projections, objectives),
optimizer.safetensors, and state.json (step, position in the data, versions, checksums of the other files), which is
written last. A checkpoint holds no code.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.distributed import copy_into
from mmssl.errors import UserError, one_line
from mmssl.files import atomic_write, remove, sha256, sync

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors")


_RENAMED = {
    "objectives.captioning.picture.": "objectives.captioning.image.",
    "objectives.moco.queue_picture": "objectives.moco.queue_paired_image",
}
"""Parts of weights' names in checkpoints of version 0.1.0 -> current names."""
KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seconds": (int, float),
    "sha256": dict,
    "skipped": list,
    "best": (list, type(None)),
    "alarms": list,
    "micro_batch": (int, type(None)),
    "stream": dict,
    "scaler": (dict, type(None)),
    "versions": dict,
}
"""Entries of state.json, and their types."""
_LATER: dict[str, type | tuple[type, ...]] = {"evaluation_due": bool, "records": dict, "watch": dict}
"""Entries that checkpoints of version 0.1.0 lack, and their types."""
_OWN = ("step", "sha256")
"""Entries that every checkpoint has; the others are the run's."""


def save_checkpoint(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/step-N` atomically.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = path_of(folder, step)
    partial = folder / f".writing-{final.name}"
    try:
        for left in folder.glob(".writing-*"):
            remove(left)
        partial.mkdir(parents=True)
        sums = {}
        for name, tensors in (("model", model), ("optimizer", optimizer)):
            path = partial / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)
            sums[path.name] = _flush(path)
        record = {"format": FORMAT, "step": step, "sha256": sums, **state}
        record["place_sha256"] = _place_sha256(record)
        (partial / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        _flush(partial / "state.json")
        sync(partial)
        remove(final)
        partial.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        remove(partial)
        raise UserError(
            f"could not write checkpoint {final}: {error}; free some space, then resume with --resume from the "
            f"previous one"
        ) from error
    return final


def update_state(folder: Path, step: int, changes: Mapping[str, Any]) -> None:
    """Replace entries of the state of `folder/step-N`, atomically.

    Raises:
        UserError: it cannot be written.
    """
    path = path_of(folder, step)
    record = {**read_state(path), **changes}
    try:
        atomic_write(path / "state.json", json.dumps(record, indent=1).encode(), durable=True)
    except OSError as error:
        raise UserError(f"could not write {path}: {error}; free some space, then resume with --resume") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Weights, optimizer tensors and state of one checkpoint folder, its checksums verified.

    Raises:
        UserError: a file is missing, cut or altered.
    """
    state = verify_checkpoint(path)
    model, optimizer = (_renamed(load_file(path / f"{name}.safetensors")) for name in ("model", "optimizer"))
    return model, optimizer, state


def load_encoder(path: Path) -> dict[str, Tensor]:
    """The weights of the dual encoder as the run evaluated them: their moving average if there is one."""
    tensors = _renamed(load_file(path / "model.safetensors"))
    prefix = "ema." if any(name.startswith("ema.") for name in tensors) else "encoder."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for old, new in _RENAMED.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a checkpoint after a check of its files' checksums.

    Raises:
        UserError: a file is missing, cut or altered.
    """
    state = read_state(path)
    for name in FILES:
        file = path / name
        if not file.is_file() or sha256(file) != state["sha256"].get(name):
            raise UserError(f"checkpoint {path} is damaged: {name} is missing or does not match its checksum")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint.

    Raises:
        UserError: it is missing, not JSON, or of another format.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path} is damaged: state.json: {one_line(error)}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise UserError(f"checkpoint {path} has format {found!r}, this version reads {FORMAT}")
    kinds = (KINDS | _LATER).items()
    lacking = [name for name, kind in kinds if not isinstance(state.get(name), kind) and name in (*state, *_OWN)]
    # Checkpoints of version 0.1.0 have no checksum of their place.
    if lacking or state.get("place_sha256", _place_sha256(state)) != _place_sha256(state):
        reason = f"{lacking[0]} is missing or wrong" if lacking else "it does not match its checksum"
        raise UserError(f"checkpoint {path} is damaged: state.json: {reason}")
    return state


def _place_sha256(state: Mapping[str, Any]) -> str:
    """Checksum of what places a run: its step, its clock, its position in the data, and the checksums of the files."""
    place = {name: state.get(name) for name in ("step", "seconds", "stream", "sha256")}
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()


def newest_checkpoint(folder: Path, before: int | None = None) -> tuple[Path, list[str]] | None:
    """The newest checkpoint whose checksums hold, and a line for each newer damaged one.

    Args:
        before: ignore checkpoints of this step and later ones.

    Raises:
        UserError: all checkpoints are damaged.
    """
    passed: list[str] = []
    for path in list_checkpoints(folder)[::-1]:
        if before is not None and step_of(path) >= before:
            continue
        try:
            verify_checkpoint(path)
            return path, passed
        except UserError as error:
            passed.append(str(error))
    if passed:
        raise UserError(f"no usable checkpoint in {folder}: {'; '.join(passed)}")
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal())


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return folder / f"step-{step:09d}"


def step_of(path: Path) -> int:
    """The step a checkpoint folder is named after."""
    return int(path.name.removeprefix("step-"))


def prune_checkpoints(folder: Path, step: int, keep: int, best: Path | None) -> None:
    """Delete all but the best checkpoint and the newest `keep` up to `step`, the one just written.

    Checkpoints of later steps are damaged ones that a resumed run skipped; they must not count as kept.
    """
    written = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    delete_checkpoints(path for path in written[:-keep] if path != best)


def delete_checkpoints(paths: Iterable[Path]) -> None:
    """Delete checkpoint folders."""
    for path in paths:
        remove(path)


def load_model_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Copy weights from `state` into `own`; names and shapes must match.

    Raises:
        UserError: weights are missing, unexpected or of another shape; names the first ones.
    """
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and _shape(own[k]) != _shape(state[k])
    ]
    if missing or extra or shapes:
        problems = [
            *(f"missing {k}" for k in missing[:2]),
            *(f"left over {k}" for k in extra[:2]),
            *shapes[:2],
        ]
        count = len(missing) + len(extra) + len(shapes)
        raise UserError(
            f"{where} holds another architecture than the configuration builds "
            f"({count} differences: {'; '.join(problems)})"
        )
    for name, tensor in own.items():
        copy_into(tensor, state[name].reshape(tensor.shape))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state as `PARAMETER/ENTRY` -> tensor."""
    return {
        f"{names[parameter]}/{entry}": value if isinstance(value, Tensor) else torch.tensor(value)
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the tensors that `optimizer_tensors` returned.

    Raises:
        UserError: they name parameters that this optimizer does not have.
    """
    optimised = {p for group in optimizer.param_groups for p in group["params"]}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in parameters or parameters[name] not in optimised:
            raise UserError(
                f"the checkpoint's optimizer has {name}, which is not trained here; resume with the run's own settings"
            )
        parameter = parameters[name]
        if entry == "step":
            optimizer.state[parameter][entry] = value.to(parameter.device)
            continue
        # Moments must lie in memory as their parameter does: the fused kernel reads both by address.
        moment = torch.empty_like(parameter).detach()
        copy_into(moment, value.reshape(parameter.shape))
        optimizer.state[parameter][entry] = moment


def _flush(path: Path) -> str:
    """Flush a file to the disk and return its SHA-256."""
    sync(path)
    return sha256(path)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """FSDP2 cannot shard scalars, so it gets vectors of one element instead."""
    return () if tensor.numel() == 1 else tuple(tensor.shape)
