"""Settings for a number of pairs and a machine, each with its reason: a pure function."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmssl.apps.autoconfig.inputs import Machine, Pairs, Start
from mmssl.apps.autoconfig.presets import Towers, towers_for

STEPS_AN_EPOCH = 4
"""Batches are small enough for so many steps an epoch at least."""
FILL = 0.7
"""Activations may take so much of what weights and optimizer leave of the memory."""
BYTES_A_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in fp32."""
FEW = 10_000
"""Below so many pairs, a large pretrained model keeps its lower layers."""
LARGE_START = 20_000_000
"""Parameters from which a model counts as large."""
LENGTHS = ("train.steps", "train.epochs", "train.samples", "train.minutes")


@dataclass(frozen=True)
class Choice:
    """One setting."""

    key: str
    """Dotted key of the configuration."""
    value: Any
    why: str
    """One sentence."""


def choose(
    pairs: Pairs, machine: Machine, start: Start | None = None, pinned: Mapping[str, Any] | None = None
) -> list[Choice]:
    """Every setting that depends on the pairs, the machine or the model to start from, but for those that are pinned.

    Args:
        start: a whole model whose towers are taken. None: towers are chosen.
        pinned: dotted key -> value; what depends on a pinned setting follows it.
    """
    pinned = dict(pinned or {})
    towers = None if start is not None else towers_for(pairs, machine)
    batch = batch_size(pairs, machine, start, pinned)
    found = [
        *(_towers(towers, pairs, pinned) if towers is not None else _start(start, pairs, pinned)),
        *_batch(batch, towers, pairs, machine, pinned),
        *_length(pairs, machine, start, batch, pinned),
        *_optimizer(batch, towers, start),
        *_machine(machine),
        *((Choice(key, value, why) for key, (value, why) in towers.recipe.items()) if towers is not None else ()),
    ]
    return [choice for choice in found if not is_pinned(choice.key, pinned)]


def is_pinned(key: str, pinned: Mapping[str, Any]) -> bool:
    """Whether a key, or a section that it lies in, is given."""
    return any(key == given or key.startswith(f"{given}.") for given in pinned)


def touched(section: str, pinned: Mapping[str, Any]) -> bool:
    """Whether anything of a section is given."""
    return any(given == section or given.startswith(f"{section}.") for given in pinned)


def max_tokens(pairs: Pairs) -> int:
    """Room for all but the longest captions: a multiple of 8 from 16 to 128, with the two tokens at the ends."""
    return min(128, max(16, 8 * math.ceil((pairs.caption_tokens + 2) / 8)))


