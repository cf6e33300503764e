"""The towers that are trained from scratch, from the smallest to the largest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmssl.apps.autoconfig.inputs import Machine, Pairs


@dataclass(frozen=True)
class Towers:
    """A vision tower, a text tower, and the recipe that goes with them."""

    words: str
    least_pairs: int
    """From so many pairs on they are worth their cost."""
    vision: str
    text: Mapping[str, Any]
    """A Hugging Face configuration."""
    embed_dim: int
    vocab_size: int
    lr: float
    """The peak at `lr_batch` pairs a step."""
    lr_batch: int
    weight_decay: float
    most_batch: int
    """Larger batches gain little at the number of pairs these towers are for."""
    parameters: int
    """Of both towers, with the whole vocabulary."""
    image_bytes: int
    """Activations kept of an image at the largest of `sizes`, in fp32."""
    token_bytes: int
    """Activations kept of a token of a caption, in fp32."""
    sizes: tuple[int, ...]
    """Sides of the input in pixels, ascending."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the vision tower."""
    recipe: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Further settings by dotted key, each with its reason."""

    def side(self, pairs: Pairs) -> int:
        """The largest input that does not exceed the median image, or else the smallest."""
        return max([side for side in self.sizes if side <= pairs.image_side], default=self.sizes[0])

    def pair_bytes(self, side: int, tokens: int) -> int:
        """Activations kept of a pair, in fp32; half precision needs less."""
        return int(self.image_bytes * (side / self.sizes[-1]) ** 2) + self.token_bytes * tokens


def _bert(width: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        **more,
    }


_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_CHANGES = {
    "augment": 0.7,
    "crop_scale": [0.6, 1.0],
    "affine": 1.0,
    "affine_degrees": 10,
    "color_jitter": 0.8,
    "gray": 0.05,
    "blur": 0.1,
    "erase": 0.1,
}

SMALL = Towers(
    words="a small ResNet and a BERT of one layer, which learn from few pairs and train on a CPU",
    least_pairs=0,
    vision="timm:resnet10t",
    options={"channels": [32, 64, 128, 256]},
    sizes=(64, 96),
    text=_bert(192, 1, 4),
    embed_dim=256,
    vocab_size=8192,
    lr=1.5e-3,
    lr_batch=128,
    weight_decay=0.1,
    most_batch=256,
    parameters=3_600_000,
    image_bytes=4_000_000,
    token_bytes=18_000,
    recipe={
        "data.views.main": (_CHANGES, "few pairs are seen often: each time with other crops, turns and colours"),
        "train.ema": (0.998, "averaged weights are less noisy after a short training; they are what is kept"),
        "optim.clip_norm": (1.0, "a rare large gradient at this learning rate is cut"),
        "optim.final_lr": (0.01, "the schedule ends just above zero"),
    },
)
MEDIUM = Towers(
    words="a ResNet-50 and a BERT of six layers: enough pairs for them, too few for a ViT from scratch",
    least_pairs=100_000,
    vision="timm:resnet50",
    sizes=(128, 224),
    text=_bert(512, 6, 8, **_NO_DROPOUT),
    embed_dim=512,
    vocab_size=30_522,
    lr=1e-3,
    lr_batch=1024,
    weight_decay=0.1,
    most_batch=1024,
    parameters=60_000_000,
    image_bytes=87_000_000,
    token_bytes=210_000,
)
LARGE = Towers(
    words="open_clip's ViT-B-32 and a BERT of twelve layers, OpenCLIP's choice for millions of pairs",
    least_pairs=3_000_000,
    vision="open_clip:ViT-B-32",
    sizes=(224,),
    text=_bert(512, 12, 8, **_NO_DROPOUT),
    embed_dim=512,
    vocab_size=30_522,
    lr=5e-4,
    lr_batch=4096,
    weight_decay=0.2,
    most_batch=4096,
    parameters=142_000_000,
    image_bytes=32_000_000,
    token_bytes=420_000,
)
TOWERS = (SMALL, MEDIUM, LARGE)


def towers_for(pairs: Pairs, machine: Machine) -> Towers:
    """The largest that the pairs can teach; on a CPU the small ones, whatever the pairs."""
    if not machine.on_gpu:
        return SMALL
    return max((towers for towers in TOWERS if towers.least_pairs <= pairs.count), key=lambda t: t.least_pairs)
