"""The model card: README.md beside the weights."""

from pathlib import Path

from mmssl.report import facts
from mmssl.report.collect import collect
from mmssl.report.page import repeat
from mmssl.report.render import render_card
from mmssl.types import UserError


def write_card(folder: Path) -> Path:
    """Write MODEL/README.md of a finished run: what it was trained on, its figures, its limits and how to use it.

    Raises:
        UserError: the folder is no run, or has no model yet.
    """
    run = collect([folder])[0]
    if run.model is None:
        raise UserError(f"{folder} has no model yet; the card is written when the run has ended")
    path = run.model / "README.md"
    card = render_card(
        run=run,
        summary=facts.summary(run),
        parameters=facts.parameters(run),
        results={facts.title_of(key): facts.figures_of(metrics) for key, metrics in run.results.items()},
        chances={facts.title_of(key): facts.chance(metrics) for key, metrics in run.results.items()},
        repeat=repeat(run),
    )
    path.write_text(card, encoding="utf-8")
    return path
