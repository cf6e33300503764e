"""Snapshots of what a user types (every verb's help, every configuration key), and of the numbers of a small run.

`python -m tests.golden.snapshots` writes the first two, and the pages of docs/reference/, anew after an intended
change, which also goes into CHANGELOG.md. With `--numbers` it writes the numbers of the run anew too.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from safetensors.torch import load_file

from mmssl.cli import app
from mmssl.config import Config, known_keys, load_config
from mmssl.train.trainer import train
from scripts import docs_reference

HELP = Path(__file__).parent / "help.txt"
KEYS = Path(__file__).parent / "config_keys.txt"
NUMBERS = Path(__file__).parent / "ci_tiny.json"


def help_text() -> str:
    """The help of every verb, one after another, at 100 columns."""
    return "\n".join(_helps(typer.main.get_command(app), None, "mmssl"))


def _helps(command: Any, parent: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, max_content_width=100)
    context.terminal_width = 100
    yield f"$ {context.command_path} --help\n{command.get_help(context)}\n"
    for verb, child in sorted(getattr(command, "commands", {}).items()):
        yield from _helps(child, context, verb)


def config_keys() -> str:
    """Every key that the configuration knows, one per line."""
    return "\n".join(sorted(known_keys(Config))) + "\n"


def run_numbers(run: Path) -> dict[str, Any]:
    """Losses, norms of the weights and a digest of all weights of configs/ci_tiny.yaml, trained in a folder."""
    train(load_config("configs/ci_tiny.yaml", [f"run_dir={run}", "train.precision=fp32"]))
    weights, digest = load_file(run / "model" / "model.safetensors"), hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].numpy().tobytes())
    return {
        "losses": [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()],
        "sha256": digest.hexdigest(),
        "norms": {name: float(weights[name].double().norm()) for name in sorted(weights)},
    }


if __name__ == "__main__":
    if "--numbers" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            NUMBERS.write_text(json.dumps(run_numbers(Path(folder) / "run"), indent=1) + "\n", encoding="utf-8")
    HELP.write_text(help_text(), encoding="utf-8")
    KEYS.write_text(config_keys(), encoding="utf-8")
    docs_reference.write_pages()
