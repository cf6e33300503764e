"""`model`: the two towers, the projections and the temperature."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mmssl.config.base import ConfigBase

_ONE_TEXT_TOWER = "model.text needs exactly one of `name` (pretrained) and `config` (random weights)"


class LoraConfig(ConfigBase):
    """Low-rank adapters of one tower (Hu et al. 2022): its own weights are frozen, only the adapters are trained."""

    rank: int = Field(8, ge=1)
    """Rank of each layer's change."""
    alpha: int = Field(16, ge=1)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an entry of an adapter's input."""
    targets: list[str] | None = Field(None, min_length=1)
    """Layers to adapt, by the ends of their names (`[qkv, mlp.fc1]`). Default: all linear layers; in a tower without
    linear layers, all ungrouped convolutions."""


class VisionConfig(ConfigBase):
    """The vision tower."""

    name: str = "open_clip:ViT-B-32"
    """`open_clip:MODEL` (the visual tower of an open_clip config) or `timm:MODEL`."""
    pretrained: str | None = None
    """A pretrained tag of the library, or a local weights file. Null: random weights."""
    image_size: int | None = Field(None, ge=8)
    """Side of the square input in pixels. Default: the model's own."""
    options: dict[str, Any] = {}
    """Further arguments of the model (timm: keyword arguments such as depth; open_clip: entries of vision_cfg)."""
    mean: tuple[float, float, float] | None = None
    """Mean of red, green and blue, from 0 to 1. Default: that of the pretrained weights."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of red, green and blue, from 0 to 1. Default: that of the pretrained weights."""
    fit: Literal["shortest", "squash"] = "shortest"
    """Resizing in evaluation. `shortest`: the shorter side, then a centre crop. `squash`: both sides."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of the resizing."""
    lock: bool = False
    """Freeze the tower (LiT); its batch norms keep their statistics."""
    unlocked_layers: int = Field(0, ge=0)
    """With `lock`: the last layers left free, with what follows them; all weights if there are not as many."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the tower's own weights. Needs `pip install 'mmssl[lora]'`."""

    @model_validator(mode="after")
    def _check(self) -> "VisionConfig":
        _no_free_layers("vision", self.lora, self.unlocked_layers)
        return self


class TextConfig(ConfigBase):
    """The text tower."""

    name: str | None = None
    """A Hugging Face encoder: a hub name or a local folder with weights and a tokenizer."""
    config: dict[str, Any] | None = None
    """A Hugging Face configuration (`model_type: bert`, ...) to build random weights from, instead of `name`; with
    `model_type: open_clip` the entries of open_clip's text_cfg."""
    tokenizer: str | None = None
    """A hub name, a folder with a fast tokenizer, `clip` for OpenAI's CLIP tokenizer, or `train` to train one on the
    training captions. Default: `name`."""
    vocab_size: int = Field(8192, ge=64)
    """Most tokens of a trained tokenizer (`tokenizer: train`). From 420 on it knows every letter of every script."""
    lowercase: bool = True
    """A trained tokenizer (`tokenizer: train`) reads captions in lower case, so that `Dog` and `dog` are one word."""
    pooling: Literal["auto", "cls", "mean", "eos", "pooler"] = "auto"
    """Pooling of the token vectors. `auto`: as the folder declares (sentence-transformers), else `eos`, the last token,
    for causal models, `mean` for the encoder of an encoder-decoder, and `cls`, the first token. `pooler`: the encoder's
    own pooled vector."""
    max_tokens: int = Field(77, ge=4)
    """Captions are cut to this many tokens and padded to the longest of the batch only. More than a pretrained tower
    has learned positions for: the positions are stretched (Long-CLIP)."""
    lock: bool = False
    """Freeze the tower."""
    unlocked_layers: int = Field(0, ge=0)
    """With `lock`: the last layers left free, with what follows them; all weights if there are not as many."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the tower's own weights. Needs `pip install 'mmssl[lora]'`."""

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        _no_free_layers("text", self.lora, self.unlocked_layers)
        if self.name is not None and self.config is not None:
            raise ValueError(_ONE_TEXT_TOWER)
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.text.tokenizer is missing; give a folder or hub name, or 'train' to train one")
        return self


def _no_free_layers(tower: str, lora: LoraConfig | None, unlocked_layers: int) -> None:
    if lora is not None and unlocked_layers > 0:
        raise ValueError(
            f"model.{tower}.lora trains adapters only, so model.{tower}.unlocked_layers={unlocked_layers} cannot be; "
            f"set one of them to its default"
        )


class ModelConfig(ConfigBase):
    """The dual encoder."""

    start: str | None = None
    """A whole model to start from: its towers, weights, tokenizer and preprocessing. A run or a model folder,
    `open_clip:MODEL/TAG`, `local-dir:FOLDER` or a Hugging Face CLIP folder. Of the towers, only `lock`,
    `unlocked_layers`, `lora` and `text.max_tokens` can then be set."""
    vision: VisionConfig = VisionConfig()
    """The vision tower."""
    text: TextConfig = TextConfig()
    """The text tower."""
    embed_dim: int = Field(512, ge=1)
    """Dimensions of the shared space."""
    projection: Literal["linear", "mlp"] = "linear"
    """Projection from the width of a tower to the shared space."""
    init_temperature: float = Field(0.07, gt=0)
    """Initial value of the learnable temperature (CLIP: 0.07). Its inverse is the logit scale."""
    max_logit_scale: float = Field(100.0, gt=0)
    """Upper limit of the logit scale."""

    @property
    def needs_towers(self) -> bool:
        """True until the towers of `start` are written into the configuration."""
        return self.start is not None and self.text.name is None and self.text.config is None

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.start is None and self.text.name is None and self.text.config is None:
            raise ValueError(_ONE_TEXT_TOWER)
        return self
