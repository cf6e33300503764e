"""`mmssl finetune` and `mmssl interpolate`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import (
    BadSamples,
    BatchSize,
    Cache,
    Classnames,
    Device,
    JsonFile,
    Label,
    ModelName,
    NoCache,
    Precision,
    ProgressBar,
    Templates,
    load_model,
    make_folder,
    open_cache,
    progress_bar,
    stdout,
    verb,
    write_json,
)
from mmssl.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from mmssl.apps.finetune import FineTuneData, FineTuneSettings, methods, study
    from mmssl.apps.finetune import guard as guards
    from mmssl.inference import Model
    from mmssl.stats import Interval


_MOST_CLASSES = 20
"""Classes of which each gets a line."""
_DRAW = "; for this draw of labels, and --seeds 5 tries others"
_BASELINES = {"majority": "always the most frequent class", "chance": "chance at the class frequencies"}


@verb(130)
def finetune(
    model: ModelName,
    data: Annotated[
        str,
        typer.Argument(
            help="Folder in CLIP_benchmark's layout with a training split, a shard pattern, a folder of images per "
            "class, or a table with a column of labels."
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="linear: a head on cached features; full: image tower and head; lp-ft: linear, then full. "
            "Several, separated by commas: a table."
        ),
    ] = "linear",
    shots: Annotated[
        str | None,
        typer.Option(
            help="Labels per class for training; up to 4 more per class are held out to choose settings. Several "
            "(1,2,4,8,16): a table. Default: all labels."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of labels and of their order.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds to average over in a table, from --seed on.")] = 1,
    alpha: Annotated[
        str,
        typer.Option(
            metavar="NUMBER|auto",
            help="WiSE-FT: (1 - alpha) * zero-shot + alpha * fine-tuned weights. auto: the best on held-out labels.",
        ),
    ] = "1",
    guard: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Other labelled images, with class names: alpha is lowered until their zero-shot accuracy falls by "
            "--guard-loss at most.",
        ),
    ] = None,
    guard_loss: Annotated[float, typer.Option(min=0, max=1, help="Accuracy that may be lost on --guard.")] = 0.02,
    balance: Annotated[
        bool,
        typer.Option("--balance", help="Treat classes of unequal sizes alike: logits are adjusted by class frequency."),
    ] = False,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of full and lp-ft. Default: chosen on held-out labels.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of full and lp-ft, with at least 100 updates.")] = 10,
    test: Annotated[
        str | None, typer.Option(help="Shards to evaluate on. Default: the test split, or a fifth of the data.")
    ] = None,
    classnames: Classnames = None,
    templates: Templates = None,
    label: Label = None,
    json_file: JsonFile = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the classifier, or for the table and its plot; it must be empty.")
    ] = None,
    cache: Cache = None,
    no_cache: NoCache = False,
    batch_size: BatchSize = 256,
    bad_samples: BadSamples = 0.1,
    device: Device = None,
    precision: Precision = "auto",
) -> None:
    """Fine-tune a classifier on labelled images, and evaluate it on the test split.

    The head starts from the zero-shot classifier of the class names, or from zero if classes have no names.

    Example: mmssl finetune runs/mine data/pets --method lp-ft --shots 16 --out pets-classifier
    """
    from mmssl.apps.finetune import LabelOptions, gather
    from mmssl.apps.finetune import guard as guards
    from mmssl.evaluate import suite

    plan = _plan(method, (shots, seeds), seed, _parse_alpha(alpha), lr, epochs, balance)
    if guard is not None and plan.classifiers > 1:
        raise UserError("--guard is for one classifier; a table compares methods without it")
    if out is not None:
        make_folder(out, empty=True)
    loaded = load_model(model, device, precision)
    with progress_bar("classifiers", plan.classifiers, text="starting") as bar:
        options = suite.SuiteOptions(
            batch_size=batch_size,
            bad_samples=bad_samples,
            cache=open_cache(loaded, cache, no_cache),
            progress=bar.describe,
        )
        chosen = LabelOptions(classnames, templates, label)
        dataset = gather(loaded, data, test=test, label_options=chosen, seed=seed, options=options)
        watched = (
            None if guard is None else guards.open_guard(loaded, guard, loss=guard_loss, seed=seed, options=options)
        )
        found = _train(plan, loaded, dataset, bar, watched)
    for note in dataset.notes:
        print(note)
    print(f"{dataset.name}: {len(dataset.classnames)} classes, {len(dataset.test.labels)} test samples")
    _report(found, dataset.name, out)
    if json_file is not None:
        write_json(json_file, found.metrics())


@verb(140)
def interpolate(
    first: Annotated[str, typer.Argument(metavar="MODEL", help="Run, model or classifier folder.")],
    second: Annotated[str, typer.Argument(metavar="OTHER", help="Another one of the same architecture.")],
    out: Annotated[Path, typer.Option(help="Folder of the new model; it must be empty or not exist.")],
    alpha: Annotated[float, typer.Option(min=0, max=1, help="0 is the first model, 1 the second.")] = 0.5,
) -> None:
    """Interpolate the weights of two models (WiSE-FT): (1 - alpha) * MODEL + alpha * OTHER.

    Two classifiers with the same labels give a classifier.

    Example: mmssl interpolate runs/before runs/after --alpha 0.5 --out between
    """
    from mmssl.apps.finetune import classifier, is_classifier, load_classifier

    make_folder(out, empty=True)
    classifiers = [is_classifier(place) for place in (first, second)]
    if all(classifiers):
        classifier.interpolate_classifiers(load_classifier(first), load_classifier(second), alpha).save(out)
    else:
        classifier.interpolate(load_model(first, "cpu"), load_model(second, "cpu"), alpha).save(out)
        if any(classifiers):
            print("only one of the two is a classifier: its labels and its head are left out")
    print(f"{out}: {1 - alpha:g} * {first} + {alpha:g} * {second}")


@dataclass(frozen=True)
class _Plan:
    """The classifiers to train: one, or those of a table."""

    settings: "FineTuneSettings"
    """Settings of the first."""
    methods: "list[methods.Method]"
    shots: list[int]
    """Labels per class; empty: all labels."""
    seeds: int

    @property
    def classifiers(self) -> int:
        return len(self.methods) * max(1, len(self.shots)) * self.seeds


def _train(
    plan: _Plan, model: "Model", data: "FineTuneData", bar: ProgressBar, guard: "guards.GuardSet | None"
) -> "study.Study | methods.Tuned":
    """Train the classifiers of the plan."""
    from mmssl.apps.finetune import fine_tune, study

    if plan.classifiers == 1:
        return fine_tune(model, data, plan.settings, bar.describe, guard)
    design = study.StudyDesign(plan.methods, plan.shots, plan.seeds)
    return study.study(model, data, plan.settings, design, bar.describe, bar.advance)


def _parse_alpha(words: str) -> float | None:
    """A number from 0 to 1; None for `auto`."""
    if words == "auto":
        return None
    try:
        alpha = float(words)
    except ValueError:
        alpha = -1.0
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha {words!r} must be a number from 0 to 1, or auto")
    return alpha


def _plan(
    method: str,
    draws: tuple[str | None, int],
    seed: int,
    alpha: float | None,
    lr: float | None,
    epochs: int,
    balance: bool,
) -> _Plan:
    """Args:
    draws: labels per class, and seeds for each number of them.
    """
    from mmssl.apps.finetune import FineTuneSettings
    from mmssl.evaluate.classifiers import fine_tuning

    methods, counts = _parse_methods(method), _parse_counts(draws[0])
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"--lr {lr:g} must be a number above 0, such as 1e-4")
    rates = fine_tuning.RATES if lr is None else (lr,)
    settings = FineTuneSettings(methods[0], counts[0] if counts else None, seed, alpha, balance, rates, epochs)
    plan = _Plan(settings, methods, counts, draws[1])
    if plan.classifiers > 1 and not counts:
        raise UserError("a table needs --shots, for example --shots 1,2,4,8,16")
    return plan


def _parse_methods(words: str) -> "list[methods.Method]":
    from mmssl.apps.finetune import methods

    known = {str(method): method for method in methods.METHODS}
    names = [word.strip() for word in words.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--method {name!r} is unknown; choose from {', '.join(methods.METHODS)}")
    return [known[name] for name in dict.fromkeys(names)]


def _parse_counts(words: str | None) -> list[int]:
    if words is None:
        return []
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--shots {words!r} must be labels per class, for example 16, or several: 1,2,4,8,16")
    return sorted({int(part) for part in parts})


def _report(found: "study.Study | methods.Tuned", name: str, out: Path | None) -> None:
    """Print the results, and write them to a folder."""
    from mmssl.apps.finetune import study

    if not isinstance(found, study.Study):
        _print_tuned(found)
        if out is not None:
            found.classifier.save(out)
            print(f"classifier: {out}")
        return
    _print_study(found)
    if out is not None:
        write_json(out / "accuracy.json", found.metrics())
        study.draw_study(out / "accuracy.png", name, found)
        print(f"table and plot: {out}")


def _print_tuned(found: "methods.Tuned") -> None:
    from rich.table import Table

    from mmssl.apps.finetune import methods
    from mmssl.evaluate.metrics import baselines

    metrics = found.metrics()
    table = Table("", "accuracy", "95 % interval", "by class")
    for name, key, prefix in (("zero-shot", "zero_shot", "zero_shot_"), ("fine-tuned", "acc1", "")):
        if key in metrics:
            low, high = metrics[f"{key}_interval"]
            mean = metrics[f"{prefix}mean_per_class_recall"]
            table.add_row(name, f"{metrics[key]:.4f}", f"{low:.4f} to {high:.4f}", f"{mean:.4f}")
    classes = len(methods.by_class(found.after, found.labels))
    chance = 1 / classes
    for name, accuracy in found.baselines().items():
        # Whatever does not look at the image is right equally often over the classes.
        table.add_row(_BASELINES[name], f"{accuracy:.4f}", "", f"{chance:.4f}")
    stdout().print(table)
    if classes <= _MOST_CLASSES:
        stdout().print(_class_table(found))
    difference = found.difference()
    if difference is not None:
        low, high = difference.interval
        print(
            f"gain: {100 * difference.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}, "
            f"p = {difference.p_value:.2g}){_DRAW if found.classifier.record['shots'] is not None else ''}"
        )
    words = baselines.no_better(metrics["acc1"], found.baselines())
    mean = metrics["mean_per_class_recall"]
    if words and mean <= chance:
        print(f"the classifier is {words}")
    elif words:
        print(f"the classifier is {words}, but over the classes it is right in {mean:.1%}; chance is {chance:.1%}")
    settings = {name: value for name, value in found.chosen.items() if not name.startswith("guard")}
    chosen = ", ".join(f"{name} = {value:.3g}" for name, value in settings.items())
    if "guard_after" in found.chosen:
        before, after = found.chosen["guard_before"], found.chosen["guard_after"]
        print(f"zero-shot accuracy on the guard: {before:.4f} before, {after:.4f} now")
    print(f"trained on {found.train_samples:,} samples; chosen on others: {chosen}")
    if found.kept_start:
        print(
            "no weights of the training were better on these others than those before it, so the weights before it are "
            f"kept; try an --lr other than {found.chosen['lr']:g}, more labels, or --method linear"
        )


def _class_table(found: "methods.Tuned") -> "Table":
    """One row per class with test images."""
    from rich.table import Column, Table
    from rich.text import Text

    from mmssl.apps.finetune import methods

    table = Table(Column("class", overflow="fold"), "test images", "zero-shot", "fine-tuned")
    before = {} if found.before is None else methods.by_class(found.before, found.labels)
    for number, (count, accuracy) in methods.by_class(found.after, found.labels).items():
        zero = f"{before[number][1]:.4f}" if before else ""
        table.add_row(Text(found.classifier.labels[number]), f"{count:,}", zero, f"{accuracy:.4f}")
    return table


def _print_study(found: "study.Study") -> None:
    """Print accuracies with their intervals and their spread over draws of labels, then the gains of fine-tuning."""
    from rich.table import Column, Table

    from mmssl.evaluate import compare

    accuracies, gains = (
        Table("labels", Column("classifier", no_wrap=True), "accuracy in %", "95 % interval", "spread"),
        Table("labels", "", "points", "spread", "p"),
    )
    for name, accuracy in found.baselines().items():
        accuracies.add_row("0", _BASELINES[name], f"{100 * accuracy:.1f}", "", "")
    if found.zero_shot is not None:
        accuracies.add_row("0", "zero-shot", *_percent(found.zero_shot.mean(), found.zero_shot_interval()), "")
    for k in next(iter(found.lines.values())):
        for name in found.lines:
            mean = found.mean(name, k)
            spread = found.spread(name, k)
            accuracies.add_row(str(k), name, *_percent(mean.mean(), found.interval(name, k)), _points(spread))
        for name in found.tuned():
            for other, by_shots in found.differences(name).items():
                gain = by_shots[k]
                low, high = (100 * end for end in gain.interval)
                points = f"{100 * gain.difference:+.1f} ({low:+.1f} to {high:+.1f})"
                p_value = "" if gain.p_value is None else f"{gain.p_value:.1g}"
                gains.add_row(str(k), f"{name} minus {other}", points, _points(gain.spread), p_value)
    for table in (accuracies, gains):
        stdout().print(table)
    draws = len(next(iter(next(iter(found.lines.values())).values())))
    if draws < compare.LEAST_DRAWS:
        print(
            f"no p-values: {draws} draws of labels are too few for a test; give --seeds {compare.LEAST_DRAWS} or more"
        )


def _points(spread: "float | None") -> str:
    """A standard deviation in points; empty with one draw."""
    return "" if spread is None else f"{100 * spread:.1f}"


def _percent(accuracy: float, interval: "Interval") -> tuple[str, str]:
    low, high = (100 * end for end in interval)
    return f"{100 * accuracy:.1f}", f"{low:.1f} to {high:.1f}"
