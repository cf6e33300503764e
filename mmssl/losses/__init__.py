"""Losses: pure functions from tensors to a scalar, without configuration or state.

A loss that compares samples with each other takes `ranks` (see `mmssl.losses.ranks`). Its value on each rank
is that rank's *share*: the mean of the shares over ranks is the loss of the global batch, and so, since DDP
averages gradients, the averaged gradient is the one that one process would have found on the whole batch.

A loss that is a mean over items that do not see each other (masked tokens, masked patches, caption tokens,
queries) returns `(sum, count)`: micro-batches add up, and `ranks.share` makes a share of the sums.
"""
