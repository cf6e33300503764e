"""`mmssl towers check`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import group, progress_bar, stdout
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.models import tower_check

towers_app = group(210, "towers", "Towers: what a vision or text encoder can do here.")
YAML = (".yaml", ".yml")
POOLINGS = ("auto", "cls", "mean", "eos", "pooler")


@towers_app.command("check")
def check(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="timm:MODEL or open_clip:MODEL; a text model's folder or hub name (USER/MODEL); a model type of "
            "transformers, such as roberta; or a configuration file, for its two towers.",
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Side of the images in pixels. Default: the model's own.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="Pooling of text towers: auto, cls, mean, eos or pooler.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON instead of a table.")] = False,
) -> None:
    """Build towers and try what they can do with two inputs, before a training does.

    A tower must give different inputs different vectors, and an input the same vector in every batch. Names alone get
    random weights; folders and hub names of text models are read with theirs. The exit code is 1 if a tower is refused.

    Example: mmssl towers check timm:vit_small_patch16_dinov3 open_clip:ViT-B-16-SigLIP roberta configs/small.yaml
    """
    if pooling not in POOLINGS:
        raise UserError(f"--pooling {pooling} is unknown; choose one of {', '.join(POOLINGS)}")
    reports = []
    with progress_bar("towers", len(names)) as bar:
        for name in names:
            bar.describe(name)
            reports += _reports(name, image_size, pooling)
            bar.advance()
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        _print_table(reports)
    if any(report.problem for report in reports):
        raise typer.Exit(1)


def _reports(name: str, image_size: int | None, pooling: str) -> "list[tower_check.TowerReport]":
    """The report on a tower, or the two on those of a configuration."""
    from mmssl.config import TextConfig, VisionConfig, load_config
    from mmssl.models import tower_check

    if name.endswith(YAML):
        model = load_config(Path(name), []).model
        vision = tower_check.examine_vision(f"{name}: {model.vision.name}", model.vision, model.embed_dim)
        if model.needs_towers:
            raise UserError(f"{name} takes its towers from model.start={model.start}; there is nothing to build")
        kind = model.text.name or (model.text.config or {}).get("model_type")
        return [vision, tower_check.examine_text(f"{name}: {kind}", model.text)]
    if name.startswith(("timm:", "open_clip:")):
        return [tower_check.examine_vision(name, VisionConfig(name=name, image_size=image_size))]
    chosen = {"pooling": pooling}
    if "/" in name or Path(name).exists():
        text = TextConfig.model_validate({"name": name, **chosen})
    else:
        text = TextConfig.model_validate({"config": {"model_type": name}, "tokenizer": "train", **chosen})
    return [tower_check.examine_text(name, text)]


def _print_table(reports: "list[tower_check.TowerReport]") -> None:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(Column("tower", overflow="fold"), "state", Column("found", overflow="fold"))
    for report in reports:
        if report.problem is not None:
            table.add_row(report.name, Text("refused", style="red"), Text(report.problem))
        else:
            table.add_row(report.name, Text("ok", style="green"), Text("; ".join(_findings(report))))
    stdout().print(table)


def _findings(report: "tower_check.TowerReport") -> list[str]:
    """The abilities of a tower in words."""
    abilities = {
        "subsets of patches": report.subsets,
        "activation checkpointing": report.checkpointing,
        "unlocking by layers": report.unlocking,
    }
    can = [name for name, able in abilities.items() if able]
    lacks = [name for name, able in abilities.items() if not able]
    return [
        f"{report.weights / 1e6:.1f} million weights",
        f"width {report.width}",
        f"tokens: {report.tokens}",
        *([f"can: {', '.join(can)}"] if can else []),
        *([f"cannot: {', '.join(lacks)}"] if lacks else []),
        *report.remarks,
    ]
