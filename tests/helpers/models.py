"""Tiny towers that train in seconds."""

from mmssl.config import ModelConfig, TextConfig, VisionConfig

TINY_TEXT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 77,
}


def tiny_model_config(dropout: float = 0.0, drop_path: float = 0.0) -> ModelConfig:
    """A two-layer ViT on 16 px and a two-layer BERT."""
    text = {**TINY_TEXT, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    options = {
        "patch_size": 4,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "drop_path_rate": drop_path,
        "proj_drop_rate": dropout,
    }
    return ModelConfig(
        vision=VisionConfig(name="timm:vit_tiny_patch16_224", image_size=16, options=options),
        text=TextConfig(config=text, tokenizer="train", pooling="mean"),
        embed_dim=24,
    )
