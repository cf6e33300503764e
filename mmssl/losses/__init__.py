"""Losses: pure functions from tensors to a scalar, without configuration or state.

A loss over the whole global batch takes `ranks` (see `mmssl.losses.ranks`). Its value on each rank is that
rank's *share*: the mean of the shares over ranks is the loss of the global batch, and so, since DDP averages
gradients, the averaged gradient is the one that a single process would have found on the whole batch.

A loss that is a mean over something other than samples (masked tokens, masked patches, caption tokens)
returns `(sum, count)`. Its share is `ranks.world * sum / ranks.sum(count)`; micro-batches add up before that.
"""
