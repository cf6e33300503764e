"""One training on data in any form: packing, choice of settings, training, and a search index."""

import copy
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from mmssl import errors, system
from mmssl.apps.autoconfig.choices import Choice, choose, touched
from mmssl.apps.autoconfig.inputs import Machine, Pairs, Start, probe_pairs, this_machine
from mmssl.apps.autoconfig.preparation import HELD_OUT, TRAIN, Prepared, Source, patterns_of, prepare
from mmssl.apps.report import write_card
from mmssl.apps.search import embed_shards
from mmssl.build import build_limits, objective_options
from mmssl.config import Config, HoldOutConfig, load_config, parse_config, set_key
from mmssl.data import expand
from mmssl.data.shards import SampleLimits
from mmssl.errors import UserError
from mmssl.inference import Model, load, stored
from mmssl.train import PACKED, Finished, is_available, resume_command, train

INDEX = "index"
"""Folder of a run for the embeddings of its packed pairs."""
EVALUATIONS, PATIENCE = 12, 4
"""Evaluations of a run on its held-out pairs, and those in a row without an improvement that end it: a third, as a
metric often rests until the learning rate falls."""
_TRIAL = Pairs(1_000, 16, 224)
"""Placeholder for unknown pairs, to check the settings before anything is packed."""

Tree = Mapping[str, Any]


def train_on(
    data: Source | None,
    run_dir: Path | None = None,
    *,
    start: Start | None = None,
    tree: Tree | None = None,
    pinned: Mapping[str, Any] | None = None,
    table: Mapping[str, str] | None = None,
) -> Finished:
    """Train on a folder of images with captions, a table or shards, with settings that suit them.

    Args:
        data: None: that of the configuration, as it is.
        run_dir: folder of the run. Default: runs/NAME, by the name of the data.
        start: a model to start from.
        tree: a configuration, in which the data and pinned settings are replaced. None: settings are chosen, and
            the model is that of the best of several evaluations on held-out pairs. With a configuration, pairs are held
            out if `data.hold_out` is pinned, and evaluated at the end.
        pinned: dotted key -> value given by the user.
        table: how to read a table: image_column, caption_column, separator, encoding. Others are recognised.

    Raises:
        UserError: the data are unusable, a setting is wrong, or the folder contains another run.
    """
    given, machine = dict(pinned or {}), this_machine()
    if start is None and tree is None and given.get("model.start") is not None:
        start = start_from(str(given["model.start"]))
    own: Any = ((tree or {}).get("data") or {}).get("train") if data is None else None
    used = data or own
    if not used:
        raise UserError("no data given; name a folder of images, a table or shards")
    if data is not None and "data.train" in given:
        raise UserError(f"data.train={given['data.train']!r} and the data {data!r} are both given; remove one of them")
    named = given.pop("run_dir", None) or (tree or {}).get("run_dir")
    run = _folder(run_dir or (Path(named) if named is not None else None), used)
    trial = tree if tree is not None else _tree(choose(_TRIAL, machine, start, given))
    if data is None:
        finished = train(_config(trial, used, run, given))
        after_training(finished)
        return finished
    tried = _config(trial, "unknown", run, given)
    objective_options(tried)
    console, limits = errors.console(quiet=not _is_first()), build_limits(tried.data)
    apart = tree is None or any(key.startswith("data.hold_out") for key in given)
    prepared = _prepared(data, run, tried.data.hold_out if apart else HoldOutConfig(share=0), limits, console, table)
    if apart:
        given = {key: value for key, value in given.items() if not key.startswith("data.hold_out")}
    if tree is None:
        templates = list(given.get("data.captions", ["{txt}"]))
        pairs = probe_pairs(expand(patterns_of(prepared.train)), prepared.pairs, templates, limits)
        choices = choose(pairs, machine, start, given)
        choices += [*_evaluation(prepared, given), *selection(prepared, choices, given)]
        console.print(_settings_table(choices, given))
        _report_unused_gpus(machine, console)
        tree = _tree(choices)
    elif apart:
        tree = _with_held_out(tree, prepared, given)
        console.print(prepared.why, soft_wrap=True, markup=False)
    finished = train(_config(tree, prepared.train, run, given))
    after_training(finished)
    return finished


