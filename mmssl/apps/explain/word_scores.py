"""Which words of a caption make it alike to an image."""

from torch import Tensor

from mmssl.inference import Model


def word_scores(model: Model, caption: str, image: Tensor) -> list[tuple[str, float]]:
    """Each word and how much the similarity falls when it is left out; below zero where it rises.

    This is exact: the caption is encoded again without the word. Words that say the same thing twice share little.

    Args:
        image: the image's unit vector, [D].
    """
    words = caption.split()
    without = [" ".join(words[:place] + words[place + 1 :]) for place in range(len(words))]
    scores = model.encode_text([caption, *without]) @ image.cpu()
    return list(zip(words, (scores[0] - scores[1:]).tolist(), strict=True))
