"""Inputs of the choices: the pairs, the machine, and the model to start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median

import torch

from mmssl import system
from mmssl.data import iter_samples
from mmssl.data.shards import SampleLimits
from mmssl.data.sources import remedy_of
from mmssl.data.transforms import DecodeError, captions, decoding
from mmssl.errors import UserError
from mmssl.precision import choose_precision

SHARDS, SAMPLES = 8, 128
"""Number of shards to probe, and of samples in each."""
TOKENS_PER_WORD = 1.4
"""Typical number of tokens per English word."""
_IDEOGRAPHS = "\u2e80"
"""First character of the scripts that are written without spaces, with about one token per character."""


@dataclass(frozen=True)
class Pairs:
    """Properties of the pairs to train on."""

    count: int
    caption_tokens: int
    """Estimated 95 % quantile of the number of tokens per caption."""
    image_side: int
    """Median of the images' shorter sides, in pixels."""


@dataclass(frozen=True)
class Machine:
    """Resources of a run."""

    cores: int
    memory: int
    """Main memory in bytes, including what is in use."""
    gpu_memory: tuple[int, ...] = ()
    """Memory of each GPU in bytes. Empty: the run uses the CPU."""
    bf16: bool = False
    """True if the device multiplies bfloat16 faster than float32."""
    processes: int = 1
    """Number of training processes on this machine."""
    machines: int = 1
    """Number of machines like this one."""

    @property
    def on_gpu(self) -> bool:
        """True if the run uses GPUs."""
        return len(self.gpu_memory) > 0

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.processes * self.machines

    @property
    def memory_per_process(self) -> int:
        """Bytes for each process: the smallest GPU, or an equal part of half the main memory."""
        return min(self.gpu_memory) if self.on_gpu else self.memory // 2 // self.processes


@dataclass(frozen=True)
class Start:
    """A model to start from."""

    name: str
    """Name, path or address for `mmssl.load`."""
    trained: bool
    """True if its weights are pretrained."""
    parameters: int
    """Number of parameters of both towers."""


def probe_pairs(
    shards: Sequence[str], count: int, templates: Sequence[str] = ("{txt}",), limits: SampleLimits | None = None
) -> Pairs:
    """Estimate the properties of pairs from samples of evenly spread shards.

    Args:
        count: the number of pairs, from the index of the shards.

    Raises:
        UserError: a shard cannot be read, or no sample is usable.
    """
    step = max(1, len(shards) // SHARDS)
    lengths, sides, problem = [], [], ""
    for shard in shards[::step][:SHARDS]:
        for sample in islice(iter_samples([shard], limits, on_bad=lambda bad: None), SAMPLES):
            try:
                header = decoding.read_header(sample.image)
            except DecodeError:
                continue
            try:
                texts = [text for template in templates for text in captions.every_caption(sample.fields, template)]
            except UserError as error:
                problem = problem or f"{shard}:{sample.key} ({error}); {remedy_of(str(error))}"
                continue
            sides.append(min(header.width, header.height))
            lengths.append(max(count_tokens(captions.clean_caption(caption)) for caption in texts))
    if not sides:
        more = problem or "for a full report: mmssl shards check PATTERN"
        raise UserError(f"no usable pair in {shards[0]}: {more}")
    return Pairs(count, sorted(lengths)[math.ceil(0.95 * len(lengths)) - 1], round(median(sides)))


def count_tokens(caption: str) -> int:
    """Estimate the number of tokens of a caption without a tokenizer."""
    ideographs = sum(character >= _IDEOGRAPHS for character in caption)
    words = "".join(" " if character >= _IDEOGRAPHS else character for character in caption).split()
    return ideographs + math.ceil(TOKENS_PER_WORD * len(words))


def this_machine() -> Machine:
    """Resources of this machine for its training processes."""
    gpus = tuple(
        torch.cuda.get_device_properties(number).total_memory
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    )
    processes = system.local_world_size()
    return Machine(
        cores=system.cores(),
        memory=system.memory(),
        gpu_memory=gpus,
        bf16=choose_precision("cuda" if gpus else "cpu").precision == "bf16",
        processes=processes,
        machines=max(1, system.world_size() // processes),
    )
