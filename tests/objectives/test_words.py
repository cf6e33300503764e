"""Classification by the words of the caption."""

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import MultiLabelBinarizer

from mmssl.distributed import World
from mmssl.models import build_dual_encoder
from mmssl.objectives.words import COMMON, Words, WordsOptions, repeated
from mmssl.rng import RowRandom
from tests.helpers.models import tiny_model_config
from tests.helpers.objective_batch import WORDS, vocabulary

ROWS, LENGTH = 9, 11


def captions(seed: int) -> dict[str, torch.Tensor]:
    """Captions of few words, many of them twice, with special tokens and padding; one has no word."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 15, (ROWS, LENGTH), generator=g)
    tokens[:, 0] = 1
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=g)
    mask[4, 1:] = False
    # Padding holds an ordinary id here, to prove that the mask counts.
    return {"tokens": torch.where(mask, tokens, 7), "token_mask": mask, "ids": torch.arange(ROWS)}


def k_hot(inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Scikit-learn's [ROWS, WORDS] of the ordinary tokens of each caption."""
    rows = [
        {int(t) for t, real in zip(tokens, mask, strict=True) if real and t > 4}
        for tokens, mask in zip(inputs["tokens"], inputs["token_mask"], strict=True)
    ]
    return np.asarray(MultiLabelBinarizer(classes=list(range(WORDS))).fit_transform(rows))


@pytest.mark.parametrize("idf", [True, False])
def test_targets_and_loss_are_those_of_scikit_learn_and_a_loop(idf: bool) -> None:
    """The targets of a step are MultiLabelBinarizer's k-hot rows, weighted by TfidfTransformer's smoothed idf (less its
    constant 1) of all captions before, and divided by their sum. The loss is the loop over captions and words of
    -target log softmax, a mean over captions with a word, and so is its gradient."""
    encoder = build_dual_encoder(tiny_model_config(), WORDS, 0)
    words, seen = Words(WordsOptions(idf=idf), encoder, vocabulary()), []
    for step in range(4):
        inputs = captions(step)
        random = RowRandom(torch.Generator(), 0, ROWS, ROWS)
        inputs |= words.sample_targets(inputs, random, encoder)
        hot = k_hot(inputs)
        weights = np.full(WORDS, COMMON)
        if seen:
            weights += TfidfTransformer(smooth_idf=True).fit(np.concatenate(seen)).idf_ - 1
        weighted = hot * (weights if idf else 1)
        expected = np.divide(weighted, weighted.sum(1, keepdims=True), where=hot.any(1, keepdims=True), out=0.0 * hot)
        dense = torch.zeros(ROWS, WORDS).scatter_add(1, inputs["tokens"], inputs["words.weights"])
        np.testing.assert_allclose(dense, expected, atol=1e-6)
        logits = torch.randn(ROWS, WORDS, generator=torch.Generator().manual_seed(9)).requires_grad_()
        output = words.loss({"logits": logits}, inputs, World())
        peer, total = logits.detach().clone().requires_grad_(), torch.zeros(())
        for row in range(ROWS):
            for word in range(WORDS):
                target = float(expected[row, word])
                total = total - target * (peer[row, word].exp() / peer[row].exp().sum()).log()
        count = int(hot.any(1).sum())
        assert count == ROWS - 1 == int(words.num_terms(inputs))
        torch.testing.assert_close(output.total / count, total / count)
        for mine, theirs in zip(
            torch.autograd.grad(output.total, logits), torch.autograd.grad(total, peer), strict=True
        ):
            torch.testing.assert_close(mine, theirs)
        hits, of = output.metrics["accuracy"]
        assert (int(hits), int(of)) == (int(hot[range(ROWS), logits.argmax(1)].sum()), count)
        words.on_step_end(inputs, World())
        seen.append(hot[hot.any(1)])
    assert int(words.get_buffer("caption_count")) == (4 * (ROWS - 1) if idf else 0)


def test_only_the_first_of_equal_tokens_counts() -> None:
    """By hand."""
    found = repeated(torch.tensor([[3, 5, 3, 3, 5], [1, 2, 3, 4, 1]]))
    assert found.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
