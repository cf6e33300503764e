"""Choice of settings for the pairs and the machine, each with its reason: a pure function."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.apps.autoconfig.inputs import Machine, Pairs, Start
from mmssl.apps.autoconfig.towers import Towers, choose_towers

STEPS_PER_EPOCH = 4
"""Minimum number of steps per epoch, which limits the batch size."""
FILL = 0.7
"""Fraction of the memory left by weights and optimizer that activations may use."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two AdamW moments in fp32."""
FEW = 10_000
"""Number of pairs below which the lower layers of a large pretrained model stay fixed."""
LARGE_START = 20_000_000
"""Number of parameters from which a model counts as large."""
PRETRAINED_RATE, PRETRAINED_BATCH = 1e-5, 256
"""Peak learning rate of a large pretrained model, and the number of pairs per step that it is for."""
LENGTH_KEYS = ("train.steps", "train.epochs", "train.samples", "train.minutes")


@dataclass(frozen=True)
class Choice:
    """One setting."""

    key: str
    """Dotted configuration key."""
    value: Any
    why: str
    """Reason, in one sentence."""


def choose(
    pairs: Pairs, machine: Machine, start: Start | None = None, pinned: Mapping[str, Any] | None = None
) -> list[Choice]:
    """Choose every setting that depends on the pairs, the machine or the model to start from, and is not pinned.

    Args:
        start: a model whose towers are used. None: towers are chosen.
        pinned: dotted key -> value given by the user. Dependent settings follow it.
    """
    pinned = dict(pinned or {})
    towers = None if start is not None else choose_towers(pairs, machine)
    batch = batch_size(pairs, machine, start, pinned)
    found = [
        *(_towers(towers, pairs, pinned) if towers is not None else _start(start, pairs, pinned)),
        *_batch(batch, towers, pairs, machine, pinned),
        *_length(pairs, machine, start, batch, pinned),
        *_optimizer(batch, towers, start),
        *_pretrained_towers(batch, towers, pinned),
        *_machine(machine),
        *((Choice(key, towers.setting(key), why) for key, why in towers.recipe.items()) if towers is not None else ()),
    ]
    return [choice for choice in found if not is_pinned(choice.key, pinned)]


def is_pinned(key: str, pinned: Mapping[str, Any]) -> bool:
    """True if a key or a section above it is given."""
    return any(key == given or key.startswith(f"{given}.") for given in pinned)


def touched(section: str, pinned: Mapping[str, Any]) -> bool:
    """True if a section or any key below it is given."""
    return any(given == section or given.startswith(f"{section}.") for given in pinned)


def max_tokens(pairs: Pairs) -> int:
    """Caption length in tokens for 95 % of the captions, with the two end tokens: a multiple of 8 from 16 to 128."""
    return min(128, max(16, 8 * math.ceil((pairs.caption_tokens + 2) / 8)))


