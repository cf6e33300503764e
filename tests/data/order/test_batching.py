"""Orders that keep neighbours together, or equal values apart, keep every promise of the order."""

import json
import pickle
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmssl.data import Source
from mmssl.data.order import Batching, DistinctValues, NeighbourGroups, PlannedSource, Position, StreamPlan
from mmssl.errors import UserError
from mmssl.types import PipeCommand
from tests.data.order.test_plan import Pair, batches, planned, take
from tests.helpers.tars import toy_loader


def grouped(samples: int, group: int, seed: int = 0, weight: float = 1.0) -> PlannedSource:
    """A source whose groups are random ones."""
    line = np.random.default_rng(seed).permutation(samples)
    return planned([samples], weight=weight).with_batching(NeighbourGroups(line, group))


def apart(values: Sequence[int], batch_size: int) -> PlannedSource:
    """A source whose samples have these values."""
    return planned([len(values)]).with_batching(DistinctValues(np.array(values), batch_size))


def whole_groups(source: PlannedSource, batch: list[Pair], number: int = 0) -> int:
    """The groups of a source that lie in a batch completely."""
    batching = source.batching
    assert isinstance(batching, NeighbourGroups)
    count = len(batching.line) // batching.group
    found = {sample for which, sample in batch if which == number}
    groups = batching.line[: count * batching.group].reshape(count, batching.group)
    return sum(found.issuperset(members) for members in groups.tolist())


@settings(deadline=None, max_examples=80)
@given(
    group=st.integers(2, 6),
    lanes=st.sampled_from([1, 2, 3, 4]),
    depth=st.integers(1, 2),
    extra=st.integers(0, 70),
    seed=st.integers(0, 5),
)
def test_batches_are_made_of_whole_groups(group: int, lanes: int, depth: int, extra: int, seed: int) -> None:
    """For all settings: an epoch repeats no sample and leaves out fewer than B + L g, and its batches are whole groups,
    but for the N mod g places that samples without a full group take."""
    size = lanes * group * depth
    source = grouped(size + extra, group, seed)
    plan = StreamPlan([source], seed=seed, lanes=lanes, block=2)
    plan.check(size)
    per_epoch = plan.batches_per_epoch(size)
    found = batches(plan, size, 2 * per_epoch)
    for epoch in (found[:per_epoch], found[per_epoch:]):
        ids = [number for batch in epoch for _, number in batch]
        assert len(set(ids)) == len(ids)
        assert source.samples - len(ids) < size + lanes * group
        kept = sum(whole_groups(source, batch) for batch in epoch)
        assert kept >= len(ids) // group - source.samples % group
        if source.samples % group == 0:
            assert kept == len(ids) // group


def test_samples_without_a_full_group_are_seen_and_others_left_out_in_turn() -> None:
    """29 samples in groups of 4 and batches of 8: the one that is left over is in every batch's reach, and over 40
    epochs every sample is used about equally often."""
    plan = StreamPlan([grouped(29, 4)], seed=1, lanes=2, block=2)
    seen = Counter(n for epoch in range(40) for b in batches(plan, 8, 3, Position(epoch)) for _, n in b)
    assert set(seen) == set(range(29))
    assert min(seen.values()) >= 20


def every_order() -> dict[str, list[PlannedSource]]:
    """Sources whose batches of 24 are chosen: one of groups, two of groups with weights, and one of values apart."""
    return {
        "groups": [grouped(107, 3)],
        "mixture": [grouped(107, 3, weight=2.0), grouped(40, 3)],
        "apart": [apart([n % 37 for n in range(107)], 24)],
    }


@pytest.mark.parametrize("name", every_order())
@pytest.mark.parametrize(("world_size", "workers"), [(2, 1), (3, 2), (8, 3)])
def test_global_batches_do_not_depend_on_world_and_workers(name: str, world_size: int, workers: int) -> None:
    """Split among ranks and workers, also inside groups, the parts form the same batches."""
    plan = StreamPlan(every_order()[name], seed=1, lanes=4, block=2)
    position = Position()
    for _ in range(9):
        position = plan.start(position, 24)
        assert take(plan, position, 24, world_size, workers) == take(plan, position, 24)
        position = plan.after(position, 24)


