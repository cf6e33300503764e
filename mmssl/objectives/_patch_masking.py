"""Random subsets of visible patches. Objectives with the same ratio share one encoder pass."""

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.models import DualEncoder
from mmssl.objectives._base import EncoderPass, Inputs
from mmssl.rng import RowRandom


def visible_pass(mask_ratio: float) -> EncoderPass:
    """The pass on the main view with this fraction of its patches hidden."""
    # Six digits: 1 - 0.9 is a little less than 0.1, which would keep one patch less.
    kept = f"{1 - mask_ratio:g}"
    return EncoderPass("vision", "view.main", f"visible.{kept}", float(kept))


def visible_patches(
    inputs: Inputs, random: RowRandom, encoder: DualEncoder, encoder_pass: EncoderPass
) -> dict[str, Tensor]:
    """The visible patches of each sample in `encoder_pass`, int64 [B, K]; drawn once for all objectives that read it.

    Uniform noise is sorted and the first patches are kept (MAE, He et al. 2021, section 3).
    """
    if encoder_pass.mask in inputs:
        return {}
    assert encoder.vision.grid is not None
    rows, columns = encoder.vision.grid
    kept = max(1, int(rows * columns * encoder_pass.keep_ratio))
    return {encoder_pass.mask: random.uniform(rows * columns).argsort(1)[:, :kept]}


def hidden_patches(keep: Tensor, patches: int) -> Tensor:
    """True for patches that are not in `keep`: int64 [B, K] -> bool [B, patches]."""
    return torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


def check_sees_patches(key: str, encoder: DualEncoder) -> None:
    """Raise UserError if the vision tower cannot encode a subset of its patches."""
    if encoder.vision.grid is None:
        raise UserError(
            f"{key}: this vision tower cannot encode a subset of its patches; a ViT of open_clip or timm can, "
            f"for example model.vision.name=timm:vit_small_patch16_224"
        )
