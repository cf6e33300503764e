"""Maps over images: each method against its formula worked out another way."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.apps.explain.attention import attention_relevance, recorded_attention
from mmssl.apps.explain.gradcam import activations, gradcam
from mmssl.apps.explain.maps import DEFAULT, METHODS, heat, image_maps, methods_of
from mmssl.apps.explain.occlusion import cover, occlusion, rise
from mmssl.errors import UserError
from mmssl.models import DualEncoder
from tests.apps.explain.conftest import COLUMN, RESNET, ROW, TOWERS, VIT, images_and_texts, small_encoder


@pytest.mark.parametrize("tower", TOWERS)
def test_every_method_of_every_kind_of_tower_gives_a_map(tower: str) -> None:
    """All methods that a tower allows give finite maps that depend on the text; the others refuse in one line."""
    encoder = small_encoder(**TOWERS[tower])
    side = encoder.vision.image_size
    images, texts = images_and_texts(2, side, encoder.embed_dim)
    allowed = methods_of(encoder.vision)
    assert DEFAULT in allowed
    for name in METHODS:
        if name not in allowed:
            with pytest.raises(UserError):
                image_maps(encoder, images, texts, name)
            continue
        found = image_maps(encoder, images, texts, name)
        assert found.shape[0] == 2
        assert found.ndim == 3
        assert bool(found.isfinite().all())
        assert not torch.equal(found, image_maps(encoder, images, -texts, name)), name
    assert all(p.grad is None for p in encoder.parameters())


def test_gradcam_of_the_last_stage_is_the_closed_form() -> None:
    """With average pooling z = W mean(F) and S = z.t / |z|, the gradient is W'(t - S z/|z|) / (|z| places)."""
    encoder = small_encoder(**RESNET)
    images, texts = images_and_texts(3, 64, 16)
    with torch.no_grad():
        features = encoder.vision.trunk.forward_features(encoder.vision.normalize(images))
        weight = encoder.image_projection.weight
        z = features.mean((2, 3)) @ weight.T
        norm = z.norm(dim=1, keepdim=True)
        score = (z * texts).sum(1, keepdim=True) / norm
        slope = ((texts - score * z / norm) / norm) @ weight / 4
        expected = (slope[:, :, None, None] * features).sum(1)
    stage = activations(encoder, images, texts, min_side=1)
    assert stage.values.shape[2:] == (2, 2)
    torch.testing.assert_close(gradcam(encoder, images, texts, 1), expected.clamp(min=0), rtol=1e-4, atol=1e-7)


def test_the_stage_is_the_deepest_that_is_fine_enough() -> None:
    """At 64 px a ResNet's stages have 16, 8, 4 and 2 places a side; with none fine enough the finest is taken."""
    encoder = small_encoder(**RESNET)
    images, texts = images_and_texts(1, 64, 16)
    sides = {least: gradcam(encoder, images, texts, least).shape[-1] for least in (1, 3, 7, 9, 99)}
    assert sides == {1: 2, 3: 4, 7: 8, 9: 16, 99: 32}


def test_gradients_at_a_stage_are_those_of_finite_differences() -> None:
    """A small change of a stage's output changes the similarity as its gradient says."""
    encoder = small_encoder(**RESNET).double()
    encoder.project_image = lambda pooled: F.normalize(encoder.image_projection(pooled), dim=-1)  # type: ignore[method-assign]
    images, texts = images_and_texts(1, 64, 16)
    texts = texts.double()
    gradient = activations(encoder, images.double(), texts, 7).gradients
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    stage = encoder.vision.trunk.layer2

    def score(step: float) -> float:
        handle = stage.register_forward_hook(lambda _, __, output: output + step * change)
        with torch.no_grad():
            found = float((encoder.encode_image(images.double()) * texts).sum())
        handle.remove()
        return found

    slope = (score(1e-5) - score(-1e-5)) / 2e-5
    assert slope == pytest.approx(float((gradient * change).sum()), rel=1e-5)


