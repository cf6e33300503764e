"""What `examples.json` holds: images of an evaluation with their predictions or search results."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExampleImage:
    """An image of the dataset."""

    id: int
    """Id of the sample in the dataset."""
    shard: str
    key: str
    thumbnail: str
    """Path relative to examples.json."""


@dataclass(frozen=True)
class ClassifiedExample:
    """An image with its best classes."""

    image: ExampleImage
    label: str
    right: bool
    rank: int
    """Rank of the label among all classes, from 1."""
    best: list[tuple[str, float]]
    """The best classes and their scores."""


@dataclass(frozen=True)
class ConfusedPair:
    """A frequent mistake."""

    label: str
    prediction: str
    count: int
    samples: int
    """Samples of the label."""
    mistaken: ExampleImage
    """One of the mistakes."""
    typical: ExampleImage | None
    """An image of the predicted class, if the dataset has one."""


@dataclass(frozen=True)
class ClassificationExamples:
    """The examples shown of a classification."""

    data: str
    samples: int
    classes: int
    acc1: float
    probabilities: bool
    """True: the scores are probabilities. False: similarities."""
    examples: list[ClassifiedExample]
    """Drawn at random: correct ones first, then wrong ones."""
    confused: list[ConfusedPair]
    """The most frequent first."""


@dataclass(frozen=True)
class CaptionSearch:
    """A caption and its best images, each marked if it belongs to the caption."""

    caption: str
    found: list[tuple[ExampleImage, bool]]


@dataclass(frozen=True)
class ImageSearch:
    """An image and its best captions, each marked if it belongs to the image."""

    image: ExampleImage
    found: list[tuple[str, bool]]


@dataclass(frozen=True)
class RetrievalExamples:
    """The examples shown of a retrieval."""

    data: str
    samples: int
    captions: int
    by_caption: list[CaptionSearch]
    by_image: list[ImageSearch]
