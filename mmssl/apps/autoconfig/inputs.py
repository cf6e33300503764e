"""What is known before a training: the pairs, the machine, and the model to start from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """The pairs to train on."""

    count: int
    caption_tokens: int
    """An estimate of the tokens that 19 of 20 captions do not exceed."""
    image_side: int
    """The shorter side of the median image, in pixels."""


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    cores: int
    memory: int
    """Bytes of the host, whoever uses them now."""
    gpu_memory: tuple[int, ...] = ()
    """Bytes of each GPU; none: the run is on the CPU."""
    bf16: bool = False
    """Whether the device multiplies bfloat16 numbers, rather than emulating that."""
    processes: int = 1
    """How many train together on this machine."""
    machines: int = 1
    """Machines like this one that train together."""

    @property
    def on_gpu(self) -> bool:
        """Whether towers run on GPUs."""
        return len(self.gpu_memory) > 0

    @property
    def world_size(self) -> int:
        """Processes of all machines, among which a batch is divided."""
        return self.processes * self.machines

    @property
    def memory_a_process(self) -> int:
        """Bytes that one process can count on: the smallest GPU, or its share of half the host's memory."""
        return min(self.gpu_memory) if self.on_gpu else self.memory // 2 // self.processes


@dataclass(frozen=True)
class Start:
    """A whole model to start from."""

    name: str
    """As `mmssl.load` takes it."""
    trained: bool
    """Whether its weights are more than a random start."""
    parameters: int
    """Of both towers."""
