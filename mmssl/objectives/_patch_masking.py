"""Random subsets of patches that a vision tower is shown; objectives that hide the same part share one forward."""

import torch
from torch import Tensor

from mmssl.errors import UserError
from mmssl.models.dual_encoder import DualEncoder
from mmssl.objectives._base import EncoderPass, Inputs
from mmssl.rng import RowRandom


def visible_pass(mask_ratio: float) -> EncoderPass:
    """The main view with this part of its patches hidden."""
    return EncoderPass("vision", "view.main", f"visible.{1 - mask_ratio:g}")


def visible_patches(inputs: Inputs, random: RowRandom, encoder: DualEncoder, forward: EncoderPass) -> dict[str, Tensor]:
    """The patches each sample shows in `forward`, int64 [B, K]; drawn once for all objectives that read it.

    Uniform noise is sorted and the first patches are kept (MAE, He et al. 2021, section 3).
    """
    if forward.mask in inputs:
        return {}
    assert encoder.vision.grid is not None
    rows, columns = encoder.vision.grid
    share = float(forward.mask.removeprefix("visible."))
    kept = max(1, int(rows * columns * share))
    return {forward.mask: random.uniform(rows * columns).argsort(1)[:, :kept]}


def hidden_patches(keep: Tensor, patches: int) -> Tensor:
    """True where a patch is not among those kept: int64 [B, K] -> bool [B, patches]."""
    return torch.ones(len(keep), patches, dtype=torch.bool, device=keep.device).scatter(1, keep, False)


def check_sees_patches(key: str, encoder: DualEncoder) -> None:
    """Raises UserError where the vision tower cannot be shown a subset of patches."""
    if encoder.vision.grid is None:
        raise UserError(
            f"{key}: this vision tower cannot be shown a subset of its patches; a ViT of open_clip or timm can, "
            f"for example model.vision.name=timm:vit_small_patch16_224"
        )
