"""The model of a step counts what ranks really send, and its constants are found again."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from mmssl.config import load_config
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import info_nce
from mmssl.losses.logits import correct_matches
from scripts.bench import scale_gpus
from scripts.bench.scale import SIZES, Training, bench_scale, fit, fit_links
from scripts.bench.scale_model import Exchange, Link, Links, Machine, Work, step_seconds, step_terms
from tests.helpers.ranks import on_ranks

FREE = Link(0.0, 0.0)
NOTHING = Links(FREE, FREE, FREE)


def machine(links: Links = NOTHING, **changes: Any) -> Machine:
    """A machine on which only what is named costs anything."""
    nothing = Machine(0.0, 0.0, 0.0, 0.0, 0.0, links, links, node=1024, device="cpu")
    return replace(nothing, **changes)


def sent(world: World, ring: bool, rows: int, dim: int) -> dict[str, float]:
    """Exchanges, and bytes that this rank sends, in a loss with its accuracy; forward and backward.

    The bytes of collectives are those of the ring: in W - 1 rounds a rank passes on one of W parts, twice for a sum.
    """
    counts: dict[str, float] = dict.fromkeys(("gathers", "gathered", "reductions", "reduced", "shifts", "shifted"), 0)
    gather, reduce, swap = dist.all_gather_into_tensor, dist.all_reduce, dist.batch_isend_irecv

    def counted_gather(out: torch.Tensor, own: torch.Tensor) -> Any:
        counts["gathers"] += 1
        counts["gathered"] += sum(own.nbytes for _ in range(world.size - 1))
        return gather(out, own)

    def counted_reduce(x: torch.Tensor, *arguments: Any) -> Any:
        counts["reductions"] += 1
        counts["reduced"] += 2 * sum(x.nbytes / world.size for _ in range(world.size - 1))
        return reduce(x, *arguments)

    def counted_swap(messages: list[dist.P2POp]) -> Any:
        counts["shifts"] += 1
        counts["shifted"] += sum(m.tensor.nbytes for m in messages if m.op is dist.isend)
        return swap(messages)

    world = replace(world, equal_batches=True, ring=ring)
    generator = torch.Generator().manual_seed(world.rank)
    image, text = (F.normalize(torch.randn(rows, dim, generator=generator)).requires_grad_() for _ in range(2))
    with (
        mock.patch.object(dist, "all_gather_into_tensor", counted_gather),
        mock.patch.object(dist, "all_reduce", counted_reduce),
        mock.patch.object(dist, "batch_isend_irecv", counted_swap),
    ):
        info_nce(image, text, torch.tensor(10.0, requires_grad=True), world=world).backward()  # type: ignore[no-untyped-call]
        correct_matches(image, text, world=world)
    return counts


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_bytes_and_hops_are_those_that_ranks_send(exchange: Exchange, ranks: int) -> None:
    """Messages of the loss on gloo processes, counted where they are sent, are the model's, forward and backward."""
    work = Work(6 * ranks, ranks, 5, weights=0, exchange=exchange)
    for found in on_ranks(ranks, sent, exchange == "ring", 6, 5):

        def seconds(**links: Link) -> float:
            return step_terms(work, machine(replace(NOTHING, **links))).exchange

        assert seconds(gather=Link(0, 1)) == found["gathered"]
        assert seconds(gather=Link(1, 0)) == found["gathers"] * (ranks - 1)
        assert seconds(reduce=Link(0, 1)) == pytest.approx(found["reduced"])
        assert seconds(reduce=Link(1, 0)) == found["reductions"] * 2 * (ranks - 1)
        assert seconds(shift=Link(0, 1)) == found["shifted"]
        assert seconds(shift=Link(1, 0)) == found["shifts"]


def test_constants_are_found_again() -> None:
    """A machine made up from constants gives costs from which fitting returns the same constants."""
    links = Links(Link(1e-4, 2e-9), Link(3e-4, 4e-9), Link(5e-4, 6e-9))
    true = Machine(0.05, 2e-3, 1e-8, 2e-8, 5e-4, links, links, node=2**31, device="cpu")
    seconds = [step_seconds(Work(batch, 1, 64, 1000), true) for batch in (128, 512)]
    found = fit((128, 512), seconds, true.load, (true.logit, true.blocked_logit))(NOTHING)
    assert [found.step, found.sample] == pytest.approx([true.step, true.sample])
    pairs = zip((links.gather, links.reduce, links.shift), (0.5, 1.0, 1.0), (1, 2, 1), strict=True)
    costs = [link.hop * hops + link.byte * share * size for link, share, hops in pairs for size in SIZES]
    again = fit_links(costs)
    for name in ("gather", "reduce", "shift"):
        link, other = getattr(again, name), getattr(links, name)
        assert [link.hop, link.byte] == pytest.approx([other.hop, other.byte])


