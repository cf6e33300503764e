"""The table of suspects: a CSV to correct in a spreadsheet, and to read back."""

import csv
from collections.abc import Sequence
from pathlib import Path

from mmssl.apps.suspects.ranking import Suspect
from mmssl.data.packing import correct
from mmssl.errors import UserError
from mmssl.types import Sample

KEEP = "keep"
_EVIDENCE = ("suspicion", "similarity", "better_captions", "neighbours_label", "neighbours_agree", "nearest_caption")
_HEAD = ("shard", "key", *_EVIDENCE, KEEP)
"""Columns behind these are fields of the samples."""


def write_table(path: Path, suspects: Sequence[Suspect], samples: Sequence[Sample], fields: Sequence[str]) -> None:
    """Write the suspects in their order. `fields`: fields to correct, of which the first holds the caption."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_HEAD, *fields])
        for suspect in suspects:
            sample = samples[suspect.row]
            numbers = (suspect.suspicion, suspect.similarity, suspect.better_captions)
            agree = "" if suspect.neighbours_agree is None else f"{suspect.neighbours_agree:.2f}"
            nearest = correct.as_cell(samples[suspect.nearest].fields.get(fields[0], ""))
            evidence = [*(f"{number:.4f}" for number in numbers), suspect.neighbours_label or "", agree, nearest]
            cells = [correct.as_cell(sample.fields.get(field, "")) for field in fields]
            writer.writerow([sample.shard, sample.key, *evidence, "yes", *cells])


def read_table(path: Path) -> list[correct.Correction]:
    """Read a corrected table. `no` under `keep` drops a sample; every column behind it is a field to write.

    Raises:
        UserError: the file cannot be read, lacks a column, or holds another word under `keep`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8: {error}; save it as CSV UTF-8") from None
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)  # spreadsheets write their country's separator
    rows = list(csv.reader(text.splitlines(keepends=True), delimiter=separator))
    header = rows[0] if rows else []
    if missing := [name for name in ("shard", "key", KEEP) if name not in header]:
        raise UserError(f"{path} has no column {missing[0]!r}; it must be a table of `mmssl shards suspects`")
    fields = header[header.index(KEEP) + 1 :]
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if not any(row):
            continue
        if len(row) != len(header):
            raise UserError(
                f"{path}, row {number}: {len(row)} cells under {len(header)} columns; quote cells with commas"
            )
        cells = dict(zip(header, row, strict=True))
        keep = cells[KEEP].strip().lower()
        if keep not in ("yes", "no"):
            raise UserError(f"{path}, row {number}: {cells[KEEP]!r} under {KEEP!r}; write yes or no")
        values = {field: cells[field] for field in fields}
        found.append(correct.Correction(cells["shard"], cells["key"], keep == "yes", values))
    return found
