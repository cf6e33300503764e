"""Groups of neighbours among stored embeddings, and batches that are made of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmssl
from mmssl.apps.search import embed_shards
from mmssl.build import build_batching, resolve
from mmssl.cli.show import describe
from mmssl.config import parse_config
from mmssl.data.shards import SampleLimits
from mmssl.data.sources import index_source, sample_keys
from mmssl.data.sources.catalog import plan_source
from mmssl.data.storage import Access, iter_samples
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.inference import neighbours, stored
from mmssl.train.trainer import train
from tests.helpers.objective_batch import TEACHER
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_runs import run_tree, write_pairs


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def groups_in_loops(values: np.ndarray, group: int) -> list[list[int]]:
    """Rows by the mean cosine with their nearest others, closest first; each takes its nearest free rows."""
    cosines = [[float(a @ b) for b in values] for a in values]
    closest = []
    for i, row in enumerate(cosines):
        others = sorted((c for j, c in enumerate(row) if j != i), reverse=True)
        closest.append(sum(others[: group - 1]) / (group - 1))
    free, found = set(range(len(values))), []
    for seed in sorted(free, key=lambda i: -closest[i]):
        if seed in free and len(free) >= group:
            free.remove(seed)
            nearest = sorted(free, key=lambda j: -cosines[seed][j])[: group - 1]
            free -= set(nearest)
            found.append([seed, *nearest])
    return [*found, sorted(free)]


@pytest.mark.parametrize(("rows", "group"), [(50, 2), (53, 4), (64, 8), (5, 6), (6, 6), (1, 2)])
def test_groups_are_those_of_the_loops(rows: int, group: int) -> None:
    """Each row in turn, those with the closest neighbours first, takes its nearest free rows."""
    values = unit(rows, 6, rows)
    line, expected = neighbours.group_line(values, group), groups_in_loops(values, group)
    assert line.tolist() == [row for rows in expected for row in rows]


@pytest.mark.parametrize("group", [3, 4])
def test_large_sets_are_divided_into_near_halves(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 rows in 50 tight clusters, compared 60 at a time: all rows once, and the groups nearly as close as those of
    one comparison of all; groups by chance are far from it."""
    centres = np.repeat(unit(50, 16), 10, axis=0)
    values = centres + 0.05 * unit(500, 16, 1)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    values = values[np.random.default_rng(2).permutation(500)]
    whole = neighbours.group_line(values, group)
    monkeypatch.setattr(neighbours, "LEAF", 60)
    divided = neighbours.group_line(values, group)
    assert sorted(divided.tolist()) == list(range(500))

    def closeness(line: np.ndarray) -> float:
        members = values[line[: 500 // group * group]].reshape(-1, group, 16)
        return float(np.square(members.sum(1)).sum(1).mean() - group) / (group * (group - 1))

    assert closeness(divided) > 0.9 * closeness(whole) > 0.8
    assert abs(closeness(np.arange(500))) < 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards under `shards`, and what `mmssl embed` stores of them under `index`."""
    base = tmp_path_factory.mktemp("neighbours")
    (base / "shards").mkdir()
    write_pairs(base / "shards")
    embed_shards(mmssl.load(TEACHER), sorted(map(str, (base / "shards").glob("*.tar"))), base / "index")
    return base


def found_groups(folder: Path, index: Path, world: World = World(), lines: list[str] | None = None) -> Any:  # noqa: B008
    """The groups of 4 of the shards."""
    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    indexes = [i for i in index_source(shards, SampleLimits(), Access()) if i is not None]
    say = (lambda line: None) if lines is None else lines.append
    source = plan_source(indexes, 1.0, None)
    return neighbours.neighbour_groups(index, 4, source, indexes, most_lacking=0.1, world=world, say=say)


def test_groups_of_an_index_are_those_of_its_embeddings(folder: Path) -> None:
    """Numbers of samples in file order, groups those of the loops on the stored embeddings; they are stored, and read
    again without the embeddings. A damaged file is made anew."""
    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    record = stored.read_record(folder / "index")
    assert record is not None
    values = [stored.read_part(stored.vectors(folder / "index", part), record) for part in record.parts]
    expected = groups_in_loops(np.concatenate(values).astype(np.float32), 4)
    lines: list[str] = []
    groups = found_groups(folder, folder / "index", lines=lines)
    assert groups.line.tolist() == [row for rows in expected for row in rows]
    assert "12 groups of 4 neighbours among 48 samples" in lines[-1]
    indexes = [i for i in index_source(shards, SampleLimits(), Access()) if i is not None]
    assert [key for i in indexes for key in sample_keys(i)] == [sample.key for sample in iter_samples(shards)]
    (path,) = (folder / "index").glob("groups-of-4-*.npy")
    line = np.load(path)[::-1]
    np.save(path, line)
    assert found_groups(folder, folder / "index").line.tolist() == line.tolist()
    path.write_bytes(path.read_bytes()[:-8])
    assert found_groups(folder, folder / "index").line.tolist() == groups.line.tolist()


def _on_a_rank(world: World, base: str) -> list[int]:
    line: list[int] = found_groups(Path(base), Path(base) / "fresh", world).line.tolist()
    return line


def test_processes_have_the_same_groups(folder: Path) -> None:
    """Of two processes the first finds the groups, and both have them."""
    shutil.copytree(folder / "index", folder / "fresh", ignore=shutil.ignore_patterns("groups*"))
    first, second = on_ranks(2, _on_a_rank, str(folder))
    assert first == second == found_groups(folder, folder / "index").line.tolist()


def test_folders_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """No embeddings, those of other shards, of a changed shard or of too few samples: each says what to do. A few
    samples without an embedding are counted, and grouped by chance."""
    with pytest.raises(UserError, match=r"holds no embeddings; make them: mmssl embed MODEL SHARDS"):
        found_groups(folder, tmp_path / "nothing")
    one = tmp_path / "one"
    embed_shards(mmssl.load(TEACHER), [str(folder / "shards" / "0.tar")], one)
    with pytest.raises(
        UserError, match=r"no embeddings of 1 of 2 training shards, such as .*1\.tar; embed all of them"
    ):
        found_groups(folder, one)
    copy = tmp_path / "copy"
    shutil.copytree(folder / "index", copy, ignore=shutil.ignore_patterns("groups*"))
    tree = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps({**tree, "states": [[1, 2], tree["states"][1]]}))
    with pytest.raises(UserError, match=r"no embeddings of .*0\.tar as it is now; call the same mmssl embed again"):
        found_groups(folder, copy)
    (copy / "index.json").write_text(json.dumps(tree))
    for lacking, refused in ((3, False), (9, True)):
        keep = slice(0, 24 - lacking)
        record = stored.read_record(copy)
        assert record is not None
        part = record.parts[1]
        original = stored.read_part(stored.vectors(folder / "index", part), record)
        table = stored.read_table(stored.table(folder / "index", part), 24)
        columns = {name: table.column(name).to_pylist()[keep] for name in ("key", "caption")}
        stored.write_part(copy, part, np.array(original[keep]), columns, {})
        for path in copy.glob("groups*"):
            path.unlink()
        if refused:
            with pytest.raises(UserError, match=r"lacks 9 of 48 samples, such as .*1\.tar:s1-015, more than"):
                found_groups(folder, copy)
            continue
        lines: list[str] = []
        groups = found_groups(folder, copy, lines=lines)
        assert "3 samples have no embedding, such as" in lines[0]
        assert set(groups.line[-3:].tolist()) == {45, 46, 47}
        assert sorted(groups.line.tolist()) == list(range(48))


def run(folder: Path, name: str, steps: int, **data: Any) -> list[list[int]]:
    """The sample numbers of each step of a run, which is resumed if it exists."""
    tree = run_tree(folder / "shards", folder / name, evaluate={}, train__steps=steps)
    tree["data"] |= data
    train(parse_config(tree, "here"), resume=(folder / name).exists())
    lines = (folder / name / "sample_ids.jsonl").read_text().splitlines()
    return [json.loads(line)["ids"] for line in lines]


@pytest.mark.parametrize("kind", ["neighbours", "distinct"])
def test_a_run_has_the_batches_that_were_chosen(folder: Path, kind: str, tmp_path: Path) -> None:
    """Steps of a run hold whole groups, or labels apart as far as possible, and a run that stopped after 4 steps and
    was resumed has the batches of an uninterrupted one."""
    shards = sorted(map(str, (folder / "shards").glob("*.tar")))
    batching = {"neighbours": str(folder / "index"), "group": 4} if kind == "neighbours" else {"distinct": "cls"}
    whole = run(folder, f"whole-{kind}", 12, batching=batching)
    run(folder, f"parts-{kind}", 4, batching=batching)
    assert run(folder, f"parts-{kind}", 12, batching=batching) == whole
    assert sorted(n for ids in whole[:6] for n in ids) == list(range(48))
    if kind == "neighbours":
        groups = {frozenset(members) for members in found_groups(folder, folder / "index").line.reshape(12, 4).tolist()}
        assert all(frozenset(half) in groups for ids in whole for half in (ids[:4], ids[4:]))
        return
    labels = [int(sample.fields["cls"]) for sample in iter_samples(shards)]
    for first in (0, 6):
        times = [max(np.bincount([labels[n] for n in ids])) for ids in whole[first : first + 6]]
        assert max(times) == -(-max(np.bincount(labels)) // 6)


@pytest.mark.parametrize(
    ("batching", "line"),
    [
        ({}, "samples by chance"),
        ({"neighbours": "index", "group": 4}, "2 groups of 4 neighbours, by the embeddings in index"),
        ({"distinct": "caption"}, "samples with the same caption in different batches, as far as possible"),
    ],
)
def test_show_says_which_samples_share_a_batch(batching: dict[str, Any], line: str) -> None:
    """`mmssl show` has a line on the batches; it needs no data and no index."""
    tree = run_tree(Path("data"), Path("run"), evaluate={})
    tree["data"] |= {"batching": batching}
    assert f"batches\n  {line}\n" in describe(parse_config(tree, "here"))


def test_choices_that_cannot_be(folder: Path) -> None:
    """Both choices together, batches without whole groups, an unknown field and several sources are refused."""
    for data, says in (
        ({"batching": {"neighbours": "x", "distinct": "caption"}}, "set one"),
        ({"batching": {"neighbours": "x", "group": 3}}, "pick a multiple of 3"),
        ({"batching": {"neighbours": "x", "group": 4}, "lanes": 4}, "pick a multiple of 16"),
    ):
        tree = run_tree(folder / "shards", folder / "no", evaluate={})
        tree["data"] |= data
        with pytest.raises(UserError, match=says):
            parse_config(tree, "here")
    with pytest.raises(UserError, match=r"distinct='kind' names a field that no sample has; use caption or: cls"):
        run(folder, "no", 2, batching={"distinct": "kind"})
    pattern = str(folder / "shards" / "0.tar")
    tree = run_tree(folder / "shards", folder / "no", evaluate={})
    tree["data"] |= {"train": [pattern, {"shards": pattern, "weight": 2.0}], "batching": {"distinct": "caption"}}
    with pytest.raises(UserError, match="works with one source"):
        build_batching(resolve(parse_config(tree, "here")), World(), print)
