"""A model of the time of a training step over the number of ranks.

An exchange takes a time per hop and a time per byte that a rank sends (Hockney 1994). Gathers and reductions are those
of a ring (Patarasuk and Yuan 2009): a rank sends (W - 1) / W of a gathered tensor, and twice that of a reduced one. On
GPUs the hops of a reduction are those of NCCL's tree.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mmssl.losses.logits import choose_form

FLOAT = 4
"""Bytes per number that is sent."""
BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel reduces at a time."""
SMALL_SUMS = 2
"""Short vectors that a step adds up over ranks: the terms of its losses, and its metrics."""
Exchange = Literal["gather", "ring"]


@dataclass(frozen=True)
class Work:
    """A step, and its division among ranks."""

    batch: int
    """Pairs of the global batch, N."""
    ranks: int
    """W; each has n = N / W pairs."""
    dim: int
    """Dimension of the features, D."""
    weights: int
    """Trained numbers, whose gradients are reduced."""
    exchange: Exchange = "gather"
    micro_batch: int | None = None
    """Pairs whose activations are held at a time; None: all."""

    @property
    def rows(self) -> int:
        """Pairs of a rank, n."""
        return self.batch // self.ranks


@dataclass(frozen=True)
class Link:
    """Seconds of an exchange, per hop and per byte that a rank sends."""

    hop: float
    byte: float


@dataclass(frozen=True)
class Links:
    """The three exchanges among ranks that are connected alike."""

    gather: Link
    reduce: Link
    shift: Link
    """From a rank to the next one of the ring."""


@dataclass(frozen=True)
class Machine:
    """Costs of a step on one kind of machine, in seconds."""

    step: float
    """Per step and rank, whatever the batch: launches, the update of the weights."""
    sample: float
    """Towers, forward and backward, per pair."""
    logit: float
    """Loss, forward and backward, per logit of the plain form."""
    blocked_logit: float
    """The same of the blocked form, which computes its logits anew."""
    load: float
    """Loader, per pair."""
    within: Links
    """Inside a node."""
    across: Links
    """Over nodes."""
    node: int
    """Ranks per node."""
    device: Literal["cpu", "cuda"]
    """`cpu`: all ranks share one core, so that the times of all their parts add up. `cuda`: a device and cores for each
    rank. Loading goes on beside the step, gradients are reduced during the backward pass, and a ring sends features
    while it multiplies others."""


@dataclass(frozen=True)
class StepTerms:
    """Seconds of the parts of a step on one rank."""

    towers: float
    loss: float
    exchange: float
    reduction: float
    load: float


def step_terms(work: Work, machine: Machine) -> StepTerms:
    """The parts of a step on one rank."""
    n, batch, ranks = work.rows, work.batch, work.ranks
    # GradCache runs the forward pass, a third of the work, twice.
    passes = 1.0 if work.micro_batch is None or n <= work.micro_batch else 4 / 3
    form = choose_form("auto", n, batch, torch.device(machine.device))
    logit = machine.blocked_logit if work.exchange == "ring" or form == "blocked" else machine.logit
    exchange = _ring_seconds(work, machine) if work.exchange == "ring" else _gather_seconds(work, machine)
    gradients = FLOAT * work.weights
    reductions = SMALL_SUMS + math.ceil(gradients / BUCKET)
    return StepTerms(
        towers=machine.step + passes * n * machine.sample,
        loss=n * batch * logit,
        exchange=exchange if ranks > 1 else 0.0,
        reduction=_reduce_seconds(reductions, gradients, ranks, machine) if ranks > 1 else 0.0,
        load=n * machine.load,
    )


def step_seconds(work: Work, machine: Machine) -> float:
    """Time of a step: of all ranks where they share a core, else of one."""
    terms = step_terms(work, machine)
    if machine.device == "cpu":
        return work.ranks * (terms.towers + terms.loss + terms.exchange + terms.reduction + terms.load)
    ring = work.exchange == "ring"
    loss = max(terms.loss, terms.exchange) if ring else terms.loss + terms.exchange
    # The backward pass of the last micro-batch, two thirds of its work, hides the reduction.
    last = min(work.rows, work.micro_batch or work.rows)
    exposed = max(0.0, terms.reduction - 2 / 3 * last * machine.sample)
    return max(terms.load, terms.towers + loss + exposed)


def _gather_seconds(work: Work, machine: Machine) -> float:
    """Of one side's features: gathered for the loss and for the accuracy, and their gradients reduced.

    The sums over the logits' columns are reduced three times: their maximum, their sum, and backward. So is the number
    of pairs.
    """
    nodes, link = _nodes(work.ranks, machine), _links(work.ranks, machine).gather
    hops = (work.ranks - nodes) * machine.within.gather.hop + (nodes - 1) * machine.across.gather.hop
    features = work.batch * FLOAT * work.dim
    gathers = 2 * (hops + _share(work.ranks) * features * link.byte)
    return gathers + _reduce_seconds(5, features + 3 * work.batch * FLOAT + FLOAT, work.ranks, machine)


def _ring_seconds(work: Work, machine: Machine) -> float:
    """Features go round three times, for the accuracy, forward and backward; sums and gradients return."""
    link, ranks, features = _links(work.ranks, machine).shift, work.ranks, work.rows * FLOAT * work.dim
    shifts = 3 * (ranks - 1) + 2 * ranks
    size = (3 * (ranks - 1) + ranks) * features + (2 * (ranks - 1) + ranks) * work.rows * FLOAT
    return shifts * link.hop + size * link.byte + _reduce_seconds(1, FLOAT, ranks, machine)


def _reduce_seconds(count: int, size: int, ranks: int, machine: Machine) -> float:
    """Of `count` reductions of `size` bytes together."""
    nodes, link = _nodes(ranks, machine), _links(ranks, machine).reduce
    within, across = machine.within.reduce.hop, machine.across.reduce.hop
    if machine.device == "cpu":
        hops = 2 * ((ranks - nodes) * within + (nodes - 1) * across)
    else:
        hops = 2 * ((ranks / nodes - 1) * within + math.log2(nodes) * across)
    return count * hops + 2 * _share(ranks) * size * link.byte


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def _nodes(ranks: int, machine: Machine) -> int:
    return -(-ranks // machine.node)


def _links(ranks: int, machine: Machine) -> Links:
    return machine.within if ranks <= machine.node else machine.across
