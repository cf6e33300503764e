"""From a CSV to a model that is trained, asked, searched and judged, by the class and by the commands."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl import MMSSL, load
from mmssl.api import full_key
from mmssl.apps.autoconfig import next_commands
from mmssl.apps.autoconfig.preparation import prepare
from mmssl.config import HoldOutConfig, SourceConfig, load_config, set_key
from mmssl.data import expand, iter_samples
from mmssl.errors import UserError
from tests.cli.test_main import fails, main_ok
from tests.helpers.color_pairs import TINY, write_table
from tests.helpers.tiny_runs import run_tree, write_pairs

LABELS = ["a red square", "a green square", "a blue square", "a white square"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 40 pairs."""
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[MMSSL, Path]:
    """A tiny model that the class trained on them, and its run."""
    model, run = MMSSL(), tmp_path_factory.mktemp("runs") / "squares"
    finished = model.train(table, run, epochs=2, **TINY)
    assert (finished.run_dir, finished.signal) == (run, None)
    return model, run


def test_importing_the_package_loads_no_library() -> None:
    """Neither `import mmssl` nor the command line before its verb loads torch or what is built on it: help and
    completion are there at once."""
    code = (
        "import sys, mmssl, mmssl.cli.main;"
        "assert not {'torch', 'transformers', 'open_clip', 'timm', 'accelerate', 'matplotlib'} & set(sys.modules);"
        "assert mmssl.__all__ == ['MMSSL', 'Model', 'load']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_holds_a_part_out_and_judges_by_it(trained: tuple[MMSSL, Path], table: Path) -> None:
    """The run's shards hold all pairs, those that are judged by are not among those that are trained on, the figures
    are of all of them, and the chosen settings are the run's."""
    _, run = trained
    config = load_config(run / "config.yaml")
    parts = [
        {s.key for s in iter_samples(expand(spec))}
        for spec in (str(config.data.train), config.evaluate.suites["held-out"].data)
    ]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 40
    (figures,) = json.loads((run / "results.json").read_text()).values()
    assert figures["samples"] == len(parts[1])
    assert config.train.epochs == 2
    assert config.data.batch_size == 8
    assert config.model.vision.image_size == 16


def test_a_model_is_what_it_was_trained_to_be(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """After training the class gives what the run's model gives, and what is saved and read again."""
    model, run = trained
    image, texts = table.parent / "photos" / "3.png", ["a red square", "x"]
    model.save(tmp_path / "saved")
    for other in (load(run), MMSSL(run), MMSSL(tmp_path / "saved")):
        assert torch.equal(model.encode_image(image), other.encode_image(image))
        assert torch.equal(model.encode_text(texts), other.encode_text(texts))
    assert model.vision.image_size == 16
    assert model.text is model.model.text


def test_predictions_are_the_classifications(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """For files, a folder and arrays alike, probabilities are `classify`'s, highest first; a drawing is an image and
    lies where it says."""
    model, _ = trained
    photos = sorted((table.parent / "photos").glob("*.png"))
    pixels = np.array(Image.open(photos[5]))
    found = model.predict([photos[5], pixels, photos[7]], LABELS, save=tmp_path / "drawn")
    assert [p.image for p in found] == [str(photos[5]), "image 2", str(photos[7])]
    for prediction, image in zip(found, (photos[5], photos[5], photos[7]), strict=True):
        expected = model.classify(image, LABELS)
        assert prediction.probabilities == pytest.approx(expected, abs=1e-6)
        shown = list(prediction.probabilities.values())
        assert shown == sorted(shown, reverse=True)
        assert prediction.saved is not None
        assert prediction.saved.parent == tmp_path / "drawn"
        assert np.asarray(Image.open(prediction.saved).convert("L")).std() > 10
    assert len({p.saved for p in found}) == 3
    assert len(model.predict(photos[0].parent, LABELS)) == 40
    (beside,) = model.predict(str(photos[0]), LABELS, templates=["{c}", "this is {c}"], save=True)
    assert beside.saved == photos[0].with_name("0-predicted.png")
    beside.saved.unlink()


def test_images_of_one_name_are_drawn_apart(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """Two files of one name in two folders get two drawings in one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes((table.parent / "photos" / "1.png").read_bytes())
    found = trained[0].predict([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"], LABELS, save=tmp_path)
    assert sorted(str(p.saved) for p in found) == [str(tmp_path / f"x{n}-predicted.png") for n in ("", "-2")][::-1]


def test_search_finds_images(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """Training leaves an index of all pairs, in which an image has the similarity 1 to itself; words give as many hits
    as asked for, the nearest first; an index of a table is made and searched alike."""
    model, run = trained
    image = table.parent / "photos" / "8.png"
    hits = model.search(str(image), run / "index", count=40)
    (itself,) = [hit for hit in hits if hit.key == "000000008"]
    assert itself.similarity == pytest.approx(1, abs=2e-3)
    assert hits[0].similarity == pytest.approx(1, abs=2e-3)
    index = model.embed(table, tmp_path / "index")
    assert len(index) == 40
    hits = model.search("a red square", index, count=5)
    assert len(hits) == 5
    assert hits[0].similarity == max(hit.similarity for hit in hits)
    with Image.open(image) as opened:
        assert model.search(opened, index, count=1)[0].similarity == pytest.approx(1, abs=2e-3)


def test_evaluation_takes_any_form_of_pairs(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """A table is judged by retrieval, with the figures of the same pairs as shards."""
    model, _ = trained
    (of_table,) = model.evaluate(table).values()
    packed = prepare(table, tmp_path / "shards", HoldOutConfig(share=0))
    (of_shards,) = model.evaluate(str(packed.train), "retrieval", tmp_path / "out").values()
    assert of_table["samples"] == of_shards["samples"] == 40
    assert of_table["image_retrieval_recall@5"] == of_shards["image_retrieval_recall@5"]
    assert (tmp_path / "out" / "results.json").is_file()


def test_training_goes_on_from_a_model(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """A model that is trained again starts from its weights: with a vanishing learning rate they stay the same."""
    model = MMSSL(trained[1])
    before = model.encode_text(LABELS)
    options = {"train.threads": 1, "train.trackers": [], "train.micro_batch": None, "optim.lr": 1e-12}
    model.train(table, tmp_path / "run", steps=1, precision="fp32", **options)
    assert model.source == str(tmp_path / "run")
    assert torch.allclose(model.encode_text(LABELS), before, atol=1e-5)
    assert load_config(tmp_path / "run" / "config.yaml").model.start == str(trained[1])


def test_a_configuration_is_followed(table: Path, tmp_path: Path) -> None:
    """With a YAML file only the data are replaced: its towers and length are the run's, and nothing is held out."""
    tree = {"run_dir": str(tmp_path / "run"), "data": {"train": "none", "batch_size": 8}, "train": {"steps": 1}}
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(tree))
    tokenizer = {"model.text.tokenizer": "train", "model.text.vocab_size": 64, "model.text.pooling": "mean"}
    finished = MMSSL(path).train(table, **{**TINY, **tokenizer})
    assert finished.run_dir == tmp_path / "run"
    assert finished.results == {}
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.data.batch_size, config.train.steps) == (8, 1)
    assert len(list(iter_samples(expand(str(config.data.train))))) == 40


def test_mistakes_are_named(trained: tuple[MMSSL, Path], table: Path, tmp_path: Path) -> None:
    """An unknown setting is refused before anything is packed, with the nearest known one; asking a model without
    weights, an existing run, bad labels and files that are no images are each named in one line."""
    model, run = trained
    (tmp_path / "words.png").write_text("no image")
    image = table.parent / "photos" / "1.png"

    def refused(call: Any, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert [word for word in words if word not in str(caught.value)] == []

    refused(lambda: MMSSL().train(table, tmp_path / "run", **{"optim.lrr": 1}), "optim.lrr", "optim.lr")
    refused(lambda: MMSSL().train(table, tmp_path / "run", batchsize=1), "batchsize", "batch_size")
    refused(lambda: MMSSL().train(table, tmp_path / "run", batch_size="many"), "batch_size", "many")
    assert not (tmp_path / "run").exists()
    refused(lambda: MMSSL().train(table, run), str(run), "--resume")
    refused(lambda: MMSSL().train(), "data")
    refused(lambda: MMSSL().train([]), "no data")
    refused(lambda: MMSSL().train(""), "no data")
    refused(lambda: MMSSL().predict(image, LABELS), "train")
    refused(lambda: MMSSL(tmp_path / "none"), "none")
    refused(lambda: MMSSL(tmp_path / "none.yaml"), "none.yaml")
    refused(lambda: model.predict(image, []), "labels")
    refused(lambda: model.predict(image, ["a", "a"]), "'a'")
    refused(lambda: model.predict(image, LABELS, templates="a photo"), "{c}")
    refused(lambda: model.predict(tmp_path / "gone.png", LABELS), "gone.png")
    refused(lambda: model.predict([tmp_path / "words.png"], LABELS), "words.png")
    refused(lambda: model.search("x", tmp_path), "index")
    refused(lambda: model.search("gone.png", run / "index"), "gone.png")


def test_a_mixture_is_trained_on_as_in_a_configuration(tmp_path: Path) -> None:
    """Weighted sources as a list, and in a configuration without other data: the run has these sources and weights, and
    some pairs of each are held out where there is no configuration."""
    parts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        parts.append({"shards": str(write_pairs(tmp_path / name) / "*.tar"), "weight": 1.0 + len(parts)})
    run = tmp_path / "given"
    MMSSL().train(data=parts, run_dir=run, steps=1, **{**TINY, "data.batch_size": 9})
    config = load_config(run / "config.yaml")
    assert [source.weight for source in config.data.train if not isinstance(source, str)] == [1.0, 2.0]
    tree = {**_nested(TINY), "run_dir": str(tmp_path / "mix")}
    tree["data"] = {"train": parts, "batch_size": 9}
    tree["model"]["text"] |= {"tokenizer": "train", "vocab_size": 64, "pooling": "mean"}
    tree["train"] |= {"steps": 1}
    (tmp_path / "mix.yaml").write_text(json.dumps(tree))
    model = MMSSL(tmp_path / "mix.yaml")
    finished = model.train()
    assert finished.run_dir == tmp_path / "mix"
    assert load_config(finished.run_dir / "config.yaml").data.train == [SourceConfig(**part) for part in parts]
    with pytest.raises(UserError, match="shards.* required.*weight"):
        MMSSL().train([{"shard": "x"}], tmp_path / "x")


def test_a_configuration_holds_out_what_the_words_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`mmssl train CONFIG --data TABLE data.hold_out.group=product`: no product is on both sides, every pair is on one,
    and the held-out pairs are evaluated beside the configuration's own suites."""
    lines = write_table(tmp_path).read_text().splitlines()
    rows = [f"{line},P{number // 2}" for number, line in enumerate(lines[1:])]
    (tmp_path / "products.csv").write_text("\n".join([f"{lines[0]},product", *rows]))
    (tmp_path / "shards").mkdir()
    tree = run_tree(write_pairs(tmp_path / "shards"), tmp_path / "unused", train__steps=1)
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    run = tmp_path / "run"
    table = str(tmp_path / "products.csv")
    main_ok(["train", str(tmp_path / "c.yaml"), "--data", table, "--run", str(run), "data.hold_out.group=product"])
    assert "are held out from training" in capsys.readouterr().out
    parts = [list(iter_samples(expand(str(run / "shards" / f"{name}-*.tar")))) for name in ("train", "held-out")]
    first, second = ({sample.fields["product"] for sample in part} for part in parts)
    assert first
    assert second
    assert not first & second
    assert sum(map(len, parts)) == 40
    results = json.loads((run / "results.json").read_text())
    assert {name.partition("/")[0] for name in results} == {"colors", "held-out"}
    assert results["held-out/retrieval"]["samples"] == len(parts[1])


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        set_key(tree, key, value)
    return tree


def test_settings_by_their_last_word() -> None:
    """A word that one section has stands for the whole key; whole keys and unknown words stay as they are."""
    assert full_key("epochs") == "train.epochs"
    assert full_key("batch_size") == "data.batch_size"
    assert full_key("lr") == "optim.lr"
    assert [full_key(name) for name in ("seed", "optim.lr", "nonsense")] == ["seed", "optim.lr", "nonsense"]


def tiny_words() -> list[str]:
    """The tiny settings as KEY=VALUE."""
    return [f"{key}={json.dumps(value)}" for key, value in TINY.items()]


def test_the_commands_do_the_same(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`train --data` prints settings with reasons and what to do next, with paths that exist; `predict` prints what the
    model says, as a table, as JSON and as drawings; `embed` takes the table too; the run's folder is refused the second
    time."""
    run, image = tmp_path / "run", str(table.parent / "photos" / "2.png")
    main_ok(["train", "--data", str(table), "--run", str(run), "train.steps=2", *tiny_words()])
    printed = capsys.readouterr().out
    for word in (
        "setting",
        "why",
        "data.batch_size",
        "given",
        "40 pairs packed",
        f"mmssl predict {run}",
        f"{run}/index",
    ):
        assert word in printed
    assert (run / "index" / "index.json").is_file()
    main_ok(["predict", str(run), image, "--labels", "red, blue", "--out", str(tmp_path / "drawn")])
    printed = capsys.readouterr().out
    assert "red" in printed
    assert "blue" in printed
    assert Image.open(tmp_path / "drawn" / "2-predicted.png").convert("L").size[0] > 300
    names = tmp_path / "names.txt"
    names.write_text("\n".join(LABELS))
    main_ok(["predict", str(run), image, "--classnames", str(names), "--template", "{c}", "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["probabilities"] == pytest.approx(load(run).classify(image, LABELS), abs=1e-6)
    main_ok(["embed", str(run), str(table), "--out", str(tmp_path / "index")])
    assert "40 images" in capsys.readouterr().out
    fails(["train", "--data", str(table), "--run", str(run)], capsys, str(run), "--resume")
    fails(["train", "--data", str(table), "--resume", str(run)], capsys, "--data", "--resume")
    fails(["train", "--run", str(run)], capsys, "--run", "--data")
    fails(["predict", str(run), image], capsys, "--labels")
    fails(["predict", str(run), image, "--labels", "a,b", "--classnames", str(names)], capsys, "--classnames")


def test_what_to_do_next_names_packages_that_are_missing(
    trained: tuple[MMSSL, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where search and page cannot run, how to install what they need comes before them."""
    assert not any("pip" in command for command in next_commands(trained[1]))
    monkeypatch.setattr(
        "mmssl.apps.autoconfig.training.find_spec", lambda name: None if name == "fastapi" else object()
    )
    commands = next_commands(trained[1])
    assert commands[1] == "pip install 'mmssl[search,serve]'"
    assert [command.split()[1] for command in commands] == ["predict", "install", "search", "serve"]


def test_a_run_on_a_table_is_resumed(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was stopped, even while it packed, goes on: the same command packs the rest and trains, `--resume`
    takes up a training that was killed and ends where one that was not killed ends."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    words = ["train.steps=6", "train.checkpoint_steps=2", *tiny_words()]
    prepare(table, run / "shards")
    fails(["train", "--resume", str(run)], capsys, str(run), "packing")
    command = [sys.executable, "-m", "mmssl", "train", "--data", str(table), "--run", str(run), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((run / "checkpoints").glob("*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    main_ok(["train", "--resume", str(run)])
    main_ok(["train", "--data", str(table), "--run", str(whole), *words])
    image = table.parent / "photos" / "4.png"
    assert torch.equal(load(run).encode_image(image), load(whole).encode_image(image))
    assert f"mmssl predict {run}" in capsys.readouterr().out
