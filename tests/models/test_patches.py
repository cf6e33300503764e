"""Embeddings of patches, against other libraries and explicit loops."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import mmssl
from mmssl.data.transforms import load_tokenizer
from mmssl.errors import UserError
from mmssl.models.patches import patch_features
from tests.models.test_vision_types import build, dual_encoder, images

MEAN_POOLED = ["open_clip ViT, mean", "DINOv3", "SAM's ViT", "Swin", "PVT v2", "ResNet", "FastViT", "ConvMixer"]
NORMALISED_AFTER = ["ViT, registers, mean", "ConvNeXt", "BEiT", "NaFlexViT"]
ATTENTION = ["ViT, attention-pooled", "open_clip ViT, attention-pooled", "CoCa", "open_clip SigLIP"]
CLASS_TOKEN = ["ViT", "open_clip ViT", "DINOv2", "ViT, rotary", "ViT, rotary per layer", "DeiT III"]


@pytest.mark.parametrize("kind", [*MEAN_POOLED, *NORMALISED_AFTER, *ATTENTION, *CLASS_TOKEN])
def test_every_tower_with_patches_gives_a_vector_of_each(kind: str) -> None:
    """One finite vector per place; the tower itself is left as it was."""
    tower = build(kind)
    assert tower.places is not None
    x = images(tower)
    with torch.no_grad():
        before = tower(x).pooled
        found = patch_features(tower, x)
        assert found.shape == (2, tower.places, tower.places, tower.width)
        assert found.isfinite().all()
        assert torch.equal(tower(x).pooled, before)


@pytest.mark.parametrize("kind", MEAN_POOLED)
def test_the_mean_of_the_patches_is_the_pooled_vector(kind: str) -> None:
    """Where a tower pools by a mean and normalises before it, its pooled vector is the mean over patches; so is the
    image's embedding, before it gets unit length."""
    encoder = dual_encoder(kind).eval()
    tower = encoder.vision
    x = images(tower)
    with torch.no_grad():
        found = patch_features(tower, x)
        torch.testing.assert_close(found.mean(dim=(1, 2)), tower(x).pooled, atol=1e-5, rtol=1e-5)
        mean = encoder.image_projection(found).mean(dim=(1, 2))
        torch.testing.assert_close(F.normalize(mean, dim=-1), encoder.encode_image(x), atol=1e-5, rtol=1e-5)


def clip_folder(folder: Path) -> transformers.CLIPModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=dict(sizes), vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    theirs = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.vision_model.parameters():
            parameter.normal_(0, 0.2)
    theirs.save_pretrained(folder)
    load_tokenizer("clip", 77).save(folder)
    return theirs


def pixels_of(model: mmssl.Model) -> tuple[Tensor, Tensor]:
    """Three random images, and the same normalised."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in model.vision.statistics)
    return pixels, (pixels / 255 - mean) / std


def test_clips_patches_are_maskclips(tmp_path: Path) -> None:
    """MaskCLIP's values (section 3.2), from the weights of transformers' CLIPModel: in the last layer each patch keeps
    the output of its own value instead of the attention's."""
    theirs = clip_folder(tmp_path)
    ours = mmssl.load(tmp_path)
    pixels, x = pixels_of(ours)
    vision = theirs.vision_model
    layer = vision.encoder.layers[-1]
    with torch.no_grad():
        hidden = vision(x, output_hidden_states=True).hidden_states[-2]
        rows = []
        for image in hidden:
            for token in image[1:]:
                value = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(token)))
                kept = token + value
                kept = kept + layer.mlp(layer.layer_norm2(kept))
                rows.append(F.normalize(theirs.visual_projection(vision.post_layernorm(kept)), dim=-1))
    expected = torch.stack(rows).view(3, 4, 4, 24)
    torch.testing.assert_close(ours.encode_rendered(pixels, patches=True), expected, atol=1e-5, rtol=0)


def test_siglips_patches_are_its_head_on_one_token(tmp_path: Path) -> None:
    """The attention pooling of transformers' SiglipModel, given one patch at a time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "max_position_embeddings": 16, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    theirs = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    load_tokenizer("clip", 16).save(tmp_path)
    ours = mmssl.load(tmp_path)
    pixels, x = pixels_of(ours)
    with torch.no_grad():
        tokens = theirs.vision_model(x).last_hidden_state
        pooled = [theirs.vision_model.head(token[None, None])[0] for image in tokens for token in image]
    expected = F.normalize(torch.stack(pooled), dim=-1).view(3, 4, 4, 32)
    torch.testing.assert_close(ours.encode_rendered(pixels, patches=True), expected, atol=1e-5, rtol=0)


def test_clips_resnet_maps_its_features_by_value_and_output() -> None:
    """MaskCLIP's two convolutions of 1 x 1 in place of the attention pooling."""
    tower = build("CLIP's ResNet", image_size=64)
    trunk, x = tower.trunk, images(tower)
    with torch.no_grad():
        features = trunk.stem(tower.normalize(x))
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            features = stage(features)
        for linear in (trunk.attnpool.v_proj, trunk.attnpool.c_proj):
            features = F.conv2d(features, linear.weight[:, :, None, None], linear.bias)
        assert features.shape[-2:] == (2, 2)
        torch.testing.assert_close(patch_features(tower, x), features.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("Twins", "shows no patches"), ("CaiT", "class token only"), ("DeiT, distilled", "class token only")],
)
def test_towers_whose_patches_say_nothing_are_refused(kind: str, words: str) -> None:
    """A tower without tokens, or that never pools them, is named instead of returning vectors of another space."""
    tower = build(kind)
    with pytest.raises(UserError, match=words):
        patch_features(tower, images(tower))


def test_patches_in_python(tmp_path: Path) -> None:
    """`encode_image(..., patches=True)` of images in any form, in batches, of none at all, and of the first
    dimensions."""
    clip_folder(tmp_path)
    model = mmssl.load(tmp_path)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator) for _ in range(3)]
    found = mmssl.MMSSL(tmp_path).encode_image(pictures, patches=True)
    assert found.shape == (3, 4, 4, 24)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3, 4, 4), atol=1e-6)
    assert torch.allclose(model.encode_image(pictures, batch_size=2, patches=True), found, atol=1e-6)
    assert model.encode_image([], patches=True).shape == (0, 4, 4, 24)
    cut = model.first_dimensions(8).encode_image(pictures, patches=True)
    assert torch.allclose(cut, F.normalize(found[..., :8], dim=-1), atol=1e-5)
