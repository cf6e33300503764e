"""`data`: sources of samples, views and loading."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmssl.config.base import ConfigBase


class SourceConfig(ConfigBase):
    """One source of a mixture."""

    shards: str | list[str]
    """A path, URL or pattern (`a/{00000..00009}.tar`, `a/*.tar`), or a list of them."""
    weight: float = Field(1.0, gt=0)
    """Fraction of the batch, relative to the weights of the other sources."""


class MembersConfig(ConfigBase):
    """Members of the shards that hold the image and the caption, where they are not named as usual."""

    image: list[str] = []
    """Extensions or names, in order of preference: `img_content` for KEY.img_content, `input.jpg` for KEY.input.jpg or
    KEY/input.jpg."""
    caption: list[str] = []
    """The same for the caption, which becomes the field `txt`."""


class CacheConfig(ConfigBase):
    """A folder on a local disk that keeps what was read."""

    dir: Path | None = None
    """Folder of the cache of remote shards. null: none. Several processes and runs may share it."""
    gib: float = Field(100.0, gt=0)
    """Size limit of the folder. The least recently used pieces are deleted first; with `resize`, no more is kept."""
    resize: int | None = Field(None, ge=1)
    """Shrink images to this shorter side in pixels before they are rendered, and keep them, of local shards too: the
    originals are read and decoded once. Give at least the model's image size, and more the smaller the crops are.
    null: images are rendered from the originals."""

    @model_validator(mode="after")
    def _check(self) -> "CacheConfig":
        if self.resize is not None and self.dir is None:
            raise ValueError(f"data.cache.resize={self.resize} needs a folder on a local disk: give data.cache.dir")
        return self


class ViewConfig(ConfigBase):
    """One named view of an image in training. The defaults are OpenCLIP's."""

    augment: float = Field(1.0, ge=0, le=1)
    """Fraction of images that receive the augmentations below. Crop and flip always apply."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of the random resized crop, as a fraction of the image."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Smallest and largest width/height of the crop."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    affine: float = Field(0.0, ge=0, le=1)
    """Probability of a small random rotation, translation and scaling."""
    affine_degrees: float = Field(15.0, ge=0, le=180)
    """Largest rotation of `affine`, in degrees."""
    affine_scale: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest scale of `affine`."""
    affine_fill: Literal["mirror", "white"] = "mirror"
    """Fill of the area that `affine` brings in from outside the image."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Probability of changing brightness, contrast, saturation and hue."""
    color_jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Largest relative change of brightness, contrast and saturation, and largest shift of hue (in turns)."""
    gray: float = Field(0.0, ge=0, le=1)
    """Probability of conversion to grayscale."""
    invert: float = Field(0.0, ge=0, le=1)
    """Probability of inverting all pixels."""
    solarize: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the pixels above one half."""
    posterize: float = Field(0.0, ge=0, le=1)
    """Probability of keeping 3 to 6 levels per colour channel."""
    outline: float = Field(0.0, ge=0, le=1)
    """Probability of darkening the edges of shapes, as a drawing with outlines."""
    blur: float = Field(0.0, ge=0, le=1)
    """Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels at 224 px (scaled with the size)."""
    erase: float = Field(0.0, ge=0, le=1)
    """Probability of painting over one random rectangle of 2 to 20 % of the area."""


class BatchingConfig(ConfigBase):
    """The samples that share a batch. By default chance decides."""

    neighbours: Path | None = None
    """Folder of embeddings of the training shards, as `mmssl embed` writes it: groups of samples with similar images
    stay together in every batch, as hard negatives."""
    group: int = Field(8, ge=2)
    """Samples of a group of neighbours. It must divide the batch size."""
    distinct: str | None = None
    """`caption`, or a field of the .json (or `cls`): samples with the same value are in different batches, as far as an
    epoch has enough batches."""

    @model_validator(mode="after")
    def _check(self) -> "BatchingConfig":
        if self.neighbours is not None and self.distinct is not None:
            raise ValueError(
                "data.batching: neighbours often share their captions, so distinct would part them; set one. To keep "
                "equal captions of a batch from being negatives, set objectives.contrastive.positives=caption"
            )
        return self


class HoldOutConfig(ConfigBase):
    """Samples of the training shards that are not trained on."""

    share: float = Field(0.0, ge=0, lt=1)
    """Fraction of the samples, chosen by a hash of their keys: the same ones in any shard, order and process. The
    shards must be on a disk. `mmssl train --data SHARDS` sets it, and copies those samples to
    RUN/shards/held-out-*.tar."""
    group: str | None = None
    """Field of the .json (or `cls`), for example a patient or a product: samples with the same value are held out
    together. The fraction is then one of the values."""


