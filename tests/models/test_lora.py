"""Adapters: what they train, what they change, and that they merge away."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmssl.config import LoraConfig, ModelConfig, TextConfig, VisionConfig
from mmssl.errors import UserError
from mmssl.models import DualEncoder, build_dual_encoder
from mmssl.models.lora import CalledAttention, add_adapters, merged, without_adapters
from mmssl.rng import torch_generator
from tests.helpers.models import tiny_model_config

SMALL = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
CLIP_TEXT = {"model_type": "open_clip", "context_length": 16, "width": 32, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**CLIP_TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "output_dim": 24}
CNN = {"name": "timm:resnet10t", "options": {"channels": [8, 8, 16, 16]}}
KINDS: dict[str, dict[str, Any]] = {
    "timm ViT, BERT": {},
    "open_clip's towers": {
        "vision": {"name": "open_clip:ViT-B-32", "options": SMALL},
        "text": {"config": CLIP_TEXT, "tokenizer": "clip"},
    },
    "CNN, text that sees padding": {"vision": CNN, "text": {"config": SIGLIP_TEXT, "tokenizer": "clip"}},
}


def model_config(kind: str, lora: LoraConfig | None) -> ModelConfig:
    config, parts = tiny_model_config(), KINDS[kind]
    vision = VisionConfig(image_size=16, **parts["vision"]) if "vision" in parts else config.vision
    text = TextConfig(**parts["text"], max_tokens=16) if "text" in parts else config.text
    vision, text = (tower.model_copy(update={"lora": lora}) for tower in (vision, text))
    return config.model_copy(update={"vision": vision, "text": text})


def encoder_of(config: ModelConfig) -> DualEncoder:
    torch.manual_seed(0)
    return build_dual_encoder(config, 100, 0).eval()


def features(encoder: DualEncoder) -> Tensor:
    """Of two images and two captions, [4, D]."""
    generator = torch_generator("inputs")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.tensor([[2, 5, 7, 3], [2, 6, 3, 0]])
    return torch.cat([encoder.encode_image(images), encoder.encode_text(tokens, tokens > 0)])


def draw_adapters(encoder: DualEncoder, size: float = 0.3) -> None:
    """Adapters begin as no change: give them one, of this standard deviation."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=torch_generator(name)))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_as_no_change_and_merge_into_the_same_features(kind: str) -> None:
    """With fresh adapters features stay, with trained ones they change, and the merged model gives the changed ones
    with the names, shapes and kinds of layers of a model that never had any."""
    config = model_config(kind, LoraConfig(rank=2))
    plain, adapted = encoder_of(config), encoder_of(config)
    add_adapters(adapted, config)
    before = features(plain)
    torch.testing.assert_close(features(adapted), before, atol=1e-5, rtol=0)
    draw_adapters(adapted)
    changed = features(adapted)
    assert float((changed - before).abs().amax(dim=1).min().detach()) > 1e-3
    whole = merged(adapted)
    torch.testing.assert_close(features(whole), changed, atol=1e-5, rtol=0)
    assert {n: t.shape for n, t in whole.state_dict().items()} == {n: t.shape for n, t in plain.state_dict().items()}
    assert [type(m) for m in whole.modules()] == [type(m) for m in plain.modules()]
    rebuilt = encoder_of(without_adapters(config))
    rebuilt.load_state_dict(whole.state_dict())
    torch.testing.assert_close(features(rebuilt), features(whole), atol=1e-6, rtol=0)
    assert torch.equal(features(adapted), changed), "merging changed the model that is trained"


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_projections_and_the_temperature_train(kind: str) -> None:
    """Every trained weight of a tower is an adapter's; each gets a gradient; three steps leave all others as they are,
    batch norms' statistics too."""
    config = model_config(kind, LoraConfig(rank=2))
    encoder = encoder_of(config)
    add_adapters(encoder, config)
    draw_adapters(encoder)
    encoder.train()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    outside = {name for name, _ in encoder.named_parameters() if not name.startswith(("vision.", "text."))}
    assert {"image_projection.weight", "log_logit_scale"} <= outside
    assert {name for name in trained if "lora_" not in name} == outside
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        found = features(encoder)
        (encoder.logit_scale * found @ found.T).logsumexp(1).sum().backward()
        assert [n for n in trained if encoder.get_parameter(n).grad is None] == []
        optimizer.step()
        optimizer.zero_grad()
    after = encoder.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained


