"""Logs of a run are read tolerantly: no damage to them ends a training or changes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmssl.config import Config, parse_config
from mmssl.data.loading.pipeline import append_json_lines
from mmssl.errors import UserError
from mmssl.files import read_json_lines, set_aside
from mmssl.train.checkpoint import newest_checkpoint, read_state, save_checkpoint
from mmssl.train.loggers import StepLog
from mmssl.train.recovery import batches_past, rewind
from mmssl.train.trainer import train
from tests.helpers.tiny_runs import run_tree, write_pairs

WEIGHTS = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("shards"))


def config(shards: Path, run: Path, **changes: Any) -> Config:
    settings = {"train__keep": 9, "train__trackers": ["tensorboard"], "evaluate__every": 3, **changes}
    return parse_config(run_tree(shards, run, **settings), "test")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run with checkpoints of steps 3, 6 and 8, evaluated at 3, 6 and 8."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config(shards, run))
    return run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def without_step(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([b'{"loss": 1}\n', b'{"step": "4"}\n', b'{"step": null}\n', b"[3]\n", *lines])


def as_folder(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cut last line": rewritten(lambda content: content[:-7]),
    "no last line break": rewritten(lambda content: content[:-1]),
    "cut to half": rewritten(lambda content: content[: len(content) // 2]),
    "empty": rewritten(lambda _: b""),
    "NULs at the end": rewritten(lambda content: content + bytes(100)),
    "NULs in the middle": rewritten(lambda content: content[:50] + bytes(30) + content[80:]),
    "only NULs": rewritten(lambda content: bytes(len(content))),
    "UTF-16": rewritten(lambda content: content.decode().encode("utf-16")),
    "not UTF-8": rewritten(lambda content: b"\xff\xfe\x80\n" + content),
    "no step, or none that is a number": rewritten(without_step),
    "brackets without end": rewritten(lambda content: b"[" * 100_000 + b"\n" + content),
    "a folder": as_folder,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_to_logs_changes_a_resumed_run(
    damage: str, finished: Path, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With all logs damaged alike, a run cut back to step 6 ends with the weights of the whole run; each log holds one
    JSON object a line, none twice, and the steps that were done again; what could not be read is in a file of its
    own."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    names = ("metrics", "sample_ids", "evaluations")
    for name in names:
        DAMAGE[damage](run / f"{name}.jsonl")
    train(config(shards, run), resume=True)
    for name in WEIGHTS:
        path = Path("checkpoints/step-000000008") / name
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    for name in names:
        found = rows(run / f"{name}.jsonl")
        steps = [row["step"] for row in found]
        assert steps == sorted(set(steps))
        assert steps[-1] == 8
        whole = {row["step"]: row for row in rows(finished / f"{name}.jsonl")}
        assert name == "metrics" or [row.get("ids") for row in found] == [whole[step].get("ids") for step in steps]
    assert [row["step"] for row in rows(run / "metrics.jsonl")][-3:] == [6, 7, 8]
    said = capfd.readouterr().err
    assert sum("metrics.jsonl" in line for line in said.splitlines()) <= 1
    if damage in ("a folder", "not UTF-8", "no step, or none that is a number", "brackets without end"):
        for name in ("metrics", "evaluations"):
            assert (run / f"{name}.jsonl.damaged").exists()
            assert f"{name}.jsonl.damaged" in said


def test_a_line_that_was_cut_at_the_checkpoint_comes_back(tmp_path: Path) -> None:
    """The checkpoint's own record takes the place of a last line that was cut, and nothing is glued to it."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    with StepLog(path, 3, {"step": 3, "loss": 0.5}) as log:
        assert log.warning is None
        log.write({"step": 4})
    assert rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}, {"step": 4}]


def test_steps_without_a_line_are_named(tmp_path: Path) -> None:
    """A log that lacks steps which the checkpoint has says which."""
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 4}\n')
    with StepLog(path, 6) as log:
        assert log.warning is not None
        assert "4 steps have no line, from step 2 to 6" in log.warning