def batch_size(pairs: Pairs, machine: Machine, start: Start | None, pinned: Mapping[str, Any]) -> int:
    """Global batch size: a power of two that leaves enough steps per epoch, rounded down to a multiple of lanes and
    processes."""
    given = _count(pinned, "data.batch_size")
    if given is not None:
        return given
    if start is None:
        most = choose_towers(pairs, machine).most_batch
    elif machine.on_gpu:
        most = 512
    else:
        most = 64 if start.parameters >= LARGE_START else 256
    unit = math.lcm(machine.world_size, _count(pinned, "data.lanes") or 1)
    wanted = min(most, power_of_two(pairs.count // STEPS_PER_EPOCH))
    return max(unit, wanted // unit * unit)


def epochs(pairs: Pairs, machine: Machine, start: Start | None) -> int:
    """Number of epochs, which falls with the square root of the number of pairs."""
    if start is not None and start.trained:
        return min(10, max(1, round(10 * math.sqrt(10_000 / pairs.count))))
    passes = min(100, max(1, round(100 * math.sqrt(1_000 / pairs.count))))
    return max(32, passes) if machine.on_gpu else passes


def learning_rate(batch: int, towers: Towers | None, start: Start | None) -> float:
    """Peak learning rate in two digits, scaled by the square root of the batch from a known good value."""
    if towers is not None:
        base, at = towers.lr, towers.lr_batch
    else:
        assert start is not None
        base, at = _start_rate(start)
    return float(f"{base * math.sqrt(batch / at):.2g}")


def micro_batch(batch: int, pair_bytes: int, parameters: int, machine: Machine) -> int | None:
    """Pairs whose activations fit into the memory of a process, a power of two. None: its whole batch fits."""
    rows = batch // machine.world_size
    free = FILL * (machine.memory_per_process - BYTES_PER_PARAMETER * parameters)
    fits = power_of_two(int(max(free, 0)) // pair_bytes)
    return None if fits >= rows else fits


def power_of_two(number: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def _towers(towers: Towers, pairs: Pairs, pinned: Mapping[str, Any]) -> Iterator[Choice]:
    tokens = _count(pinned, "model.text.max_tokens") or max_tokens(pairs)
    if "model.vision.name" not in pinned:
        yield Choice("model.vision.name", towers.setting("model.vision.name"), towers.why)
        if (options := towers.setting("model.vision.options")) is not None:
            yield Choice("model.vision.options", options, "half the usual width")
        why = f"the median image's shorter side is {pairs.image_side} px"
        yield Choice("model.vision.image_size", towers.side(pairs), why)
    if "model.text.name" not in pinned:
        text = towers.setting("model.text.config")
        text["max_position_embeddings"] = max(text["max_position_embeddings"], tokens)
        yield Choice("model.text.config", text, "goes with the vision tower")
        pooling = towers.setting("model.text.pooling")
        yield Choice(
            "model.text.pooling", pooling, "a small text tower learns faster from the mean than from one token"
        )
        if "model.text.tokenizer" not in pinned:
            yield Choice("model.text.tokenizer", "train", "trained on the captions: their words and their language")
            yield Choice(
                "model.text.vocab_size", towers.setting("model.text.vocab_size"), "at most; few captions need fewer"
            )
    yield Choice(
        "model.text.max_tokens", tokens, f"95 % of the captions have at most about {pairs.caption_tokens} tokens"
    )
    yield Choice("model.embed_dim", towers.setting("model.embed_dim"), "goes with the towers")


def _start(start: Start | None, pairs: Pairs, pinned: Mapping[str, Any]) -> Iterator[Choice]:
    assert start is not None
    why = "its towers, tokenizer and preprocessing, and its weights" if start.trained else "its towers, random weights"
    yield Choice("model.start", start.name, why)
    if start.trained and start.parameters >= LARGE_START and pairs.count < FEW:
        why = f"{pairs.count:,} pairs are few for {start.parameters / 1e6:.0f} M weights: the lower layers stay fixed"
        for tower in ("vision", "text"):
            if not any(touched(f"model.{tower}.{key}", pinned) for key in ("lock", "lora")):
                yield Choice(f"model.{tower}.lock", True, why)
                yield Choice(f"model.{tower}.unlocked_layers", 2, "the last layers are trained")


def _batch(
    batch: int, towers: Towers | None, pairs: Pairs, machine: Machine, pinned: Mapping[str, Any]
) -> Iterator[Choice]:
    why = f"the largest with {STEPS_PER_EPOCH} steps per epoch of {pairs.count:,} pairs"
    if batch < power_of_two(pairs.count // STEPS_PER_EPOCH):
        why = f"larger ones gain little here; an epoch of {pairs.count:,} pairs has {pairs.count // batch:,} steps"
    yield Choice("data.batch_size", batch, why)
    unknown = any(touched(section, pinned) for section in ("model.vision", "model.text", "objectives", "data.views"))
    if towers is None or unknown:
        yield Choice("train.micro_batch", "auto", "measured before the first step: as much as fits into memory")
        return
    per_pair = towers.pair_bytes(towers.side(pairs), max_tokens(pairs))
    fits = micro_batch(batch, per_pair, towers.parameters, machine)
    room = f"{machine.memory_per_process / 2**30:.1f} GiB {'of the GPU' if machine.on_gpu else 'of the host'}"
    needs = f"{batch // machine.world_size} pairs of about {per_pair / 2**20:.1f} MiB"
    fate = "fit at once" if fits is None else "do not fit at once; the gradient is still that of the whole batch"
    yield Choice("train.micro_batch", fits, f"{needs} {fate} ({room})")


def _length(
    pairs: Pairs, machine: Machine, start: Start | None, batch: int, pinned: Mapping[str, Any]
) -> Iterator[Choice]:
    if any(touched(key, pinned) for key in LENGTH_KEYS):
        return
    passes = epochs(pairs, machine, start)
    steps = passes * max(1, pairs.count // batch)
    kind = (
        "a pretrained model needs few epochs" if start is not None and start.trained else "fewer pairs need more epochs"
    )
    yield Choice("train.epochs", passes, f"{kind}; about {steps:,} steps")


def _optimizer(batch: int, towers: Towers | None, start: Start | None) -> Iterator[Choice]:
    if towers is not None:
        why = f"{towers.lr:g} at {towers.lr_batch} pairs per step, scaled by the square root of the batch"
        yield Choice("optim.lr", learning_rate(batch, towers, start), why)
        yield Choice("optim.weight_decay", towers.setting("optim.weight_decay"), "goes with the towers")
        return
    assert start is not None
    base, at = _start_rate(start)
    kind = "pretrained weights should change slowly" if start.trained else "usual for random weights"
    why = f"{kind}: {base:g} at {at} pairs per step, scaled by the square root of the batch"
    yield Choice("optim.lr", learning_rate(batch, towers, start), why)
    if start.trained:
        yield Choice("optim.warmup", 0.1, "the optimizer starts from scratch, the weights do not")


def _pretrained_towers(batch: int, towers: Towers | None, pinned: Mapping[str, Any]) -> Iterator[Choice]:
    """Rates of towers whose pretrained weights the user names; the other parts learn from scratch."""
    named = {"vision": "model.vision.pretrained", "text": "model.text.name"}
    for tower, key in named.items() if towers is not None else ():
        if pinned.get(key) is not None:
            rate = float(f"{PRETRAINED_RATE * math.sqrt(batch / PRETRAINED_BATCH):.2g}")
            why = f"{key} is pretrained: its weights should change slowly, unlike the new ones"
            yield Choice(f"optim.{tower}_lr", rate, why)


def _start_rate(start: Start) -> tuple[float, int]:
    """Peak learning rate for a model to start from, and its batch size."""
    if not start.trained:
        return 5e-4, 4096
    return (PRETRAINED_RATE if start.parameters >= LARGE_START else 2e-4), PRETRAINED_BATCH


def _machine(machine: Machine) -> Iterator[Choice]:
    device = "GPU" if machine.on_gpu else "CPU"
    if machine.bf16:
        yield Choice("train.precision", "bf16", f"this {device} computes it faster than fp32")
    elif machine.on_gpu:
        yield Choice("train.precision", "fp16", "this GPU has no bf16")
    else:
        yield Choice("train.precision", "fp32", "this CPU only emulates bf16")
    workers = min(16, max(1, machine.cores // machine.processes // 2))
    shared = f", shared by {machine.processes} processes" if machine.processes > 1 else ""
    yield Choice("data.workers", workers, f"half of the cores ({machine.cores}{shared}) decode, the others compute")


def _count(pinned: Mapping[str, Any], key: str) -> int | None:
    """A pinned positive integer. Other values are refused later, with the configuration."""
    value = pinned.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