def test_a_merged_weight_is_the_old_one_plus_b_a_scaled() -> None:
    """W + alpha / rank * B A, the formula of the paper."""
    config = model_config("timm ViT, BERT", LoraConfig(rank=4, alpha=12, targets=["qkv"]))
    encoder = encoder_of(config.model_copy(update={"text": config.text.model_copy(update={"lora": None})}))
    old = encoder.state_dict()["vision.trunk.blocks.0.attn.qkv.weight"].clone()
    add_adapters(encoder, config.model_copy(update={"text": config.text.model_copy(update={"lora": None})}))
    draw_adapters(encoder)
    place = "vision.trunk.blocks.0.attn.qkv"
    a, b = (encoder.get_parameter(f"{place}.lora_{letter}.default.weight") for letter in "AB")
    torch.testing.assert_close(merged(encoder).state_dict()[f"{place}.weight"], old + 12 / 4 * b @ a)
    assert {n for n, _ in encoder.named_parameters() if "lora_" in n} == {
        f"vision.trunk.blocks.{block}.attn.qkv.lora_{letter}.default.weight" for block in (0, 1) for letter in "AB"
    }


def test_every_layer_that_is_called_is_adapted_by_default() -> None:
    """Queries, keys, values and outputs of open_clip's attention and both layers of its MLP, in each block of both
    towers; the patches' convolution is not."""
    config = model_config("open_clip's towers", LoraConfig(rank=2))
    encoder = encoder_of(config)
    add_adapters(encoder, config)
    adapted = {name.partition(".lora_A")[0] for name, _ in encoder.named_parameters() if "lora_A" in name}
    parts = ("attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    towers = ("vision.trunk.transformer", "text.encoder.model.transformer")
    assert adapted == {f"{tower}.resblocks.{block}.{part}" for tower in towers for block in (0, 1) for part in parts}


@pytest.mark.parametrize("mask", ["none", "causal", "by head"])
def test_called_attention_is_torchs(mask: str) -> None:
    """Outputs and gradients of nn.MultiheadAttention, whose parameters it shares and gives back."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    ours = CalledAttention(attention)
    x = torch.randn(3, 5, 32)
    causal = torch.full((5, 5), float("-inf")).triu(1)
    masks = {"none": None, "causal": causal, "by head": causal + torch.randn(12, 5, 5)}
    found = []
    for module in (attention, ours):
        given = x.clone().requires_grad_()
        output, _ = module(given, given, given, need_weights=False, attn_mask=masks[mask])
        (gradient,) = torch.autograd.grad(output.square().sum(), given)
        found.append((output, gradient))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    back = ours.restored()
    assert all(value is dict(attention.named_parameters())[name] for name, value in back.named_parameters())


def test_dropout_of_adapters_acts_in_training_only() -> None:
    """The frozen tower stays in evaluation mode, the adapters' own dropout does not."""
    config = model_config("timm ViT, BERT", LoraConfig(rank=2, dropout=0.5))
    encoder = encoder_of(config)
    add_adapters(encoder, config)
    draw_adapters(encoder)
    assert torch.equal(features(encoder), features(encoder))
    encoder.train()
    assert not torch.equal(features(encoder)[:2], features(encoder)[:2])


def test_what_cannot_be_adapted_is_said() -> None:
    """A name that no layer has, or only one whose weights are read without a call, is refused."""
    config = model_config("open_clip's towers", LoraConfig(targets=["qkv"]))
    with pytest.raises(UserError, match=r"model\.vision\.lora\.targets.*'qkv'.*c_fc, c_proj, conv1, in_proj, out_proj"):
        add_adapters(encoder_of(config), config)
    pooling = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "patch_size": None}
    vision = VisionConfig(
        name="open_clip:RN50", image_size=64, options=pooling, lora=LoraConfig(targets=["attnpool.q_proj"])
    )
    config = tiny_model_config().model_copy(update={"vision": vision})
    with pytest.raises(UserError, match="attnpool.q_proj"):
        add_adapters(encoder_of(config), config)


def test_without_peft_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the extra."""
    monkeypatch.setitem(sys.modules, "peft", None)
    config = model_config("timm ViT, BERT", LoraConfig())
    with pytest.raises(UserError, match=r"pip install 'mmssl\[lora\]'"):
        add_adapters(encoder_of(config), config)


def test_free_layers_beside_adapters_are_refused() -> None:
    """Adapters freeze all layers of a tower."""
    with pytest.raises(ValueError, match="unlocked_layers=2 cannot be"):
        VisionConfig(lora=LoraConfig(), unlocked_layers=2)
