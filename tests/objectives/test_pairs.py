"""Objectives that pair images with captions, with positives beyond each image's own caption."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmssl.build import complete_config, resolve
from mmssl.config import parse_config
from mmssl.data.storage import iter_samples
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.objectives import TrainingTask, base
from mmssl.train.setup import set_up
from mmssl.train.step import Step, Tally, backward
from mmssl.train.trainer import Trainer, train
from tests.helpers.objective_batch import ROWS, Plain, batch, part, tiny_task
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny_runs import run_tree, write_pairs

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "positives": ("contrastive", {"positives": "cls", "label_smoothing": 0.1}),
    "mask": ("contrastive", {"positives": "cls", "same": "mask"}),
    "sigmoid positives": ("siglip", {"positives": "cls"}),
    "dims": ("contrastive", {"dims": [24, 8, 3], "positives": "cls"}),
    "sigmoid dims": ("siglip", {"dims": [8, 4]}),
    "several": ("contrastive", {"images_per_sample": 2, "captions_per_sample": 3}),
    "several of a field": ("contrastive", {"images_per_sample": 2, "positives": "cls", "mask_ratio": 0.5}),
    "sigmoid several": ("siglip", {"captions_per_sample": 2, "positives": "cls", "same": "mask"}),
    "sigmoid mask": ("siglip", {"positives": "cls", "same": "mask"}),
}


def _gradient(case: str, world: World, micro_batch: int | None = None) -> tuple[TrainingTask, Tally]:
    """The gradient of one step on this process's rows of the batch, in the task's parameters."""
    name, options = CASES[case]
    task = tiny_task([name], world=world, options=options)
    model = task if world.size == 1 else DistributedDataParallel(task, find_unused_parameters=True)
    step = Step(task, part(batch(task), world), {name: 1.0}, 0.5, (0, "step"), micro_batch)
    return task, backward(model, step, Plain())


def _gradients(task: TrainingTask) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in task.named_parameters() if p.grad is not None}


def _assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert np.abs(g - found[name]).max() <= 1e-5 * max(np.abs(g).max(), 1e-4), name


def _on_a_rank(world: World) -> dict[str, dict[str, np.ndarray]]:
    return {case: _gradients(_gradient(case, world, micro_batch=4)[0]) for case in CASES}


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, dict[str, np.ndarray]]]:
    """The gradients of each of two gloo processes, in micro-batches of 4."""
    return on_ranks(2, _on_a_rank)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_and_processes_give_the_gradient_of_the_batch(
    case: str, two_processes: list[dict[str, dict[str, np.ndarray]]]
) -> None:
    """Micro-batches of 5, and two processes with micro-batches of 4, have the gradient of one step on all samples;
    groups reach across them. Another grouping gives another gradient."""
    whole, tally = _gradient(case, World())
    parts, found = _gradient(case, World(), 5)
    expected = _gradients(whole)
    _assert_same(_gradients(parts), expected)
    for key, pair in tally.sums.items():
        # Accuracies count ranks, and several images of a sample have nearly equal ones: rounding may turn one over.
        slack = 1.0 if key.endswith("accuracy") else 1e-4
        assert torch.allclose(found.sums[key], pair, rtol=1e-4, atol=slack), key
    for gradients in two_processes:
        _assert_same(gradients[case], expected)
    plain = tiny_task([CASES[case][0]], options={})
    backward(plain, Step(plain, batch(plain), {CASES[case][0]: 1.0}, 0.5, (0, "step")), Plain())
    with pytest.raises(AssertionError):
        _assert_same(_gradients(plain), expected)


def test_accuracy_counts_captions_of_the_group() -> None:
    """With all samples in one group every nearest caption is right."""
    task = tiny_task(["contrastive"], options={"positives": "cls"})
    given = batch(task)
    given.groups["cls"].zero_()
    tally = backward(task, Step(task, given, {"contrastive": 1.0}, 0.5, (0, "step")), Plain())
    assert tally.sums["contrastive.accuracy"].tolist() == [ROWS, ROWS]


def test_all_pairs_of_a_sample_are_right() -> None:
    """With two images and three captions per sample, the loss is cross-entropy over 2 N rows and 3 N columns, even over
    the pairs of a sample, computed from the encoder's own embeddings."""
    task = tiny_task(["contrastive"], options={"images_per_sample": 2, "captions_per_sample": 3})
    given, encoder = batch(task), task.encoder
    tally = backward(task, Step(task, given, {"contrastive": 1.0}, 0.5, (0, "step")), Plain())
    images = torch.cat([encoder.encode_image(given.views[name]) for name in ("main", "main.1")])
    tokens = [(given.tokens, given.token_mask)]
    tokens += [(given.more_tokens[f"tokens.{i}"], given.more_tokens[f"token_mask.{i}"]) for i in (1, 2)]
    texts = torch.cat([encoder.encode_text(*pair) for pair in tokens])
    logits = encoder.logit_scale * images @ texts.T
    same = (torch.arange(ROWS).repeat(2)[:, None] == torch.arange(ROWS).repeat(3)).float()
    expected = (F.cross_entropy(logits, same / 3) + F.cross_entropy(logits.T, same.T / 2)) / 2
    total, count = tally.sums["contrastive.loss"]
    assert float(total / count) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "case", ["positives", "mask", "several", "sigmoid positives", "sigmoid mask", "sigmoid several"]
)
def test_the_chance_loss_of_a_batch_is_that_of_equal_embeddings(case: str) -> None:
    """Where captions or labels repeat, the chance loss in the metrics is the loss of embeddings that are all the same,
    for SigLIP with the best of all biases."""
    name, options = CASES[case]
    task = tiny_task([name], options=options)
    objective, given = task.objectives[name], batch(task)
    inputs = {"ids": torch.arange(ROWS), "group.cls": given.groups.get("cls", torch.arange(ROWS))}
    images = ["image", *(f"image.{i}" for i in range(1, options.get("images_per_sample", 1)))]
    texts = ["text", *(f"text.{i}" for i in range(1, options.get("captions_per_sample", 1)))]
    same = {key: torch.ones(ROWS, 4) / 2 for key in (*images, *texts)}

    def found(bias: float) -> base.Output:
        scalars = {"logit_scale": torch.tensor(3.0), "bias": torch.tensor(bias)}
        return objective.loss(same | scalars, inputs, World())

    chance, count = found(0.0).metrics["chance_loss"]
    best = minimize_scalar(lambda bias: float(found(bias).total), (-10, 0)).fun if name == "siglip" else found(0).total
    assert float(chance) / count == pytest.approx(float(best), rel=1e-5)


