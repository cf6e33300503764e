"""Bad input ends in one line that says what, where and what to do, exit code 2, and nothing half-written."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import mmssl
from mmssl.cli import main
from mmssl.cli.train import resumed_config
from mmssl.config import parse_config
from mmssl.errors import UserError
from mmssl.train.trainer import train
from tests.helpers.tiny_runs import run_tree, write_pairs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two tars."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "done"
    train(parse_config(run_tree(shards, run, train__steps=2), "test"))
    return run


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """The command exits with 2 and one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 2
    assert len(lines) == 1, lines
    assert [word for word in words if word not in lines[0]] == []
    assert "Traceback" not in lines[0]


def configured(shards: Path, run: Path, path: Path) -> str:
    path.write_text(yaml.safe_dump(run_tree(shards, run, train__steps=2)))
    return str(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'optim.lr'"]),
        ("data.train={here}/none-*.tar", ["none-*.tar", "match"]),
        ("data.train={here}/none.tar", ["none.tar"]),
        ("data.batch_size=4096", ["4096", "48"]),
        ("model.text={{name: {here}/empty}}", ["empty", "tokenizer"]),
        ("model.vision.name=timm:resnet10tt", ["resnet10tt", "resnet10t"]),
        ("objectives.contrastive.temperature=1", ["objectives.contrastive.temperature"]),
        ("objectives.contrastiv.weight=1", ["contrastiv", "contrastive"]),
        ("run_dir=/proc/none", ["/proc/none", "cannot be written"]),
        ("run_dir={here}/c.yaml/run", ["c.yaml/run", "cannot be written"]),
        ("evaluate.suites.x.data={here}/nowhere", ["nowhere"]),
        ("data.captions=['{{title}}']", ["title", "txt"]),
        ("train.precision=fp16", ["fp16", "bf16"]),
    ],
)
def test_training_refuses_bad_input(
    change: str, words: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake is named before a run folder exists."""
    if torch.cuda.is_available() and "fp16" in change:
        change, words = "train.precision=fp8", ["fp8", "bf16"]
    (tmp_path / "empty").mkdir()
    path = configured(shards, tmp_path / "run", tmp_path / "c.yaml")
    fails(["train", path, change.format(here=tmp_path)], capsys, *words)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_never_overwritten(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training into a folder that exists is refused, with the way to go on; its files stay."""
    before = (finished / "metrics.jsonl").read_bytes()
    fails(["train", configured(shards, finished, tmp_path / "c.yaml")], capsys, str(finished), "--resume")
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_architecture_says_what_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resuming with another tower names the weights that do not fit, and leaves the run as it was."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    saved = (run / "config.yaml").read_bytes()
    fails(["train", "--resume", str(run), "model.embed_dim=12"], capsys, "another architecture", "projection")
    assert (run / "config.yaml").read_bytes() == saved


def test_resuming_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without config.yaml is named, and nothing is written to it."""
    (tmp_path / "notes.txt").write_text("mine")
    fails(["train", "--resume", str(tmp_path)], capsys, str(tmp_path), "config.yaml")
    fails(["train"], capsys, "configs/quickstart.yaml")
    fails(["train", str(tmp_path / "none.yaml")], capsys, "none.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["exp #2", "a: b", "1e3", "null", "[x]", "{y}", "~", "*z", "true"])
def test_a_run_resumes_in_a_folder_of_any_name(name: str, finished: Path, tmp_path: Path) -> None:
    """The folder's name is a value of the configuration, never read as YAML."""
    run = tmp_path / name
    shutil.copytree(finished, run)
    (tmp_path / "here").mkdir()
    assert resumed_config(run, ["optim.lr=0.5"]).run_dir == run
    with contextlib.chdir(tmp_path):
        assert resumed_config(Path(name), []).run_dir == Path(name)
    main_ok(["train", "--resume", str(run)])
    assert yaml.safe_load((run / "config.yaml").read_text())["run_dir"] == str(run)
    assert {path.name for path in tmp_path.iterdir()} == {name, "here"}


def test_help_and_version_are_fast() -> None:
    """`mmssl --help`, the help of a verb and `mmssl --version` load no heavy library, and take under a second."""
    heavy = {"torch", "numpy", "rich", "matplotlib", "transformers", "open_clip", "yaml", "PIL"}
    code = (
        "import sys; from mmssl.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    for words in (["--help"], ["train", "--help"], ["export", "--help"], ["shards", "pack", "--help"], ["--version"]):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert heavy.isdisjoint(done.stderr.split()), words
        assert after.children_user + after.children_system - before.children_user - before.children_system < 1
        if words == ["--version"]:
            assert done.stdout == f"mmssl {version('mmssl')}\n"


def test_every_module_is_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """Each module beside main and common registers a verb, a group or verbs of `shards`; no other verb is imported."""
    main_ok(["--help"])
    listed = capsys.readouterr().out
    for path in (ROOT / "mmssl" / "cli").glob("*.py"):
        if path.stem in ("__init__", "main", "common"):
            continue
        source = path.read_text()
        assert "@verb(" in source or "= group(" in source or "@shards_app.command(" in source, path
        assert set(re.findall(r"mmssl\.cli\.(\w+)", source)) <= {"common", "shards"}, path
        assert path.stem.replace("_", "-") in listed or path.stem in ("evaluate", "suspects"), path


def test_evaluation_refuses_what_does_not_fit(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few class names, no data, no model, and an unwritable output are each named; no figures file appears."""
    few = tmp_path / "few.txt"
    few.write_text("red\ngreen\n")
    out = tmp_path / "figures.json"
    common = ["--json", str(out)]
    pattern = str(shards / "*.tar")
    fails(["eval", str(finished), pattern, "--classnames", str(few), *common], capsys, "few.txt")
    fails(["eval", str(finished), str(tmp_path / "none-*.tar"), *common], capsys, "none-*.tar")
    fails(["eval", str(tmp_path), pattern, *common], capsys, str(tmp_path), "no model")
    fails(["eval", str(finished), pattern, "--task", "zeroshot", *common], capsys, "zeroshot", "zero_shot")
    assert not out.exists()
    fails(["eval", str(finished), pattern, "--json", "/proc/none/x.json"], capsys, "/proc/none")
    fails(["eval", str(finished), pattern, "--out", "/proc/none"], capsys, "/proc/none")


def test_a_model_folder_that_does_not_fit_together_is_refused(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of another shape, and a configuration of another format, are named; put back, the model is usable."""
    model = tmp_path / "model"
    shutil.copytree(finished / "model", model)
    save_file({"x": torch.zeros(1)}, model / "model.safetensors")
    fails(["eval", str(model), str(shards / "*.tar")], capsys, "do not fit together")
    (model / "config.json").write_text(json.dumps({"format": 9}))
    fails(["eval", str(model), str(shards / "*.tar")], capsys, "format 9")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(finished / "model" / name, model)
    main_ok(["eval", str(model), str(shards / "*.tar")])
    assert "acc1" in capsys.readouterr().out


def test_damaged_weights_are_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of weights that was cut is no model, and a model that cannot be written is told, in one line each."""
    shutil.copytree(finished / "model", tmp_path / "m")
    content = (tmp_path / "m" / "model.safetensors").read_bytes()
    (tmp_path / "m" / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails(["predict", str(tmp_path / "m"), str(tmp_path), "--labels", "a,b"], capsys, str(tmp_path / "m"))
    model, place = mmssl.load(finished), tmp_path / "m" / "config.json" / "inside"
    with pytest.raises(UserError, match=f"{place} cannot be written: .*pick another folder"):
        model.save(place)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trane", ["'trane'", "'train'", "see: mmssl --help"]),
        ("predict", ["see: mmssl predict --help"]),
        ("predict m p --lables a", ["--lables", "--labels", "see: mmssl predict --help"]),
        ("search m i words -k 0", ["'-k'", "see: mmssl search --help"]),
        ("shards pakc", ["'pakc'", "see: mmssl shards --help"]),
        ("train steps=3", ["give pairs", "configuration"]),
    ],
)
def test_misused_commands_are_one_line(words: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown verbs and options, missing words and numbers out of range name themselves and where the help is."""
    fails(words.split(), capsys, *said)


@pytest.mark.parametrize("words", [[], ["shards"]])
def test_a_verb_of_verbs_alone_shows_its_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All verbs, with exit code 2, as nothing was done."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert "Usage: mmssl" in printed.err + printed.out
    assert "error" not in printed.err


def test_what_no_verb_foresaw_of_files_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal of the system says which file and what to do; a file that is missing where it should not be is a fault
    of ours, and shown as such."""

    def meets(number: int) -> None:
        def broken(config: object) -> str:
            raise OSError(number, os.strerror(number), "/some/file")

        monkeypatch.setattr("mmssl.cli.show.describe", broken)

    arguments = ["show", str(ROOT / "configs" / "ci_tiny.yaml")]
    meets(errno.EACCES)
    fails(arguments, capsys, "/some/file cannot be used", "Permission denied", "change its permissions")
    meets(errno.ENOSPC)
    fails(arguments, capsys, "No space left", "free some space")
    meets(errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        main(arguments)


def test_eval_writes_figures_tables_and_images(
    finished: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tasks on the same shards; --json holds what is printed, --out holds tables and plots."""
    for task, figure in (("zero_shot", "acc1"), ("retrieval", "image_retrieval_recall@1")):
        out = tmp_path / task
        main_ok(
            ["eval", str(finished), str(shards / "*.tar"), "--task", task, "--json", f"{out}.json", "--out", str(out)]
        )
        (figures,) = json.loads(Path(f"{out}.json").read_text()).values()
        assert 0 <= figures[figure] <= 1
        assert list(out.rglob("*.png"))
        assert figure in capsys.readouterr().out


def test_show_needs_no_data(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`show` prints the resolved configuration, counts, length, curve and plan although the shards do not exist."""
    path = configured(tmp_path / "nowhere", tmp_path / "run", tmp_path / "c.yaml")
    main_ok(["show", path, "optim.lr=3e-3"])
    printed = capsys.readouterr().out
    for word in ("lr: 0.003", "vision tower", "2 steps of 8 pairs", "peak 0.003", "vision tower on view.main"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_learnt_from_shards(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tokenizer train` writes a folder that the configuration can name."""
    main_ok(["tokenizer", "train", str(shards / "*.tar"), "--out", str(tmp_path / "tok"), "--vocab-size", "80"])
    assert (tmp_path / "tok" / "tokenizer.json").is_file()
    path = configured(shards, tmp_path / "run", tmp_path / "c.yaml")
    main_ok(["show", path, f"model.text.tokenizer={tmp_path / 'tok'}"])


def main_ok(arguments: list[str]) -> None:
    """The command ends with exit code 0."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert not caught.value.code


def test_lit_with_packaged_towers(tmp_path: Path) -> None:
    """The shipped LiT configuration trains on towers that come in PyPI packages: the locked EfficientNet-Lite0 stays as
    it was, MiniLM's last layer moves."""
    towers = tmp_path / "towers"
    subprocess.run([sys.executable, "scripts/local_towers.py", str(towers)], check=True, cwd=ROOT, capture_output=True)
    changes = [
        f"model.vision.pretrained={towers / 'tf_efficientnet_lite0.safetensors'}",
        f"model.text.name={towers / 'all-MiniLM-L6-v2'}",
        *(
            "train.minutes=null",
            "train.steps=2",
            "train.precision=fp32",
            "data.batch_size=8",
            "train.threads=1",
            "train.trackers=[]",
        ),
        *("evaluate.suites={}", f"run_dir={tmp_path / 'run'}", f"data.train={ROOT}/shards/train/train-00000.tar"),
    ]
    main_ok(["train", str(ROOT / "configs" / "lit_efficientnet_minilm.yaml"), *changes])
    model = mmssl.load(tmp_path / "run")
    given = load_file(towers / "tf_efficientnet_lite0.safetensors")
    for name, tensor in model.vision.trunk.state_dict().items():
        assert torch.equal(tensor, given[name]), name
    words = AutoModel.from_pretrained(towers / "all-MiniLM-L6-v2").state_dict()
    moved = {n for n, t in model.text.encoder.state_dict().items() if not torch.equal(t, words[n])}
    assert moved
    assert all("layer.5." in name for name in moved)
