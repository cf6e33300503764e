"""README.md of an exported folder."""

from importlib.metadata import version
from pathlib import Path

from mmssl.inference import Model


def write_card(model: Model, kind: str, lines: str, folder: Path) -> None:
    """Say what the folder is, how it is loaded, how images are prepared, and what is known of its licence."""
    vision = model.self_contained().vision
    mean, std = model.vision.statistics
    fit = "shorter side resized and the centre cut out" if vision.fit == "shortest" else "both sides resized"
    text = f"""# An image-text encoder ({kind})

```python
{lines}
```

Images: {vision.image_size} x {vision.image_size} pixels, {vision.interpolation}, {fit}, values from 0 to 1,
mean {_numbers(mean)}, deviation {_numbers(std)}. Captions: at most {model.tokenizer.max_tokens} tokens.
Features are compared by cosine similarity; times {model.logit_scale:.4g} they are logits.

Vision tower: {vision.name}. Text tower: {model.text.encoder.config.model_type}. {model.config.embed_dim} dimensions.
Weights: {"; ".join(model.notes) or "trained with mmssl"}.

Licence: mmssl {version("mmssl")}, which wrote these files, is under Apache-2.0. The weights are under the terms of
whoever trained them and of the weights they were trained from: say here which.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
