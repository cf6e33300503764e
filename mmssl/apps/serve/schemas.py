"""The JSON that the API gives."""

from pydantic import BaseModel, Field


class ServerStatus(BaseModel):
    """The server answers."""

    status: str = "ok"


class Caps(BaseModel):
    """What a request may hold at most."""

    upload_bytes: int
    pixels: int
    text_chars: int
    labels: int
    hits: int


class ModelFacts(BaseModel):
    """What is served."""

    vision: str = Field(description="The vision tower.")
    dimensions: int = Field(description="Numbers of a vector.")
    image_size: int = Field(description="Side in pixels of what the model sees of an image.")
    images: int | None = Field(description="Images in the index; null without one.")
    methods: list[str] = Field(description="Ways to make a similarity map.")
    limits: Caps


class Found(BaseModel):
    """An image of the index."""

    row: int = Field(description="Its number, for /api/images/{row}.")
    similarity: float = Field(description="Cosine with what was looked for.")
    key: str = Field(description="Its name inside its shard.")
    caption: str


class Hits(BaseModel):
    """Images of the index, the nearest first."""

    hits: list[Found]


class Guess(BaseModel):
    """A label and how well it fits."""

    label: str
    probability: float = Field(description="Among the given labels; they sum to 1.")
    similarity: float = Field(description="Cosine of the image and the prompt.")


class Guesses(BaseModel):
    """All labels, the likeliest first."""

    labels: list[Guess]


class WordScore(BaseModel):
    """A word and how much the similarity falls without it."""

    word: str
    fall: float


class Map(BaseModel):
    """Where in an image a text comes from."""

    similarity: float = Field(description="Cosine of the image and the text.")
    method: str
    grid: list[list[float]] = Field(description="Rows of the map, from the top; more speaks more for the text.")
    overlay: str = Field(description="What the model sees with the map laid over it, a PNG as a data: URI.")
    words: list[WordScore]


class ErrorAnswer(BaseModel):
    """Why a request was refused."""

    detail: str
