"""scripts/hard_pairs.py on the repository's own shards."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mmssl.data import iter_samples
from mmssl.errors import UserError
from mmssl.evaluate import suite
from mmssl.types import Sample
from scripts import hard_pairs
from tests.helpers.docs_blocks import ROOT
from tests.helpers.toy_encoder import ToyEncoder, pack, paint

SEEN, UNSEEN = ROOT / "shards" / "train", ROOT / "shards" / "emoji-unseen-style"


def made(data: str | Path, out: Path, *more: str) -> tuple[list[Sample], list[Sample]]:
    """Captions and groups that the script makes."""
    hard_pairs.main([str(data), "--out", str(out), *more])
    shards = [out / kind / "test" / "0.tar" for kind in ("captions", "groups")]
    both = [list(iter_samples([str(s)], on_bad=lambda bad: None)) if s.is_file() else [] for s in shards]
    return both[0], both[1]


def changed(right: str, wrong: str) -> tuple[Counter[str], Counter[str]]:
    """The words that only one of two names has."""
    a, b = (Counter(re.findall(r"[\w-]+", name)) for name in (right, wrong))
    return a - b, b - a


def check_captions(captions: list[Sample], names: set[str]) -> int:
    """Every wrong caption differs by words of the stated attribute; returns how many are names of other images."""
    for sample in captions:
        (wrong,) = sample.fields["negatives"]
        attribute = sample.fields["attribute"]
        assert sample.caption in names
        assert wrong != sample.caption
        for words in changed(sample.caption, wrong):
            assert sum(words.values()) <= 1, (sample.caption, wrong)
            assert all(attribute == "skin tone" or hard_pairs.RIVALS[word][0] == attribute for word in words)
        known = {word for name in names for word in re.findall(r"[\w-]+", name)}
        assert known.issuperset(re.findall(r"[\w-]+", wrong))
    return sum(sample.fields["negatives"][0] in names for sample in captions)


def test_wrong_captions_differ_by_one_attribute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded shards each caption is a name of the data, by class or by JSON; its wrong one has other words of
    one attribute, all from the data; and the printed table counts them, and those that name another image."""
    names = set((UNSEEN / "classnames.txt").read_text().lower().splitlines())
    captions, _ = made(UNSEEN, tmp_path / "classes")
    real = check_captions(captions, names)
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["all", str(len(captions)), str(real)]
    assert len(captions) > 20
    fields = [s.fields for s in iter_samples([str(p) for p in sorted(SEEN.glob("*.tar"))], on_bad=lambda bad: None)]
    captions, groups = made(f"{SEEN}/*.tar", tmp_path / "json", "--field", "label")
    assert check_captions(captions, {" ".join(f["label"].lower().split()) for f in fields}) > 20
    assert len(groups) >= 10


def test_groups_are_two_images_that_differ_by_one_attribute(tmp_path: Path) -> None:
    """On the embedded shards a group is two different images by one artist whose names differ by one word of an
    attribute; no image is in two groups; and one attribute can be asked for."""
    artists = {
        s.image: s.fields["style"]
        for s in iter_samples([str(p) for p in sorted(SEEN.glob("*.tar"))], on_bad=lambda bad: None)
    }
    _, samples = made(f"{SEEN}/*.tar", tmp_path / "all", "--field", "label")
    assert len({s.image for s in samples}) == len(samples)
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        assert first.fields == second.fields | {"txt": first.caption}
        assert artists[first.image] == artists[second.image]
        check_captions([_with_wrong(first, second), _with_wrong(second, first)], {first.caption, second.caption})
    captions, samples = made(f"{SEEN}/*.tar", tmp_path / "one", "--field", "label", "--attribute", "colour")
    assert {s.fields["attribute"] for s in captions + samples} == {"colour"}


def _with_wrong(sample: Sample, other: Sample) -> Sample:
    return Sample(0, "", "", b"", {**sample.fields, "negatives": [other.caption]})


def test_the_task_reads_what_is_written(tmp_path: Path) -> None:
    """`pairs` finds both datasets: scores of a caption among two and of groups, with their chances; exchanged words
    give the wrong caption where no other name does."""
    names = ["red left box 9", "red right box 9", "blue left box 9", "arrow left of right 9"]
    pack(
        tmp_path / "in.tar",
        [{"png": paint(n, n), "txt": f"{name}: tag", "json": {"set": "a"}} for n, name in enumerate(names)],
    )
    captions, groups = made(tmp_path / "in.tar", tmp_path / "hard")
    wrong = {s.caption: s.fields["negatives"][0] for s in captions}
    assert wrong["red left box 9"] in {"red right box 9", "blue left box 9"}
    assert wrong["red right box 9"] == "red left box 9"
    assert wrong["arrow left of right 9"] in {
        f"arrow {way} 9" for way in ("right of left", "left of left", "right of right")
    }
    assert len(groups) == 2  # two images of the three boxes
    for kind, score, chance in (("captions", "caption_accuracy", 1 / 2), ("groups", "group_score", 1 / 6)):
        data = {"p": (str(tmp_path / "hard" / kind), "pairs")}
        (found,) = suite.run(ToyEncoder(), data, None, suite.SuiteOptions(draw=False)).values()
        assert found["baselines"][score]["chance"] == pytest.approx(chance)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attribute", "taste"], "--attribute taste is unknown; choose among: colour"),
        (["--field", "label"], "has no field 'label'; name the field"),
        (["--attribute", "gender"], "no name in .* has a word of: gender"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, more: list[str], message: str) -> None:
    """An unknown attribute, a missing field and data without the words are errors that say what to do."""
    shard = pack(tmp_path / "in.tar", [{"png": paint(n, n), "txt": f"{name} box"} for n, name in enumerate(["a", "b"])])
    with pytest.raises(UserError, match=message):
        made(shard, tmp_path / "out", *more)


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    """Groups of an earlier call would stay among the new ones."""
    (tmp_path / "note.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is not empty; name another folder"):
        made(UNSEEN, tmp_path)
