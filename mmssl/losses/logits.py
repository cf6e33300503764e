"""What losses need of the matrix of logits between the global batch's two sides, whole or in blocks.

The matrix is scale * left @ right.T [N, N] over all ranks' rows; a rank works on its own n rows of it, so on
its own left side against everyone's right side, gathered or (`ranks.ring`) one rank's after the other. The diagonal
holds what belongs together.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmssl.losses import blockwise as blocked
from mmssl.losses import ring
from mmssl.losses.blocks import LEFT_OUT
from mmssl.losses.ranks import Ranks

Form = Literal["auto", "plain", "blocked"]


def logsumexps(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    *,
    world: Ranks,
    form: Form = "auto",
    without_diagonal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of this rank's rows and of this rank's columns, and its part of the diagonal, all [n].

    `left` and `right` [n, D], `scale` a scalar. `without_diagonal` leaves the diagonal out of the sums. Over a ring
    the form is always the blocked one.
    """
    if world.ring:
        return ring.logsumexps(left, right, scale, without_diagonal, world)
    everyone, offset = world.gather(right)
    plain = choose(form, len(left), len(everyone), left.device) == "plain"
    parts = _plain_logsumexps if plain else blocked.logsumexps
    rows, columns, diagonal = parts(left, everyone, scale, offset, without_diagonal)
    # Here a column has summed over this rank's rows only.
    return rows, world.logsumexp(columns)[offset : offset + len(right)], diagonal


def sigmoid_loss(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, *, world: Ranks, form: Form = "auto"
) -> Tensor:
    """Sum over this rank's rows of -log sigmoid(+-(logit + bias)): + on the diagonal, - elsewhere."""
    if world.ring:
        return ring.sigmoid_loss(left, right, scale, bias, world)
    everyone, offset = world.gather(right)
    plain = choose(form, len(left), len(everyone), left.device) == "plain"
    return (_plain_sigmoid_loss if plain else blocked.sigmoid_loss)(left, everyone, scale, bias, offset)


@torch.no_grad()
def pick_their_own(left: Tensor, right: Tensor, *, world: Ranks) -> Tensor:
    """Whether each of the first rows `left` [m, D] has its greatest logit on the diagonal, bool [m]; `right` [n, D]."""
    own = torch.arange(len(left), device=left.device)
    if world.ring:
        return ring.nearest(left, right, world) == own
    everyone, offset = world.gather(right)
    return (left @ everyone.T).argmax(1) == own + offset


def choose(form: Form, rows: int, columns: int, device: torch.device) -> Literal["plain", "blocked"]:
    """The form to use for [rows, columns] logits: `form` itself, unless it is `auto`."""
    if form != "auto":
        return form
    # On a CPU the blocked form is the faster one from 4 Mi logits on. A GPU moves matrices fast: there it
    # starts where autograd's four or so copies of the matrix would take a GiB.
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
    # A pair's loss is softplus(z): z is a negative's logit, or minus a positive's.
    return F.softplus(logits, threshold=50).sum()
