"""Tables of accuracy by labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmssl import Model
from mmssl.apps.finetune import FineTuneData, FineTuneSettings, fine_tune
from mmssl.apps.finetune.study import PROBE, UNTRAINED, StudyDesign, study, untrained
from mmssl.evaluate import suite
from mmssl.evaluate.classifiers import logistic_regression as probe
from mmssl.evaluate.tasks import few_shot
from mmssl.models import build_dual_encoder
from tests.helpers.models import tiny_model_config


def test_the_lines_are_what_each_command_gives_alone(
    model: Model, problem: FineTuneData, colors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe's line is that of the task few_shot; the method's is fine_tune's, draw by draw; zero-shot is the task
    zero_shot; differences are those of the means."""
    monkeypatch.setattr(few_shot, "SEEDS", 2)
    monkeypatch.setattr(probe, "SHOTS", (2,))
    found = study(model, problem, FineTuneSettings(), StudyDesign(["linear"], [2], 2))
    expected = suite.run(model, {"c": (colors, ["few_shot", "zero_shot"])}, options=suite.SuiteOptions(draw=False))
    metrics = found.metrics()
    assert metrics[PROBE]["2"]["acc1"] == expected["c/few_shot"]["acc1@2"]
    assert metrics[PROBE]["2"]["std"] == pytest.approx(expected["c/few_shot"]["std@2"])
    assert metrics["zero-shot"]["acc1"] == expected["c/zero_shot"]["acc1"]
    alone = [fine_tune(model, problem, FineTuneSettings("linear", shots=2, seed=seed)).after for seed in range(2)]
    assert np.array_equal(found.lines["linear"][2], alone)
    gain = metrics["differences"]["linear"][UNTRAINED]["2"]
    ours, bare = (metrics[name]["2"]["acc1"] for name in ("linear", UNTRAINED))
    assert gain["difference"] == pytest.approx(ours - bare)
    assert gain["interval"][0] <= gain["difference"] <= gain["interval"][1]


def test_an_untrained_tower_shares_nothing_but_its_form(model: Model, problem: FineTuneData) -> None:
    """Weights are drawn anew, the same for the same seed, and torch's own generator is left where it was."""
    state = torch.get_rng_state()
    first, same, other = (untrained(model, problem.train, seed).encoder.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    own = model.encoder.state_dict()
    assert {n: v.shape for n, v in first.items()} == {n: v.shape for n, v in own.items()}
    name = "vision.trunk.blocks.0.attn.qkv.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], own[name])


def test_an_untrained_convolutional_tower_knows_the_images_statistics(model: Model, problem: FineTuneData) -> None:
    """In evaluation mode its features are what batch norms on those images give in training mode."""
    config = tiny_model_config()
    vision = config.vision.model_copy(update={"name": "timm:resnet10t", "options": {"channels": [8, 8, 16, 16]}})
    config = config.model_copy(update={"vision": vision})
    encoder = build_dual_encoder(config, model.tokenizer.vocab_size, model.tokenizer.pad_id)
    bare = untrained(Model(encoder, model.tokenizer, config), problem.train, 0)
    images, _ = problem.train.render(bare, torch.arange(48))
    evaluated = bare.encode_rendered(images)
    with torch.no_grad():
        batch = bare.encoder.train().encode_image(images)
    # A variance of the population stands for one of the sample: a percent of it at 48 images.
    torch.testing.assert_close(evaluated, batch, atol=0.03, rtol=0)
