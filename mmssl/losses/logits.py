"""Sums over the matrix of logits between the two sides of the global batch, in the form that suits its size.

The matrix is scale * left @ right.T [N, N] over all ranks' rows. A rank works on its own n rows of it: its
left side against all ranks' right sides, gathered or (`world.ring`) one rank's after the other. The diagonal
holds the true pairs.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.distributed import World
from mmssl.losses import blockwise
from mmssl.losses.blocks import LEFT_OUT

Form = Literal["auto", "plain", "blocked"]
"""`plain` holds the matrix, `blocked` never does."""


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    *,
    world: World,
    form: Form = "auto",
    without_diagonal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of this rank's rows and of this rank's columns, and its part of the diagonal, all [n].

    `left` and `right` [n, D], `scale` a scalar. `without_diagonal` leaves the diagonal out of the sums. Over a ring
    the form is always the blocked one.
    """
    if world.ring:
        return blockwise.logsumexps(left, right, scale, without_diagonal=without_diagonal, world=world)
    all_right, offset = world.gather(right)
    if choose_form(form, len(left), len(all_right), left.device) == "plain":
        rows, columns, diagonal = _plain_logsumexps(left, all_right, scale, offset, without_diagonal)
    else:
        rows, columns, diagonal = blockwise.logsumexps(left, all_right, scale, offset, without_diagonal)
    # So far a column has summed over this rank's rows only.
    return rows, world.logsumexp(columns)[offset : offset + len(right)], diagonal


def sigmoid_loss(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, *, world: World, form: Form = "auto"
) -> Tensor:
    """Sum over this rank's rows of -log sigmoid(+-(logit + bias)): + on the diagonal, - elsewhere."""
    if world.ring:
        return blockwise.ring_sigmoid_loss(left, right, scale, bias, world)
    all_right, offset = world.gather(right)
    plain = choose_form(form, len(left), len(all_right), left.device) == "plain"
    return (_plain_sigmoid_loss if plain else blockwise.sigmoid_loss)(left, all_right, scale, bias, offset)


@torch.no_grad()
def correct_matches(left: Tensor, right: Tensor, *, world: World) -> Tensor:
    """True if the greatest logit of a row lies on the diagonal, bool [m].

    `left` [m, D] holds the first rows of this rank's side, `right` [n, D] all of its other side.
    """
    own = torch.arange(len(left), device=left.device)
    if world.ring:
        return blockwise.nearest(left, right, world) == own
    all_right, offset = world.gather(right)
    return (left @ all_right.T).argmax(1) == own + offset


def choose_form(form: Form, rows: int, columns: int, device: torch.device) -> Literal["plain", "blocked"]:
    """The form to use for [rows, columns] logits: `form` itself, unless it is `auto`."""
    if form != "auto":
        return form
    # On a CPU the blocked form is faster from 4 Mi logits on. A GPU moves matrices fast: there it is used
    # when autograd's four or so copies of the matrix would take a GiB.
    largest_plain = 2**22 if device.type == "cpu" else 2**26
    return "plain" if rows * columns < largest_plain else "blocked"


def _plain_logsumexps(
    left: Tensor, right: Tensor, scale: Tensor, offset: int, without_diagonal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logits = scale * left @ right.T
    diagonal = logits.diagonal(offset)
    if without_diagonal:
        own = torch.arange(len(left), device=left.device)
        logits = logits.index_put((own, own + offset), logits.new_full((), LEFT_OUT))
    return logits.logsumexp(1), logits.logsumexp(0), diagonal


def _plain_sigmoid_loss(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:
    logits = scale * left @ right.T + bias
    logits.diagonal(offset).neg_()
    # The loss of a pair is softplus(z), where z is the logit of a negative or minus the logit of a positive.
    return F.softplus(logits, threshold=50).sum()
