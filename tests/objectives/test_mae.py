"""Masked autoencoding."""

import pytest
import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl.config import ModelConfig, TextConfig, VisionConfig
from mmssl.distributed import World
from mmssl.errors import UserError
from mmssl.models import build_dual_encoder
from mmssl.models.heads import PatchDecoder, patchify, unpatchify
from mmssl.objectives._base import TEXT
from mmssl.objectives._mixing import encoder_passes
from mmssl.objectives._patch_masking import hidden_patches
from mmssl.objectives.contrastive import Contrastive, ContrastiveOptions
from mmssl.objectives.mae import Mae, MaeOptions
from mmssl.rng import RowRandom
from tests.helpers.models import TINY_TEXT
from tests.helpers.objective_batch import batch, tiny_task, vocabulary

WIDTH, DEPTH, HEADS, PATCH, SIDE = 32, 2, 2, 8, 32
DECODER_WIDTH, DECODER_DEPTH = 64, 2


def towers(**options: object) -> ModelConfig:
    sizes = {"patch_size": PATCH, "depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, **options}
    return ModelConfig(
        vision=VisionConfig(name="timm:vit_tiny_patch16_224", image_size=SIDE, options=sizes),
        text=TextConfig(config=TINY_TEXT, tokenizer="train"),
        embed_dim=16,
    )


def transformers_mae(normalise: bool) -> ViTMAEForPreTraining:
    """ViT-MAE of the same sizes."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    decoder = {"decoder_hidden_size": DECODER_WIDTH, "decoder_num_hidden_layers": DECODER_DEPTH}
    torch.manual_seed(3)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            **sizes,
            **decoder,
            intermediate_size=4 * WIDTH,
            decoder_num_attention_heads=DECODER_WIDTH // 32,
            decoder_intermediate_size=4 * DECODER_WIDTH,
            image_size=SIDE,
            patch_size=PATCH,
            layer_norm_eps=1e-6,
            norm_pix_loss=normalise,
        )
    )
    return model.eval()


def copy(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], names: dict[str, str], depth: int) -> None:
    """Fill our tensors (by name) from theirs; `{}` stands for the layer, `qkv` for their three projections in a row."""
    for own, other in names.items():
        for layer in range(depth if "{}" in own else 1):
            source = other.format(layer)
            if "qkv" in source:
                value = torch.cat([theirs[source.replace("qkv", f"{part}_proj")] for part in "qkv"])
            else:
                value = theirs[source]
            target = ours[own.format(layer)]
            target.data.copy_(value.view_as(target))


def pairs(ours: str, theirs: str) -> dict[str, str]:
    """Weight and bias of a layer."""
    return {f"{ours}.{end}": f"{theirs}.{end}" for end in ("weight", "bias")}


def copy_weights(mae: Mae, tower: nn.Module, peer: ViTMAEForPreTraining) -> None:
    """Theirs into our tower (timm's names) and decoder (torch's names)."""
    theirs = dict(peer.named_parameters())
    layer = "vit.layers.{}"
    copy(
        dict(tower.named_parameters()),
        theirs,
        {
            "trunk.cls_token": "vit.embeddings.cls_token",
            "trunk.pos_embed": "vit.embeddings.position_embeddings",
            **pairs("trunk.patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
            **pairs("trunk.blocks.{}.norm1", f"{layer}.layernorm_before"),
            **pairs("trunk.blocks.{}.norm2", f"{layer}.layernorm_after"),
            **pairs("trunk.blocks.{}.attn.qkv", f"{layer}.attention.qkv"),
            **pairs("trunk.blocks.{}.attn.proj", f"{layer}.attention.o_proj"),
            **pairs("trunk.blocks.{}.mlp.fc1", f"{layer}.mlp.fc1"),
            **pairs("trunk.blocks.{}.mlp.fc2", f"{layer}.mlp.fc2"),
            **pairs("trunk.norm", "vit.layernorm"),
        },
        DEPTH,
    )
    layer = "decoder.decoder_layers.{}"
    copy(
        dict(mae.decoder.named_parameters()),
        theirs,
        {
            "mask_token": "decoder.mask_token",
            **pairs("embed", "decoder.decoder_embed"),
            **pairs("blocks.{}.norm1", f"{layer}.layernorm_before"),
            **pairs("blocks.{}.norm2", f"{layer}.layernorm_after"),
            "blocks.{}.self_attn.in_proj_weight": f"{layer}.attention.qkv.weight",
            "blocks.{}.self_attn.in_proj_bias": f"{layer}.attention.qkv.bias",
            **pairs("blocks.{}.self_attn.out_proj", f"{layer}.attention.o_proj"),
            **pairs("blocks.{}.linear1", f"{layer}.mlp.fc1"),
            **pairs("blocks.{}.linear2", f"{layer}.mlp.fc2"),
            **pairs("norm", "decoder.decoder_norm"),
            **pairs("predict", "decoder.decoder_pred"),
        },
        DECODER_DEPTH,
    )
    assert isinstance(mae.decoder, PatchDecoder)
    mae.decoder.position.copy_(peer.decoder.decoder_pos_embed[0, 1:])


@pytest.mark.parametrize("normalise", [True, False])
def test_agrees_with_transformers(normalise: bool) -> None:
    """With the same weights and the same noise, loss and gradients (in the decoder, the patch embedding and the class
    token) are those of transformers' ViTMAEForPreTraining."""
    encoder = build_dual_encoder(towers(), 100, 0)
    options = MaeOptions(normalise=normalise, decoder_width=DECODER_WIDTH, decoder_depth=DECODER_DEPTH)
    mae, peer = Mae(options, encoder, vocabulary()), transformers_mae(normalise)
    copy_weights(mae, encoder.vision, peer)
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(3, (SIDE // PATCH) ** 2, generator=torch.Generator().manual_seed(1))
    inputs = {"view.main": images, "ids": torch.arange(3)}
    random = RowRandom(torch.Generator().manual_seed(1), 0, 3, 3)
    inputs |= mae.sample_targets(inputs, random, encoder)
    features = {mae.read: encoder.vision(images, inputs[mae.read.mask])}
    output = mae.loss(mae.predict(features, inputs, encoder), inputs, World())
    ours = output.total / mae.num_terms(inputs)
    theirs = peer(encoder.vision.normalize(images), noise=noise).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    found, expected = dict(encoder.vision.named_parameters()), dict(peer.named_parameters())
    checked = {
        "trunk.cls_token": "vit.embeddings.cls_token",
        "trunk.patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
        "trunk.blocks.0.mlp.fc1.weight": "vit.layers.0.mlp.fc1.weight",
    }
    for own, other in checked.items():
        torch.testing.assert_close(found[own].grad, expected[other].grad, rtol=1e-4, atol=1e-6)
    decoder = dict(mae.decoder.named_parameters())
    for own, other in {"mask_token": "mask_token", "embed.weight": "decoder_embed.weight"}.items():
        gradient = expected[f"decoder.{other}"].grad
        torch.testing.assert_close(decoder[own].grad, gradient.view_as(decoder[own]), rtol=1e-4, atol=1e-6)


def test_patches_come_back() -> None:
    """unpatchify inverts patchify, and a patch's values run over rows, columns, colours."""
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4), images)
    assert torch.equal(patches[1, 2].view(4, 4, 3), images[1, :, 4:, :4].movedim(0, -1))


def test_as_many_patches_are_hidden_as_asked() -> None:
    """Three quarters of each sample's patches are hidden, other ones in each sample."""
    task = tiny_task(["mae"])
    inputs = task.inputs(batch(task), ["mae"], lambda _: RowRandom(torch.Generator(), 0, 12, 12), 0.0)
    hidden = inputs["mae.hidden"]
    assert (hidden.sum(1) == 27).all()
    assert hidden.shape == (12, 36)
    assert len({tuple(row.tolist()) for row in hidden}) == 12
    assert torch.equal(hidden_patches(inputs["visible.0.25"], 36), hidden)


def test_a_tower_without_patches_has_its_input_covered() -> None:
    """A ResNet sees the mean colour where cells are hidden and the image elsewhere, and predicts all cells."""
    task = tiny_task(["mae"], {"name": "timm:resnet10t", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}})
    main = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    given = batch(task).slice(0, 4)
    given.views["main"] = main
    inputs = task.inputs(given, ["mae"], lambda _: RowRandom(torch.Generator(), 0, 4, 4), 0.0)
    mae = task.objective("mae")
    assert isinstance(mae, Mae)
    cover = inputs["mae.hidden"].view(4, 1, 8, 8).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    seen = inputs["mae.image"]
    assert torch.equal(seen[~cover], main[~cover])
    mean = task.encoder.vision.mean.round().to(torch.uint8).expand_as(seen)
    assert torch.equal(seen[cover], mean[cover])
    predictions = task.predict(inputs, ["mae"])["mae"]
    assert predictions["patches"].shape == (4, 64, 48)
    shown = mae.visualize(predictions, inputs, task.encoder)
    assert shown.shape == (4, 3, 3, 32, 32)
    whole = shown[:, 2]
    assert (whole.int() - main.int()).abs()[~cover].max() <= 1


