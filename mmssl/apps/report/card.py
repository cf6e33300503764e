"""The model card: README.md beside the weights."""

from dataclasses import dataclass
from pathlib import Path

from mmssl.apps.report import wording as facts
from mmssl.apps.report.page import repeat
from mmssl.apps.report.render import render_card
from mmssl.apps.report.run_reader import collect
from mmssl.errors import UserError


def write_card(folder: Path) -> Path:
    """Write MODEL/README.md of a finished run: its training data, metrics, limits and use.

    Raises:
        UserError: the folder is not a run, or has no model yet.
    """
    path, card = _card(folder)
    path.write_text(card, encoding="utf-8")
    return path


@dataclass(frozen=True)
class CardBeside:
    """The card of a run before an evaluation is written into the folder of the run."""

    run: Path
    untouched: bool
    """True if the card is as `write_card` wrote it."""

    def renewed(self) -> str:
        """Write the card again with the new results, unless it was edited; returns a message."""
        if self.untouched:
            return f"{write_card(self.run)} has these metrics too"
        return f"{self.run / 'model' / 'README.md'} was edited and is left as it is"


def card_beside(run: Path, out: Path | None) -> CardBeside | None:
    """The card to renew after an evaluation, if `out` is a folder of a finished run; else None."""
    finished = (run / "config.yaml").is_file() and (run / "model" / "config.json").is_file()
    if out is None or not finished or out.resolve().parent != run.resolve():
        return None
    path, card = _card(run)
    return CardBeside(run, path.is_file() and path.read_text(encoding="utf-8", errors="replace") == card)


def _card(folder: Path) -> tuple[Path, str]:
    """Path and text of the card."""
    run = collect([folder])[0]
    if run.model is None:
        raise UserError(f"{folder} has no model yet; the card is written when the run has ended")
    card = render_card(
        run=run,
        summary=facts.summary(run),
        parameters=facts.parameters(run),
        results={facts.result_title(key): facts.list_metrics(metrics) for key, metrics in run.results.items()},
        chances={facts.result_title(key): facts.chance(metrics) for key, metrics in run.results.items()},
        repeat=repeat(run),
    )
    return run.model / "README.md", card
