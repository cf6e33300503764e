"""Compiled towers compute the same, and captions of any length share one program."""

import torch
from torch._dynamo.utils import counters

from mmssl.models import DualEncoder


def test_captions_of_any_length_share_one_program(tiny_encoder: DualEncoder) -> None:
    """Lengths 5 to 12 and batches of 3 to 6: after the first two, no graph is made any more; outputs are those of the
    plain tower, and the compiled one keeps its names."""
    text, names = tiny_encoder.text.eval(), [*tiny_encoder.state_dict()]
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for rows, length in ((4, 7), (3, 9), (6, 5), (5, 12), (4, 8), (6, 6)):
        tokens = torch.randint(5, 100, (rows, length), generator=generator)
        mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1), generator=generator)
        inputs.append((tokens * mask, mask))
    plain = [text(*given).pooled for given in inputs]
    torch._dynamo.reset()
    counters.clear()
    text.compile(dynamic=True, backend="aot_eager")
    graphs = []
    for given, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(text(*given).pooled, expected, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1
    assert len(set(graphs[1:])) == 1
    assert [*tiny_encoder.state_dict()] == names
