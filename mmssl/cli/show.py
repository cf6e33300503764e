"""`mmssl show`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import Overrides, verb

if TYPE_CHECKING:
    from torch import nn

    from mmssl.config import Config, ObjectiveConfig
    from mmssl.objectives import TrainingTask

_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 40


@verb(150)
def show(
    config: Annotated[str, typer.Argument(help="YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved configuration, parameter counts, length and learning-rate curve; needs no data and no GPU."""
    from mmssl.config import load_config

    print(describe(load_config(config, overrides or [])))


def describe(config: "Config") -> str:
    """The resolved configuration, parameter counts, length, learning-rate curve and encoder passes per step.

    Raises:
        UserError: a tower cannot be built as configured.
    """
    import torch
    from torch import nn

    from mmssl.build import complete_config
    from mmssl.config import dump_config
    from mmssl.precision import choose_precision
    from mmssl.train import untrained_task

    config, objectives = complete_config(config)
    task = untrained_task(config, objectives)
    lines = [dump_config(config).rstrip(), "", "parameters"]
    encoder = task.encoder
    parts: list[tuple[str, nn.Module]] = [
        (f"vision tower ({config.model.vision.name}, {encoder.vision.image_size} px)", encoder.vision),
        ("text tower", encoder.text),
        ("projections", nn.ModuleList([encoder.image_projection, encoder.text_projection])),
        *((f"objective {name}", task.objective(name)) for name in task.names),
    ]
    lines += [f"  {name}: {_count(module)}" for name, module in parts]
    lines += [f"  total: {_count(task)}"]
    if config.train.precision == "auto":
        choice = choose_precision("cuda" if torch.cuda.is_available() else "cpu")
        lines += ["precision", f"  {choice.precision} on this machine: {choice.reason}"]
    lines += [
        "length",
        f"  {_length(config)}",
        "batches",
        f"  {_batches(config)}",
        "learning rate",
        f"  {_curve(config)}",
        "encoder passes per step",
    ]
    lines += _passes(task)
    lines.append(f"  predicted cost per step: {_cost(config, objectives, task)}")
    return "\n".join(lines)


def _passes(task: "TrainingTask") -> list[str]:
    """One line per pass of an encoder, with the objectives that use it."""
    from mmssl.objectives import mixing

    lines = []
    for forward in mixing.encoder_passes(task.objective(name) for name in task.names):
        users = [n for n in task.names if forward in task.objective(n).required_passes()]
        masked = f" seeing {forward.mask} only" if forward.tower == "vision" and forward.mask else ""
        lines.append(f"  {forward.tower} tower on {forward.input}{masked}: for {', '.join(users)}")
    return lines


def _cost(config: "Config", objectives: "Mapping[str, ObjectiveConfig]", task: "TrainingTask") -> str:
    """The cost of an average step, relative to contrastive alone on the same towers."""
    from mmssl.build import build_objectives, placeholder_vocabulary
    from mmssl.distributed import World
    from mmssl.objectives import TrainingTask, find_objective
    from mmssl.train import StepCosts, predicted_cost

    text = config.model.text
    vocabulary = placeholder_vocabulary(text.vocab_size, text.max_tokens)
    plain = build_objectives({"contrastive": find_objective("contrastive").Options()}, task.encoder, vocabulary)
    alone = predicted_cost(TrainingTask(task.encoder, plain, World()), plain)
    cost = StepCosts(task).mean(objectives)
    return f"{cost / alone:.2f} x contrastive alone ({cost / 1e9:.3g} GFLOP per pair)"


def _count(module: "nn.Module") -> str:
    total = sum(p.numel() for p in module.parameters())
    free = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return f"{total:,}" + ("" if free == total else f", {free:,} of them trained")


def _length(config: "Config") -> str:
    train, batch = config.train, config.data.batch_size
    if train.minutes is not None:
        return f"{train.minutes:g} minutes of training steps, {batch} pairs per step"
    if train.epochs is not None:
        return f"{train.epochs:g} epochs of {batch} pairs per step (the number of steps depends on the data)"
    steps = train.steps if train.steps is not None else -(-(train.samples or 0) // batch)
    return f"{steps:,} steps of {batch} pairs, {steps * batch:,} pairs in total"


def _batches(config: "Config") -> str:
    batching = config.data.batching
    if batching.neighbours is not None:
        groups = config.data.batch_size // batching.group
        return f"{groups:,} groups of {batching.group} neighbours, by the embeddings in {batching.neighbours}"
    if batching.distinct is not None:
        return f"samples with the same {batching.distinct} in different batches, as far as possible"
    return "samples by chance"


def _curve(config: "Config") -> str:
    """The learning-rate schedule as a line of bars, with its peak."""
    from mmssl.train import lr_factor

    steps = None if config.train.minutes is not None else 1000
    optim = config.optim
    if optim.warmup >= 1 and config.train.steps is not None:
        steps = config.train.steps
    at = [i / (_POINTS - 1) for i in range(_POINTS)]
    factors = [lr_factor(optim, p, int(p * (steps or 0)), steps) for p in at]
    bars = "".join(_BARS[round(f * (len(_BARS) - 1))] for f in factors)
    towers = {"vision": optim.vision_lr, "text": optim.text_lr}
    own = "".join(f", {name} {lr:g}" for name, lr in towers.items() if lr is not None)
    return f"{bars} peak {optim.lr:g}{own}, {optim.schedule}, warm-up {optim.warmup:g}"
