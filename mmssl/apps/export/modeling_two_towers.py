"""A dual encoder of two towers of transformers, with a head for labels: load the folder with trust_remote_code=True."""

# Exports hold a copy of this file, so that it imports transformers and PyTorch only.
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import CLIPOutput


class TwoTowersConfig(PretrainedConfig):  # type: ignore[misc]
    """The towers' configurations, `pooling` of captions (cls, mean, eos: the last token, pooler), and, of images and of
    captions, the `widths` before the projections and their kinds: linear, mlp or none."""

    model_type = "two_towers"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        widths: tuple[int, int] = (1, 1),
        projections: tuple[str, str] = ("none", "none"),
        projection_dim: int = 1,
        pooling: str = "cls",
        **others: Any,
    ) -> None:
        self.vision_config = _read(vision_config)
        self.text_config = _read(text_config)
        self.widths = widths
        self.projections = projections
        self.projection_dim = projection_dim
        self.pooling = pooling
        super().__init__(**others)


class TwoTowersModel(PreTrainedModel):  # type: ignore[misc]
    """Images and captions as vectors of one space."""

    config_class = TwoTowersConfig
    main_input_name = "pixel_values"
    _keys_to_ignore_on_load_unexpected = (r"classifier\..*",)

    def __init__(self, config: TwoTowersConfig) -> None:
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.visual_projection, self.text_projection = (
            _projection(kind, width, config.projection_dim)
            for kind, width in zip(config.projections, config.widths, strict=True)
        )
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self._add_head(config)
        self.post_init()

    def _add_head(self, config: TwoTowersConfig) -> None:
        """None here."""

    def get_image_features(self, pixel_values: Tensor, **unused: Any) -> BaseModelOutputWithPooling:
        """`pooler_output`: vectors of images, [N, projection_dim], of any length."""
        seen = self.vision_model(pixel_values=pixel_values)
        return BaseModelOutputWithPooling(seen.last_hidden_state, self.visual_projection(seen.pooler_output))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: vectors of captions, [N, projection_dim], of any length."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        read = self.text_model(input_ids=input_ids, attention_mask=mask)
        hidden = read.last_hidden_state
        if self.config.pooling == "pooler":
            pooled = read.pooler_output
        elif self.config.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.config.pooling == "mean":
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        else:
            pooled = hidden[torch.arange(len(mask)), mask.cumsum(1).argmax(1)]
        return BaseModelOutputWithPooling(hidden, self.text_projection(pooled))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, **others: Any) -> CLIPOutput:
        """Logits of every image with every caption, and their unit vectors."""
        images = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        texts = nn.functional.normalize(self.get_text_features(input_ids, **others).pooler_output, dim=-1)
        logits = self.logit_scale.exp() * images @ texts.T
        return CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, image_embeds=images, text_embeds=texts)


class TwoTowersForImageClassification(TwoTowersModel):
    """The image tower with a linear head on its unit vectors."""

    def _add_head(self, config: TwoTowersConfig) -> None:
        self.classifier = nn.Linear(config.projection_dim, config.num_labels)

    def forward(self, pixel_values: Tensor, **unused: Any) -> ImageClassifierOutput:  # type: ignore[override]
        """Logits of the labels, [N, num_labels]."""
        images = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output, dim=-1)
        return ImageClassifierOutput(logits=self.classifier(images))


def _projection(kind: str, width: int, dim: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    last = nn.Linear(dim if kind == "mlp" else width, dim, bias=False)
    return nn.Sequential(nn.Linear(width, dim), nn.GELU(), last) if kind == "mlp" else last


def _read(config: Any) -> Any:
    """A tower's configuration; None without one, as transformers makes an empty one to compare with."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(config) if isinstance(config, dict) else config
