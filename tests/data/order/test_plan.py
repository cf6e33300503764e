"""The order is a permutation, the same for every split of the work, and addressable at any point."""

import itertools
import json
import pickle
import tracemalloc
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from mmssl.data.order import (
    Mixture,
    PlannedSource,
    Position,
    Slices,
    StreamPlan,
    default_lanes,
    default_slice_bytes,
    shuffled,
)
from mmssl.data.order.epoch import EpochOrder
from mmssl.errors import UserError

GOLDEN = Path(__file__).parent / "golden_order.json"
Pair = tuple[int, int]


def planned(counts: list[int], slice_bytes: int = 3, weight: float = 1.0) -> PlannedSource:
    """A source whose samples have one byte each."""
    return PlannedSource(Slices.cut(counts, counts, slice_bytes), weight, f"{counts}")


def take(plan: StreamPlan, position: Position, batch_size: int, world_size: int = 1, workers: int = 1) -> list[Pair]:
    """(source, sample) of a global batch, joined from the parts of ranks and workers."""
    batch: list[Pair] = []
    for rank in range(world_size):
        low, high = batch_size * rank // world_size, batch_size * (rank + 1) // world_size
        bounds = [low + (high - low) * w // workers for w in range(workers + 1)]
        for start, stop in pairwise(bounds):
            part: list[Pair | None] = [None] * (stop - start)
            for run in plan.runs(position, batch_size, start, stop):
                for slot, number in zip(run.slots.tolist(), plan.ids(run).tolist(), strict=True):
                    assert part[slot] is None
                    part[slot] = (run.source, number)
            batch += [pair for pair in part if pair is not None]
    assert len(batch) == batch_size
    return batch


def batches(plan: StreamPlan, batch_size: int, count: int, position: Position = Position()) -> list[list[Pair]]:  # noqa: B008
    """The next global batches."""
    found = []
    for _ in range(count):
        position = plan.start(position, batch_size)
        found.append(take(plan, position, batch_size))
        position = plan.after(position, batch_size)
    return found


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda c: sum(c) >= 24),
    lanes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    block=st.integers(1, 9),
    slice_bytes=st.integers(1, 40),
    depth=st.integers(1, 2),
    seed=st.integers(0, 5),
)
def test_every_sample_at_most_once_an_epoch_and_the_tail_as_promised(
    counts: list[int], lanes: int, block: int, slice_bytes: int, depth: int, seed: int
) -> None:
    """For all settings, an epoch repeats no sample and drops fewer than B + L, different ones each epoch."""
    plan = StreamPlan([planned(counts, slice_bytes)], seed=seed, lanes=lanes, block=block)
    size, total = lanes * depth, sum(counts)
    per_epoch = plan.batches_per_epoch(size)
    found = batches(plan, size, 2 * per_epoch)
    for epoch in (found[:per_epoch], found[per_epoch:]):
        ids = [number for batch in epoch for _, number in batch]
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(range(total))
        assert total - len(ids) < size + lanes


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda c: sum(c) >= 48),
    lanes=st.sampled_from([1, 2, 3, 4, 6]),
    second=st.booleans(),
    world_size=st.integers(1, 8),
    workers=st.integers(1, 5),
)
def test_global_batches_do_not_depend_on_world_and_workers(
    counts: list[int], lanes: int, second: bool, world_size: int, workers: int
) -> None:
    """Split among any ranks and workers, also inside lanes, the parts form the same batches; in mixtures too."""
    sources = [planned(counts)] + ([planned([30], weight=0.5)] if second else [])
    plan = StreamPlan(sources, seed=1, lanes=lanes, block=2)
    position = Position()
    for _ in range(4):
        position = plan.start(position, 24)
        assert take(plan, position, 24, world_size, workers) == take(plan, position, 24)
        position = plan.after(position, 24)


@pytest.mark.parametrize("size", [8, 12, 16])
@pytest.mark.parametrize("mixed", [False, True])
def test_resuming_at_every_step_goes_on_with_the_same_order(mixed: bool, size: int) -> None:
    """A new plan and a JSON state give the rest of the uninterrupted order, into the next epoch; also if a batch of
    a mixture spans two epochs."""
    sources = [planned([20, 33, 5]), *([planned([17], weight=3.0)] if mixed else [])]
    plan = StreamPlan(sources, seed=3, lanes=4, block=3)
    whole, position = batches(plan, size, 20), Position()
    for step in range(20):
        state = json.dumps(plan.state(position))
        assert len(state) < 200
        again = StreamPlan(sources, seed=3, lanes=4, block=3)
        assert batches(again, size, 20 - step, again.position(json.loads(state))) == whole[step:]
        position = plan.after(plan.start(position, size), size)


