"""open_clip's side of the step's measurement: its model around the same towers, its loss, its trainer's optimizer."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CustomTextCLIP
from safetensors.torch import load_file
from torch import Tensor

from mmssl.config import Config
from mmssl.data.transforms import load_tokenizer
from mmssl.errors import UserError
from mmssl.types import Batch

OPEN_CLIP = "open_clip"
"""Names this side."""
WEIGHTS, TEXT_CONFIG, TOKENIZER = "weights.safetensors", "text", "tokenizer"
"""Files in one folder from which both sides are built."""
_POOLERS = {"cls": "cls_last_hidden_state_pooler", "auto": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}


class OpenClip:
    """A training step of open_clip: captions padded to the full context, plain AdamW, autocast for bf16."""

    flops = 0.0

    def __init__(self, config: Config, folder: Path) -> None:
        text, vision = config.model.text, config.model.vision
        if text.pooling not in _POOLERS:
            raise UserError(f"model.text.pooling={text.pooling!r}: open_clip pools by cls or mean; or use --no-peer")
        words = load_tokenizer(str(folder / TOKENIZER), text.max_tokens)
        known = open_clip.get_model_config(vision.name.partition(":")[2])
        vision_cfg = {**known["vision_cfg"], **vision.options}
        if vision.image_size is not None:
            vision_cfg["image_size"] = vision.image_size
        text_cfg = {
            "hf_model_name": str(folder / TEXT_CONFIG),
            "hf_model_pretrained": False,
            "hf_proj_type": "linear",
            "hf_pooler_type": _POOLERS[text.pooling],
        }
        quick_gelu = known.get("quick_gelu", False)
        self.model = CustomTextCLIP(config.model.embed_dim, vision_cfg, text_cfg, quick_gelu=quick_gelu)
        _load(self.model, folder / WEIGHTS)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device).train()
        statistics = (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in statistics)
        self.length, self.pad_id, self.bf16 = text.max_tokens, words.pad_id, config.train.precision == "bf16"
        self.clip_norm = config.optim.clip_norm
        self.loss = ClipLoss(cache_labels=True)
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
        kept = {id(p) for p in plain}
        groups = [
            {"params": plain, "weight_decay": 0.0},
            {"params": [p for _, p in named if id(p) not in kept], "weight_decay": config.optim.weight_decay},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images normalised, captions padded, as its data workers do."""
        images = (batch.views["main"].float() / 255 - self.mean) / self.std
        tokens = batch.tokens.new_full((len(batch), self.length), self.pad_id)
        tokens[:, : batch.tokens.shape[1]] = batch.tokens.masked_fill(~batch.token_mask, self.pad_id)
        return (images.pin_memory(), tokens.pin_memory()) if self.device.type == "cuda" else (images, tokens)

    def step(self, number: int, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """One update; returns the loss."""
        images, texts = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
        self.optimizer.zero_grad()
        with self._autocast():
            image_features, text_features, scale = self.model(images, texts)
            loss: Tensor = self.loss(image_features, text_features, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, norm_type=2.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def _load(model: CustomTextCLIP, weights: Path) -> None:
    """Our dual encoder's weights under open_clip's names."""
    ours = load_file(weights)
    state: dict[str, Tensor] = {"logit_scale": ours.pop("log_logit_scale").reshape(())}
    state["visual.proj"] = ours.pop("image_projection.weight").T
    state["text.proj.weight"] = ours.pop("text_projection.weight")
    for name, tensor in ours.items():
        trunk, encoder = name.removeprefix("vision.trunk."), name.removeprefix("text.encoder.")
        state[f"visual.{trunk}" if trunk != name else f"text.transformer.{encoder}"] = tensor
    known = model.state_dict()
    # The pooler that open_clip lets Hugging Face build is not used by either side.
    unused = {name for name in known if name.startswith("text.transformer.pooler.")}
    missing, extra = known.keys() - state.keys() - unused, state.keys() - known.keys()
    if missing or extra:
        raise UserError(
            f"open_clip's model differs from ours: it lacks {sorted(extra)[:2]} and adds {sorted(missing)[:2]}; "
            f"use a plain ViT and a linear projection, or --no-peer"
        )
    model.load_state_dict({**{name: known[name] for name in unused}, **state})
