"""Models between two models."""

from pathlib import Path

import pytest
import torch

from mmssl import Model, load
from mmssl.apps.finetune.classifier import Classifier, interpolate, interpolate_classifiers
from mmssl.data.transforms import train_tokenizer
from mmssl.errors import UserError
from mmssl.models import build_dual_encoder
from tests.helpers.models import tiny_model_config
from tests.helpers.tiny_runs import COLORS


def other_model(words: list[str], **vision: object) -> Model:
    tokenizer = train_tokenizer(words, 64, 77)
    config = tiny_model_config()
    config = config.model_copy(update={"vision": config.vision.model_copy(update=vision)})
    torch.manual_seed(1)
    return Model(build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id), tokenizer, config)


def test_the_ends_are_the_models_and_the_middle_is_their_mean(model: Model, model_folder: Path, tmp_path: Path) -> None:
    """Alpha 0 and 1 give either model to the bit, 0.25 the weighted mean of every weight; saved, it loads as it is."""
    second = other_model([f"a photo of a {c}." for c in COLORS])
    old, new = model.encoder.state_dict(), second.encoder.state_dict()
    for alpha, expected in ((0.0, old), (1.0, new)):
        found = interpolate(model, second, alpha).encoder.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    between = interpolate(model, second, 0.25)
    between.save(tmp_path / "between")
    for name, value in load(tmp_path / "between").encoder.state_dict().items():
        torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * new[name])
    assert all(torch.equal(value, old[name]) for name, value in load(model_folder).encoder.state_dict().items())


def test_models_of_different_kinds_are_refused_with_what_differs(model: Model) -> None:
    """Another depth names weights, another rendering names the setting, another vocabulary is named."""
    words = [f"a photo of a {c}." for c in COLORS]
    options = {**tiny_model_config().vision.options, "depth": 1}
    with pytest.raises(UserError, match=r"vision\.trunk\.blocks\.1\.\S+ is \(.*\) in the first, missing in the second"):
        interpolate(model, other_model(words, options=options), 0.5)
    with pytest.raises(UserError, match="fit is shortest in the first, squash in the second"):
        interpolate(model, other_model(words, fit="squash"), 0.5)
    reordered = [word.replace("photo", "ptoho") for word in words]
    with pytest.raises(UserError, match="vocabular|text.encoder.embeddings"):
        interpolate(model, other_model(reordered), 0.5)


def test_between_two_classifiers_their_heads_are_mixed_too(model: Model, tmp_path: Path) -> None:
    """Logits of a linear head on one tower lie between theirs; other labels, or the same in another order, are refused
    with the first that differs."""
    one, two = (
        Classifier(model, ["a", "b"], torch.full((2, model.config.embed_dim), value), torch.tensor([value, 0.0]))
        for value in (1.0, 3.0)
    )
    middle = interpolate_classifiers(one, two, 0.25)
    assert torch.equal(middle.weight, torch.full_like(one.weight, 1.5))
    assert middle.bias.tolist() == [1.5, 0.0]
    features = torch.eye(model.config.embed_dim)
    torch.testing.assert_close(middle.logits(features), 0.75 * one.logits(features) + 0.25 * two.logits(features))
    turned = Classifier(model, ["b", "a"], two.weight, two.bias)
    with pytest.raises(UserError, match="label 1 is 'a' in the first, 'b' in the second"):
        interpolate_classifiers(one, turned, 0.5)
    more = Classifier(model, ["a", "b", "c"], torch.zeros(3, model.config.embed_dim), torch.zeros(3))
    with pytest.raises(UserError, match="label 3 is None in the first, 'c' in the second"):
        interpolate_classifiers(one, more, 0.5)
