"""Random text as a table: nothing crashes the reader."""

import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mmssl.data.packing.records import RecordError
from mmssl.data.packing.tables import open_records
from mmssl.errors import UserError


def offered(source: Path) -> int:
    """The number of rows that a table offers, all of which are read or counted with a cause."""
    records = open_records(source)
    keys = records.keys()
    for number in range(len(keys)):
        with suppress(RecordError):
            records.load(number)
    return len(keys) + len(records.defects())


@settings(max_examples=1000, deadline=None)
@given(st.text(alphabet='ab,;\t|"\n\r\x00é.png/', max_size=80), st.sampled_from(["csv", "tsv", "txt", "jsonl", "json"]))
def test_any_text_is_read_or_refused_in_one_line(text: str, suffix: str) -> None:
    """No text crashes the reader: it gives rows, or a message of one line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t.{suffix}"
        path.write_text(f"image,caption\n{text}" if len(text) % 2 else text, encoding="utf-8", newline="")
        message, rows = "", 0
        try:
            rows = offered(path)
        except UserError as error:
            message = str(error)
    assert (rows > 0) != bool(message)
    assert "\n" not in message
