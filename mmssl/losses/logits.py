"""Sums over the matrix of logits between the two sides of the global batch, in the form that suits its size.

The matrix is scale * left @ right.T [N, N] over all ranks' rows. A rank works on its own n rows of it: its
left side against all ranks' right sides, gathered or (`world.ring`) one rank's after the other. The diagonal
holds the true pairs; with `Groups`, pairs of one group are true too.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.losses import blockwise
from mmssl.losses.blocks import BlockForm
from mmssl.losses.pairing import LEFT_OUT, Diagonal, Grouped, group_sizes
from mmssl.types import Groups

Form = Literal["auto", "plain"] | BlockForm
"""`plain` holds the matrix, the others never do. `auto` never chooses `triton`."""


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    *,
    world: World,
    form: Form = "auto",
    without_diagonal: bool = False,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of this rank's rows [n] and columns [m], and the sum of each row's positives [n].

    `left` [n, D] and `right` [m, D], `scale` a scalar. `without_diagonal` leaves the diagonal out of the sums. With
    `groups` of this rank's rows and columns these tell the positives, in place of the diagonal. Over a ring the form is
    never the plain one.
    """
    if world.ring:
        pairing = Diagonal(0, without_diagonal) if groups is None else Grouped(groups)
        return blockwise.logsumexps(left, right, scale, pairing, form=_in_blocks(form), world=world)
    all_right, offset = world.gather(right)
    pairing = Diagonal(offset, without_diagonal) if groups is None else _gathered(groups, world)
    chosen = choose_form(form, len(left), len(all_right), left.device)
    if chosen == "plain":
        rows, columns, positives = _plain_logsumexps(left, all_right, scale, pairing)
    else:
        rows, columns, positives = blockwise.logsumexps(left, all_right, scale, pairing, form=chosen)
    # So far a column has summed over this rank's rows only.
    return rows, world.logsumexp(columns)[offset : offset + len(right)], positives


def sigmoid_loss(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    world: World,
    form: Form = "auto",
    groups: Groups | None = None,
) -> Tensor:
    """Sum over this rank's rows of -log sigmoid(+-(logit + bias)): + for positives, - elsewhere."""
    if world.ring:
        pairing = Diagonal() if groups is None else Grouped(groups)
        return blockwise.ring_sigmoid_loss(left, right, scale, bias, pairing, form=_in_blocks(form), world=world)
    all_right, offset = world.gather(right)
    pairing = Diagonal(offset) if groups is None else _gathered(groups, world)
    chosen = choose_form(form, len(left), len(all_right), left.device)
    if chosen == "plain":
        return _plain_sigmoid_loss(left, all_right, scale, bias, pairing)
    return blockwise.sigmoid_loss(left, all_right, scale, bias, pairing, form=chosen)


@torch.no_grad()
def correct_matches(left: Tensor, right: Tensor, *, world: World, groups: Groups | None = None) -> Tensor:
    """True if the greatest logit of a row lies on the diagonal, or in the group of the row, bool [m].

    `left` [m, D] holds the first rows of this rank's side, `right` [n, D] all of its other side. Of `groups`, the last
    number counts: what is no negative is no mistake.
    """
    own = torch.arange(len(left), device=left.device) if groups is None else groups.left[: len(left), -1]
    labels = None if groups is None else groups.right[:, -1].contiguous()
    if world.ring:
        return blockwise.nearest(left, right, world, labels) == own
    all_right, offset = world.gather(right)
    best = (left @ all_right.T).argmax(1)
    return best == own + offset if labels is None else world.gather(labels)[0][best] == own


@torch.no_grad()
def count_candidates(groups: Groups, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the entries that are not left out: in each of this rank's rows [n], in each of its columns [m]; and of
    the positives in each row [n]."""
    left, right = (world.gather(side)[0] for side in (groups.left, groups.right))
    by_row, positives = _count(groups.left, right)
    return by_row, _count(groups.right, left)[0], positives


def _count(own: Tensor, everyone: Tensor) -> tuple[Tensor, Tensor]:
    positives, alike = (group_sizes(own[:, k].contiguous(), everyone[:, k].contiguous()) for k in (0, -1))
    return len(everyone) - (alike - positives), positives


def choose_form(form: Form, rows: int, columns: int, device: torch.device) -> Literal["plain"] | BlockForm:
    """The form to use for [rows, columns] logits: `form` itself, unless it is `auto`."""
    if form != "auto":
        return form
    # On a CPU the blocked form is faster from 4 Mi logits on. A GPU moves matrices fast: there it is used
    # when autograd's four or so copies of the matrix would take a GiB.
    largest_plain = 2**22 if device.type == "cpu" else 2**26
    return "plain" if rows * columns < largest_plain else "blocked"


def _in_blocks(form: Form) -> BlockForm:
    """The form over a ring, where no rank holds the matrix."""
    return "triton" if form == "triton" else "blocked"


def _gathered(groups: Groups, world: World) -> Grouped:
    """The pairing of this rank's rows with the columns of all ranks."""
    return Grouped(Groups(groups.left, world.gather(groups.right)[0]))


def _plain_logsumexps(
    left: Tensor, right: Tensor, scale: Tensor, pairing: Diagonal | Grouped
) -> tuple[Tensor, Tensor, Tensor]:
    logits = scale * left @ right.T
    if isinstance(pairing, Grouped):
        same, left_out = pairing.marks(slice(None), slice(None))
        positives = torch.where(same, logits, 0).sum(1)
        logits = logits if left_out is None else logits.masked_fill(left_out, LEFT_OUT)
    else:
        positives = logits.diagonal(pairing.offset)
        if pairing.left_out:
            own = torch.arange(len(left), device=left.device)
            logits = logits.index_put((own, own + pairing.offset), logits.new_full((), LEFT_OUT))
    return logits.logsumexp(1), logits.logsumexp(0), positives


def _plain_sigmoid_loss(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, pairing: Diagonal | Grouped
) -> Tensor:
    logits = scale * left @ right.T + bias
    if isinstance(pairing, Grouped):
        same, left_out = pairing.marks(slice(None), slice(None))
        logits = torch.where(same, -logits, logits)
        logits = logits if left_out is None else logits.masked_fill(left_out, LEFT_OUT)
    else:
        logits.diagonal(pairing.offset).neg_()
    # The loss of a pair is softplus(z), where z is the logit of a negative or minus the logit of a positive.
    return F.softplus(logits, threshold=50).sum()