@pytest.mark.parametrize("name", every_order())
def test_resuming_at_every_step_goes_on_with_the_same_order(name: str) -> None:
    """A new plan, also one that was pickled, and a JSON state give the rest of the uninterrupted order, into the next
    epoch. Without the choice of batches the state is refused."""
    plan = StreamPlan(every_order()[name], seed=3, lanes=4, block=3)
    whole, position = batches(plan, 24, 12), Position()
    for step in range(12):
        state = json.loads(json.dumps(plan.state(position)))
        again = pickle.loads(pickle.dumps(StreamPlan(every_order()[name], seed=3, lanes=4, block=3)))
        assert batches(again, 24, 12 - step, again.position(state)) == whole[step:]
        position = plan.after(plan.start(position, 24), 24)
    plain = StreamPlan([planned([source.samples]) for source in plan.sources], seed=3, lanes=4, block=3)
    with pytest.raises(UserError, match=r"data\.batching"):
        plain.position(plan.state(position))


def test_mixtures_keep_groups_whole_and_exact() -> None:
    """In a 2:1 mixture every batch of 36 holds 12 complete groups of 3, 24 and 12 samples of the sources, and each
    source repeats no sample within its own epoch."""
    sources = [grouped(108, 3, weight=2.0), grouped(36, 3)]
    plan = StreamPlan(sources, seed=0, lanes=2, block=2)
    position, seen = Position(), list[tuple[int, int, int]]()
    for _ in range(12):
        position = plan.start(position, 36)
        batch = take(plan, position, 36)
        assert [sum(which == number for which, _ in batch) for number in (0, 1)] == [24, 12]
        assert [whole_groups(source, batch, number) for number, source in enumerate(sources)] == [8, 4]
        runs = plan.runs(position, 36, 0, 36)
        seen += [(run.source, run.epoch, number) for run in runs for number in plan.ids(run).tolist()]
        position = plan.after(position, 36)
    assert len(set(seen)) == len(seen) == 12 * 36
    epochs = Counter((source, epoch) for source, epoch, _ in seen)
    assert [epochs[0, 0], epochs[0, 1], epochs[1, 0], epochs[1, 1]] == [108, 108, 36, 36]


