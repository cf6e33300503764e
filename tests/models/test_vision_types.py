"""Vision towers of every kind: patches, sizes, options, locks and switches do what they say or are refused."""

import multiprocessing
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.models import DualEncoder, TextTower, VisionTower, build_dual_encoder, tower_check
from mmssl.models.dual_encoder import saved_state
from mmssl.models.vision import subsample_first
from mmssl.models.vision_factory import build_vision
from mmssl.objectives import base, find_objective
from mmssl.rng import RowRandom, torch_generator
from tests.helpers.models import tiny_model_config
from tests.helpers.tower_types import VISION, text_config, vision_config

WITH_PATCHES = [
    kind
    for kind in VISION
    if kind.startswith(("ViT", "DINO", "EVA", "Perception", "DeiT", "CoCa", "open_clip ViT"))
    and not kind.startswith(("ViTamin", "ViT of one channel", "ViT of a size"))
]
DROPPING = ["ViT, patch dropout", "EVA-02, patch dropout", "open_clip ViT, patch dropout"]


def build(kind: str, **changes: Any) -> VisionTower:
    torch.manual_seed(0)
    return build_vision(vision_config(kind).model_copy(update=changes), 64)[0].eval()


def images(tower: VisionTower, count: int = 2) -> Tensor:
    side = tower.image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def dual_encoder(kind: str) -> DualEncoder:
    torch.manual_seed(0)
    config = ModelConfig(vision=vision_config(kind), text=tiny_model_config().text, embed_dim=64)
    return build_dual_encoder(config, 100, 0)


@pytest.mark.parametrize("kind", WITH_PATCHES)
def test_a_vit_sees_the_patches_that_are_kept(kind: str) -> None:
    """All patches in any order give the vector of the whole image; a patch left out cannot change it."""
    tower = build(kind)
    assert tower.grid is not None
    assert tower.patch_size is not None
    count = tower.grid[0] * tower.grid[1]
    x = images(tower)
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    changed = x.clone()
    changed[..., : tower.patch_size, : tower.patch_size] = 0  # patch 0
    kept = torch.arange(1, count).expand(2, count - 1)
    with torch.no_grad():
        whole = tower(x)
        torch.testing.assert_close(tower(x, order).pooled, whole.pooled, atol=1e-5, rtol=1e-5)
        assert whole.tokens is not None
        assert whole.tokens.shape == (2, count, tower.token_width)
        torch.testing.assert_close(tower(changed, kept).pooled, tower(x, kept).pooled)
        assert not torch.equal(tower(changed).pooled, whole.pooled)


@pytest.mark.parametrize("kind", DROPPING)
def test_patch_dropout_of_the_options_acts_in_training(kind: str) -> None:
    """Half of the patches are left out at random in training, none in evaluation and none of those asked for; an
    objective that predicts from every patch says so."""
    tower = build(kind)
    assert tower.grid is not None
    count, x = tower.grid[0] * tower.grid[1], images(tower)
    tower.train()
    first, second = tower(x), tower(x)
    assert first.tokens is not None
    assert first.tokens.shape[1] == count // 2
    assert not torch.equal(first.pooled, second.pooled)
    assert tower(x, torch.arange(count).expand(2, count)).tokens.shape[1] == count
    tower.eval()
    assert torch.equal(tower(x).pooled, tower(x).pooled)
    with pytest.raises(UserError, match="objectives.denoising .* leaves out patches"):
        find_objective("denoising")(find_objective("denoising").Options(), dual_encoder(kind), vocabulary())


def vocabulary() -> base.Vocabulary:
    return base.Vocabulary(100, 4, (0, 1, 2, 3, 4), torch.zeros(100, dtype=torch.bool), 77)


