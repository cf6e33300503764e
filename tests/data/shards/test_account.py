"""The account of a source adds up, and names every cause once."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mmssl.data.shards.account import DAMAGED, Account

events = st.lists(st.sampled_from(["the caption is empty", "the image is broken", "the key is missing", None]))


def account(outcomes: list[str | None]) -> Account:
    """The account of pairs with these outcomes; None: used."""
    found = Account()
    for number, cause in enumerate(outcomes):
        if cause is None:
            found.used += 1
        else:
            found.leave_out(cause, f"row {number}", remedy=f"mend {cause}")
    return found


@given(events, events)
def test_offered_is_used_and_left_out(first: list[str | None], second: list[str | None]) -> None:
    """Whatever happens to the pairs of two sources, the parts add up; each cause has its count and first example."""
    found = account(first)
    found.include(account(second))
    together = [*first, *second]
    causes = Counter(cause for cause in together if cause is not None)
    assert found.offered == len(together)
    assert found.used == together.count(None)
    assert {cause: omission.pairs for cause, omission in found.left_out.items()} == causes
    for cause, omission in found.left_out.items():
        assert omission.example == f"row {(first if cause in first else second).index(cause)}"
    assert len(found.text().splitlines()) == len(causes) + 1


def test_the_text_names_causes_examples_and_remedies() -> None:
    """The most frequent cause comes first; the summary is the last line."""
    found = Account(used=1200)
    found.leave_out("the caption is empty", "row 3")
    found.leave_out("the image file does not exist", "a.jpg", remedy="correct the paths", pairs=2)
    assert found.text().splitlines() == [
        "2 left out: the image file does not exist, for example a.jpg; to use them: correct the paths",
        "1 left out: the caption is empty, for example row 3",
        "1,203 pairs offered = 1,200 used + 3 left out (the image file does not exist: 2; the caption is empty: 1)",
    ]
    assert Account(used=1).summary() == "1 pair offered = 1 used + 0 left out"


def test_what_nobody_can_count_is_named_apart() -> None:
    """Damaged shards are no pairs: they are in no sum, but in the text and at the end of the summary."""
    found = Account(used=7)
    found.leave_out("the caption is empty", "row 3")
    for shard in "ab":
        found.leave_out(DAMAGED, f"{shard}.tar (it is cut)", remedy="get it again")
    assert (found.offered, found.omitted) == (8, 1)
    assert found.text().splitlines() == [
        "an unknown number left out: a shard is damaged, for example a.tar (it is cut); to use them: get it again",
        "1 left out: the caption is empty, for example row 3",
        "8 pairs offered = 7 used + 1 left out (the caption is empty: 1); besides, an unknown number is lost (a shard "
        "is damaged: 2)",
    ]
