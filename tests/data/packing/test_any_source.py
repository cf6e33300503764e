"""Random sources with a known truth: each pair is used rightly, or counted under its cause, and nothing else exists."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings

from mmssl.data import iter_samples
from mmssl.data.packing import open_records, pack
from mmssl.data.shards import SampleLimits, index_shards
from mmssl.data.sources import account_of_indexes
from tests.helpers.random_sources import Case, folders, tables, tars


def check(case: Case) -> None:
    """Pack the source of a case, and compare the pairs and the account with the truth."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for path, content in case.files.items():
            (root / "in" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "in" / path).write_bytes(content)
        packed = pack(open_records(root / "in" / case.start), root / "out", threads=1)
        shards = [str(path) for paths in packed.shards.values() for path in paths]
        found = {sample.image: sample.fields["txt"] for sample in iter_samples(shards)}
        clean = account_of_indexes(index_shards(shards, SampleLimits()))
    assert found == case.pairs
    account = packed.account
    assert Counter({cause: omission.pairs for cause, omission in account.left_out.items()}) == case.left_out
    assert account.offered == account.used + account.omitted == len(case.pairs) + case.left_out.total()
    assert (clean.used, clean.omitted) == (len(case.pairs), 0)


FORMS = {"folder": folders(), "table": tables(), "tar": tars()}


@pytest.mark.parametrize("form", FORMS)
def test_offered_is_used_and_left_out(form: str) -> None:
    """Whatever the names, encodings, separators, order and defects: the pairs that are used are the true ones, each
    other one is counted under its own cause, and both together are all."""
    settings(max_examples=40, deadline=None)(given(FORMS[form])(check))()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_offered_is_used_and_left_out_in_many_cases(form: str) -> None:
    """The same for a thousand sources of each form."""
    settings(max_examples=1000, deadline=None)(given(FORMS[form])(check))()