@pytest.mark.parametrize("dims", [[8, 2], [16, 8, 5, 1]])
def test_matryoshka_as_loops_and_as_sentence_transformers(dims: list[int]) -> None:
    """The loss is the mean over the numbers of dimensions of the symmetric cross-entropy of the first ones, each
    normalised; and sentence-transformers' MatryoshkaLoss (a sum) divided by their number. Gradients too."""
    task = tiny_task(["contrastive"], options={"dims": dims})
    objective, generator = task.objective("contrastive"), torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(9, 16, generator=generator), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(7.0)
    predictions = {"image": sides[0], "text": sides[1], "logit_scale": scale}
    output = objective.loss(predictions, {"ids": torch.arange(9)}, World())
    losses = []
    for dim in dims:
        image, text = (side[:, :dim] / side[:, :dim].norm(dim=1, keepdim=True) for side in sides)
        logits = scale * image @ text.T
        losses += [F.cross_entropy(z, torch.arange(9)) / 2 / len(dims) for z in (logits, logits.T)]
    expected = torch.stack(losses).sum()
    torch.testing.assert_close(output.total, expected)
    gradients = torch.autograd.grad(output.total, sides)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, sides))
    model = _Identity()
    both = ("query_to_doc", "doc_to_query")
    ranking = MultipleNegativesRankingLoss(model, scale=7.0, directions=both, partition_mode="per_direction")
    theirs = MatryoshkaLoss(model, ranking, dims)
    found = theirs([{"sentence_embedding": side} for side in sides], None) / len(dims)
    torch.testing.assert_close(found, output.total)
    torch.testing.assert_close(torch.autograd.grad(found, sides), gradients)
    assert set(output.metrics) == {"accuracy", f"accuracy_{min(dims)}", "logit_scale"}


