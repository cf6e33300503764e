"""The model of a step's time, fitted on one and two processes and compared with training on others.

Times are CPU seconds, added up over processes: what a step takes on one core that all processes share. They leave out
what other programs take of the core.
"""

import io
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mmssl.build import resolve
from mmssl.config import load_config
from mmssl.distributed import World, process_group
from mmssl.errors import UserError
from mmssl.losses import info_nce
from mmssl.losses.logits import Form, correct_matches
from mmssl.objectives._pairs import ACCURACY_ROWS
from mmssl.rng import torch_generator
from mmssl.train.setup import set_up
from mmssl.train.step import Tally, backward
from mmssl.train.trainer import Trainer
from scripts.bench.scale_model import Exchange, Link, Links, Machine, Work, step_seconds, step_terms

WARM_UP = 4
"""Steps before the timed ones: they choose kernels and fill the loader's queue."""
SIZES = (2**16, 2**22)
"""Bytes of the two messages that tell the cost per hop from the cost per byte."""
REPEATS = (100, 10)
"""Exchanges of each size."""
LOSSES = 5
PRELOADED = [
    "mmssl.train.trainer",
    "open_clip",
    "timm",
    "torch._dynamo",
    "torch.nn.parallel",
    "transformers.models.bert.modeling_bert",
]
"""Modules that processes are forked with: importing them takes a process longer than a training."""
FORMS: tuple[Form, Form] = ("plain", "blocked")


@dataclass(frozen=True)
class Training:
    """A configuration to train with."""

    config: str
    overrides: Sequence[str]
    steps: int
    """Timed steps."""

    def changed(self, batch: int, exchange: Exchange, run: Path) -> list[str]:
        """Overrides of a short run, in one precision unless told otherwise.

        The loader works in threads, whose time is that of the process.
        """
        steps = WARM_UP + self.steps + 1
        return [
            "train.precision=fp32",
            *self.overrides,
            *(f"data.batch_size={batch}", "data.workers=1", "data.worker_kind=thread", f"run_dir={run}"),
            *(f"train.exchange={exchange}", "train.threads=1", f"train.steps={steps}", "train.minutes=null"),
            *("train.epochs=null", "evaluate.suites={}", "train.trackers=[]"),
        ]


@dataclass(frozen=True)
class Cost:
    """A measured training: mean costs of a step, in seconds."""

    cpu: float
    """Of all processes together."""
    clock: float


@dataclass(frozen=True)
class Check:
    """A training beside its prediction."""

    work: Work
    costs: list[Cost]
    """Of each round."""

    @property
    def seconds(self) -> float:
        """CPU seconds of a step: the least of the rounds, because programs that share the caches only add to it."""
        return min(cost.cpu for cost in self.costs)


@dataclass(frozen=True)
class ScaleBench:
    """The fitted model, and the trainings that it did not see."""

    machine: Machine
    checks: list[Check]

    @property
    def worst(self) -> float:
        """The largest relative error of a prediction."""
        return max(abs(step_seconds(c.work, self.machine) / c.seconds - 1) for c in self.checks)

    def text(self) -> str:
        """The constants, and one line per training with the parts of its prediction."""
        m, links = self.machine, self.machine.within
        lines = [
            f"per step {1e3 * m.step:.1f} ms; per pair: towers {1e6 * m.sample:.0f} us, loader {1e6 * m.load:.0f} us; "
            f"per logit {1e9 * m.logit:.1f} ns, in blocks {1e9 * m.blocked_logit:.1f} ns",
            "; ".join(
                f"{name} {1e6 * link.hop:.0f} us per hop, {1e9 * link.byte:.2f} ns per byte"
                for name, link in (("gather", links.gather), ("reduce", links.reduce), ("shift", links.shift))
            ),
            "CPU milliseconds per step, all processes together",
            f"{'ranks':>5} {'batch':>6} {'exchange':>8} {'towers':>8} {'loss':>7} {'exchange':>8} {'reduce':>7} "
            f"{'loader':>7} {'predicted':>9} {'measured':>8} {'ratio':>6} {'by clock':>8}",
        ]
        for check in self.checks:
            work, terms = check.work, step_terms(check.work, m)
            predicted = step_seconds(work, m)
            parts = [1e3 * work.ranks * part for part in (terms.towers, terms.loss, terms.exchange, terms.reduction)]
            clock = min(cost.clock for cost in check.costs)
            lines.append(
                f"{work.ranks:5} {work.batch:6} {work.exchange:>8} {parts[0]:8.1f} {parts[1]:7.1f} {parts[2]:8.1f} "
                f"{parts[3]:7.1f} {1e3 * work.ranks * terms.load:7.1f} {1e3 * predicted:9.1f} "
                f"{1e3 * check.seconds:8.1f} {predicted / check.seconds:6.2f} {1e3 * clock:8.1f}"
            )
        return "\n".join([*lines, f"largest error {self.worst:.0%}"])


