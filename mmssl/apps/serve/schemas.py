"""The JSON answers of the API."""

from pydantic import BaseModel, Field


class ServerStatus(BaseModel):
    """The server answers."""

    status: str = "ok"


class Caps(BaseModel):
    """Limits on a request."""

    upload_bytes: int
    pixels: int
    text_chars: int
    labels: int
    hits: int
    conditions: int


class ModelFacts(BaseModel):
    """Model, index and limits."""

    vision: str = Field(description="The vision tower.")
    dimensions: int = Field(description="Length of an embedding.")
    image_size: int = Field(description="Side in pixels of the model's input.")
    images: int | None = Field(description="Images in the index; null without one.")
    fields: list[str] = Field(description="Fields that conditions may name, beside key, caption and shard.")
    methods: list[str] = Field(description="Methods of similarity maps.")
    calibrated: bool = Field(description="Answers have calibrated probabilities of matches and of no label.")
    limits: Caps


class SearchHit(BaseModel):
    """An image of the index."""

    row: int = Field(description="Row number in the index, for /api/images/{row}.")
    similarity: float = Field(description="Cosine similarity with the query.")
    match: float | None = Field(description="Probability that it matches the text; null unless calibrated.")
    key: str = Field(description="Name of the sample in its shard. Cut if it is very long.")
    caption: str = Field(description="Cut if it is very long.")
    shard: str = Field(description="File name of the shard, without its folder.")
    fields: dict[str, str | list[str]] = Field(description="Fields of its sample: a text each, or several.")


class Hits(BaseModel):
    """Images of the index, the nearest first."""

    hits: list[SearchHit]


class Guess(BaseModel):
    """A label with its probability."""

    label: str
    probability: float = Field(description="Among the given labels; they sum to 1.")
    similarity: float = Field(description="Cosine similarity of the image and the prompt.")
    match: float | None = Field(
        description="Probability that it matches, whatever the other labels are; null unless calibrated."
    )
    likely: bool | None = Field(
        description="It is one of the labels that hold the right one with probability `coverage`; null unless "
        "calibrated."
    )


class Guesses(BaseModel):
    """All labels, the most probable first."""

    labels: list[Guess]
    none: float | None = Field(description="Probability that none of the labels fits; null unless calibrated.")
    coverage: float | None = Field(description="That of the likely labels; null unless calibrated.")


class WordScore(BaseModel):
    """A word, and the decrease of the similarity when it is left out."""

    word: str
    fall: float


class Map(BaseModel):
    """The places of an image that match a text."""

    similarity: float = Field(description="Cosine similarity of the image and the text.")
    method: str
    grid: list[list[float]] = Field(description="Rows of the map from the top; higher values support the text more.")
    overlay: str = Field(description="The model's input with the map laid over it, a PNG as a data: URI.")
    words: list[WordScore]


class ErrorAnswer(BaseModel):
    """The reason for a refusal."""

    detail: str
