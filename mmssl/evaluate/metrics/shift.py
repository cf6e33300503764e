"""What a shift of the images costs: the accuracy on one data set less that on another of the same classes.

Taori et al. 2020 call a model effectively robust when it loses less than models of its accuracy usually do. That needs
many models; what is measured here of one model is the drop."""

from collections.abc import Mapping, Sequence

from mmssl.errors import UserError
from mmssl.evaluate.datasets import Dataset
from mmssl.evaluate.results import Metrics
from mmssl.stats import newcombe


def pairs(words: Sequence[str], datasets: Mapping[str, Dataset]) -> list[tuple[str, str]]:
    """The pairs that `A:B` name.

    Raises:
        UserError: a word is no pair, a data set is unknown, or the two have other classes.
    """
    found = []
    for word in words:
        first, colon, second = word.partition(":")
        unknown = [name for name in (first, second) if name not in datasets]
        if not colon or unknown:
            raise UserError(f"--shift {word!r}: write A:B with two of the data sets {', '.join(datasets)}")
        if datasets[first].classnames != datasets[second].classnames:
            raise UserError(f"--shift {word!r}: the two have other class names; give both the same --classnames")
        found.append((first, second))
    return found


def shifts(results: Mapping[str, Metrics], wanted: Sequence[tuple[str, str]]) -> dict[str, Metrics]:
    """`A:B/TASK` -> `drop` of acc1 from A to B and what is kept of it, for every task with accuracies of both.

    Raises:
        UserError: no accuracy of a pair was measured.
    """
    found: dict[str, Metrics] = {}
    for first, second in wanted:
        for key, figures in results.items():
            name, _, task = key.partition("/")
            other = results.get(f"{second}/{task}", {})
            if name == first and "acc1" in figures and "acc1" in other:
                found[f"{first}:{second}/{task}"] = _shift(figures, other)
        if not any(key.startswith(f"{first}:{second}/") for key in found):
            raise UserError(f"--shift {first}:{second} compares acc1, which no task measured; add --task zero_shot")
    return found


def _shift(first: Metrics, second: Metrics) -> Metrics:
    before, after = first["acc1"], second["acc1"]
    drop = newcombe(
        (round(before * first["samples"]), first["samples"]), (round(after * second["samples"]), second["samples"])
    )
    kept = {"kept": after / before} if before > 0 else {}
    return (
        {"acc1_first": before, "acc1_second": after, "drop": before - after}
        | kept
        | {"intervals": {"drop": list(drop)}}
    )
