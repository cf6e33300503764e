"""Samples held out from training by a rule: a pure function of each sample."""

import json
import tarfile
from importlib import import_module
from itertools import chain, islice
from pathlib import Path

import pytest

from mmssl.apps.autoconfig.preparation import copy_samples
from mmssl.config import HoldOutConfig
from mmssl.data import TrainLoader, iter_samples
from mmssl.data.shards import SampleLimits, ShardIndex, index_shards
from mmssl.data.sources import hold_out, iter_captions
from mmssl.data.sources.hold_out import is_held_out
from mmssl.errors import UserError
from mmssl.types import Sample
from tests.helpers.tars import pair, tar_bytes, toy_stream, write_shards

COUNTS = [40, 1, 90, 0, 69]
RULE = HoldOutConfig(share=0.2)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """200 pairs in 5 shards, with keys behind long names and a sample without caption among them."""
    paths = write_shards(tmp_path, COUNTS)
    files = [file for number in range(40) for file in pair(f"{'long/' * 60}{number}")]
    Path(paths[0]).write_bytes(tar_bytes([*files[:20], ("alone.jpg", b"x"), *files[20:]], tarfile.PAX_FORMAT))
    return paths


def indexes(shards: list[str]) -> list[ShardIndex]:
    return index_shards(shards, SampleLimits())


def contents(shards: list[str]) -> dict[str, tuple[bytes, str]]:
    return {s.key: (s.image, s.caption) for s in iter_samples(shards, on_bad=lambda bad: None)}


def keys(batches: list[list[str]]) -> list[str]:
    return [key.rpartition(":")[2] for batch in batches for key in batch]


def batches(stream: TrainLoader, count: int) -> list[list[str]]:
    return [list(batch.keys) for batch in islice(stream, count)]


def test_what_is_trained_on_and_what_is_held_out_are_disjoint_and_together_all(
    shards: list[str], tmp_path: Path
) -> None:
    """The keys of three epochs of the stream, and of the copies that an evaluation reads, share none and are those of
    the shards; the copies have the bytes of the originals; about a fifth is held out. Another number of samples of
    another run leaves no copy behind."""
    whole = contents(shards)
    held_out = hold_out(indexes(shards), RULE)[1]
    copy_samples([*held_out, *held_out], tmp_path / "run", "held-out")
    copies = copy_samples(held_out, tmp_path / "run", "held-out")
    assert sorted((tmp_path / "run").iterdir()) == copies
    found = contents([str(path) for path in copies])
    stream = toy_stream(shards, batch_size=8, hold_out=RULE)
    trained = set(keys(batches(stream, 3 * stream.batches_per_epoch)))
    assert trained | found.keys() == whole.keys()
    assert not trained & found.keys()
    assert found == {key: whole[key] for key in found}
    assert 0.1 < len(found) / len(whole) < 0.3
    assert stream.samples == len(whole) - len(found)


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_order_is_exact_with_any_number_of_processes_and_after_a_resume(shards: list[str], world_size: int) -> None:
    """Global batches across the end of an epoch are those of one process, also from a state in the middle; a state of
    another rule is refused."""
    expected = batches(toy_stream(shards, batch_size=8, hold_out=RULE), 30)
    ranks = [toy_stream(shards, batch_size=8, hold_out=RULE, rank=r, world_size=world_size) for r in range(world_size)]
    assert [list(chain(*parts)) for parts in zip(*(batches(rank, 9) for rank in ranks), strict=True)] == expected[:9]
    resumed = toy_stream(shards, batch_size=8, hold_out=RULE)
    state = json.loads(json.dumps(ranks[0].state_dict()))
    resumed.load_state_dict(state)
    assert batches(resumed, 21) == expected[9:]
    with pytest.raises(UserError, match=r"data\.hold_out.*changed"):
        toy_stream(shards, batch_size=8, hold_out=HoldOutConfig(share=0.3)).load_state_dict(state)


