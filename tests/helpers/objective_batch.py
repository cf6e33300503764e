"""A tiny problem that every objective can learn, and mixes of objectives on tiny towers."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from mmssl.data.transforms.captions import IMAGE_ORDER
from mmssl.distributed import World
from mmssl.models import build_dual_encoder
from mmssl.objectives import find_objective
from mmssl.objectives._base import Resized, Vocabulary
from mmssl.objectives._mixing import TrainingTask, caption_count, further_views
from mmssl.types import Batch
from tests.helpers.models import tiny_model_config

ALONE = World()
ROWS = 12
WORDS = 100
SIDE = 24
RESNET = {"name": "timm:resnet10t", "options": {"channels": [16, 16, 32, 32]}}
TEACHER = str(Path(__file__).parents[1] / "golden" / "model")
"""A model with its own image size, dimensions and tokenizer."""
OPTIONS: dict[str, dict[str, Any]] = {
    "jigsaw": {"permutations": 4},
    "moco": {"queue": 2 * ROWS, "image_text": True, "momentum": 0.9},
    "simclr": {"text": True, "head_width": 32},
    "mae": {"decoder_width": 32, "decoder_depth": 1},
    "mlm": {"see_image": True},
    "redundancy": {"head_width": 64, "head_dim": 32},
    "byol": {"head_width": 64, "head_dim": 32, "momentum": 0.9},
    "replaced_tokens": {"ratio": 0.3},
    "maskfeat": {"decoder_width": 32, "decoder_depth": 1, "momentum": 0.9},
    "distill": {"teacher": TEACHER, "interaction": 1.0, "relations": 1.0},
}
"""Sizes that fit tiny towers; what is optional is switched on."""


class Plain:
    """What the step asks of Accelerate, without its process-wide state."""

    def no_sync(self, model: DistributedDataParallel) -> AbstractContextManager[None]:
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield


def vocabulary() -> Vocabulary:
    """Ids 0 to 4 are special, 4 is the mask; every fourth of the others continues a word."""
    continues = torch.arange(WORDS) % 4 == 0
    continues[:5] = False
    return Vocabulary(WORDS, 4, (0, 1, 2, 3, 4), continues, 16)


def tiny_task(
    names: list[str],
    changes: Mapping[str, Any] | None = None,
    world: World = ALONE,
    dropout: float = 0.0,
    text: dict[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainingTask:
    """Tiny towers with some objectives; the same weights every time. `changes` are those of the vision tower, `text`
    is another text tower's configuration; `dropout` is that of tokens and of blocks; `options` are those of every
    objective, in place of OPTIONS."""
    torch.manual_seed(0)
    config = tiny_model_config(dropout, dropout)
    if text is not None:
        config = config.model_copy(update={"text": config.text.model_copy(update={"config": text})})
    vision = config.vision.model_copy(update={"image_size": SIDE, **(changes or {})})
    encoder = build_dual_encoder(config.model_copy(update={"vision": vision}), WORDS, 0)
    kinds = {name: find_objective(name) for name in names}
    chosen = {name: OPTIONS.get(name, {}) if options is None else options for name in names}
    objectives = {
        name: kind(kind.Options.model_validate(chosen[name]), encoder, vocabulary()) for name, kind in kinds.items()
    }
    task = TrainingTask(encoder, objectives, world).train()
    task.on_data(lambda: ROWS)
    return task


def batch(task: TrainingTask, seed: int = 0) -> Batch:
    """A pattern in colours that belong to the caption; further views are noisy ones of the same image."""
    g = torch.Generator().manual_seed(seed)
    colours = torch.rand(ROWS, 3, 1, 1, generator=g)
    pattern = torch.rand(1, 1, SIDE // 4, SIDE // 4, generator=g)
    images = colours * torch.nn.functional.interpolate(pattern, size=(SIDE, SIDE))
    objectives = [task.objective(name) for name in task.names]
    asked = task.required_views()
    noise = {name: 8 * torch.randn(images.shape, generator=g) for name in ("main", *asked, *further_views(objectives))}
    views = {name: (255 * images + noise[name]).clamp(0, 255).to(torch.uint8) for name in noise}
    for name, view in asked.items():
        if isinstance(view, Resized):
            resized = torch.nn.functional.interpolate(views["main"].float(), size=2 * [view.image_size])
            views[name] = resized.to(torch.uint8)
    # A caption is one word again and again, so that its masked tokens can be told from the others.
    words = torch.randperm(WORDS - 5, generator=g)[:ROWS, None] + 5
    mask = torch.arange(8) < torch.randint(6, 9, (ROWS, 1), generator=g)
    tokens = words.expand(-1, 8).clone()
    tokens[:, 0] = 1
    fields = [field for objective in objectives for field in objective.groups()]
    groups = {field: torch.randint(4, (ROWS,), generator=g) for field in fields}
    if IMAGE_ORDER in groups:
        _show_frames(views, groups, g)
    more: dict[str, torch.Tensor] = {}
    for i in range(1, caption_count(objectives)):
        more |= {f"tokens.{i}": tokens.roll(i, 0)[:, :6] * mask[:, :6], f"token_mask.{i}": mask[:, :6]}
    keys = [f"shard.tar:k{i}" for i in range(ROWS)]
    makers = (task.objective(name).sample_inputs() for name in task.names)
    captions = [f"a red square, number {seed * ROWS + row}" for row in range(ROWS)]
    extras = {k: v for maker in makers if maker is not None for k, v in maker(captions, keys).items()}
    return Batch(views, tokens * mask, mask, torch.arange(ROWS), keys, groups=groups, more_tokens=more, extras=extras)


def _show_frames(views: dict[str, torch.Tensor], groups: dict[str, torch.Tensor], g: torch.Generator) -> None:
    """Three images of each sample in random order, the later the brighter; two of the samples have one image."""
    order = torch.rand(ROWS, 3, generator=g).argsort(1)
    for place, name in enumerate(("main", "main.1", "main.2")):
        light = (1 + order[:, place]).view(-1, 1, 1, 1) / 3
        views[name] = (views[name] * light).to(torch.uint8)
    groups[IMAGE_ORDER] = ((1 + order) << 4 * torch.arange(3)).sum(1)
    groups[IMAGE_ORDER][[1, 7]] = 1


def part(whole: Batch, world: World) -> Batch:
    """This process's rows."""
    rows = len(whole) // world.size
    return whole.slice(world.rank * rows, (world.rank + 1) * rows)
