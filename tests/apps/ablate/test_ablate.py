"""`mmssl ablate` as users run it: real runs of seconds, reports, failures, and going on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmssl.cli import main
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[3]
BROKEN = "contrastive(weight=1e39)"
"""Its loss is not finite."""
MIXES = ["contrastive", "contrastive+mlm", BROKEN]
MINUTES = 0.02


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration on 48 small images."""
    folder = tmp_path_factory.mktemp("ablation")
    objectives = {"contrastive": {}, "mlm": {"weight": 0.1}}
    tree = run_tree(write_pairs(folder), folder / "unused", objectives=objectives, train__nonfinite_limit=1)
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    return folder / "c.yaml"


def words(settings: Path, out: Path, *more: str) -> list[str]:
    jobs = min(2, len(os.sched_getaffinity(0)))
    return ["ablate", str(settings), "--out", str(out), "--seeds", "2", "--jobs", str(jobs), *more]


def timed(settings: Path, out: Path, *more: str) -> list[str]:
    mixes = [word for mix in MIXES for word in ("--mix", mix)]
    return [*words(settings, out, *more), *mixes, "--minutes", str(MINUTES)]


def run(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


@pytest.fixture(scope="module")
def out(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ablation of three mixes, one of which fails."""
    out = tmp_path_factory.mktemp("out") / "ablation"
    assert run(timed(settings, out)) == 1
    return out


def test_the_report_tells_what_was_run_and_found(out: Path, settings: Path) -> None:
    """JSON, Markdown with the exact command, and an image; minutes are equal, costs differ."""
    found = json.loads((out / "ablation.json").read_text())
    text = (out / "ablation.md").read_text()
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert found["command"] in text
    assert f"mmssl ablate {settings}" in text
    assert f"'{BROKEN}'" in text
    assert found["baseline"] == "contrastive"
    spent = {mix: [r["spent"] for r in found["mixes"][mix]["runs"].values()] for mix in MIXES[:2]}
    assert all(len(runs) == 2 for runs in spent.values())
    for run in [*spent["contrastive"], *spent["contrastive+mlm"]]:
        assert run["minutes"] >= MINUTES
        assert run["samples"] == 8 * run["steps"]
        assert run["peak_memory_bytes"] > 50e6
        assert run["operations_per_sample"] == pytest.approx(run["operations"] / run["samples"])
    plain, mixed = (spent[mix][0]["operations_per_sample"] for mix in MIXES[:2])
    assert plain < mixed
    assert mixed == pytest.approx(found["mixes"]["contrastive+mlm"]["operations_per_sample"])
    (end,) = found["moments"]
    mixed_comparison, broken = end["comparisons"]
    assert mixed_comparison["seeds"] == [0, 1]
    assert mixed_comparison["samples"] == 48
    assert mixed_comparison["sentence"] in text
    assert broken["verdict"] == "too few runs"


def test_a_failed_run_is_reported_and_the_others_go_on(out: Path) -> None:
    """Its log's last line says why, in the report too; it left no record of being finished."""
    found = json.loads((out / "ablation.json").read_text())
    assert len(found["failed"]) == 2
    for name, why in found["failed"].items():
        assert "not finite" in why
        assert f"{name}: {why}" in (out / "ablation.md").read_text()
        assert not (out / "runs" / name / "finished.json").exists()


def test_seeds_are_paired(out: Path) -> None:
    """The same seed gives both mixes the same samples in the same order, another seed another order."""

    def order(mix: str, seed: int) -> list[str]:
        return (out / "runs" / f"{mix}-seed{seed}" / "sample_ids.jsonl").read_text().splitlines()[:1]

    assert order("contrastive", 0) == order("contrastive+mlm", 0)
    assert order("contrastive", 0) != order("contrastive", 1)


def test_finished_runs_are_kept(out: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command without the broken mix starts no process, whichever metric is requested."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    again = [*words(settings, out), "--mix", MIXES[0], "--mix", MIXES[1], "--minutes", str(MINUTES)]
    assert not run([*again, "--metric", "mean_per_class_recall"])
    found = json.loads((out / "ablation.json").read_text())
    assert [c["metric"] for c in found["moments"][0]["comparisons"]] == ["mean_per_class_recall"]
    assert run([*again, "--metric", "acc7"]) == 2


def test_bad_input_ends_in_one_line(
    settings: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2; the message names the option."""
    new = words(settings, tmp_path / "new")
    for arguments, expected in (
        ([*new, "--minutes", "0"], "--minutes"),
        (new, "--minutes"),
        ([*new, "--minutes", "1", "--flops"], "--minutes and --flops exclude each other"),
        ([*new, "--minutes", "1", "--epochs", "3"], "--minutes and --epochs exclude each other"),
        ([*new, "--epochs", "0"], "--epochs"),
        ([*new, "--epochs", "1", "--mix", "mlm", "--plan", str(settings)], "--plan and --mix exclude each other"),
        ([*new, "--minutes", "1", "--seeds", "a"], "--seeds 'a'"),
        ([*new, "--minutes", "1", "--seeds", "1"], "at least 2 seeds"),
        ([*new, "--minutes", "1", "--jobs", "9999"], "--jobs 9999"),
        ([*new, "--minutes", "1", "--mix", "contrastive", "--mix", "x"], "'x'"),
        (["ablate", str(settings)], "--out"),
        ([*words(settings, Path("/proc/none")), "--minutes", "1"], "/proc/none"),
        ([*timed(settings, out), "optim.lr=0.5"], "optim.lr"),
    ):
        capsys.readouterr()
        assert run(arguments) == 2, arguments
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert expected in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_dry_run_prints_the_plan_only(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mixes, predicted cost, number of runs and minutes; nothing is written."""
    out = tmp_path / "out"
    jobs = min(2, len(os.sched_getaffinity(0)))
    assert not run([*words(settings, out, "--dry-run"), "--minutes", "3"])
    printed = capsys.readouterr().out
    assert "contrastive+mlm" in printed
    assert "4 runs to go of 4 (2 seeds)" in printed
    assert f"{3 * 4 // jobs} minutes of training" in printed
    assert not out.exists()


def test_a_plan_of_many_epochs_shows_the_best_step(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal epochs, evaluated on the way: the report has curves, the best step beside the last, the same within the
    minutes of the fastest mix, a page of all runs, and the command that repeats it."""
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    plan.write_text("plain: contrastive\nsmooth: {mix: contrastive+mlm, settings: {optim.lr: 0.01}}\n")
    assert not run([*words(settings, out, "evaluate.every=5"), "--plan", str(plan), "--epochs", "3"])
    printed = capsys.readouterr().out
    found, text = json.loads((out / "ablation.json").read_text()), (out / "ablation.md").read_text()
    assert f"--plan {plan}" in found["command"]
    assert "--epochs 3" in found["command"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "page" / "index.html").is_file()
    assert str(out / "page" / "index.html") in printed
    end, best, *_ = found["moments"]
    assert [end["title"], best["title"]] == ["At the end", "At the best step"]
    for mix in ("plain", "smooth"):
        for seed, made in found["mixes"][mix]["runs"].items():
            assert made["spent"]["steps"] == 18
            assert [e["step"] for e in made["evaluations"]] == [5, 10, 15, 18]
            values = {e["step"]: e["results"]["colors/zero_shot"]["acc1"] for e in made["evaluations"]}
            assert values[best["steps"][mix][int(seed)]] == max(values.values())
    assert end["steps"] == {"plain": [18, 18], "smooth": [18, 18]}
    assert "## At the best step" in text
    assert best["comparisons"][0]["sentence"] in text
    assert best["comparisons"][0]["over_samples"] is None


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(settings: Path, tmp_path: Path) -> None:
    """SIGINT ends with exit code 130 and a checkpoint of the running runs; started again, they are resumed, and all
    end with the steps of the plan."""
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "mmssl"),
        *words(settings, out, "train.steps=400", "train.checkpoint_steps=null", "--flops"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = out / "runs" / "contrastive-seed0" / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "resume with the same command" in errors
    assert list((metrics.parent / "checkpoints").glob("step-*"))
    assert not (metrics.parent / "finished.json").exists()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert "resumed from" in (out / "logs" / "contrastive-seed0.log").read_text()
    found = json.loads((out / "ablation.json").read_text())
    spent = {mix: [r["spent"] for r in found["mixes"][mix]["runs"].values()] for mix in found["mixes"]}
    assert [r["steps"] for r in spent["contrastive"]] == [400, 400]
    assert all(r["steps"] < 400 for r in spent["contrastive+mlm"])
    totals = [r["operations"] for runs in spent.values() for r in runs]
    assert max(totals) / min(totals) < 1.01
    assert not list(out.glob("runs/*/checkpoints"))
