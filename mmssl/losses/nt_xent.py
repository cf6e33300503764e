"""NT-Xent between two views of the same things (SimCLR, arXiv:2002.05709, equation 1 and algorithm 1)."""

from torch import Tensor

from mmssl.losses.logits import Form, logsumexps
from mmssl.losses.precision import in_float32
from mmssl.losses.ranks import ALONE, Ranks, share


@in_float32
def nt_xent(
    first: Tensor, second: Tensor, temperature: float = 0.1, *, ranks: Ranks = ALONE, form: Form = "auto"
) -> Tensor:
    """This rank's share of the mean over all 2N views of -log p(the other view of the same thing).

    `first` and `second` [n, D] are this rank's two views, L2-normalised by the caller. The candidates for a
    view are all ranks' other 2N - 1 views.
    """
    scale = first.new_full((), 1 / temperature)
    to_second, to_first, positives = logsumexps(first, second, scale, ranks=ranks, form=form)
    among_first, _, _ = logsumexps(first, first, scale, ranks=ranks, form=form, without_diagonal=True)
    among_second, _, _ = logsumexps(second, second, scale, ranks=ranks, form=form, without_diagonal=True)
    of_first = to_second.logaddexp(among_first) - positives
    of_second = to_first.logaddexp(among_second) - positives
    return share((of_first + of_second).sum() / 2, len(positives), ranks)