@pytest.mark.parametrize(
    "kind",
    [
        *("ViT", "ViT, size not divided by its patches", "EVA-02", "DINOv3", "Perception Encoder", "ViT, rotary"),
        *("ViT, attention-pooled", "open_clip ViT, size not divided by its patches", "CoCa", "ViT, patch dropout"),
        *("open_clip ViT, attention-pooled", "NaFlexViT", "SAM's ViT", "ViTamin", "Swin", "ResNet", "CLIP's ResNet"),
    ],
)
def test_masked_autoencoding_on_any_tower_with_places(kind: str) -> None:
    """Loss, gradient and example images, on ViTs by their patches and on others by covered squares; a perfect
    prediction has no loss, so targets and hidden patches are aligned."""
    encoder = dual_encoder(kind)
    Mae = find_objective("mae")
    objective: Any = Mae(Mae.Options(decoder_depth=1), encoder, vocabulary())
    inputs = {"view.main": images(encoder.vision, 3)}
    random = RowRandom(torch_generator("x", device="cpu"), 0, 3, 3)
    inputs |= objective.sample_targets(inputs, random, encoder)
    (needed,) = objective.required_passes()
    keep = inputs[needed.mask] if needed.mask else None
    features = {needed: encoder.vision(inputs[needed.input], keep)}
    predictions = objective.predict(features, inputs, encoder)
    output = objective.loss(predictions, inputs, World())
    output.total.backward()
    assert float(output.total.detach()) > 0
    assert encoder.vision.trunk is not None
    perfect = objective.loss({**predictions, "patches": predictions["target"]}, inputs, World())
    assert float(perfect.total) == 0
    assert objective.visualize(predictions, inputs, encoder).shape[:2] == (3, 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [("ViT-B-16-SigLIP", 64), ("PE-Core-T-16-384", 64), ("EVA02-B-16", 64), ("ViTamin-S", 64)],
)
def test_open_clips_timm_towers_take_another_size(name: str, size: int) -> None:
    """The same features as open_clip's own model at that size, with the same weights."""
    torch.manual_seed(0)
    tower, projection = build_vision(
        VisionConfig(name=f"open_clip:{name}", image_size=size), open_clip.get_model_config(name)["embed_dim"]
    )
    assert tower.image_size == size
    assert tower.places is not None
    theirs = open_clip.create_model(name, force_image_size=size).visual
    theirs.trunk.load_state_dict(tower.trunk.state_dict())
    x = images(tower)
    with torch.no_grad():
        expected = theirs.eval().trunk(tower.normalize(x))
        torch.testing.assert_close(tower.eval()(x).pooled, expected, atol=1e-5, rtol=1e-4)
    assert projection is None


@pytest.mark.parametrize("kind", ["MLP-Mixer", "ResMLP", "gMLP", "VOLO", "FocalNet", "ConvMixer", "Sequencer"])
def test_options_override_what_a_factory_of_timm_sets(kind: str) -> None:
    """The options are those of the built trunk: as many weights as the class itself with these options."""
    name, size, options = VISION[kind]
    tower = build(kind)
    whole = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    assert sum(p.numel() for p in tower.trunk.parameters()) < sum(p.numel() for p in whole.parameters())
    assert type(tower.trunk) is type(whole)
    assert tower.trunk._model_args["num_classes"] == 0
    assert {key: tower.trunk._model_args[key] for key in options} == options
    width = options.get("embed_dim", options.get("dim"))
    if kind in ("MLP-Mixer", "ResMLP", "gMLP", "ConvMixer"):
        assert tower.width == width
    assert size == tower.image_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"img_size": [32, 64]}}, r"img_size=\[32, 64\]: images are square"),
        ({"options": {"in_chans": 1}}, "in_chans=1: images have 3 channels"),
        ({"options": {"img_size": 32}, "image_size": 64}, "image_size=64 and model.vision.options.img_size=32 differ"),
        ({"name": "timm:efficientformer_l1", "image_size": 64}, "cannot encode images of 64 x 64 pixels"),
        ({"name": "timm:mixer_s32_224", "options": {"blocks": 2}}, "blocks"),
        ({"name": "open_clip:ViT-B-32", "options": {"layer": 2}}, "layer"),
        ({"name": "open_clip:ViT-B-32", "options": {"image_size": [32, 64]}}, "images are square"),
    ],
)
def test_inputs_that_a_tower_cannot_take_are_refused(changes: dict[str, Any], words: str) -> None:
    """One line that names the key, at build."""
    config = VisionConfig(**{"name": "timm:vit_tiny_patch16_224", **changes})
    with pytest.raises(UserError, match=words) as caught:
        build_vision(config, 64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["VGG", "PiT", "Twins", "DLA", "Sequencer", "CoaT"])
