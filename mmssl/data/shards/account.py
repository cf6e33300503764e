"""The account of a source: every pair that it offers is used or left out, and each cause is counted and named."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from mmssl.errors import UserError

DAMAGED, CLOSED = "a shard is damaged", "a folder cannot be read"
UNOPENED = "a file that may hold pairs is not opened"
_UNKNOWN = (DAMAGED, CLOSED, UNOPENED)
"""Causes behind which nobody can tell how many pairs are lost."""
FEW = 100
"""Fewer pairs count as so many when the fraction of unusable ones is limited."""


@dataclass
class Omission:
    """Pairs left out for one cause."""

    pairs: int
    """Their number. Where it is unknown: the number of damaged shards, of folders or of files."""
    example: str
    """The first of these pairs, with its particulars."""
    remedy: str = ""
    """Instruction that makes them usable. Empty: none is known."""


@dataclass
class Account:
    """Pairs of a source: offered = used + left out."""

    used: int = 0
    left_out: dict[str, Omission] = field(default_factory=dict)
    """Cause -> the pairs that it concerns. A cause names no pair, so that pairs are counted by it."""

    @property
    def omitted(self) -> int:
        """Number of pairs left out, as far as it is known."""
        return sum(omission.pairs for cause, omission in self.left_out.items() if cause not in _UNKNOWN)

    @property
    def offered(self) -> int:
        """Number of pairs that the source seems to offer."""
        return self.used + self.omitted

    def leave_out(self, cause: str, example: str, *, remedy: str = "", pairs: int = 1) -> None:
        """Count pairs that are not used.

        Args:
            cause: the same text for all pairs of its kind, for example "the image file does not exist".
            example: one of the pairs: its shard and key, its file, or its line.
            remedy: an instruction, for example "correct the paths in the table".
        """
        if cause in self.left_out:
            self.left_out[cause].pairs += pairs
        elif pairs > 0:
            self.left_out[cause] = Omission(pairs, example, remedy)

    def include(self, other: "Account") -> None:
        """Add the pairs of another source."""
        self.used += other.used
        for cause, omission in other.left_out.items():
            self.leave_out(cause, omission.example, remedy=omission.remedy, pairs=omission.pairs)

    def limit(self, fraction: float, remedy: str) -> None:
        """Refuse a source of which more than a fraction is left out. Of fewer than 100 pairs, it is that of 100.

        Args:
            remedy: instruction that raises the limit, for example "give --bad-samples 0.5".

        Raises:
            UserError: it says how many are left out, and why.
        """
        if self.omitted > fraction * max(self.offered, FEW):
            causes = list(self.causes())
            more = "; ..." if len(causes) > 3 else ""
            raise UserError(
                f"{self.omitted:,} of {self.offered:,} samples cannot be used, more than the limit of {fraction:.4g}: "
                f"{'; '.join(causes[:3])}{more}; to go on without them, {remedy}"
            )

    def causes(self) -> Iterator[str]:
        """One line per cause, the most frequent first: number of pairs, an example and the remedy."""
        for cause, omission in self._sorted():
            remedy = f"; to use {'it' if omission.pairs == 1 else 'them'}: {omission.remedy}" if omission.remedy else ""
            number = "an unknown number" if cause in _UNKNOWN else f"{omission.pairs:,}"
            yield f"{number} left out: {cause}, for example {omission.example}{remedy}"

    def summary(self) -> str:
        """One line: offered = used + left out, by cause; and what may be lost besides."""
        counts = [(cause in _UNKNOWN, f"{cause}: {omission.pairs:,}") for cause, omission in self._sorted()]
        known = "; ".join(text for unknown, text in counts if not unknown)
        unknown = "; ".join(text for unknown, text in counts if unknown)
        pairs = "pair" if self.offered == 1 else "pairs"
        return (
            f"{self.offered:,} {pairs} offered = {self.used:,} used + {self.omitted:,} left out"
            + (f" ({known})" if known else "")
            + (f"; besides, an unknown number is lost ({unknown})" if unknown else "")
        )

    def text(self) -> str:
        """The lines of all causes, then the summary."""
        return "\n".join([*self.causes(), self.summary()])

    def _sorted(self) -> list[tuple[str, Omission]]:
        return sorted(self.left_out.items(), key=lambda item: (-item[1].pairs, item[0]))
