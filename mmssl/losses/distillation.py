"""Losses that bring a student's embeddings near a teacher's, or its similarities near the teacher's.

CLIP-KD (Yang et al. 2023, arXiv:2307.12732, section 3.2): feature distillation (FD), contrastive relational
distillation (CRD) and interactive contrastive learning (ICL). Similarities within a modality are compared as in
similarity-preserving distillation (Tung and Mori 2019). All embeddings are L2-normalised by the caller; teachers get no
gradient. Each loss is this rank's share: the mean of the shares over ranks is the loss of the global batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmssl.distributed import SINGLE_PROCESS, World
from mmssl.losses.common import in_float32, share

MOST_ENTRIES = 2**22
"""Entries of a matrix of similarities held at a time; with more, blocks of rows are computed anew backward."""


@in_float32
def features(student: Tensor, teacher: Tensor, *, world: World = SINGLE_PROCESS) -> Tensor:
    """Mean over samples of the squared distance of two unit vectors [n, D], 2 - 2 cos: FD without its mean over D."""
    distances = (student - teacher.detach()).square().sum(1)
    return share(distances.sum(), len(distances), world)


@in_float32
def similarities(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor,
    teacher_scale: Tensor,
    *,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """KL(teacher || student) of each image's distribution over all captions and of each caption's over all images,
    averaged over both: CRD. Embeddings [n, D]; the scales are inverse temperatures, scalars."""
    scales = scale, teacher_scale.detach()
    by_image = _over_columns(_divergence, (image, teacher_image.detach()), (text, teacher_text.detach()), scales, world)
    by_text = _over_columns(_divergence, (text, teacher_text.detach()), (image, teacher_image.detach()), scales, world)
    return (by_image + by_text) / 2


@in_float32
def interaction(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    scale: Tensor,
    *,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """Cross-entropy of finding the teacher's caption for the student's image among all captions, and the teacher's
    image for the student's caption, averaged over both: ICL. Student and teacher have the same dimensions [n, D]."""
    by_image = _over_columns(_own_column, (image,), (teacher_text.detach(),), (scale,), world)
    by_text = _over_columns(_own_column, (text,), (teacher_image.detach(),), (scale,), world)
    return (by_image + by_text) / 2


@in_float32
def relations(student: Tensor, teacher: Tensor, *, world: World = SINGLE_PROCESS) -> Tensor:
    """Mean over all pairs of samples of the squared difference between the student's cosine and the teacher's."""
    both = student, teacher.detach()
    return _over_columns(_differences, both, both, (), world)


def _over_columns(
    of_rows: Callable[..., Tensor],
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    world: World,
) -> Tensor:
    """The mean over all ranks' rows of a loss of rows against all ranks' columns, a block of rows at a time."""
    gathered = [world.gather(x) for x in columns]
    everywhere, offset = [x for x, _ in gathered], gathered[0][1]
    step = max(1, MOST_ENTRIES // len(everywhere[0]))
    total = rows[0].new_zeros(())
    for start in range(0, len(rows[0]), step):
        loss = partial(of_rows, offset=offset + start)
        given = (*(x[start : start + step] for x in rows), *everywhere, *scales)
        blocks = step < len(rows[0])
        total = total + (checkpoint(loss, *given, use_reentrant=False) if blocks else loss(*given))
    return share(total, len(rows[0]), world)


def _divergence(
    rows: Tensor,
    teacher_rows: Tensor,
    columns: Tensor,
    teacher_columns: Tensor,
    scale: Tensor,
    teacher_scale: Tensor,
    offset: int,
) -> Tensor:
    ours = (scale * rows @ columns.T).log_softmax(1)
    theirs = (teacher_scale * teacher_rows @ teacher_columns.T).log_softmax(1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _own_column(rows: Tensor, columns: Tensor, scale: Tensor, offset: int) -> Tensor:
    own = torch.arange(offset, offset + len(rows), device=rows.device)
    return F.cross_entropy(scale * rows @ columns.T, own, reduction="sum")


def _differences(rows: Tensor, teacher_rows: Tensor, columns: Tensor, teacher_columns: Tensor, offset: int) -> Tensor:
    return (rows @ columns.T - teacher_rows @ teacher_columns.T).square().mean(1).sum()