def test_attention_relevance_is_that_of_the_paper() -> None:
    """The map equals loops over layers, heads and tokens on probabilities that timm's own plain attention computed."""
    encoder = small_encoder("timm:vit_tiny_patch16_224", **VIT)
    images, texts = images_and_texts(2, 64, 16)
    found = attention_relevance(encoder, images, texts)
    kept: list[Tensor] = []
    for block in encoder.vision.trunk.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, output: kept.append(output))
    score = (encoder.encode_image(images.float()) * texts).sum()
    gradients = torch.autograd.grad(score, kept)
    for row in range(2):
        relevance = torch.eye(17)
        for attention, gradient in zip(kept, gradients, strict=True):
            mean = torch.zeros(17, 17)
            for head in range(2):
                mean += (gradient[row, head] * attention[row, head]).detach().clamp(min=0) / 2
            relevance = relevance + mean @ relevance
        torch.testing.assert_close(found[row], relevance[0, 1:].view(4, 4), rtol=1e-4, atol=1e-8)


def test_recorded_attention_changes_nothing() -> None:
    """Attention step by step gives the fused result, rows that add up to 1, and leaves torch as it was."""
    before = F.scaled_dot_product_attention
    query, key, value = torch.randn(3, 2, 4, 5, 8).unbind()
    with recorded_attention() as kept:
        plain = F.scaled_dot_product_attention(query, key, value)
    assert F.scaled_dot_product_attention is before
    torch.testing.assert_close(plain, before(query, key, value))
    torch.testing.assert_close(kept[0].sum(-1), torch.ones(2, 4, 5))


def test_occlusion_finds_the_only_patch_that_matters(one_patch: DualEncoder) -> None:
    """An encoder that looks at one patch has a map that is zero everywhere else."""
    images, _ = images_and_texts(3, 32, 3)
    texts = one_patch.encode_image(images)
    found = occlusion(one_patch, images, texts)
    assert bool((found[:, ROW, COLUMN] > 0).all())
    found[:, ROW, COLUMN] = 0
    assert float(found.abs().max()) == 0.0


def test_rise_is_exact_where_patches_add_up(one_patch: DualEncoder) -> None:
    """Where one patch decides, its effect is what covering it alone costs, and no other patch has any."""
    images, _ = images_and_texts(2, 32, 3)
    texts = one_patch.encode_image(images)
    torch.testing.assert_close(
        rise(one_patch, images, texts), occlusion(one_patch, images, texts), rtol=1e-4, atol=1e-5
    )


def test_rise_sees_parts_that_stand_in_for_each_other() -> None:
    """Of two patches each of which is enough, covering one alone costs nothing; its mean effect is half the whole."""

    class EitherPatch(nn.Module):
        def encode_image(self, x: Tensor) -> Tensor:
            dark = (x[:, 0, [0, 31], [0, 31]] < 128).any(1).float()
            return torch.stack([dark, 1 - dark], 1)

    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, :4, :4] = 0
    images[:, :, 28:, 28:] = 0
    encoder: Any = EitherPatch()
    texts = encoder.encode_image(images)
    assert float(occlusion(encoder, images, texts).abs().max()) == 0
    found = rise(encoder, images, texts)[0]
    assert float(found[0, 0]) == pytest.approx(0.5, abs=0.1)
    assert float(found[7, 7]) == pytest.approx(0.5, abs=0.1)
    found[0, 0] = found[7, 7] = 0
    assert float(found.abs().max()) < 0.15


def test_patches_are_covered_with_the_border_colour() -> None:
    """Only marked patches change, to the mean of the outermost pixels."""
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    images[:, :, 2:6, 2:6] = 10
    cells = torch.zeros(1, 4, 4, dtype=torch.bool)
    cells[0, 1, 2] = True
    expected = images.clone()
    expected[:, :, 2:4, 4:6] = 200
    assert torch.equal(cover(images, cells), expected)


def test_heat_is_between_zero_and_one() -> None:
    """What speaks against the text is not shown; the strongest place of each image is 1, none where none speaks."""
    maps = torch.tensor([[[4.0, -1.0], [0.0, 2.0]], [[-1.0, -2.0], [-3.0, -1.0]]])
    shown = heat(maps, 2)
    assert shown.tolist() == [[[1.0, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]


def test_an_unknown_method_is_named() -> None:
    """A wrong name ends with the right ones."""
    encoder: Any = nn.Identity()
    with pytest.raises(UserError, match="gradcam"):
        image_maps(encoder, torch.zeros(1), torch.zeros(1), "magic")