def test_checkpointing_is_refused_by_towers_without_it(kind: str) -> None:
    """One line that names the setting, not an error of the library."""
    with pytest.raises(UserError, match="train.activation_checkpointing: this vision tower .* does not support it"):
        build(kind).checkpoint_activations()


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "Swin", "open_clip ViT", "CoCa", "CLIP's ResNet", "EVA-02"])
def test_more_unlocked_layers_than_there_are_free_the_whole_tower(kind: str) -> None:
    """The embeddings too; one unlocked layer leaves the beginning frozen."""
    tower = build(kind, lock=True, unlocked_layers=99)
    assert all(parameter.requires_grad for parameter in tower.trunk.parameters())
    tower.lock(1)
    free = [parameter.requires_grad for parameter in tower.trunk.parameters()]
    assert any(free)
    assert not all(free)


@pytest.mark.parametrize("kind", ["ViT", "ResNet", "open_clip ViT", "EVA-02, patch dropout", "Swin"])
def test_building_and_checking_a_tower_leaves_torchs_generator_alone(kind: str) -> None:
    """The numbers drawn after a build are those after the library's own build; a check draws none and keeps modes and
    running statistics."""
    encoder = dual_encoder(kind).train()
    state, numbers = torch.get_rng_state(), {k: v.clone() for k, v in encoder.state_dict().items()}
    assert tower_check.check_towers(encoder) == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(numbers[key], value) for key, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.vision.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def first_batch(encoder: DualEncoder) -> tuple[Tensor, Tensor, Tensor]:
    """Images, and captions with one first token, of which two are equal."""
    tokens = torch.randint(5, 100, (8, 12), generator=torch.Generator().manual_seed(2))
    tokens[:, 0], tokens[7] = 2, tokens[6]
    return images(encoder.vision, 8), tokens, torch.ones_like(tokens, dtype=torch.bool)


class Blind(torch.nn.Module):
    """Gives every input the vector of an empty one."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(torch.zeros_like(x))


def test_a_run_whose_embeddings_are_one_point_is_stopped() -> None:
    """Different captions, or different images, with one embedding are named with their number; a healthy model and a
    batch of equal inputs pass."""
    encoder = dual_encoder("ViT")
    x, tokens, mask = first_batch(encoder)
    tower_check.check_embeddings(encoder, x, tokens, mask)
    blind = dual_encoder("ViT")
    blind.vision.trunk.patch_embed.proj = Blind(blind.vision.trunk.patch_embed.proj)
    with pytest.raises(UserError, match="model.vision: the embeddings of 8 different images are one point"):
        tower_check.check_embeddings(blind, x, tokens, mask)
    with pytest.raises(UserError, match="model.vision: two different inputs get the same vector"):
        tower_check.check_towers(blind)
    tower_check.check_embeddings(blind, x[:1].expand_as(x), tokens, mask)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "clip_text_model"])
def test_causal_models_pooled_at_their_first_token_are_stopped(kind: str) -> None:
    """Both by the check of the tower and by that of the first batch, which say what to set."""
    vision = vision_config("ViT")
    encoder = build_dual_encoder(ModelConfig(vision=vision, text=text_config(kind, "cls"), embed_dim=64), 100, 0)
    x, tokens, mask = first_batch(encoder)
    with pytest.raises(UserError, match="embeddings of 7 different captions are one point.*pooling=eos or mean"):
        tower_check.check_embeddings(encoder, x, tokens, mask)
    with pytest.raises(UserError, match="model.text: two different inputs get the same vector.*pooling=eos or mean"):
        tower_check.check_towers(encoder)


def test_an_own_pooled_vector_that_misses_the_end_token_is_stopped() -> None:
    """CLIP's text model pools at the end token of its configuration; captions of another tokenizer do not have it."""
    text = text_config("clip_text_model", "pooler", eos_token_id=3)
    encoder = build_dual_encoder(ModelConfig(vision=vision_config("ViT"), text=text, embed_dim=64), 100, 0)
    x, tokens, mask = first_batch(encoder)
    with pytest.raises(UserError, match="captions are one point: the encoder's own pooled vector looks for an end"):
        tower_check.check_embeddings(encoder, x, tokens, mask)
    tokens[:, -1] = 3
    tower_check.check_embeddings(encoder, x, tokens, mask)