class _Identity(torch.nn.Module):
    """A model of sentence-transformers whose embeddings are given."""

    def get_embedding_dimension(self) -> None:
        """Unknown."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)


def test_more_dimensions_than_there_are() -> None:
    """Dimensions that embeddings lack are refused, with the key to change."""
    with pytest.raises(UserError, match=r"objectives\.siglip\.dims has 25, .*model\.embed_dim=24"):
        tiny_task(["siglip"], options={"dims": [25, 4]})


def test_captions_of_several_are_not_compared() -> None:
    """positives=caption has no meaning beside several captions of a sample."""
    tree = run_tree(
        Path("data"), Path("run"), objectives={"siglip": {"captions_per_sample": 2, "positives": "caption"}}
    )
    with pytest.raises(UserError, match="positives=caption compares one caption"):
        complete_config(parse_config(tree, "here"))


def test_smoothing_needs_all_pairs() -> None:
    """A smoothed label has no meaning for pairs that are left out; the message names both options."""
    tree = run_tree(Path("data"), Path("run"), objectives={"contrastive": {"label_smoothing": 0.1, "same": "mask"}})
    with pytest.raises(UserError, match=r"label_smoothing spreads over all pairs.*same=mask"):
        complete_config(parse_config(tree, "here"))


@pytest.mark.parametrize("name", ["contrastive", "siglip"])
def test_the_form_reaches_the_loss(name: str) -> None:
    """Kernels for GPUs are refused on a CPU, when the loss is computed, and with several right captions before."""
    task = tiny_task([name], options={"form": "triton"})
    with pytest.raises(UserError, match="leave form at auto"):
        backward(task, Step(task, batch(task), {name: 1.0}, 0.5, (0, "step")), Plain())
    tree = run_tree(Path("data"), Path("run"), objectives={name: {"form": "triton", "positives": "cls"}})
    with pytest.raises(UserError, match="form=triton is for one caption per image"):
        complete_config(parse_config(tree, "here"))


def test_a_run_groups_samples_by_their_label(tmp_path: Path) -> None:
    """A run with positives=cls trains, and numbers the samples of a batch by the labels in the shards. A field that no
    sample has is refused, with those that there are."""
    shards = write_pairs(tmp_path)
    objectives = {"contrastive": {"positives": "cls"}}
    tree = run_tree(shards, tmp_path / "run", objectives=objectives, evaluate={}, train__steps=2)
    setup = set_up(resolve(parse_config(tree, "here")), resume=False, rewind=False)
    given = next(setup.trained.stream)
    tars = sorted(map(str, shards.glob("*.tar")))
    labels = torch.tensor([int(sample.fields["cls"]) for sample in iter_samples(tars)])[given.ids]
    numbers = given.groups["cls"]
    assert torch.equal(labels[:, None] == labels, numbers[:, None] == numbers)
    assert 1 < len(numbers.unique()) < len(numbers)
    Trainer(setup).run()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    tree = run_tree(shards, tmp_path / "other", objectives={"siglip": {"positives": "kind"}})
    with pytest.raises(UserError, match=r"objectives\.siglip\.positives='kind'.*lack.*: cls"):
        train(parse_config(tree, "here"))
