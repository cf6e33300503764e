"""`mmssl finetune` and `mmssl interpolate` from the command line."""

import json
from pathlib import Path

import pytest

from mmssl import load
from mmssl.finetune import load_classifier
from tests.test_cli_eval import refused, run


def test_a_classifier_is_written_and_its_figures_printed(
    model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed, what --json holds and what stands in the folder are the same; a full folder is refused."""
    out, figures = tmp_path / "classifier", tmp_path / "figures.json"
    run("finetune", model_folder, colors, "--shots", "4", "--out", out, "--json", figures)
    printed = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert load_classifier(out).record["figures"] == found
    assert f"{found['acc1']:.4f}" in printed
    assert f"{found['zero_shot']:.4f}" in printed
    assert "gain: " in printed
    assert "is not empty" in refused(capsys, "finetune", model_folder, colors, "--out", out)


def test_several_numbers_of_labels_make_a_table(
    model_folder: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row a number and a way, with the picture and the figures beside it."""
    out = tmp_path / "table"
    run("finetune", model_folder, colors, "--shots", "1,2", "--out", out)
    printed = capsys.readouterr().out
    assert "linear probe, untrained tower" in printed
    found = json.loads((out / "accuracy.json").read_text())
    for k in ("1", "2"):
        assert f"{100 * found['linear'][k]['acc1']:.1f}" in printed
        assert f"{100 * found['differences']['linear']['zero-shot'][k]['difference']:+.1f}" in printed
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_one_line(model_folder: Path, colors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong method, a wrong number of labels, and a table without numbers are told before anything is read."""
    command = ("finetune", model_folder, colors)
    assert "there are linear, full, lp-ft" in refused(capsys, *command, "--method", "lora")
    assert "--shots 'few'" in refused(capsys, *command, "--shots", "few")
    assert "a table needs --shots" in refused(capsys, *command, "--seeds", "3")


def test_interpolate_writes_a_model(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At alpha 0 it is the first one; a folder that holds something is left alone."""
    run("interpolate", model_folder, model_folder, "--alpha", "0", "--out", tmp_path / "between")
    assert load(tmp_path / "between").fingerprint() == load(model_folder).fingerprint()
    assert "not empty" in refused(capsys, "interpolate", model_folder, model_folder, "--out", tmp_path / "between")
