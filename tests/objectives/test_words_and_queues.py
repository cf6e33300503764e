"""Captioning, SigLIP, SimCLR and MoCo beyond the losses they call."""

import copy

import pytest
import torch
from open_clip.loss import CoCaLoss, SigLipLoss

from mmssl.distributed import World
from mmssl.models.heads import unit
from mmssl.objectives._mixing import TrainingTask
from mmssl.objectives.moco import Moco
from mmssl.objectives.simclr import SimclrOptions
from mmssl.rng import RowRandom
from tests.helpers.objective_batch import ROWS, batch, tiny_task


def prepared(task: TrainingTask, name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of a step on one batch."""
    random = RowRandom(torch.Generator().manual_seed(1), 0, ROWS, ROWS)
    return task.inputs(batch(task, seed), [name], lambda _: random, 0.0)


def test_captioning_agrees_with_open_clips_coca() -> None:
    """The loss and its gradient in the logits are CoCaLoss's caption term with padding ignored."""
    task = tiny_task(["captioning"])
    inputs = prepared(task, "captioning")
    objective = task.objective("captioning")
    predictions = {"logits": task.predict(inputs, ["captioning"])["captioning"]["logits"].detach().requires_grad_()}
    ours = objective.loss(predictions, inputs, World()).total / objective.num_terms(inputs)
    theirs_logits = predictions["logits"].detach().clone().requires_grad_()
    labels = inputs["tokens"].masked_fill(~inputs["token_mask"], 0)
    features = unit(torch.randn(ROWS, 4))
    _, theirs = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=0)(
        features, features, theirs_logits[:, :-1], labels[:, 1:], torch.tensor(1.0)
    )
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(predictions["logits"].grad, theirs_logits.grad)


def test_captioning_sees_no_later_token() -> None:
    """Changing a token changes no prediction before or at the place that predicts it."""
    task = tiny_task(["captioning"]).eval()
    inputs = prepared(task, "captioning")
    before = task.predict(inputs, ["captioning"])["captioning"]["logits"]
    inputs["tokens"] = inputs["tokens"].clone()
    inputs["tokens"][:, 4] = 50
    after = task.predict(inputs, ["captioning"])["captioning"]["logits"]
    torch.testing.assert_close(after[:, :4], before[:, :4])
    assert (after[:, 4:] - before[:, 4:]).abs().max() > 1e-3


def test_captioning_sees_the_image() -> None:
    """Another image gives other predictions."""
    task = tiny_task(["captioning"]).eval()
    inputs = prepared(task, "captioning")
    before = task.predict(inputs, ["captioning"])["captioning"]["logits"]
    inputs["view.main"] = 255 - inputs["view.main"]
    after = task.predict(inputs, ["captioning"])["captioning"]["logits"]
    assert (after - before).abs().max() > 1e-3


def test_siglip_starts_at_the_papers_values_and_agrees_with_open_clip() -> None:
    """Scale 10 and bias -10; the objective's loss and the gradients of scale and bias are SigLipLoss's."""
    task = tiny_task(["siglip"])
    inputs = prepared(task, "siglip")
    predictions = task.predict(inputs, ["siglip"])["siglip"]
    assert float(predictions["logit_scale"].detach()) == pytest.approx(10)
    assert float(predictions["bias"].detach()) == -10
    leaves = {name: value.detach().clone().requires_grad_() for name, value in predictions.items()}
    ours = task.objective("siglip").loss(leaves, inputs, World()).total
    peers = {name: value.detach().clone().requires_grad_() for name, value in predictions.items()}
    theirs = SigLipLoss()(peers["image"], peers["text"], peers["logit_scale"], peers["bias"])
    torch.testing.assert_close(ours, theirs)
    for total in (ours, theirs):
        total.backward()
    for name in peers:
        torch.testing.assert_close(leaves[name].grad, peers[name].grad, rtol=1e-4, atol=1e-6)


def test_two_dropouts_make_two_views_of_a_caption() -> None:
    """The text forwards of simclr are two, and with dropout their features differ."""
    task = tiny_task(["simclr"])
    for module in task.encoder.text.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    predictions = task.predict(prepared(task, "simclr"), ["simclr"])["simclr"]
    assert (predictions["text_1"] - predictions["text_2"]).abs().max() > 1e-3


def test_simclr_needs_something_to_compare() -> None:
    """Neither images nor captions is an error that names the keys."""
    with pytest.raises(ValueError, match="image and text are both false"):
        SimclrOptions(image=False, text=False)


def test_the_momentum_encoder_follows_before_the_keys_are_made() -> None:
    """At each step: slow = m slow + (1 - m) fast, then keys from the new slow one."""
    task = tiny_task(["moco"])
    moco = task.objective("moco")
    assert isinstance(moco, Moco)
    with torch.no_grad():
        for parameter in task.encoder.vision.parameters():
            parameter.add_(0.1)
    before = copy.deepcopy(moco.slow)
    inputs = prepared(task, "moco")
    fast = dict(task.encoder.vision.named_parameters())
    for name, parameter in moco.slow["vision"].named_parameters():
        torch.testing.assert_close(parameter, 0.9 * before["vision"].get_parameter(name) + 0.1 * fast[name])
    with torch.no_grad():
        keys = unit(moco.slow["head"](moco.slow["vision"](inputs["view.main"]).pooled))
    torch.testing.assert_close(inputs["moco.image"], keys)


def test_the_queue_is_first_in_first_out_and_filled_after_the_loss() -> None:
    """The loss of a step does not see its own keys in the queue; after steps 1 to 3 a queue of two batches holds
    the keys of 2 and 3, at the places of the oldest."""
    task = tiny_task(["moco"])
    moco = task.objective("moco")
    kept = []
    for i in range(3):
        inputs = prepared(task, "moco", i)
        before = moco.get_buffer("queue_image").clone()
        moco.loss(task.predict(inputs, ["moco"])["moco"], inputs, World())
        assert torch.equal(moco.get_buffer("queue_image"), before)
        task.on_step_end(inputs, ["moco"])
        kept.append(inputs["moco.image"])
    assert torch.equal(moco.get_buffer("queue_image"), torch.cat([kept[2], kept[1]]))
    assert int(moco.get_buffer("next")) == ROWS


def test_the_momentum_encoder_is_not_trained() -> None:
    """Only the fast encoder gets gradients."""
    task = tiny_task(["moco"])
    assert not any(p.requires_grad for n, p in task.named_parameters() if ".slow." in n)