def bench_scale(
    training: Training, ranks: Sequence[int], batches: Sequence[int], rounds: int, progress: Callable[[str], None]
) -> ScaleBench:
    """Fit the model, and train with every other number of ranks and batch size; rounds take turns.

    One process with as few and as many pairs as any has gives the costs of steps and pairs. The exchanges are measured
    by themselves on two processes, the loss and the loader on one.

    Raises:
        UserError: fewer than two batch sizes, or a batch that does not divide by the ranks.
    """
    batches = sorted(set(batches))
    if len(batches) < 2:
        raise UserError("give two --batch or more: their difference is the cost of a pair")
    if any(batch % count for batch, count in product(batches, ranks)):
        raise UserError("every --batch must divide by every --ranks")
    config = load_config(training.config, training.changed(batches[-1], "gather", Path("run")))
    with tempfile.TemporaryDirectory() as folder:
        ((weights, load),) = _on_ranks(1, _loader_cost, training, batches[-1], Path(folder) / "run")
    make = partial(Work, dim=config.model.embed_dim, weights=weights)
    # From the fewest to the most pairs that a process has.
    fits = [Check(make(batch, 1), []) for batch in (batches[0] // max(ranks), batches[-1])]
    cases = [make(b, w, exchange=e) for w, e, b in product(sorted(set(ranks)), ("gather", "ring"), batches)]
    seen = [fitted.work for fitted in fits]
    checks = [Check(work, []) for work in cases if work not in seen and _is_check(work, batches)]
    logits, links = [], []
    for number in range(rounds):
        for check in [*fits, *checks]:
            progress(f"round {number + 1} of {rounds}: {check.work.ranks} processes, batch {check.work.batch}")
            with tempfile.TemporaryDirectory() as folder:
                costs = _on_ranks(check.work.ranks, _training_cost, training, check.work, Path(folder) / "run")
            check.costs.append(Cost(sum(c.cpu for c in costs), statistics.mean(c.clock for c in costs)))
        logits += _on_ranks(1, _logit_costs, batches[-1], config.model.embed_dim)
        links += _on_ranks(2, _link_costs)
    logit, blocked = map(min, zip(*logits, strict=True))
    machine = fit([fits[0].work.batch, fits[1].work.batch], [check.seconds for check in fits], load, (logit, blocked))
    return ScaleBench(machine(fit_links([min(column) for column in zip(*links, strict=True)])), checks)


def fit(
    batches: Sequence[int], seconds: Sequence[float], load: float, logits: tuple[float, float]
) -> Callable[[Links], Machine]:
    """The costs of steps and pairs from two trainings on one process; the rest of the machine is given.

    Args:
        load: of the loader, per pair.
        logits: per logit of the plain and of the blocked form.
    """
    (few, many), logit = batches, logits[0]
    rest = [cost - logit * batch**2 - load * batch for cost, batch in zip(seconds, batches, strict=True)]
    sample = (rest[1] - rest[0]) / (many - few)
    step = rest[0] - sample * few
    return lambda links: Machine(step, sample, *logits, load, links, links, node=2**31, device="cpu")


def fit_links(costs: Sequence[float]) -> Links:
    """Costs per hop and byte from those of a small and a large message of each kind between two ranks.

    Args:
        costs: of one rank: gather, reduce and shift; each of both `SIZES`.
    """
    sent, hops = (0.5, 1.0, 1.0), (1, 2, 1)
    links = []
    for part, count, small, large in zip(sent, hops, costs[::2], costs[1::2], strict=True):
        byte = (large - small) / (part * (SIZES[1] - SIZES[0]))
        links.append(Link(max(0.0, small - part * SIZES[0] * byte) / count, byte))
    return Links(*links)


def _is_check(work: Work, batches: Sequence[int]) -> bool:
    """One process exchanges nothing; a ring is tried with the largest batch."""
    return work.exchange == "gather" or (work.ranks > 1 and work.batch == batches[-1])


def _on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of a function on each of some fresh processes, which may join a process group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free, ProcessPoolExecutor(ranks, context) as pool:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        return [
            result.result()
            for result in [pool.submit(_join, rank, ranks, port, function, arguments) for rank in range(ranks)]
        ]


def _join(rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    if ranks > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in own.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    with redirect_stderr(io.StringIO()):  # the progress of each training
        return function(*arguments)


def _training_cost(training: Training, work: Work, run: Path) -> Cost:
    """Of one rank, in the trainer itself."""
    cpu, clock = [], []

    def timed(*arguments: Any) -> Tally:
        cpu.append(time.process_time())
        clock.append(time.perf_counter())
        return backward(*arguments)

    config = load_config(training.config, training.changed(work.batch, work.exchange, run))
    Trainer(set_up(resolve(config), resume=False, rewind=False), backward=timed).run()
    return Cost(*((times[-1] - times[WARM_UP]) / training.steps for times in (cpu, clock)))


def _loader_cost(training: Training, batch: int, run: Path) -> tuple[int, float]:
    """The number of trained weights, and the loader's CPU seconds per pair."""
    plan = resolve(load_config(training.config, training.changed(batch, "gather", run)))
    setup = set_up(plan, resume=False, rewind=False)
    task = setup.trained.task
    with setup.trained.stream as stream:
        list(islice(stream, WARM_UP))
        start = time.process_time()
        list(islice(stream, training.steps))
        seconds = time.process_time() - start
    setup.lock.release()
    weights = sum(weight.numel() for weight in task.parameters() if weight.requires_grad)
    return weights, seconds / (training.steps * batch)


def _logit_costs(batch: int, dim: int) -> tuple[float, float]:
    """CPU seconds per logit of the loss and the accuracy, forward and backward: plain and blocked."""
    sides = F.normalize(torch.randn(2, batch, dim, generator=torch_generator("scale")), dim=-1)
    scale = torch.tensor(14.0, requires_grad=True)
    found = []
    for form in FORMS:
        for repeat in range(1 + LOSSES):
            if repeat == 1:  # the first one is not timed
                start = time.process_time()
            image, text = (side.clone().requires_grad_() for side in sides)
            info_nce(image, text, scale, form=form).backward()  # type: ignore[no-untyped-call]
            correct_matches(image[:ACCURACY_ROWS], text, world=World())
        found.append((time.process_time() - start) / (LOSSES * batch**2))
    return found[0], found[1]


def _link_costs() -> list[float]:
    """CPU seconds of one rank per exchange with another: gather, reduce and shift, each of both sizes."""
    costs = []
    with process_group() as joined:
        world = replace(joined, equal_batches=True)
        for call in (_gather, World.sum, _shift):
            for size, count in zip(SIZES, REPEATS, strict=True):
                numbers = torch.zeros(size // 4)
                call(world, numbers)
                world.barrier()
                start = time.process_time()
                for _ in range(count):
                    call(world, numbers)
                costs.append((time.process_time() - start) / count)
    return costs


def _gather(world: World, numbers: torch.Tensor) -> object:
    """Of so many numbers over all ranks."""
    return world.gather(numbers[: len(numbers) // world.size])


def _shift(world: World, numbers: torch.Tensor) -> object:
    return world.ring_shift(numbers)()