def batch_size(pairs: Pairs, machine: Machine, start: Start | None, pinned: Mapping[str, Any]) -> int:
    """Pairs a step over all processes: a power of two that leaves some steps an epoch, or the multiple of the lanes
    and processes below it."""
    given = _count(pinned, "data.batch_size")
    if given is not None:
        return given
    if start is None:
        most = towers_for(pairs, machine).most_batch
    elif machine.on_gpu:
        most = 512
    else:
        most = 64 if start.parameters >= LARGE_START else 256
    unit = math.lcm(machine.world_size, _count(pinned, "data.lanes") or 1)
    wanted = min(most, power_of_two(pairs.count // STEPS_AN_EPOCH))
    return max(unit, wanted // unit * unit)


def epochs(pairs: Pairs, machine: Machine, start: Start | None) -> int:
    """Passes over the data: they fall with the square root of the number of pairs."""
    if start is not None and start.trained:
        return min(10, max(1, round(10 * math.sqrt(10_000 / pairs.count))))
    passes = min(100, max(1, round(100 * math.sqrt(1_000 / pairs.count))))
    return max(32, passes) if machine.on_gpu else passes


def learning_rate(batch: int, towers: Towers | None, start: Start | None) -> float:
    """The peak, scaled by the square root of the batch from where it is known to be good; two digits."""
    if towers is not None:
        base, at = towers.lr, towers.lr_batch
    else:
        assert start is not None
        base, at = _start_rate(start)
    return float(f"{base * math.sqrt(batch / at):.2g}")


def micro_batch(batch: int, pair_bytes: int, parameters: int, machine: Machine) -> int | None:
    """Pairs whose activations fit into a process's memory, a power of two; None: all of its share fit."""
    rows = batch // machine.world_size
    free = FILL * (machine.memory_a_process - BYTES_A_PARAMETER * parameters)
    fits = power_of_two(int(max(free, 0)) // pair_bytes)
    return None if fits >= rows else fits


def power_of_two(number: int) -> int:
    """The largest power of two that is not above a number; 1 below 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def _towers(towers: Towers, pairs: Pairs, pinned: Mapping[str, Any]) -> Iterator[Choice]:
    tokens = _count(pinned, "model.text.max_tokens") or max_tokens(pairs)
    if "model.vision.name" not in pinned:
        yield Choice("model.vision.name", towers.vision, towers.words)
        if towers.options:
            yield Choice("model.vision.options", dict(towers.options), "half the usual width")
        why = f"the median image's shorter side is {pairs.image_side} px"
        yield Choice("model.vision.image_size", towers.side(pairs), why)
    if "model.text.name" not in pinned:
        text = {**towers.text, "max_position_embeddings": max(77, tokens)}
        yield Choice("model.text.config", text, "goes with the vision tower")
        yield Choice("model.text.pooling", "mean", "a short text tower learns it sooner than a token of its own")
        if "model.text.tokenizer" not in pinned:
            yield Choice("model.text.tokenizer", "train", "learnt from the captions: their words and their language")
            yield Choice("model.text.vocab_size", towers.vocab_size, "at most; few captions fill less")
    yield Choice("model.text.max_tokens", tokens, f"19 of 20 captions have at most some {pairs.caption_tokens} tokens")
    yield Choice("model.embed_dim", towers.embed_dim, "goes with the towers")


def _start(start: Start | None, pairs: Pairs, pinned: Mapping[str, Any]) -> Iterator[Choice]:
    assert start is not None
    why = "its towers, tokenizer and preprocessing, and its weights" if start.trained else "its towers, random weights"
    yield Choice("model.start", start.name, why)
    if start.trained and start.parameters >= LARGE_START and pairs.count < FEW:
        why = f"{pairs.count:,} pairs are few for {start.parameters / 1e6:.0f} M weights: the lower layers stay"
        for tower in ("vision", "text"):
            if not any(touched(f"model.{tower}.{key}", pinned) for key in ("lock", "lora")):
                yield Choice(f"model.{tower}.lock", True, why)
                yield Choice(f"model.{tower}.unlocked_layers", 2, "the last ones learn")


def _batch(
    batch: int, towers: Towers | None, pairs: Pairs, machine: Machine, pinned: Mapping[str, Any]
) -> Iterator[Choice]:
    why = f"as large as leaves {STEPS_AN_EPOCH} steps an epoch of {pairs.count:,} pairs"
    if batch < power_of_two(pairs.count // STEPS_AN_EPOCH):
        why = f"larger ones gain little here; an epoch of {pairs.count:,} pairs has {pairs.count // batch:,} steps"
    yield Choice("data.batch_size", batch, why)
    unknown = any(touched(section, pinned) for section in ("model.vision", "model.text", "objectives", "data.views"))
    if towers is None or unknown:
        yield Choice("train.micro_batch", "auto", "measured before the first step: what fits into the memory")
        return
    a_pair = towers.pair_bytes(towers.side(pairs), max_tokens(pairs))
    fits = micro_batch(batch, a_pair, towers.parameters, machine)
    room = f"{machine.memory_a_process / 2**30:.1f} GiB {'of the GPU' if machine.on_gpu else 'of the host'}"
    needs = f"{batch // machine.world_size} pairs at some {a_pair / 2**20:.1f} MiB"
    fate = "fit at once" if fits is None else "do not fit at once; the gradient stays that of the whole batch"
    yield Choice("train.micro_batch", fits, f"{needs} {fate} ({room})")


def _length(
    pairs: Pairs, machine: Machine, start: Start | None, batch: int, pinned: Mapping[str, Any]
) -> Iterator[Choice]:
    if any(touched(key, pinned) for key in LENGTHS):
        return
    passes = epochs(pairs, machine, start)
    steps = passes * max(1, pairs.count // batch)
    kind = "a trained model needs few passes" if start is not None and start.trained else "fewer pairs, more passes"
    yield Choice("train.epochs", passes, f"{kind}; some {steps:,} steps")


def _optimizer(batch: int, towers: Towers | None, start: Start | None) -> Iterator[Choice]:
    if towers is not None:
        why = f"{towers.lr:g} at {towers.lr_batch} pairs a step, scaled by the square root of the batch"
        yield Choice("optim.lr", learning_rate(batch, towers, start), why)
        yield Choice("optim.weight_decay", towers.weight_decay, "goes with the towers")
        return
    assert start is not None
    base, at = _start_rate(start)
    kind = "what was learnt should change slowly" if start.trained else "the usual one for random weights"
    why = f"{kind}: {base:g} at {at} pairs a step, scaled by the square root of the batch"
    yield Choice("optim.lr", learning_rate(batch, towers, start), why)
    if start.trained:
        yield Choice("optim.warmup", 0.1, "the weights know something already, the optimizer nothing")


def _start_rate(start: Start) -> tuple[float, int]:
    """Peak learning rate of a model to start from, and the batch that it is for."""
    if not start.trained:
        return 5e-4, 4096
    return (1e-5 if start.parameters >= LARGE_START else 2e-4), 256


def _machine(machine: Machine) -> Iterator[Choice]:
    device = "GPU" if machine.on_gpu else "CPU"
    if machine.bf16:
        yield Choice("train.precision", "bf16", f"this {device} multiplies it faster than fp32")
    elif machine.on_gpu:
        yield Choice("train.precision", "fp16", "this GPU has no bf16")
    else:
        yield Choice("train.precision", "fp32", "this CPU only emulates bf16")
    workers = min(16, max(1, machine.cores // machine.processes // 2))
    shared = f", shared by {machine.processes} processes" if machine.processes > 1 else ""
    yield Choice("data.workers", workers, f"half of the cores ({machine.cores}{shared}) decode, the others compute")


def _count(pinned: Mapping[str, Any], key: str) -> int | None:
    """A pinned number; what is none is refused later, with the whole configuration."""
    value = pinned.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