@pytest.mark.parametrize(("kind", "idle"), [("luke", "entity"), ("longformer", "global"), ("esm", "contact_head")])
def test_weights_that_take_no_part_are_told(kind: str, idle: str) -> None:
    """One line with their number and the first name."""
    encoder = build_dual_encoder(
        ModelConfig(vision=vision_config("ViT"), text=text_config(kind, "mean"), embed_dim=64), 100, 0
    )
    (line,) = tower_check.check_towers(encoder)
    assert line.startswith("model.text: ")
    assert f"{idle}" in line
    assert "weights take no part" in line


@pytest.mark.parametrize("stride", [2, (1, 3)])
@pytest.mark.parametrize("channels", [1, 3, 15, 16])
def test_a_convolution_of_one_pixel_with_a_stride_is_the_librarys(channels: int, stride: Any) -> None:
    """Output and gradients of the form that is safe on CPUs are those of torch's own convolution in float64."""
    torch.manual_seed(0)
    own = torch.nn.Sequential(torch.nn.Conv2d(channels, 8, 1, stride))
    x = torch.randn(2, channels, 65, 65).contiguous(memory_format=torch.channels_last)
    w, bias = (p.detach().double().requires_grad_() for p in own.parameters())
    expected = torch.nn.functional.conv2d(x.double(), w, bias, stride)
    expected.square().mean().backward()
    subsample_first(own)
    found = own(x)
    found.square().mean().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(own.parameters(), (w, bias), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def train_beside_timm(name: str) -> None:
    """Features beside timm's own model in plain order, and steps of training in channels-last order."""
    torch.manual_seed(0)
    tower = build_vision(VisionConfig(name=f"timm:{name}", image_size=128), 64)[0].eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(tower.trunk.state_dict())
    x = images(tower, 2)
    tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        torch.testing.assert_close(tower(x).pooled, theirs(tower.normalize(x)), rtol=1e-3, atol=1e-5)
    tower.train()
    for _ in range(3):
        tower(x).pooled.square().mean().backward()


@pytest.mark.parametrize("name", ["fastvit_t8", "repvgg_a0"])
def test_a_stem_of_one_pixel_with_a_stride_trains_in_channels_last_order(name: str) -> None:
    """Features are timm's. oneDNN's gradient of such a stem corrupts the memory of the process: it must survive."""
    process = multiprocessing.get_context("fork").Process(target=train_beside_timm, args=(name,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("hidden_act", "relu", "other vectors when it is saved and loaded"), ("num_hidden_layers", 1, "loaded again: 16")],
)
def test_a_tower_that_is_another_one_after_saving_is_refused(
    key: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check saves and loads: a setting that does not come back changes the vectors, a layer the weights."""
    right = TextTower.to_config

    def wrong(tower: TextTower, tokenizer: str, max_tokens: int) -> TextConfig:
        found = right(tower, tokenizer, max_tokens)
        return found.model_copy(update={"config": {**(found.config or {}), key: value}})

    assert tower_check.examine_text("bert", text_config("bert")).problem is None
    monkeypatch.setattr(TextTower, "to_config", wrong)
    problem = tower_check.examine_text("bert", text_config("bert")).problem
    assert problem is not None
    assert words in problem


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    """safetensors refuses tensors that share memory; a saved state has none, and its values are the same."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    save_file(saved_state(module), tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())
