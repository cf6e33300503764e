"""Commands: only a pattern of the user, with commands allowed, runs one. No name out of data ever does."""

import ast
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

import mmssl
from mmssl.apps.search import Hit, read_images
from mmssl.cli.train import resumed_config
from mmssl.data import Source, expand, iter_samples, resolve_sources
from mmssl.data.health.browse import find, pick
from mmssl.data.health.survey import survey_shards
from mmssl.data.packing import ShardRecords
from mmssl.data.packing.folders import FolderRecords
from mmssl.data.shards import SampleLimits, image_ranges, index_shards
from mmssl.data.sources import index_source, iter_captions, make_index
from mmssl.data.storage import Access, Fetcher, LocalFiles, find_remote_indexes, index_remote_shards, read_shard
from mmssl.errors import UserError
from mmssl.evaluate import open_dataset
from mmssl.evaluate.datasets import read as read_dataset
from mmssl.evaluate.datasets import read_images as read_dataset_images
from mmssl.types import PipeCommand, Sample
from tests.helpers.tars import toy_loader, write_shards
from tests.helpers.tiny_runs import run_tree

ROOT = Path(mmssl.__file__).parent
OPENERS = {
    "read_shard",
    "read_groups",
    "iter_samples",
    "open_regular",
    "regular_handle",
    "open_fsspec",
    "open_web",
    "url_to_fs",
    "image_ranges",
    "index_shard",
    "index_forward",
}
"""Functions that open a shard by its name."""
CALLERS = {
    "apps/autoconfig/inputs.py",
    "apps/autoconfig/preparation.py",
    "apps/doctor/shards.py",
    "apps/explain/explanation.py",
    "apps/search/embed.py",
    "apps/search/images.py",
    "apps/suspects/scan.py",
    "build.py",
    "data/health/browse.py",
    "data/health/survey.py",
    "data/loading/unindexed.py",
    "data/packing/correct.py",
    "data/packing/folders.py",
    "data/packing/packer.py",
    "data/packing/records.py",
    "data/packing/shard_records.py",
    "data/shards/index.py",
    "data/shards/shard_index.py",
    "data/sources/texts.py",
    "data/storage/fetch.py",
    "data/storage/files.py",
    "data/storage/filesystem.py",
    "data/storage/remote_index.py",
    "data/storage/sequential.py",
    "evaluate/datasets.py",
    "files.py",
}
"""Modules that open shards. OPENED below goes through them; a new one needs an entry there."""


def hostile_name(folder: Path) -> str:
    """A name that would create FOLDER/ran, if anything ran it."""
    return f"pipe:touch {folder.name}-ran;.tar"


def _hit(name: str) -> Any:
    return read_images([Hit(1.0, name, "k", "")])


def _sample(name: str) -> Sample:
    return Sample(0, name, "k", b"", {})


def _loader(name: str, **options: Any) -> None:
    with toy_loader([Source([name])], lanes=1, **options) as loader:
        next(loader)


OPENED: dict[str, Callable[[str], Any]] = {
    "iter_samples": lambda name: list(iter_samples([name])),
    "read_shard": lambda name: list(read_shard(name, SampleLimits(), Fetcher(), len)),
    "index_shards": lambda name: index_shards([name], SampleLimits()),
    "index_source": lambda name: index_source([name], SampleLimits(), Access()),
    "make_index": lambda name: make_index([name], SampleLimits(), Access()),
    "find_remote_indexes": lambda name: find_remote_indexes([name], SampleLimits(), Fetcher()),
    "index_remote_shards": lambda name: index_remote_shards([name], SampleLimits(), Fetcher()),
    "image_ranges": lambda name: image_ranges(name, 0, 10240),
    "LocalFiles": lambda name: LocalFiles().read(name, 0, 512),
    "loader": _loader,
    "loader in threads": lambda name: _loader(name, workers=1),
    "ShardRecords": lambda name: ShardRecords([name]).load(0),
    "FolderRecords": lambda name: FolderRecords(Path(name).parent),
    "iter_captions": lambda name: list(iter_captions([name], ["{txt}"])),
    "pick": lambda name: pick([name], 2),
    "find": lambda name: find([name], "k"),
    "survey": lambda name: survey_shards([name]),
    "search hit": _hit,
    "dataset": lambda name: list(read_dataset(open_dataset([name]))),
    "dataset images": lambda name: list(read_dataset_images([_sample(name)])),
    "expand": lambda name: list(iter_samples(expand(name))),
    "expand a list": lambda name: list(iter_samples(expand([name]))),
    "sources": lambda name: list(iter_samples(resolve_sources(name)[0].shards)),
}
"""Every way to open a shard by a name that may come out of data."""


