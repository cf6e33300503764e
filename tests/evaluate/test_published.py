"""Suites by name, against CLIP_benchmark's own lists, and evaluated from the hub's cache."""

import json
import shutil
from pathlib import Path

import pytest

from mmssl.errors import UserError
from mmssl.evaluate.published import SUITES, download, find_suite
from mmssl.evaluate.published.suites import Published
from tests.cli.test_main import main_ok
from tests.helpers.export_models import own
from tests.helpers.toy_encoder import pack, paint


@pytest.mark.parametrize("name", ["vtab", "vtab+", "retrieval", "imagenet_robustness"])
def test_the_names_are_clip_benchmarks(name: str) -> None:
    """The datasets of each suite are those of CLIP_benchmark's collection."""
    theirs = pytest.importorskip("clip_benchmark.datasets.builder").dataset_collection[name]
    ours = SUITES[name.replace("_", "-")].sets
    assert sorted(one.name for one in ours) == sorted(theirs)
    assert len({one.hub for one in ours}) == len(ours)


def test_folders_of_the_hub_follow_both_rules() -> None:
    """CLIP_benchmark's `wds_` with dashes, DataComp's with the split; 30 classifications of DataComp and Camelyon17."""
    by_name = {one.name: one for one in SUITES["vtab+"].sets}
    assert by_name["vtab/caltech101"].hub == "clip-benchmark/wds_vtab-caltech101"
    assert by_name["voc2007_multilabel"].metric == "mean_average_precision"
    datacomp = {one.name: one for one in SUITES["datacomp"].sets}
    assert len(datacomp) == 31
    assert datacomp["cars"] == Published("cars", "djghosh/wds_cars_test", "acc1")
    assert datacomp["vtab/pets"].metric == "mean_per_class_recall"
    with pytest.raises(UserError, match="no suite is named 'x'"):
        find_suite("x")


def hub_dataset(hub: Path, repository: str, first: int) -> None:
    """A small dataset of two classes as the hub's cache keeps it: links to files that are named by their content."""
    place = hub / f"datasets--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    home = place / "snapshots" / "abc"
    blob = pack(place / "blobs" / "d0", [{"png": paint(257 * (first + n), n), "cls": n % 2} for n in range(12)])
    (home / "test").mkdir(parents=True)
    (home / "test" / "0.tar").symlink_to(blob)
    (home / "test" / "nshards.txt").write_text("1")
    (home / "classnames.txt").write_text("red\nblue\n")


def test_a_suite_is_evaluated_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`mmssl eval RUN --suite NAME` evaluates every dataset of the suite and prints the mean of their metrics; a
    dataset that is not there is named, with what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number, one in enumerate(SUITES["imagenet-robustness"].sets):
        hub_dataset(tmp_path / "hub", one.hub, 13 * number)
    own().save(tmp_path / "model")
    command = ["eval", str(tmp_path / "model"), "--suite", "imagenet-robustness", "--no-cache"]
    main_ok([*command, "--json", str(tmp_path / "m.json")])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "m.json").read_text())
    assert set(results) == {f"{one.name}/zero_shot" for one in SUITES["imagenet-robustness"].sets}
    mean = sum(metrics["acc1"] for metrics in results.values()) / 5
    assert f"imagenet-robustness: mean of 5 of 5 datasets: {mean:.4f}" in printed
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(UserError, match="cannot download clip-benchmark/wds_imagenetv2 .* give its path as DATA"):
        download(SUITES["imagenet-robustness"].sets[0])


def test_suites_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl suites` names each suite, `mmssl suites NAME` each dataset with its folder and metric."""
    main_ok(["suites"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in SUITES)
    main_ok(["suites", "retrieval"])
    printed = capsys.readouterr().out
    assert all(one.hub in printed for one in SUITES["retrieval"].sets)