@settings(deadline=None, max_examples=80)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=30).filter(lambda counts: sum(counts) >= 12),
    lanes=st.sampled_from([1, 2, 3]),
    depth=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_equal_values_are_apart_wherever_possible(counts: list[int], lanes: int, depth: int, seed: int) -> None:
    """For all counts of equal values: an epoch uses every sample but fewer than B, none twice. No batch holds a value
    twice that has at most as many samples as there are batches, and of others only as many as must be."""
    values = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    size = lanes * depth
    source = apart(values.tolist(), size)
    plan = StreamPlan([source], seed=seed, lanes=lanes, block=2)
    plan.check(size)
    per_epoch = plan.batches_per_epoch(size)
    assert per_epoch == len(values) // size
    repeats = 0
    for epoch in range(2):
        found = [[number for _, number in batch] for batch in batches(plan, size, per_epoch, Position(epoch))]
        ids = [number for batch in found for number in batch]
        assert len(set(ids)) == len(ids) > len(values) - size
        used = Counter(values[ids].tolist())
        repeats = sum(size - len(set(values[batch].tolist())) for batch in found)
        assert repeats == sum(max(0, count - per_epoch) for count in used.values())
        for batch in found:
            for value, count in Counter(values[batch].tolist()).items():
                assert count <= -(-used[value] // per_epoch)
    batching = source.batching
    assert isinstance(batching, DistinctValues)
    assert repeats <= batching.repeats() == sum(max(0, count - per_epoch) for count in counts)
    assert ("no batch holds a value twice" in batching.describe()) == (batching.repeats() == 0)


@pytest.mark.parametrize("values", [list(range(60)), [n // 2 for n in range(60)]], ids=["different", "pairs"])
def test_samples_meet_by_chance_where_they_may(values: list[int]) -> None:
    """Over 600 epochs of 60 samples in batches of 10, each pair of samples with different values shares a batch as
    often as chance makes it, within five standard deviations. Two samples with one value are as far apart in the epoch
    as two of its batches are on average, (6 + 1) / 3."""
    plan = StreamPlan([apart(values, 10)], seed=2, lanes=5, block=2)
    met, places = np.zeros((60, 60)), list[dict[int, int]]()
    for epoch in range(600):
        places.append({})
        for batch in batches(plan, 10, 6, Position(epoch)):
            ids = [number for _, number in batch]
            met[np.ix_(ids, ids)] += 1
            places[-1].update(dict.fromkeys(ids, len(places[-1]) // 10))
    free = np.array(values)[:, None] != np.array(values)
    chance = 9 / free[0].sum()
    assert met[~free & ~np.eye(60, dtype=bool)].sum() == 0
    assert abs(met[free].mean() / 600 - chance) < 1e-9
    if values[0] == values[1]:
        gaps = [abs(found[n] - found[n + 1]) for found in places for n in range(0, 60, 2)]
        assert np.mean(gaps) == pytest.approx(7 / 3, abs=0.05)
    assert np.abs(met[free] - 600 * chance).max() < 5 * (600 * chance * (1 - chance)) ** 0.5


def test_epochs_and_seeds_differ() -> None:
    """Another epoch or seed puts other groups, and other samples, into a batch."""
    for choose in (lambda: grouped(240, 4), lambda: apart(list(range(240)), 24)):
        first, other = (StreamPlan([choose()], seed=seed, lanes=3, block=2) for seed in (0, 1))
        orders = [batches(first, 24, 10), batches(first, 24, 10, Position(1)), batches(other, 24, 10)]
        sets = [{frozenset(batch) for batch in order} for order in orders]
        assert not sets[0] & sets[1]
        assert not sets[0] & sets[2]


def test_stand_ins_are_all_others() -> None:
    """A bad sample is replaced by one half a lane away, and if need be by any other of the source."""
    for source in (grouped(60, 5), apart([n % 7 for n in range(60)], 20)):
        plan = StreamPlan([source], seed=0, lanes=2, block=3)
        (run,) = plan.runs(Position(0, 10), 20, 3, 4)
        (bad,) = plan.ids(run).tolist()
        found = list(plan.stand_ins(run, run.start, 100))
        assert sorted(found) == sorted(set(range(60)) - {bad})
        assert found[0] not in [number for _, number in take(plan, Position(0, 10), 20)]


def test_batches_that_do_not_hold_whole_groups_are_refused() -> None:
    """A lane whose part of the batch is no multiple of the group is a UserError that names a batch size."""
    plan = StreamPlan([grouped(200, 4)], seed=0, lanes=6, block=2)
    plan.check(24)
    with pytest.raises(UserError, match="multiple of 24, or fewer data.lanes"):
        plan.check(30)


@pytest.mark.parametrize("shard", ["http://nowhere.invalid/a.tar", PipeCommand("pipe:cat a.tar")])
def test_shards_that_are_not_on_a_disk_are_refused(shard: str) -> None:
    """Remote shards and commands are refused before anything is read from them."""
    with pytest.raises(UserError, match=f"the shards must be on a disk; .*: {shard}"):
        toy_loader([Source([shard])], batching=lambda source, indexes: NeighbourGroups(np.arange(4), 2))


@pytest.mark.parametrize("change", ["line", "group", "values", "batch_size"])
def test_fingerprints_tell_other_choices(change: str) -> None:
    """Other groups, values or sizes give another fingerprint."""
    line, values = np.arange(12), np.arange(12) % 5
    base: dict[str, Batching] = {
        "line": NeighbourGroups(line, 3),
        "group": NeighbourGroups(line, 3),
        "values": DistinctValues(values, 4),
        "batch_size": DistinctValues(values, 4),
    }
    other: dict[str, Batching] = {
        "line": NeighbourGroups(line[::-1], 3),
        "group": NeighbourGroups(line, 4),
        "values": DistinctValues(values // 2, 4),
        "batch_size": DistinctValues(values, 6),
    }
    assert base[change].fingerprint != other[change].fingerprint
