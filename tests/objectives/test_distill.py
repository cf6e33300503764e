"""Distillation from a model and from stored embeddings."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmssl
from mmssl.apps.search import embed_shards
from mmssl.build import RunPlan, build_encoder, build_loader, build_task, build_tokenizer, resolve
from mmssl.config import parse_config
from mmssl.data import iter_samples
from mmssl.data.transforms.views import View
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.losses import distillation
from mmssl.objectives._mixing import TrainingTask
from mmssl.objectives._teachers import IMAGE, TEXT, StoredEmbeddings
from mmssl.objectives.distill import Distill, DistillOptions
from mmssl.rng import RowRandom, generator
from mmssl.types import Batch
from tests.helpers.objective_batch import ROWS, TEACHER, batch, tiny_task
from tests.helpers.tiny_runs import run_tree, write_pairs

DIM, SCALE, TEACHER_SCALE = 6, 9.0, 14.0


def unit_rows(seed: int, dim: int = DIM) -> Tensor:
    return F.normalize(torch.randn(5, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image and text of the student, with gradients, and of the teacher, which has more dimensions."""
    return unit_rows(0).requires_grad_(), unit_rows(1).requires_grad_(), unit_rows(2, 8), unit_rows(3, 8)


def crd_in_loops(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor) -> Tensor:
    """CLIP-KD's equations 5 to 8: p_k[j] is the softmax over j of the similarity of sample k with j."""
    total = image.new_zeros(())
    for rows, columns, t_rows, t_columns in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for k in range(len(rows)):
            ours = torch.stack([SCALE * rows[k] @ columns[j] for j in range(len(rows))]).exp()
            theirs = torch.stack([TEACHER_SCALE * t_rows[k] @ t_columns[j] for j in range(len(rows))]).exp()
            p, q = ours / ours.sum(), theirs / theirs.sum()
            for j in range(len(rows)):
                total = total + q[j] * (q[j].log() - p[j].log()) / len(rows) / 2
    return total


def icl_in_loops(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor) -> Tensor:
    """CLIP-KD's equations 11 and 12: the student's anchor, the teacher's candidates."""
    total = image.new_zeros(())
    for anchors, candidates in ((image, t_text), (text, t_image)):
        for k in range(len(anchors)):
            exponents = [(SCALE * anchors[k] @ candidates[b]).exp() for b in range(len(anchors))]
            total = total - (exponents[k] / torch.stack(exponents).sum()).log() / len(anchors) / 2
    return total


def relations_in_loops(student: Tensor, teacher: Tensor) -> Tensor:
    n = len(student)
    differences = [student[i] @ student[j] - teacher[i] @ teacher[j] for i in range(n) for j in range(n)]
    return torch.stack([d**2 for d in differences]).mean()


def kl_div_of_torch(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor) -> Tensor:
    """The same divergence by F.kl_div on whole matrices, as in CLIP-KD's code."""
    ours, theirs = SCALE * image @ text.T, TEACHER_SCALE * t_image @ t_text.T
    both = ((ours, theirs), (ours.T, theirs.T))
    return sum(F.kl_div(F.log_softmax(a, 1), F.softmax(b, 1), reduction="batchmean") for a, b in both) / 2


def ours_crd(image: Tensor, text: Tensor, t_image: Tensor, t_text: Tensor) -> Tensor:
    scales = image.new_tensor(SCALE), image.new_tensor(TEACHER_SCALE)
    return distillation.similarities(image, text, t_image, t_text, *scales)