class DataConfig(ConfigBase):
    """Sources of samples, views and loading."""

    train: str | list[str | SourceConfig]
    """Training shards: a pattern, or a list of patterns and weighted sources."""
    batch_size: int = Field(256, ge=1)
    """Global batch size: pairs per step over all processes."""
    members: MembersConfig = MembersConfig()
    """Members of the shards that hold the image and the caption, where they are not named as usual."""
    captions: list[str] | dict[str, Annotated[float, Field(gt=0)]] = ["{txt}"]
    """Caption templates; each sample draws one, equally likely or by weight (`{"{txt}": 3, "{alt}": 1}`). `{txt}` is
    the .txt member, other fields come from the .json member. A list of tags such as `{tags}` renders a random
    non-empty subset in random order. Of several captions (a list of sentences, or the lines of `{txt}`) one is drawn.
    `{name|one}` and `{name|all}` decide for themselves."""
    images: bool = True
    """False: samples need no image and none is decoded, for objectives that read captions alone (mlm, replaced_tokens,
    distill with a teacher of texts)."""
    lanes: int | None = Field(None, ge=1)
    """Parallel read positions in the data, fixed for a run. The number must divide the batch size. Default: the
    largest divisor of the batch size up to 64."""
    shuffle_block: int = Field(8, ge=1)
    """Shuffle buffer of a lane, in units of 8 MiB (or of a slice, if that is larger). More mixes better and takes more
    memory."""
    slice_mib: float | None = Field(None, gt=0)
    """Largest contiguous read from one shard, in bytes. Default: single samples for small datasets, a millionth of the
    bytes of larger ones, 4 to 8 MiB for remote ones."""
    batching: BatchingConfig = BatchingConfig()
    """The samples that share a batch. By default chance decides."""
    hold_out: HoldOutConfig = HoldOutConfig()
    """Samples of the training shards that are not trained on. Default: none."""
    workers: int | None = Field(None, ge=0)
    """Workers that read and decode, per process. 0 decodes in the training thread. Default: by the number of cores."""
    worker_kind: Literal["thread", "process"] = "thread"
    """Threads share memory and start at once. Processes do not compete with the training loop for Python's lock."""
    decode: Literal["quality", "fast"] = "quality"
    """`fast` decodes JPEG at a reduced DCT size where the crop allows it (30-33 dB against the full decode)."""
    views: dict[str, ViewConfig] = {"main": ViewConfig()}
    """Named views. `main` feeds the contrastive objective. Views of other objectives have defaults."""
    augment_on: Literal["auto", "host", "device"] = "auto"
    """Place of flips and augmentations: one image at a time in the workers (`host`), or in batches on the model's
    device. Both draw the same parameters and differ by rounding only. `auto`: on the device if it is a GPU."""
    max_pixels: int = Field(89_478_485, ge=1)
    """Images with more pixels are refused before they are decoded (the size at which Pillow warns)."""
    max_member_mib: float = Field(64.0, gt=0)
    """Members larger than this are refused."""
    max_caption_chars: int = Field(20_000, ge=1)
    """Longer captions are refused."""
    bad_samples: float = Field(0.1, ge=0, le=1)
    """Largest fraction of unusable samples. Above it (checked after 1,000 samples), or at 100 in a row, the run
    stops."""
    cache: CacheConfig = CacheConfig()
    """Keeping what was read on a local disk."""
    allow_pipe: bool = False
    """Allow `pipe:COMMAND` sources, which run COMMAND in a shell."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.lanes is not None and self.batch_size % self.lanes:
            raise ValueError(
                f"data.lanes={self.lanes} does not divide data.batch_size={self.batch_size}; pick a divisor"
            )
        if self.batching.neighbours is not None and self.batch_size % (self.batching.group * (self.lanes or 1)):
            raise ValueError(
                f"data.batch_size={self.batch_size} does not hold whole groups of data.batching.group="
                f"{self.batching.group}{'' if self.lanes is None else f' in each of data.lanes={self.lanes}'}; pick a "
                f"multiple of {self.batching.group * (self.lanes or 1)}"
            )
        if "main" not in self.views:
            raise ValueError("data.views has no view named 'main'; the contrastive objective reads it: add one")
        if not self.captions:
            raise ValueError("data.captions is empty; give at least one template, for example ['{txt}']")
        return self