def test_contrastive_and_mae_share_the_masked_forward() -> None:
    """With equal ratios there is one image forward, on the same patches; in the unmasked finish contrastive sees
    everything and the mix has two."""
    encoder = build_dual_encoder(towers(), 100, 0)
    mae = Mae(MaeOptions(), encoder, vocabulary())
    contrastive = Contrastive(ContrastiveOptions(mask_ratio=0.75, unmasked_finish=0.2), encoder, vocabulary())
    assert encoder_passes([contrastive, mae]) == (mae.read, TEXT)
    contrastive.on_step_start(0.9)
    assert len(encoder_passes([contrastive, mae])) == 3
    contrastive.on_step_start(0.1)
    assert len(encoder_passes([contrastive, mae])) == 2


def test_what_hides_patches_needs_a_vit() -> None:
    """Contrastive learning on visible patches with a ResNet says what would do."""
    resnet = VisionConfig(name="timm:resnet10t", image_size=32, options={"channels": [8, 8, 8, 8]})
    encoder = build_dual_encoder(towers().model_copy(update={"vision": resnet}), 100, 0)
    with pytest.raises(UserError, match=r"objectives.contrastive.mask_ratio.*ViT"):
        Contrastive(ContrastiveOptions(mask_ratio=0.5), encoder, vocabulary())
