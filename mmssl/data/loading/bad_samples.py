"""Bad samples: written down, counted, and the end of the stream when they are too many."""

import json
from dataclasses import asdict
from pathlib import Path

from mmssl.data.loading.parts import BAD_IN_A_ROW
from mmssl.data.loading.pipeline import LoadedBatch
from mmssl.data.shards.samples import BadSample
from mmssl.errors import UserError

_FIRST = 1_000
"""The fraction of bad samples counts after so many."""


class BadSampleBudget:
    """Writes bad samples down and stops the stream when they are too many."""

    def __init__(self, max_fraction: float, log: Path | None) -> None:
        self._max_fraction = max_fraction
        self._log = log
        self._samples = 0
        self._bad = 0
        self._in_a_row = 0
        self._last: BadSample | None = None

    def count(self, made: LoadedBatch) -> None:
        """Count a batch.

        Raises:
            UserError: more than the fraction of all samples so far, or 100 in a row, were bad.
        """
        self._write(made)
        self._samples += len(made.batch)
        self._bad += len(made.bad)
        previous = -1
        for place, bad in made.bad:
            self._last = bad
            self._in_a_row = self._in_a_row + 1 if place == previous + 1 else 1
            previous = place
            if self._in_a_row >= BAD_IN_A_ROW:
                raise UserError(f"{BAD_IN_A_ROW} samples in a row could not be used, the last one {self._name(bad)}")
        if previous != len(made.batch) - 1:
            self._in_a_row = 0
        if self._samples >= _FIRST and self._bad > self._max_fraction * self._samples:
            assert self._last is not None
            raise UserError(
                f"{self._bad} of {self._samples} samples could not be used, more than data.bad_samples="
                f"{self._max_fraction}; the last one {self._name(self._last)}"
            )

    def _name(self, bad: BadSample) -> str:
        where = "" if self._log is None else f"; all are in {self._log}"
        return f"is {bad.key!r} of {bad.shard} ({bad.error}){where}; run `mmssl shards check` on these shards"

    def _write(self, made: LoadedBatch) -> None:
        if self._log is None or not made.bad:
            return
        with self._log.open("a", encoding="utf-8") as file:
            # At once: other processes write to the same file.
            file.write("".join(json.dumps(asdict(bad)) + "\n" for _, bad in made.bad))
