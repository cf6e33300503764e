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


class ModelFacts(BaseModel):
    """Model, index and limits."""

    vision: str = Field(description="The vision tower.")
    dimensions: int = Field(description="Length of an embedding.")
    image_size: int = Field(description="Side in pixels of the model's input.")
    images: int | None = Field(description="Images in the index; null without one.")
    methods: list[str] = Field(description="Methods of similarity maps.")
    limits: Caps


class SearchHit(BaseModel):
    """An image of the index."""

    row: int = Field(description="Row number in the index, for /api/images/{row}.")
    similarity: float = Field(description="Cosine similarity with the query.")
    key: str = Field(description="Name of the sample in its shard. Cut if it is very long.")
    caption: str = Field(description="Cut if it is very long.")


class Hits(BaseModel):
    """Images of the index, the nearest first."""

    hits: list[SearchHit]


class Guess(BaseModel):
    """A label with its probability."""

    label: str
    probability: float = Field(description="Among the given labels; they sum to 1.")
    similarity: float = Field(description="Cosine similarity of the image and the prompt.")


class Guesses(BaseModel):
    """All labels, the most probable first."""

    labels: list[Guess]


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