def start_from(source: str, model: Model | None = None) -> Start:
    """Describe a model to start from.

    Args:
        model: the model, if it is already loaded.

    Raises:
        UserError: the model is missing.
    """
    model = load(source) if model is None else model
    library, _, name = source.partition(":")
    parameters = sum(p.numel() for p in model.encoder.parameters())
    return Start(source, trained=library != "open_clip" or "/" in name, parameters=parameters)


def after_training(finished: Finished) -> None:
    """Complete a finished run: its model card, and the index of the pairs packed for it."""
    if finished.signal is None and _is_first():
        write_card(finished.run_dir)
    index_packed(finished)


def index_packed(finished: Finished) -> None:
    """Embed the packed pairs of a finished run into RUN/index, for search and serve."""
    run = finished.run_dir
    packed = any((run / PACKED).glob(f"{TRAIN}-*.tar"))  # of shards, only the held-out pairs are copied there
    if finished.signal is None and packed and _is_first() and find_spec("pyarrow") is not None:
        shards = expand(str(run / PACKED))
        model = load(run).to("cuda" if torch.cuda.is_available() else "cpu")
        known = stored.read_record(run / INDEX)
        names = {str(Path(shard).resolve()) for shard in shards}
        if known is not None and set(known.shards) == names and known.model != model.image_fingerprint():
            shutil.rmtree(run / INDEX)  # made with the weights before the run was resumed
        with errors.console(stderr=True).status("embedding") as status:
            embed_shards(
                model, shards, run / INDEX, progress=lambda _, done: status.update(f"embedding: {done:,} images")
            )


def next_commands(run: Path) -> list[str]:
    """Useful commands after a training."""
    folder = shlex.quote(str(run))
    commands = [f"mmssl predict {folder} IMAGE --labels 'one thing,another'"]
    if any(find_spec(package) is None for package in ("pyarrow", "fastapi")):
        commands.append("pip install 'mmssl[search,serve]'")
    index = shlex.quote(str(run / INDEX))
    if not (run / INDEX).is_dir():
        trained_on = load_config(run / "config.yaml").data.train
        pattern = trained_on if isinstance(trained_on, str) else "SHARDS"
        commands.append(f"mmssl embed {folder} {shlex.quote(pattern)} --out {index}")
    return [*commands, f"mmssl search {folder} {index} 'some words'", f"mmssl serve {folder} {index}"]


def _folder(given: Path | None, data: Source) -> Path:
    """Folder of the run. Default: the first of runs/NAME, runs/NAME-2, ... that is available."""
    if given is not None:
        if not is_available(given):
            raise UserError(f"the run {given} exists; pick another folder, or continue it: {resume_command(given)}")
        return given
    path = Path(patterns_of(data)[0])
    name = path.stem if not path.is_dir() else path.resolve().name
    if "*" in name or "{" in name:
        name = path.parent.name
    found, number = Path("runs") / (name or "pairs"), 1
    while not is_available(found):
        number += 1
        found = found.with_name(f"{name or 'pairs'}-{number}")
    return found


def _prepared(
    data: Source,
    run: Path,
    rule: HoldOutConfig,
    limits: SampleLimits,
    console: Console,
    table: Mapping[str, str] | None,
) -> Prepared:
    with console.status("packing") as status:
        found = prepare(
            data,
            run / PACKED,
            rule,
            lambda done, total: status.update(f"packing: {done:,} of {total:,} pairs"),
            table=table,
            limits=limits,
        )
    if found.recognised:
        console.print(found.recognised, soft_wrap=True, markup=False)
    if found.packed:
        total = found.pairs + found.held_out_pairs
        console.print(f"{run / PACKED}: {total:,} pairs packed", soft_wrap=True, markup=False)
    for note in found.notes:
        console.print(note, soft_wrap=True, markup=False)
    console.print(found.account.text(), soft_wrap=True, markup=False)
    return found