def test_the_choice_depends_on_the_key_alone(shards: list[str], tmp_path: Path) -> None:
    """In other shards and another order the same samples are held out; a larger fraction holds out these and more; none
    is held out of nothing; no caption of one reaches the training of a tokenizer."""
    whole = contents(shards)
    one = tmp_path / "one" / "all.tar"
    one.parent.mkdir()
    one.write_bytes(tar_bytes((file for key in reversed(whole) for file in pair(key)), tarfile.PAX_FORMAT))

    def chosen(paths: list[str], share: float) -> set[str]:
        kept = hold_out(indexes(paths), HoldOutConfig(share=share))[1]
        copies = [str(path) for path in copy_samples(kept, tmp_path / "copies", "x")]
        return contents(copies).keys() if copies else set()

    assert chosen(shards, 0.2) == chosen([str(one)], 0.2) < chosen(shards, 0.5)
    assert chosen(shards, 0.0) == set()
    read = set(iter_captions([str(one)], ["{txt}"], held_out=RULE))
    assert read == {f"caption of {key}" for key in whole.keys() - chosen(shards, 0.2)}


@pytest.mark.parametrize("group", [None, "patient"])
def test_the_hashes_are_read_from_beside_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str | None
) -> None:
    """A second start computes no hash and divides the shards alike. Hashes of another group, of a shard that
    changed since, and damaged ones are computed anew, also where nothing can be written."""
    path, rule = str(tmp_path / "0.tar"), HoldOutConfig(share=0.3, group=group)
    fields = json.dumps({"patient": 7, "site": 1}).encode()

    def write(count: int) -> None:
        files = [file for n in range(count) for file in (*pair(str(n)), (f"{n}.json", fields))]
        Path(path).write_bytes(tar_bytes(files))

    def parts(rule: HoldOutConfig) -> list[list[int]]:
        return [[out.ordinal for out in part[0].left_out] for part in hold_out(indexes([path]), rule)]

    write(50)
    first, stored = parts(rule), Path(f"{path}.hashes")
    with monkeypatch.context() as patch:
        module = import_module("mmssl.data.sources.hold_out")
        patch.setattr(module, "sample_keys", None)
        patch.setattr(module, "_number", None)
        assert parts(rule) == first
    content = stored.read_bytes()
    stored.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert parts(rule) == first
    assert stored.read_bytes() == content
    parts(HoldOutConfig(share=0.3, group="site"))
    assert parts(rule) == first
    write(60)
    assert sum(map(len, parts(rule))) == 60
    stored.unlink()
    stored.mkdir()
    assert sum(map(len, parts(rule))) == 60


def test_a_group_is_held_out_as_a_whole(tmp_path: Path) -> None:
    """All samples of a patient are on one side, whatever the shard and the type of the number; those without one go by
    their keys; a field that no sample has is refused."""

    def files(shard: int, number: int) -> list[tuple[str, bytes]]:
        patient = [number // 4, float(number // 4), None][(shard + number) % 3]
        return [*pair(f"{shard}-{number}"), (f"{shard}-{number}.json", json.dumps({"patient": patient}).encode())]

    paths = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    for shard, path in enumerate(paths):
        Path(path).write_bytes(tar_bytes(file for number in range(200) for file in files(shard, number)))
    rule = HoldOutConfig(share=0.3, group="patient")
    train, held_out = (
        [str(path) for path in copy_samples(part, tmp_path / name, "x")]
        for part, name in zip(hold_out(indexes(paths), rule), "ab", strict=True)
    )
    sides = [list(iter_samples(part)) for part in (train, held_out)]
    patients = [{sample.fields["patient"] for sample in side} - {None} for side in sides]
    assert patients[0] | patients[1] == set(range(50))
    assert not patients[0] & patients[1]
    assert len(patients[1]) in range(7, 25)
    assert all(is_held_out(Sample(0, "", s.key, b"", {}), rule) for s in sides[1] if s.fields["patient"] is None)
    assert len(sides[0]) + len(sides[1]) == 400
    with pytest.raises(UserError, match=r"data\.hold_out\.group='name'.*no sample has"):
        hold_out(indexes(paths), HoldOutConfig(share=0.3, group="name"))


def test_remote_shards_are_refused() -> None:
    """Their keys would have to be fetched at every start."""
    with pytest.raises(UserError, match="the shards must be on a disk"):
        toy_stream(["http://127.0.0.1:9/a.tar"], hold_out=RULE)
