"""`mmssl eval` and `mmssl compare` from the command line: alone, on two processes, twice, and with bad input."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmssl import Model
from mmssl.cli import main
from mmssl.cli.common import print_results, progress_bar
from mmssl.config import parse_config
from mmssl.data.transforms import train_tokenizer
from mmssl.models import build_dual_encoder
from tests.helpers.models import tiny_model_config
from tests.helpers.tiny_runs import COLORS, run_tree, write_pairs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of colours, and two untrained models, `a` and `b`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "shards").mkdir()
    write_pairs(folder / "shards")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tokenizer = train_tokenizer([f"a photo of a {c}." for c in COLORS], 64, 77)
        config = tiny_model_config()
        encoder = build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id)
        Model(encoder, tokenizer, config).save(folder / name)
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of kept features, new for the test."""
    monkeypatch.setattr("mmssl.evaluate.feature_cache.default_folder", lambda: tmp_path / "features")
    return tmp_path / "features"


def run(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert not caught.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr with which the command exits with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2
    (line,) = lines
    return line


def figures(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_suites_name_tasks_and_fields(tmp_path: Path) -> None:
    """A suite takes one task, several with commas, or a list."""

    def suite(**entry: Any) -> Any:
        tree = run_tree(tmp_path, tmp_path / "run", evaluate={"suites": {"x": {"data": "none", **entry}}})
        return parse_config(tree, "c.yaml").evaluate.suites["x"]

    assert suite().task == ["zero_shot"]
    assert suite(task="knn, retrieval").task == suite(task=["knn", "retrieval"]).task == ["knn", "retrieval"]
    assert suite(slice_by="style").slice_by == ["style"]


def test_several_tasks_and_slices(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks are repeated or separated by commas, each measured once; figures are printed as they are written."""
    tasks = ["--task", "zero_shot,retrieval", "--task", "zero_shot", "--task", "geometry"]
    out = tmp_path / "out"
    run("eval", home / "a", home / "shards" / "*.tar", *tasks, "--slice-by", "cls", "--json", tmp_path / "f.json",
        "--out", out)  # fmt: skip
    found = figures(tmp_path / "f.json")
    assert [name.partition("/")[2] for name in found] == ["zero_shot", "retrieval", "geometry"]
    assert list(found["shards/zero_shot"]["gaps"]) == ["cls"]
    assert figures(out / "results.json") == found
    assert (out / "shards" / "zero_shot" / "calibration.csv").is_file()
    printed = capsys.readouterr().out
    assert f"{found['shards/zero_shot']['acc1']:.4f}" in printed
    assert "modality_gap" in printed


def test_the_second_time_nothing_is_encoded(
    home: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are kept in the default folder; another weight is encoded again; --no-cache neither keeps nor looks."""
    command: list[str | Path] = ["eval", home / "a", home / "shards" / "*.tar", "--json", tmp_path / "f.json"]
    run(*command, "--no-cache")
    assert not own_cache.exists()
    expected = figures(tmp_path / "f.json")
    run(*command)
    assert len(list(own_cache.glob("*.safetensors"))) == 1
    counted: list[int] = []
    encode = Model.encode_rendered

    def counting(self: Model, images: torch.Tensor) -> torch.Tensor:
        counted.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Model, "encode_rendered", counting)
    run(*command)
    assert (counted, figures(tmp_path / "f.json")) == ([], expected)
    weights = load_file(home / "a" / "model.safetensors")
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (home / "a").rglob("*"):
        if file.is_file():
            target = changed / file.relative_to(home / "a")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    weights["image_projection.weight"][0, 0] += 0.5
    save_file(weights, changed / "model.safetensors")
    run("eval", changed, *command[2:])
    assert counted == [48]
    run(*command, "--no-cache")
    assert counted == [48, 48]


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29641"], marks=pytest.mark.slow
        ),
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "29642"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_equal_one(home: Path, tmp_path: Path, launcher: list[str]) -> None:
    """The same command under a launcher has exactly the same figures and tables, printed and written once."""
    options = ["--task", "zero_shot,retrieval,geometry", "--batch-size", "7", "--no-cache", "--precision", "fp32"]
    data = [str(home / "a"), str(home / "shards" / "*.tar"), *options]
    run("eval", *data, "--json", tmp_path / "one.json", "--out", tmp_path / "one")
    more = ["--json", str(tmp_path / "two.json"), "--out", str(tmp_path / "two")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", *launcher, "-m", "mmssl", "eval", *data, *more]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "two.json") == figures(tmp_path / "one.json")
    assert done.stdout.count("modality_gap") == 1
    for path in (tmp_path / "one").rglob("*.csv"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def test_languages_and_shifts(home: Path, tmp_path: Path) -> None:
    """Each language's files make a dataset of their own on the same features; a shift between two is their drop."""
    data = tmp_path / "colours"
    data.mkdir()
    for shard in (home / "shards").glob("*.tar"):
        (data / f"test-{shard.name}").write_bytes(shard.read_bytes())
    names = "\n".join(COLORS)
    for language, template in (("en", "a {c} square"), ("fr", "un carré {c}")):
        (data / f"classnames.{language}.txt").write_text(names)
        (data / f"zeroshot_classification_templates.{language}.txt").write_text(template)
    both = ["--language", "en", "--language", "fr", "--shift", "colours-en:colours-fr"]
    run("eval", home / "a", data, *both, "--json", tmp_path / "f.json")
    found = figures(tmp_path / "f.json")
    assert list(found) == [
        "colours-en/zero_shot",
        "colours-fr/zero_shot",
        "colours-en:colours-fr/zero_shot",
    ]
    drop = found["colours-en/zero_shot"]["acc1"] - found["colours-fr/zero_shot"]["acc1"]
    assert found["colours-en:colours-fr/zero_shot"]["drop"] == pytest.approx(drop)


def test_compare_two_models(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, a sentence a figure, and JSON; a model against itself differs in nothing."""
    data: list[str | Path] = [home / "shards" / "*.tar", "--task", "zero_shot,retrieval", "--json", tmp_path / "f.json"]
    run("compare", home / "a", home / "b", *data, "--out", tmp_path / "out")
    found = figures(tmp_path / "f.json")
    printed = capsys.readouterr().out
    for name, values in found.items():
        assert values["difference"] == pytest.approx(values["second"] - values["first"])
        sentence = next(line for line in printed.splitlines() if line.startswith(f"{name}: "))
        assert ("(significant, p" in sentence) == values["real"]
    assert "shards/zero_shot/acc1" in found
    assert (tmp_path / "out" / "first" / "results.json").is_file()
    run("compare", home / "a", home / "a", *data)
    assert all(
        (v["difference"], v["p_value"], v["real"]) == (0, 1, False) for v in figures(tmp_path / "f.json").values()
    )


def test_real_tasks_of_a_real_model(home: Path, tmp_path: Path) -> None:
    """Fine-tuning a saved model begins at its zero-shot accuracy; k-NN and probes read the training split."""
    data = tmp_path / "split"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        (data / split / "nshards.txt").write_text("1")
    (data / "classnames.txt").write_text("\n".join(COLORS))
    for split, shard in (("train", "0.tar"), ("test", "1.tar")):
        (data / split / "0.tar").write_bytes((home / "shards" / shard).read_bytes())
    run("eval", home / "a", data, "--task", "zero_shot,knn,fine_tune", "--json", tmp_path / "f.json")
    found = figures(tmp_path / "f.json")
    assert found["split/fine_tune"]["acc1@0"] == found["split/zero_shot"]["acc1"]
    assert found["split/fine_tune"]["acc1@1"] > 0.9
    assert found["split/knn"]["train_samples"] == 24


def test_what_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake is one line that says what is wrong, where, and what to do, before anything is encoded."""
    shards = home / "shards" / "*.tar"
    common = (home / "a", shards)
    line = refused(capsys, "eval", *common, "--task", "zero_shot,zeroshot")
    assert "'zeroshot'" in line
    assert "retrieval, segmentation, zero_shot" in line
    assert "no training split" in refused(capsys, "eval", *common, "--task", "knn")
    line = refused(capsys, "eval", *common, "--slice-by", "kind")
    assert "'kind'" in line
    assert "cls" in line
    assert "--slice-by FIELD" in refused(capsys, "eval", *common, "--task", "associations")
    assert str(tmp_path / "none") in refused(capsys, "eval", home / "a", tmp_path / "none")
    assert "classnames.xx.txt" in refused(capsys, "eval", *common, "--language", "xx")
    assert "write A:B" in refused(capsys, "eval", *common, "--shift", "shards")
    assert "--device" in refused(capsys, "eval", *common, "--device", "cuda:99")
    (tmp_path / "file").touch()
    assert "give another, or --no-cache" in refused(capsys, "eval", *common, "--cache", tmp_path / "file")
    line = refused(capsys, "compare", home / "a", home / "b", shards, "--task", "geometry")
    assert "'geometry'" in line
    assert "zero_shot" in line
    assert "no model" in refused(capsys, "compare", home / "a", tmp_path / "none", shards)


def test_a_member_that_is_no_number_is_no_class(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label that is not among the class names names itself, the sample, and the file."""
    shard = tmp_path / "odd.tar"
    with tarfile.open(home / "shards" / "0.tar") as old, tarfile.open(shard, "w") as new:
        for member in old.getmembers()[:3]:
            content = b"violet" if member.name.endswith(".cls") else old.extractfile(member).read()  # type: ignore[union-attr]
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    (tmp_path / "classnames.txt").write_text("\n".join(COLORS))
    line = refused(capsys, "eval", home / "a", shard)
    assert "'violet'" in line
    assert "4 class names" in line


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in names of datasets and groups are no markup, neither in the table nor beside the bar."""
    gap = {"best": "[/a]", "worst": "[bold]", "width": 0.1, "p_value": 0.2}
    print_results({"pets [red]/zero_shot": {"acc1": 0.5, "gaps": {"style": gap}, "note": "[/b] is not told"}})
    printed = capsys.readouterr().out
    for word in ("[red]", "[/a]", "[bold]", "[/b] is not told"):
        assert word in printed
    with progress_bar("evaluations", 1) as bar:
        bar.describe("pets [/a]: images", 3)
        bar.advance()


def test_the_table_of_metrics_fits_into_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest names, intervals and baselines are whole; no line is cut at its end."""
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {"image_retrieval_median_rank": 1074.0, "text_retrieval_recall@10": 0.5}
    of_all = {"text_retrieval_recall@10": {"majority": 0.25, "chance": 0.0103}}
    intervals = {"image_retrieval_median_rank": (1062.0, 1085.5), "text_retrieval_recall@10": (0.4, 0.6)}
    print_results({"pets/retrieval": {**metrics, "intervals": intervals, "baselines": of_all}})
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 80
    assert {line[-1] for line in lines} <= set("┓┃┩│┘")
    for words in ("image_retrieval_median_rank", "1062.0000 to", "1085.5000", "majority", "0.0103"):
        assert words in "\n".join(lines)


def test_the_folder_of_the_figures_is_made(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It need not be there; where it cannot be, that is told before anything is encoded."""
    run("eval", home / "a", home / "shards" / "*.tar", "--json", tmp_path / "new" / "f.json", "--no-cache")
    assert "shards/zero_shot" in figures(tmp_path / "new" / "f.json")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "f.json"
    for command in (["eval", home / "none"], ["compare", home / "none", home / "none"]):
        assert "--json in" in refused(capsys, *command, home / "shards" / "*.tar", "--json", place)