def _evaluation(prepared: Prepared, pinned: Tree) -> list[Choice]:
    """The held-out pairs, and the evaluation suite of them."""
    chosen = prepared.rule.model_dump(exclude_defaults=True)
    choices = [Choice("data.hold_out", chosen, prepared.why)] if chosen else []
    if any(key.startswith("evaluate.suites") for key in pinned):
        return choices
    suites = {HELD_OUT: {"data": prepared.held_out, "task": ["retrieval"]}} if prepared.held_out else {}
    return [*choices, Choice("evaluate.suites", suites, prepared.why)]


def selection(prepared: Prepared, choices: Sequence[Choice], pinned: Tree) -> list[Choice]:
    """Evaluations on the way, the best of which gives the model: with few pairs a long training overfits."""
    chosen = {choice.key: choice.value for choice in choices}
    given = any(touched(section, pinned) for section in ("evaluate", "train.early_stopping"))
    if given or not prepared.held_out or "train.epochs" not in chosen:
        return []
    batch: int = {**pinned, **chosen}["data.batch_size"]
    every = max(1, chosen["train.epochs"] * prepared.pairs // batch // EVALUATIONS)
    why = f"{PATIENCE} evaluations in a row without an improvement end the run; the model is that of the best step"
    return [
        Choice("evaluate.every", every, f"{EVALUATIONS} evaluations on the held-out pairs"),
        Choice("train.early_stopping", {"patience": PATIENCE}, why),
    ]


def _with_held_out(tree: Tree, prepared: Prepared, pinned: Tree) -> Tree:
    """A configuration that does not train on the held-out pairs, and evaluates on them beside its own suites."""
    found = copy.deepcopy(dict(tree))
    set_key(found, "data.hold_out", prepared.rule.model_dump(exclude_defaults=True))
    if prepared.held_out and not any(key.startswith("evaluate.suites") for key in pinned):
        set_key(found, f"evaluate.suites.{HELD_OUT}", {"data": prepared.held_out, "task": ["retrieval"]})
    return found


def _settings_table(choices: Sequence[Choice], pinned: Mapping[str, Any]) -> Table:
    """Table of chosen settings with their reasons, and of given ones."""
    table = Table(Column("setting", no_wrap=True), Column("value", overflow="fold"), "why", box=SIMPLE_HEAD)
    for choice in choices:
        table.add_row(choice.key, Text(_short(choice.value)), choice.why)
    for key, value in pinned.items():
        table.add_row(key, Text(_short(value)), "given")
    return table


def _short(value: Any) -> str:
    """A value as short YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(_short(inner) for inner in value)}]"
    return str(value)


def _tree(choices: Sequence[Choice]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for choice in choices:
        set_key(tree, choice.key, choice.value)
    return tree


def _config(tree: Tree, train_shards: Any, run: Path, pinned: Tree) -> Config:
    merged = copy.deepcopy(dict(tree))
    for key, value in {"data.train": train_shards, "run_dir": str(run), **pinned}.items():
        set_key(merged, key, value)
    return parse_config(merged, where="the settings")


def _report_unused_gpus(machine: Machine, console: Console) -> None:
    if len(machine.gpu_memory) > machine.processes:
        console.print(
            f"{machine.processes} of {len(machine.gpu_memory)} GPUs are used; to use all of them: "
            f"accelerate launch --num_processes {len(machine.gpu_memory)} -m mmssl.train --data SHARDS",
            soft_wrap=True,
        )


def _is_first() -> bool:
    return system.rank() == 0
