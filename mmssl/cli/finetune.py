"""`mmssl finetune` and `mmssl interpolate`: a classifier from few labels, and models between two."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmssl.cli.evaluate import (
    BatchSize,
    Cache,
    Classnames,
    Device,
    JsonFile,
    Label,
    NoCache,
    Templates,
    load_on,
    make_folder,
    open_cache,
    write_json,
)
from mmssl.cli.search import ModelName
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.apps.finetune.datasets import FineTuneData
    from mmssl.apps.finetune.methods import FineTuneSettings, Method, Tuned
    from mmssl.apps.finetune.study import Study
    from mmssl.inference import Model
    from mmssl.stats import Interval


def add_finetune(app: typer.Typer) -> None:
    """Give the command line these verbs."""
    app.command()(finetune)
    app.command()(interpolate)


def finetune(
    model: ModelName,
    data: Annotated[
        str,
        typer.Argument(help="A folder in CLIP_benchmark's layout with a training split, or a pattern of shards."),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="linear: a head on kept features; full: the image tower and the head; lp-ft: linear, then full."
        ),
    ] = "linear",
    shots: Annotated[
        str | None,
        typer.Option(
            help="Labels a class to train on; up to 4 more of each class choose settings. Several (1,2,4,8,16), or "
            "several methods, or --seeds: a table. Default: all there are."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw of labels and of their order.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Draws to average over in a table, from --seed on.")] = 1,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="WiSE-FT: (1 - alpha) * zero-shot + alpha * fine-tuned weights.")
    ] = 1.0,
    lr: Annotated[float | None, typer.Option(help="Learning rate of full. Default: chosen on held-out labels.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes of full; at least 100 updates are made.")] = 10,
    test: Annotated[str | None, typer.Option(help="Shards to judge on. Default: the test split, or a fifth.")] = None,
    classnames: Classnames = None,
    templates: Templates = None,
    label: Label = None,
    json_file: JsonFile = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the classifier, or of the table and its image.")] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    device: Device = None,
) -> None:
    """Make a classifier of a pretrained model and labelled images, and judge it on the test split.

    The head begins as the zero-shot classifier of the class names; where classes have none, at zero.

    Example: mmssl finetune runs/mine data/pets --method lp-ft --shots 16 --out pets-classifier
    """
    from mmssl.apps.finetune import gather

    plan = _plan(method, shots, seed, seeds, alpha, lr, epochs)
    if out is not None:
        _empty_folder(out)
    loaded = load_on(model, device)
    with _bar(plan.classifiers) as (tell, tick):
        problem = gather(
            loaded,
            data,
            test=test,
            classnames=classnames,
            templates=templates,
            label=label,
            seed=seed,
            batch_size=batch_size,
            cache=None if no_cache else open_cache(loaded, cache),
            progress=tell,
        )
        found = plan.learnt(loaded, problem, tell, tick)
    for note in problem.notes:
        print(note)
    print(f"{problem.name}: {len(problem.classnames)} classes, {len(problem.test.labels)} test samples")
    _report(found, problem.name, out)
    if json_file is not None:
        write_json(json_file, found.figures())


def interpolate(
    first: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model or a classifier's folder.")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Another one of the same architecture.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must be empty or not exist.")],
    alpha: Annotated[float, typer.Option(min=0, max=1, help="0 is the first model, 1 the second.")] = 0.5,
) -> None:
    """Write the model whose weights lie between those of two (WiSE-FT): (1 - alpha) * MODEL + alpha * OTHER.

    Of two classifiers with the same labels, a classifier.

    Example: mmssl interpolate runs/before runs/after --alpha 0.5 --out between
    """
    from mmssl.apps.finetune import interpolate as between
    from mmssl.apps.finetune import interpolate_classifiers, load_classifier
    from mmssl.apps.finetune.classifier import is_classifier

    _empty_folder(out)
    classifiers = [is_classifier(place) for place in (first, second)]
    if all(classifiers):
        interpolate_classifiers(load_classifier(first), load_classifier(second), alpha).save(out)
    else:
        between(load_on(first, "cpu"), load_on(second, "cpu"), alpha).save(out)
        if any(classifiers):
            print("one of these is a classifier and the other is not: its labels and its head are left out")
    print(f"{out}: {1 - alpha:g} * {first} + {alpha:g} * {second}")


@dataclass(frozen=True)
class _Plan:
    """The classifiers that are asked for: one, or those of a table."""

    settings: "FineTuneSettings"
    """Of the first."""
    methods: "list[Method]"
    shots: list[int]
    """Empty: all there are."""
    seeds: int

    @property
    def is_table(self) -> bool:
        return self.classifiers > 1

    @property
    def classifiers(self) -> int:
        return len(self.methods) * max(1, len(self.shots)) * self.seeds

    def learnt(
        self, model: "Model", problem: "FineTuneData", tell: Callable[[str, int], None], tick: Callable[[], None]
    ) -> "Study | Tuned":
        from mmssl.apps.finetune import fine_tune
        from mmssl.apps.finetune.study import study

        if self.is_table:
            return study(model, problem, self.settings, self.methods, self.shots, self.seeds, tell, tick)
        return fine_tune(model, problem, self.settings, tell)


def _plan(method: str, shots: str | None, seed: int, seeds: int, alpha: float, lr: float | None, epochs: int) -> _Plan:
    from mmssl.apps.finetune import FineTuneSettings
    from mmssl.evaluate.classifiers.fine_tuning import RATES

    methods, counts = _methods(method), _counts(shots)
    rates = RATES if lr is None else (lr,)
    settings = FineTuneSettings(methods[0], counts[0] if counts else None, seed, alpha, rates, epochs)
    plan = _Plan(settings, methods, counts, seeds)
    if plan.is_table and not counts:
        raise UserError("a table needs --shots, for example --shots 1,2,4,8,16")
    return plan


def _methods(words: str) -> "list[Method]":
    from mmssl.apps.finetune import METHODS

    chosen = []
    for word in (part.strip() for part in words.split(",")):
        found = next((method for method in METHODS if method == word), None)
        if found is None:
            raise UserError(f"--method {word!r} is unknown; there are {', '.join(METHODS)}")
        chosen.append(found)
    return list(dict.fromkeys(chosen))


def _counts(words: str | None) -> list[int]:
    if words is None:
        return []
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shots {words!r} must be a number of labels a class, or several with commas: 1,2,4,8,16")
    return sorted({int(part) for part in parts})


def _empty_folder(out: Path) -> None:
    """Before hours of work: a folder that can be written and holds nothing."""
    make_folder(out)
    if any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; choose another folder")


def _report(found: "Study | Tuned", name: str, out: Path | None) -> None:
    """Print what was found, and write it."""
    from mmssl.apps.finetune.plots import draw_study
    from mmssl.apps.finetune.study import Study

    if not isinstance(found, Study):
        _print_tuned(found)
        if out is not None:
            found.classifier.save(out)
            print(f"classifier: {out}")
        return
    _print_study(found)
    if out is not None:
        write_json(out / "accuracy.json", found.figures())
        draw_study(out / "accuracy.png", name, found)
        print(f"table and image: {out}")


def _print_tuned(found: "Tuned") -> None:
    figures = found.figures()
    rows = [("fine-tuned", figures["acc1"], figures["acc1_interval"])]
    if "zero_shot" in figures:
        rows.insert(0, ("zero-shot", figures["zero_shot"], figures["zero_shot_interval"]))
    table = Table("", "accuracy", "95 % interval")
    for name, accuracy, interval in rows:
        table.add_row(name, f"{accuracy:.4f}", f"{interval[0]:.4f} to {interval[1]:.4f}")
    Console().print(table)
    difference = found.difference()
    if difference is not None:
        low, high = difference.interval
        print(
            f"gain: {100 * difference.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}, "
            f"p = {difference.p_value:.2g})"
        )
    chosen = ", ".join(f"{name} = {value:.3g}" for name, value in found.chosen.items())
    print(f"trained on {found.train_samples:,} samples; chosen on others: {chosen}")


def _print_study(found: "Study") -> None:
    """Accuracies with their intervals, then what fine-tuning gains."""
    from mmssl.apps.finetune.methods import accuracy_interval

    accuracies, gains = (
        Table("labels", "classifier", "accuracy in %", "95 % interval"),
        Table("labels", "", "points", "p"),
    )
    if found.zero_shot is not None:
        accuracies.add_row("0", "zero-shot", *_percent(found.zero_shot.mean(), accuracy_interval(found.zero_shot)))
    for k in next(iter(found.lines.values())):
        for name in found.lines:
            mean = found.mean(name, k)
            accuracies.add_row(str(k), name, *_percent(mean.mean(), accuracy_interval(mean)))
        for name in found.tuned():
            for other, by_shots in found.differences(name).items():
                gain = by_shots[k]
                low, high = (100 * end for end in gain.interval)
                points = f"{100 * gain.difference:+.1f} ({low:+.1f} to {high:+.1f})"
                gains.add_row(str(k), f"{name} less {other}", points, f"{gain.p_value:.1g}")
    for table in (accuracies, gains):
        Console().print(table)


def _percent(accuracy: float, interval: "Interval") -> tuple[str, str]:
    low, high = (100 * end for end in interval)
    return f"{100 * accuracy:.1f}", f"{low:.1f} to {high:.1f}"


@contextmanager
def _bar(total: int) -> Iterator[tuple[Callable[[str, int], None], Callable[[], None]]]:
    """A bar over the classifiers: what to call with what is done within one, and after each."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("classifiers"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("starting", total=total)
        yield lambda what, done: bar.update(line, description=f"{what} {done:,}"), lambda: bar.advance(line)