@pytest.mark.parametrize("there", [False, True], ids=["no such file", "a file of this name"])
@pytest.mark.parametrize("way", OPENED)
def test_a_name_never_runs(way: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain string that begins with `pipe:` is a file name or refused, wherever a shard is opened."""
    monkeypatch.chdir(tmp_path)
    name = hostile_name(tmp_path)
    if there:
        Path(write_shards(tmp_path, [20])[0]).rename(name)
    with suppress(UserError, FileNotFoundError):
        OPENED[way](name)
    assert not (tmp_path / f"{tmp_path.name}-ran").exists()


@pytest.mark.parametrize(
    "pattern", ["*.tar", "./*.tar", "{folder}", "{folder}/**/*.tar", "file://{folder}/*.tar", "?ipe:*"]
)
@pytest.mark.parametrize("allow_pipe", [False, True])
def test_a_listed_file_is_opened_as_a_file(
    pattern: str, allow_pipe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose name is a command is read like any other, also where the user allows commands."""
    monkeypatch.chdir(tmp_path)
    Path(write_shards(tmp_path, [8])[0]).rename(hostile_name(tmp_path))
    names = expand(pattern.format(folder=tmp_path), allow_pipe)
    assert [type(name) for name in names] == [str]
    assert len(list(iter_samples(names))) == 8
    _loader(names[0])
    assert not (tmp_path / f"{tmp_path.name}-ran").exists()


def test_a_command_of_the_user_runs_and_stays_one_between_processes(tmp_path: Path) -> None:
    """With commands allowed for the source, each expanded pattern is a PipeCommand, also after pickling, as for worker
    processes; other sources stay files."""
    first, second = write_shards(tmp_path, [8, 8])
    names = expand(f"pipe:cat {tmp_path}/0000{{0,1}}.tar", allow_pipe=True)
    assert names == [f"pipe:cat {first}", f"pipe:cat {second}"]
    assert [type(name) for name in pickle.loads(pickle.dumps(names))] == [PipeCommand, PipeCommand]
    assert len(list(iter_samples(names))) == 16
    with pytest.raises(UserError, match="allow_pipe"):
        expand(names)
    assert [type(name) for name in expand([first, str(names[1])], allow_pipe=True)] == [str, PipeCommand]


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"train": "pipe:cat x.tar", "allow_pipe": True}},
        {"data": {"train": ["x.tar", {"shards": ["y.tar", "pipe:cat x.tar"]}], "allow_pipe": True}},
        {"objectives": {"contrastive": {}, "some.module": {}}},
        {"evaluate": {"suites": {"held_out": {"data": "x", "task": "zero_shot,module:Task"}}}},
    ],
    ids=["command", "command in a list", "objective", "task"],
)
def test_a_run_folder_names_no_code(change: dict[str, Any], tmp_path: Path) -> None:
    """Commands and modules that the configuration of a run folder names need --trust, though it allows itself."""
    tree = run_tree(tmp_path / "x.tar", tmp_path)
    for section, values in change.items():
        tree[section] = {**tree.get(section, {}), **values}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"names code of its own: .*(pipe:|module).*--trust"):
        resumed_config(tmp_path, [])
    assert resumed_config(tmp_path, [], trust=True).run_dir == tmp_path
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run_tree(tmp_path / "x.tar", tmp_path)))
    assert resumed_config(tmp_path, []).run_dir == tmp_path


def test_chained_urls_are_refused(tmp_path: Path) -> None:
    """`::` opens another file system than the name begins with, also where a listing returns it."""
    secret = write_shards(tmp_path, [8])[0]
    for url in (f"simplecache::file://{secret}", f"memory://a::file://{secret}"):
        with pytest.raises(UserError, match="chains file systems"):
            list(iter_samples(expand(url)))
    fsspec.filesystem("memory").pipe_file("/chains/x::y.tar", b"")
    with pytest.raises(UserError, match="chains file systems"):
        list(iter_samples(expand("memory://chains/*.tar")))


def test_every_place_that_opens_a_shard_is_known() -> None:
    """Modules that call an opener are those above; a shell runs in one place; only `expand` makes a command."""
    called: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                called.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
                if any(word.arg == "shell" for word in node.keywords):
                    called.setdefault("shell", set()).add(path.relative_to(ROOT).as_posix())
    assert set().union(*(called[name] for name in OPENERS)) == CALLERS
    assert called["shell"] == {"data/storage/sequential.py"}
    assert called["PipeCommand"] == {"data/sources/patterns.py"}
    assert not called.keys() & {"popen", "exec_module", "spawnl", "startfile"}
