"""Train a small dual encoder with mmssl's parts and a plain PyTorch loop, without the Trainer.

Run it in the repository: python -m scripts.examples.minimal_train [STEPS]
"""

import sys

import torch

from mmssl.build import train_tokenizer_on
from mmssl.config import ModelConfig, TextConfig, ViewConfig, VisionConfig
from mmssl.data import LoaderConfig, TrainLoader, resolve_sources
from mmssl.data.transforms import Renderer, views
from mmssl.losses import info_nce
from mmssl.models import build_dual_encoder

CAPTIONS = ["{txt}"]
BERT = {"model_type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def main(steps: int = 100, shards: str = "shards/train/*.tar", batch_size: int = 64) -> list[float]:
    """Train for some steps; returns the loss of each."""
    torch.manual_seed(0)
    sources = resolve_sources(shards)
    tokenizer = train_tokenizer_on(sources[0].shards, CAPTIONS, vocab_size=1024, max_tokens=32)

    options = {"patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}
    config = ModelConfig(
        vision=VisionConfig(name="timm:vit_tiny_patch16_224", image_size=32, options=options),
        text=TextConfig(config={**BERT, "intermediate_size": 128}, tokenizer="train", pooling="mean"),
        embed_dim=64,
    )
    encoder = build_dual_encoder(config, tokenizer.vocab_size, tokenizer.pad_id)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.2)

    view = views.View(ViewConfig(), encoder.vision.image_size)
    renderer = Renderer({"main": view}, CAPTIONS, seed=0)
    loader = TrainLoader(sources, LoaderConfig(seed=0, batch_size=batch_size), renderer, tokenizer.encode)

    losses = []
    with loader:
        for step, batch in zip(range(steps), loader, strict=False):
            images = encoder.encode_image(batch.views["main"])
            texts = encoder.encode_text(batch.tokens, batch.token_mask)
            loss = info_nce(images, texts, encoder.logit_scale)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            encoder.clamp_temperature()
            losses.append(loss.item())
            print(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
