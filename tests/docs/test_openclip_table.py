"""docs/coming-from-openclip.md names what exists on both sides."""

import contextlib
import io
import re

import pytest

from tests.docs.test_docs import is_key
from tests.helpers.docs_blocks import ROOT

PAGE = ROOT / "docs" / "coming-from-openclip.md"
ROWS = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_flag_of_the_trainer_has_a_row_and_no_other() -> None:
    """The rows are the flags that open_clip_train's own parser prints."""
    params = pytest.importorskip("open_clip_train.params")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        params.parse_args(["--help"])
    flags = set(re.findall(r"^  (--[\w-]+)", printed.getvalue(), re.MULTILINE))
    assert len(flags) > 80
    assert {flag for flag, *_ in ROWS} == flags


def test_every_key_of_the_table_exists() -> None:
    """What stands in the second column is a key of the configuration, or `none` with no key at all."""
    assert len(ROWS) == len({flag for flag, *_ in ROWS})
    for flag, key, _ in ROWS:
        assert key == "none" or is_key(key.strip("`")), f"{flag}: {key}"
