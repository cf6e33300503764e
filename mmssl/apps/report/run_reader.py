"""Reading of run folders, finished or not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmssl.config import Config, load_config
from mmssl.errors import UserError
from mmssl.evaluate import Metrics
from mmssl.files import read_csv, read_json_lines

Row = dict[str, Any]
Name = tuple[str, str]
"""Shard and key of a sample."""


@dataclass(frozen=True)
class RunRecord:
    """One run as stored on disk. Everything except the folder may be missing."""

    name: str
    """Unique among the runs of the report."""
    folder: Path
    config: Config | None
    config_text: str
    metrics: list[Row]
    """One record per step."""
    evaluations: list[Row]
    """One record per evaluation during training."""
    best: Row | None
    """The best step beside the last one; None without evaluations."""
    results: dict[str, Metrics]
    """`DATASET/TASK` -> metrics of the last evaluation, and of later ones in folders of their own."""
    tables: dict[str, Path]
    """`DATASET/TASK` -> the folder of its tables."""
    starts: list[Row]
    """Entries of environment.json, one per start of the run."""
    health: Row | None
    """Output of `mmssl shards check --json RUN/data_health.json`."""
    bad_samples: list[Row]
    sanity: Row | None
    """Output of `python -m scripts.bench explain ... --out RUN/explain`."""
    notes: list[str]
    """Files that could not be read."""

    @property
    def model(self) -> Path | None:
        """The folder of the model; None before the run has finished."""
        folder = self.folder / "model"
        return folder if (folder / "config.json").is_file() else None

    @property
    def last(self) -> Row:
        """The last step's record; empty before the first."""
        return self.metrics[-1] if self.metrics else {}

    @property
    def state(self) -> str:
        """State of the run in words."""
        if self.model is not None:
            return "finished"
        return "stopped early, or still running" if self.metrics else "not started"


def collect(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs.

    Raises:
        UserError: a folder is not a run.
    """
    return [_collect(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _collect(folder: Path, name: str) -> RunRecord:
    if not any((folder / file).is_file() for file in ("config.yaml", "metrics.jsonl", "results.json")):
        raise UserError(f"{folder} is not a run: it has neither config.yaml nor metrics.jsonl nor results.json")
    notes: list[str] = []
    results, tables = _results(folder, notes)
    environment = _json(folder / "environment.json", notes)
    return RunRecord(
        name=name,
        folder=folder,
        config=_config(folder / "config.yaml", notes),
        config_text=_text(folder / "config.yaml"),
        metrics=[row for row in _lines(folder / "metrics.jsonl", notes) if isinstance(row.get("step"), int)],
        evaluations=_lines(folder / "evaluations.jsonl", notes),
        best=_json(folder / "best.json", notes),
        results=results,
        tables=tables,
        starts=environment.get("starts", []) if environment is not None else [],
        health=_json(folder / "data_health.json", notes),
        bad_samples=_lines(folder / "bad_samples.jsonl", notes),
        sanity=_json(folder / "explain" / "sanity.json", notes),
        notes=notes,
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, or their paths if two names are equal."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) == len(names):
        return names
    return [str(folder) for folder in folders]


def _results(folder: Path, notes: list[str]) -> tuple[dict[str, Metrics], dict[str, Path]]:
    """Results of the run, then of evaluations in its subfolders. A repeated name is prefixed with its folder."""
    results: dict[str, Metrics] = {}
    tables: dict[str, Path] = {}
    for path in (folder / "results.json", *sorted(folder.glob("*/results.json"))):
        for key, metrics in (_json(path, notes) or {}).items():
            if not isinstance(metrics, dict):
                continue
            name = key if key not in results else f"{path.parent.name}/{key}"
            results[name] = metrics
            tables[name] = path.parent / key
    return results, tables


def _config(path: Path, notes: list[str]) -> Config | None:
    if not path.is_file():
        return None
    try:
        return load_config(path, [])
    except UserError as error:
        notes.append(f"{path} is not a configuration of this version: {error}")
        return None


def _json(path: Path, notes: list[str]) -> Row | None:
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path} cannot be read: {error}")
        return None
    return tree if isinstance(tree, dict) else None


def _lines(path: Path, notes: list[str]) -> list[Row]:
    """The records of a JSON Lines file; an incomplete last line is ignored."""
    if not path.is_file():
        return []
    found = read_json_lines(path)
    if found.damaged:
        notes.append(f"{path}: {len(found.damaged)} lines cannot be read and are left out")
    return found.rows


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; empty if the file does not exist."""
    return read_csv(path) if path.is_file() else []


def first_captions(ranks: Sequence[Mapping[str, str]]) -> dict[Name, str]:
    """The first caption of each image of ranks.csv."""
    captions: dict[Name, str] = {}
    for row in ranks:
        if row["retrieval"] == "image":
            captions.setdefault((row["shard"], row["key"]), row["caption"])
    return captions