def test_another_batch_size_goes_on_where_the_first_stopped() -> None:
    """After 3 batches of 8, batches of 16 hold what the next batches of 8 would have, lane by lane."""
    plan = StreamPlan([planned([50, 60])], seed=0, lanes=4, block=2)
    small, large = batches(plan, 8, 9), batches(plan, 16, 3, Position(0, 6))
    for i, batch in enumerate(large):
        lanes = [
            small[3 + 2 * i][2 * lane : 2 * lane + 2] + small[4 + 2 * i][2 * lane : 2 * lane + 2] for lane in range(4)
        ]
        assert batch == [pair for lane in lanes for pair in lane]


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or seed has a different order and drops a different tail."""
    plan, other = (StreamPlan([planned([997], 5)], seed=seed, lanes=8, block=4) for seed in (0, 1))
    count = plan.batches_per_epoch(64)
    first, second = (batches(plan, 64, count, Position(epoch, 0)) for epoch in (0, 1))
    third = batches(other, 64, count)
    orders = [np.array(b)[:, :, 1].ravel() for b in (first, second, third)]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(orders[a] == orders[b]) < 0.02
        assert set(orders[a].tolist()) != set(orders[b].tolist())


def test_order_is_the_golden_one() -> None:
    """The order of one source and of a mixture equals the recorded one: no random generator may change."""
    golden = json.loads(GOLDEN.read_text())
    one = StreamPlan([planned([7, 30, 0, 11, 25], 4)], seed=golden["seed"], lanes=3, block=2)
    two = StreamPlan([planned([40], 4, 2.0), planned([9, 4], 1, 1.0)], seed=golden["seed"], lanes=3, block=2)
    assert [[number for _, number in b] for b in batches(one, 6, 15)] == golden["one_source"]
    assert [[list(pair) for pair in b] for b in batches(two, 6, 10)] == golden["mixture"]
    assert [one.fingerprint, two.fingerprint] == golden["fingerprints"]


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("lanes", [1, 3, 7])
def test_order_is_its_definition_written_out(lanes: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permuted slices joined to one list, cut into lanes, and shuffled in blocks of slices: the order, which keeps
    none of these lists, is the same. Cutting and adding up go in several rounds."""
    monkeypatch.setattr("mmssl.data.order.epoch._TOGETHER", 2)
    rng = np.random.default_rng(lanes)
    counts = rng.integers(0, 40, 60)
    slices = Slices.cut(counts.tolist(), (counts * 7).tolist(), 30)
    assert len(slices) > 4 * 64
    cuts = [np.array_split(np.arange(n), min(n, max(1, -(-7 * n // 30)))) for n in counts if n]
    assert sorted(map(len, itertools.chain(*cuts))) == sorted(np.diff(slices.bounds))
    permutation = shuffled(len(slices), 1, 2, "slices")
    joined = [range(slices.bounds[i], slices.bounds[i + 1]) for i in permutation]
    order, ends = EpochOrder(slices, (1, 2), lanes, block), np.cumsum([len(run) for run in joined])
    samples = np.array(list(itertools.chain(*joined)))
    for lane in range(lanes):
        begin, stop = slices.samples * lane // lanes, slices.samples * (lane + 1) // lanes
        first = int(np.searchsorted(ends, begin, side="right"))
        expected: list[int] = []
        for number, head in enumerate(range(first, len(joined), block)):
            low, high = max(begin, ends[head] - len(joined[head])), min(stop, ends[min(head + block, len(joined)) - 1])
            if low < high:
                part = samples[low:high]
                expected += part[shuffled(len(part), 1, 2, "block", lane, number)].tolist()
        assert order.addresses(lane, 0, stop - begin).tolist() == expected


def test_slices_cover_every_sample_once() -> None:
    """Slices are contiguous, not empty, within one shard, and close to the requested size."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, 200)
    sizes = counts * rng.integers(1, 1000, 200)
    slices = Slices.cut(counts.tolist(), sizes.tolist(), 5000)
    lengths = np.diff(slices.bounds)
    assert lengths.min() >= 1
    assert slices.bounds[0] == 0
    assert slices.samples == counts.sum()
    borders = np.cumsum(counts)
    shard_of_first = np.searchsorted(borders, slices.bounds[:-1], side="right")
    shard_of_last = np.searchsorted(borders, slices.bounds[1:] - 1, side="right")
    assert (shard_of_first == shard_of_last).all()
    assert (lengths * (sizes / np.maximum(counts, 1))[shard_of_first]).max() <= 5000 + 1000


def test_small_sets_are_shuffled_uniformly() -> None:
    """2,000 samples in 3 shards: the places of a shard's samples over 40 epochs are uniform
    (Kolmogorov-Smirnov)."""
    counts, sizes = [700, 650, 650], [700 * 9000, 650 * 9000, 650 * 9000]
    source = PlannedSource(Slices.cut(counts, sizes, default_slice_bytes(sum(sizes))), 1.0, "x")
    plan = StreamPlan([source], seed=0, lanes=64, block=8)
    places, neighbours = [], []
    for epoch in range(40):
        order = np.concatenate([np.array(b)[:, 1] for b in batches(plan, 64, 31, Position(epoch, 0))])
        places.append(np.flatnonzero(order < 700) / len(order))
        neighbours.append(np.mean(np.abs(np.diff(order)) <= 5))
    assert kstest(np.concatenate(places), "uniform").pvalue > 0.01
    # Of a uniform permutation of 2,000, 10 of 1,999 others are within 5.
    assert abs(np.mean(neighbours) - 10 / 1999) < 0.001


def test_shuffled_is_a_permutation_and_uniform() -> None:
    """Every permutation of 4 comes up as often as the others (chi-square below its 99.9 % point)."""
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2400):
        order = tuple(shuffled(4, seed, "x").tolist())
        seen[order] = seen.get(order, 0) + 1
    assert all(sorted(order) == [0, 1, 2, 3] for order in seen)
    assert len(seen) == 24
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 49.7
    assert shuffled(0, 1).tolist() == []


def test_ten_million_samples_are_planned_within_bounds() -> None:
    """10,000 shards of 100 MB, a million slices: two epochs' plans, the fingerprint and a batch in each take under
    40 MB, of which 16 stay."""
    counts, sizes = [1000] * 10_000, [100_000_000] * 10_000
    tracemalloc.start()
    slices = Slices.cut(counts, sizes, default_slice_bytes(sum(sizes)))
    plan = StreamPlan([PlannedSource(slices, 1.0, "x")], seed=0, lanes=64, block=8)
    assert plan.fingerprint
    take(plan, Position(0, 1000), 4096)
    take(plan, Position(1, 1000), 4096)
    kept, peak = tracemalloc.get_traced_memory()
    assert peak < 40e6
    assert kept < 18e6
    tracemalloc.stop()


@pytest.mark.parametrize("weights", [[1, 1], [3, 1], [0.5, 0.3, 0.2], [1, 2, 3, 4], [0.999, 0.001], [1e-6, 1, 1]])
def test_mixture_has_exact_shares_in_every_lane(weights: list[float]) -> None:
    """Each T depths of each lane hold each source by its weight; the prefix counts equal counting."""
    mixture = Mixture(weights)
    length = len(mixture.pattern)
    shares = np.array(weights) / sum(weights)
    for lane in (0, 1, 5, 63):
        picked = mixture.sources(lane, 0, 3 * length + 8)
        counts = np.bincount(picked[:length], minlength=len(weights))
        assert counts.min() >= 1
        assert np.abs(counts / length - shares).max() <= (1e-9 if min(shares) > 1e-4 else 1 / 4096)
        for source, depth in product(range(len(weights)), (0, 1, 7, length, length + 3, 2 * length)):
            assert mixture.count(source, lane, depth) == np.count_nonzero(picked[:depth] == source)


@pytest.mark.parametrize("lanes", [1, 4, 32])
def test_mixed_batches_are_close_to_the_shares(lanes: int) -> None:
    """Every batch of 32 of a 51:49 mixture holds 16 or so of each, however many lanes it has."""
    plan = StreamPlan([planned([400], weight=0.51), planned([400], weight=0.49)], seed=0, lanes=lanes, block=2)
    for batch in batches(plan, 32, 50):
        assert abs(sum(source == 0 for source, _ in batch) - 16.32) < 2


def test_mixture_reads_each_source_once_per_its_own_epoch() -> None:
    """A small source with a large weight repeats; each time it gives every sample (but N mod L) once."""
    plan = StreamPlan([planned([103], weight=1.0), planned([26], weight=2.0)], seed=0, lanes=4, block=2)
    seen: list[list[int]] = [[], []]
    for batch in batches(plan, 12, 60):
        for source, number in batch:
            seen[source].append(number)
    assert [len(ids) for ids in seen] == [240, 480]
    runs: dict[tuple[int, int], list[int]] = {}
    position = Position()
    for _ in range(60):
        position = plan.start(position, 12)
        for run in plan.runs(position, 12, 0, 12):
            runs.setdefault((run.source, run.epoch), []).extend(plan.ids(run).tolist())
        position = plan.after(position, 12)
    for (source, epoch), ids in runs.items():
        assert len(set(ids)) == len(ids)
        if (source == 0 and epoch < 2) or (source == 1 and epoch < 19):
            assert len(ids) == (100 if source == 0 else 24)


def test_stand_ins_are_others_of_the_same_block_first() -> None:
    """No stand-in is the sample itself; first all others of its block, each once, then all others of the
    source."""
    plan = StreamPlan([planned([60], 5)], seed=0, lanes=2, block=3)
    (run,) = plan.runs(Position(0, 4), 2, 0, 1)
    (bad,) = plan.ids(run).tolist()
    block, place = plan.order(0, 0).block(0, 4)
    assert block[place] == bad
    found = list(plan.stand_ins(run, 4, 100))
    others = len(block) - 1
    assert set(found[:others]) == set(block.tolist()) - {bad}
    assert len(found[:others]) == others
    assert sorted(found) == sorted(set(range(60)) - {bad})
    assert list(plan.stand_ins(run, 4, 2)) == found[:2]


def test_defaults() -> None:
    """Slices: single samples for small sets, then growing to 8 MiB, larger for remote sets; lanes; units of 8 MiB."""
    sizes = [n << 20 for n in (1, 64, 65, 1 << 14, 1 << 20, 1 << 24)]
    assert [default_slice_bytes(n) for n in sizes] == [1, 1, 16 << 10, 16 << 10, 1 << 20, 8 << 20]
    assert [default_slice_bytes(n, True) for n in sizes] == [1, 1, 4 << 20, 4 << 20, 8 << 20, 8 << 20]
    assert [default_lanes(n) for n in (1, 7, 64, 96, 97, 256, 4096)] == [1, 7, 64, 48, 1, 64, 64]
    units = [Slices.cut([100], [100 << 20], n).unit(100 << 20) for n in (1, 4 << 20, 8 << 20, 1 << 30)]
    assert units == [8, 2, 1, 1]


def test_plan_survives_pickling() -> None:
    """The copy in a worker process gives the same batches."""
    plan = StreamPlan([planned([50]), planned([9])], seed=2, lanes=3, block=2)
    assert batches(pickle.loads(pickle.dumps(plan)), 6, 9) == batches(plan, 6, 9)


def test_batches_that_do_not_fit_are_refused() -> None:
    """A batch larger than the data, or not divisible by the lanes, is a UserError."""
    plan = StreamPlan([planned([30])], seed=0, lanes=4, block=2)
    plan.check(28)
    with pytest.raises(UserError, match="takes 32 samples of a source that has 30"):
        plan.check(32)
    with pytest.raises(UserError, match="not divisible by the stream's 4 lanes"):
        plan.check(6)
    mixed = StreamPlan([planned([300]), planned([10])], seed=0, lanes=4, block=2)
    mixed.check(16)
    with pytest.raises(UserError, match="of a source that has 10"):
        mixed.check(32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fingerprint": "0"}, "the shards"),
        ({"seed": 9}, "the seed changed"),
        ({"version": 0}, "another version"),
        ({"depth": -1}, "damaged"),
        ({"depth": "1"}, "damaged"),
        ({"epoch": None}, "damaged"),
        ({"depth": 10**9}, "damaged"),
    ],
)
def test_foreign_states_are_refused(change: dict[str, object], says: str) -> None:
    """A state of other data, of another seed or with invalid values is a UserError, not a wrong order."""
    plan = StreamPlan([planned([30])], seed=0, lanes=4, block=2)
    with pytest.raises(UserError, match=says):
        plan.position({**plan.state(Position(1, 2)), **change})
    with pytest.raises(UserError, match="written when the shards had no index"):
        plan.position({key: value for key, value in plan.state(Position()).items() if key != "fingerprint"})