@pytest.mark.parametrize("most", [distillation.MOST_ENTRIES, 2 * 5], ids=["whole", "two rows at a time"])
@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (ours_crd, crd_in_loops),
        (ours_crd, kl_div_of_torch),
        (
            lambda i, t, ti, tt: distillation.interaction(i, t, ti[:, :DIM], tt[:, :DIM], i.new_tensor(SCALE)),
            lambda i, t, ti, tt: icl_in_loops(i, t, ti[:, :DIM], tt[:, :DIM]),
        ),
        (lambda i, t, ti, tt: distillation.relations(i, ti), lambda i, t, ti, tt: relations_in_loops(i, ti)),
        (
            lambda i, t, ti, tt: distillation.features(i, ti[:, :DIM]),
            # FD of the paper is a mean over the dimensions too.
            lambda i, t, ti, tt: DIM * F.mse_loss(i, ti[:, :DIM]),
        ),
    ],
    ids=["crd", "kl_div", "icl", "relations", "features"],
)
def test_losses_are_those_of_the_paper(ours: Any, oracle: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients equal the paper's formulas in loops, F.kl_div and F.mse_loss, in one block or in several."""
    monkeypatch.setattr(distillation, "MOST_ENTRIES", most)
    found, expected = pairs(), pairs()
    value, reference = ours(*found), oracle(*expected)
    torch.testing.assert_close(value, reference)
    value.backward()
    reference.backward()
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def prepared(task: TrainingTask) -> dict[str, Tensor]:
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    return task.inputs(batch(task), ["distill"], lambda _: random, 0.0)


def test_the_objective_is_the_weighted_sum_of_its_losses() -> None:
    """With weights 2, 3, 5 and 7, the total and its gradients are those of the losses by hand, images and captions
    halved; the student is projected to the teacher's dimensions for features and interaction only."""
    weights = {"features": 2.0, "logits": 3.0, "interaction": 5.0, "relations": 7.0}
    task = tiny_task(["distill"])
    objective = task.objective("distill")
    assert isinstance(objective, Distill)
    objective.options = DistillOptions(teacher=TEACHER, **weights)
    inputs = prepared(task)
    leaves = {k: v.detach().requires_grad_() for k, v in task.predict(inputs, ["distill"])["distill"].items()}
    total = objective.loss(leaves, inputs, World()).total
    i, t, s = leaves["image"], leaves["text"], leaves["logit_scale"]
    pi, pt, ti, tt = leaves["image_features"], leaves["text_features"], inputs[IMAGE], inputs[TEXT]
    assert pi.shape == ti.shape != i.shape
    scale = torch.tensor(mmssl.load(TEACHER).logit_scale)
    expected = (
        2 * (distillation.features(pi, ti) + distillation.features(pt, tt)) / 2
        + 3 * distillation.similarities(i, t, ti, tt, s, scale)
        + 5 * distillation.interaction(pi, pt, ti, tt, s)
        + 7 * (distillation.relations(i, ti) + distillation.relations(t, tt)) / 2
    )
    torch.testing.assert_close(total, expected)
    found = torch.autograd.grad(total, list(leaves.values()))
    for mine, theirs in zip(found, torch.autograd.grad(expected, list(leaves.values())), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_teacher_sees_its_own_input() -> None:
    """Its embeddings are those of `load(...)`: images at its own size, captions in its own tokens; also while the
    training task is in training mode, where the teacher has dropout."""
    task = tiny_task(["distill"])
    inputs, model = prepared(task), mmssl.load(TEACHER)
    assert inputs["view.distill"].shape[-1] == model.vision.image_size != inputs["view.main"].shape[-1]
    torch.testing.assert_close(inputs[IMAGE], model.encode_rendered(inputs["view.distill"]))
    first = batch(task).extras["distill.tokens"]
    words = [f"a red square, number {row}" for row in range(ROWS)]
    assert torch.equal(first, model.tokenizer.encode(words)[0])
    torch.testing.assert_close(inputs[TEXT], model.encode_text(words))


def test_checkpoints_hold_the_fingerprint_alone(tmp_path: Path) -> None:
    """No weight of the teacher is in the state dict or gets a gradient; a run that is resumed with another teacher at
    the same path is refused."""
    shutil.copytree(TEACHER, tmp_path / "teacher")
    task = tiny_task(["distill"], options={"teacher": str(tmp_path / "teacher")})
    kept = {name.removeprefix("objectives.distill.") for name in task.state_dict() if "distill" in name}
    assert kept == {"fingerprint", "projections.image.weight", "projections.text.weight"}
    assert not any(p.requires_grad for n, p in task.named_parameters() if ".teacher." in n)
    other = mmssl.load(TEACHER)
    with torch.no_grad():
        other.encoder.image_projection.weight.add_(0.01)
    other.save(tmp_path / "teacher")
    resumed = tiny_task(["distill"], options={"teacher": str(tmp_path / "teacher")})
    resumed.load_state_dict(task.state_dict())
    task.objective("distill").on_resume()
    with pytest.raises(UserError, match="not the teacher that this run began with"):
        resumed.objective("distill").on_resume()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return sorted(map(str, write_pairs(tmp_path_factory.mktemp("shards")).glob("*.tar")))


@pytest.fixture(scope="module")
def embedded(shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `mmssl embed --with-text` stores."""
    out = tmp_path_factory.mktemp("embedded") / "index"
    embed_shards(mmssl.load(TEACHER), shards, out, with_text=True)
    return out


def plan_of(shards: list[str], teacher: str) -> RunPlan:
    tree = run_tree(
        Path(shards[0]).parent, Path("unused"), objectives={"contrastive": {}, "distill": {"teacher": teacher}}
    )
    tree["data"] |= {"workers": 0, "views": {"main": {"crop_scale": [0.3, 0.8]}}}
    tree["model"]["vision"]["image_size"] = 24
    return resolve(parse_config(tree, "here"))


def loaded(shards: list[str], teacher: str, folder: Path) -> tuple[Batch, TrainingTask]:
    """The first batch of a run, and its task."""
    plan = plan_of(shards, teacher)
    tokenizer = build_tokenizer(plan, folder / "tokenizer")
    task = build_task(plan.objectives, build_encoder(plan.config, tokenizer), tokenizer, World())
    with build_loader(plan, task, tokenizer, folder / "bad.jsonl") as loader:
        return next(loader), task


def test_the_loader_renders_the_same_crop_at_the_teachers_size(shards: list[str], tmp_path: Path) -> None:
    """Student and teacher see one random crop of each image, each rendered from the full image at its own size."""
    given, _ = loaded(shards, TEACHER, tmp_path)
    assert given.views["main"].shape[-1] == 24
    assert given.views["distill"].shape[-1] == 16
    samples = {f"{s.shard}:{s.key}": s for s in iter_samples(shards)}
    config = plan_of(shards, TEACHER).config.data.views["main"]
    for row, key in enumerate(given.keys):
        for name, size in (("main", 24), ("distill", 16)):
            drawn = generator(0, "view", "main", 0, int(given.ids[row]))
            assert torch.equal(given.views[name][row], View(config, size)(samples[key].image, drawn)), name
    captions = [samples[key].fields["txt"] for key in given.keys]
    assert torch.equal(given.extras["distill.tokens"], mmssl.load(TEACHER).tokenizer.encode(captions)[0])


def test_stored_embeddings_teach_without_a_forward_pass(shards: list[str], embedded: Path, tmp_path: Path) -> None:
    """The loader looks up each sample by shard and key: rows are the model's own embeddings of the evaluation view,
    within float16; the objective holds no tower and asks for no view."""
    given, task = loaded(shards, str(embedded), tmp_path)
    objective = task.objective("distill")
    assert set(given.views) == {"main"}
    assert not list(objective.teacher.parameters())
    model, samples = mmssl.load(TEACHER), {f"{s.shard}:{s.key}": s for s in iter_samples(shards)}
    chosen = [samples[key] for key in given.keys]
    expected = model.encode_image([s.image for s in chosen]), model.encode_text([s.fields["txt"] for s in chosen])
    for name, rows in zip((IMAGE, TEXT), expected, strict=True):
        torch.testing.assert_close(given.extras[name], rows, atol=2e-3, rtol=0)
    random = RowRandom(torch.Generator().manual_seed(1), 0, 8, 8)
    inputs = task.inputs(given, ["distill"], lambda _: random, 0.0)
    output = objective.loss(task.predict(inputs, ["distill"])["distill"], inputs, World())
    assert math.isfinite(float(output.total.detach()))


def test_stored_embeddings_refuse_what_they_lack(shards: list[str], embedded: Path, tmp_path: Path) -> None:
    """An unknown sample, another caption than the embedded one, and embeddings of images alone are errors that say what
    to do; a shard that moved is found by its name."""
    found = StoredEmbeddings(embedded)
    sample = next(iter_samples(shards))
    key, caption = f"{sample.shard}:{sample.key}", sample.fields["txt"]
    moved = f"/elsewhere/{Path(sample.shard).name}:{sample.key}"
    assert torch.equal(found([caption], [moved])[IMAGE], found([caption], [key])[IMAGE])
    with pytest.raises(UserError, match=r"no embedding of .*nothing; embed the training shards: mmssl embed"):
        found([caption], [f"{sample.shard}:nothing"])
    with pytest.raises(UserError, match=r"was embedded with the caption .* and is trained with 'another'"):
        found(["another"], [key])
    embed_shards(mmssl.load(TEACHER), shards, tmp_path / "images")
    with pytest.raises(UserError, match=r"no embeddings of captions; embed again with --with-text"):
        tiny_task(["distill"], options={"teacher": str(tmp_path / "images")})
    images_only = {"teacher": str(tmp_path / "images"), "logits": 0.0, "relations": 1.0}
    assert tiny_task(["distill"], options=images_only).objective("distill").required_passes()[0].tower == "vision"
    # The same command with texts makes the parts anew.
    assert embed_shards(mmssl.load(TEACHER), shards, tmp_path / "images", with_text=True).renewed == 2
    assert StoredEmbeddings(tmp_path / "images")([caption], [key])[TEXT].shape == (1, 16)


def test_a_missing_teacher_is_named() -> None:
    """No teacher, and a path without one, are errors that name the key."""
    with pytest.raises(UserError, match=r"objectives\.distill\.teacher is missing"):
        tiny_task(["distill"], options={})
    with pytest.raises(UserError, match=r"objectives\.distill\.teacher: no model at nowhere"):
        tiny_task(["distill"], options={"teacher": "nowhere"})
    with pytest.raises(ValueError, match="all of its losses have weight 0"):
        DistillOptions(teacher="x", features=0, logits=0)