@pytest.mark.parametrize("end", [b"", b"\n", b'{"shard": "a", "k', b"\x00\x00"])
def test_appended_lines_are_never_glued_to_a_cut_one(end: bytes, tmp_path: Path) -> None:
    """Whatever a list of bad samples ends with, the next ones are lines of their own."""
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(b'{"key": "first"}\n' + end)
    append_json_lines(path, [{"key": "second"}])
    append_json_lines(path, [{"key": "third"}])
    assert [row["key"] for row in read_json_lines(path).rows] == ["first", "second", "third"]


@pytest.mark.parametrize("name", ["tensorboard", "images", "tokenizer"])
def test_a_file_where_a_folder_goes_is_set_aside(
    name: str, finished: Path, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file named as a folder of the run is renamed, with one line, and the run goes on."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-000000008")
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).write_text("mine")
    # The run's own tokenizer would be trained anew.
    train(config(shards, run), resume=True)
    assert (run / f"{name}.damaged").read_text() == "mine"
    assert f"{name} is no folder; it is set aside" in capfd.readouterr().err
    path = "checkpoints/step-000000008/model.safetensors"
    assert (run / path).read_bytes() == (finished / path).read_bytes()


def test_names_that_are_taken_are_not_used(tmp_path: Path) -> None:
    """Setting aside twice keeps both."""
    for text in ("a", "b", "c"):
        (tmp_path / "x").write_text(text)
        set_aside(tmp_path / "x")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "x.damaged": "a",
        "x.damaged-2": "b",
        "x.damaged-3": "c",
    }


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x00", b"\xff", b"[]", b"{}", b'{"step": 3}', b'{"step": 3, "batches": "2"}']
)
def test_a_damaged_note_of_rewinding_is_no_crash(content: bytes, tmp_path: Path) -> None:
    """It is named as damaged; `--rewind` itself refuses, for it must know the batches."""
    (tmp_path / "rewound.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"rewound\.json is damaged"):
        batches_past(tmp_path, 3)
    (tmp_path / "nonfinite-step-5-rank-0.json").write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        rewind(tmp_path)


def saved(folder: Path, step: int) -> Path:
    state = {
        "seconds": 1.0,
        "skipped": [0, 0],
        "best": None,
        "alarms": [],
        "micro_batch": None,
        "stream": {"position": 40 + step},
        "scaler": None,
        "versions": {},
    }
    return save_checkpoint(folder, step, {}, {}, state)


def state_change(**changes: Any) -> Callable[[Path], None]:
    return rewritten(lambda content: json.dumps({**json.loads(content), **changes}).encode())


STATES: dict[str, Callable[[Path], None]] = {
    "another place in the data": state_change(stream={"position": 41}),
    "another step": state_change(step=7),
    "another clock": state_change(seconds=2.0),
    "no checksums": state_change(sha256={}),
    "no counters": state_change(skipped=None),
    "not a mapping": rewritten(lambda _: b"[1]"),
    "brackets without end": rewritten(lambda _: b"[" * 100_000),
    "empty": rewritten(lambda _: b""),
    "NULs": rewritten(lambda content: bytes(len(content))),
    "not UTF-8": rewritten(lambda content: content.replace(b"step", b"st\xffp")),
}


@pytest.mark.parametrize("damage", STATES)
def test_a_damaged_state_is_passed_over(damage: str, tmp_path: Path) -> None:
    """What decides over a training has a checksum: the checkpoint before is taken, and the damage is named."""
    older, newer = saved(tmp_path, 3), saved(tmp_path, 6)
    STATES[damage](newer / "state.json")
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == older
    assert str(newer) in found[1][0]


def test_leftover_files_do_not_stop_a_checkpoint(tmp_path: Path) -> None:
    """Files where a checkpoint or its half-written folder goes make way, and so do names that are no step."""
    (tmp_path / ".writing-step-000000003").write_text("left over")
    (tmp_path / ".writing-step-000000009").mkdir()
    (tmp_path / "step-000000003").write_text("a file")
    (tmp_path / "step-backup").mkdir()
    path = saved(tmp_path, 3)
    assert read_state(path)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000003", "step-backup"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == path