def test_a_shared_core_adds_up_and_devices_overlap() -> None:
    """Two ranks on one core take twice the time of one rank; devices hide the loader and the gradients' reduction, as
    long as these are shorter than what hides them."""
    work = Work(128, 2, 64, weights=10)
    assert step_seconds(work, machine(step=1.0, sample=0.5, load=0.25)) == 2 * (1 + 64 * 0.5 + 64 * 0.25)
    reduce = replace(NOTHING, reduce=Link(0.0, 1.0))
    device = machine(reduce, step=1.0, sample=3.0, device="cuda")
    only_gradients = replace(work, dim=0)
    sums = 3 * 4 * 128 + 4  # of the loss's columns, and the number of pairs
    assert step_seconds(only_gradients, device) == 1 + 64 * 3 + sums
    assert step_seconds(replace(only_gradients, weights=100), device) == 1 + 64 * 3 + sums + (400 - 128)
    assert step_seconds(only_gradients, replace(device, load=100.0)) == 6400


def test_micro_batches_repeat_the_forward_pass_and_large_losses_their_logits() -> None:
    """GradCache costs a third more; 4 Mi logits per rank on a CPU, and any number on a ring, are computed in blocks."""
    assert step_seconds(Work(128, 1, 8, 0, micro_batch=32), machine(sample=3.0)) == 128 * 4
    costs = machine(logit=1.0, blocked_logit=10.0)
    assert step_terms(Work(1024, 1, 8, 0), costs).loss == 2**20
    assert step_terms(Work(2048, 1, 8, 0), costs).loss == 10 * 2**22
    assert step_terms(Work(1024, 2, 8, 0, "ring"), costs).loss == 10 * 2**19


def test_gpus_of_many_nodes_send_over_the_network() -> None:
    """Eight GPUs use NVLink alone. Of 64, a ring crosses each node's border over one adapter, ten times slower than a
    ring of collectives that uses all eight; of a gather's 63 hops 7 are between nodes."""
    projection = scale_gpus.Projection(1e9, 1000, 512, utilisation=0.5, load=1e-3, micro_batch=10**9)
    costs = projection.machine()
    one, many = (Work(2**15, count, 512, 1000) for count in (8, 64))
    hops = 2 * (56 * scale_gpus.WITHIN_RING + 7 * scale_gpus.ACROSS_RING)
    tree = 5 * 2 * (7 * scale_gpus.WITHIN_TREE + 3 * scale_gpus.ACROSS_TREE)
    moved = 63 / 64 * (2**15 * (4 * 2048 + 2 * 12) + 2 * 4)
    rate = 8 * scale_gpus.NIC * scale_gpus.LINE_RATE
    assert step_terms(many, costs).exchange == pytest.approx(hops + tree + moved / rate)
    assert step_terms(replace(one, exchange="ring"), costs).exchange == pytest.approx(
        (3 * 7 + 2 * 8) * scale_gpus.WITHIN_RING
        + 2 * 7 * scale_gpus.WITHIN_TREE
        + ((3 * 7 + 8) * 2**12 * 2048 + (2 * 7 + 8) * 2**12 * 4 + 7) / (scale_gpus.NVLINK * scale_gpus.LINE_RATE)
    )
    slower = step_terms(replace(many, exchange="ring"), costs).exchange
    assert slower > 2**15 * 2048 * 3 / (scale_gpus.NIC * scale_gpus.LINE_RATE)


def test_a_configuration_is_projected() -> None:
    """The table has a line per batch and number of GPUs, with the weights of the configuration."""
    text = scale_gpus.project(load_config("configs/ci_tiny.yaml", []), 0.4, 500.0, 2048).text([1024], [1, 8])
    assert len(text.splitlines()) == 4
    assert "64 dimensions" in text
    assert text.splitlines()[-1].split()[:3] == ["1024", "8", "128"]


def test_batches_that_give_no_model_are_refused() -> None:
    """One batch size gives no cost per pair, and batches divide by the ranks."""
    training = Training("configs/ci_tiny.yaml", [], 1)
    with pytest.raises(UserError, match="two --batch"):
        bench_scale(training, [1], [64], 1, print)
    with pytest.raises(UserError, match="divide"):
        bench_scale(training, [3], [64, 128], 1, print)


@pytest.mark.slow
def test_the_whole_measurement() -> None:
    """Trainings on one and two processes are measured and predicted, each with a line."""
    found = bench_scale(Training("configs/ci_tiny.yaml", [], 2), [1, 2], [32, 64, 128], 1, print)
    assert [(c.work.ranks, c.work.batch, c.work.exchange) for c in found.checks] == [
        (1, 32, "gather"),
        (1, 64, "gather"),
        (2, 32, "gather"),
        (2, 64, "gather"),
        (2, 128, "gather"),
        (2, 128, "ring"),
    ]
    assert all(check.seconds > 0 for check in found.checks)
    assert found.worst > 0
    assert len(found.text().splitlines()) == 4 + len(found.checks) + 1
