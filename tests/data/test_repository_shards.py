"""The contract of the embedded data, read from the repository alone."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

SHARDS = Path(__file__).parents[2] / "shards"
TESTS = ("emoji-unseen-style", "emoji-unseen-concepts")
STYLES = {
    "train": {"noto", "twemoji"},
    "emoji-unseen-style": {"openmoji"},
    "emoji-unseen-concepts": {"noto", "twemoji"},
}


def samples(split: str) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, over the tars of a split."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((SHARDS / split).rglob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                assert extension not in found.setdefault(key, {}), f"{path.name} holds {member.name} twice"
                file = tar.extractfile(member)
                assert file is not None, f"{path.name}: {member.name} is no regular file"
                found[key][extension] = file.read()
    return found


def codes(split: str) -> set[str]:
    """Code points of the concepts of a split."""
    return {key.partition("-")[2] for key in samples(split)}


def labels(test: str) -> list[str]:
    return (SHARDS / test / "classnames.txt").read_text(encoding="utf-8").splitlines()


def train_labels() -> set[str]:
    return {json.loads(sample["json"])["label"] for sample in samples("train").values()}


def test_the_whole_folder_is_at_most_8_mib() -> None:
    """A clone stays small."""
    written_later = (".idx", "index.json")
    files = [p for p in SHARDS.rglob("*") if p.is_file() and not p.name.endswith(written_later)]
    assert sum(p.stat().st_size for p in files) <= 8 * 2**20


def test_tars_are_those_the_script_made() -> None:
    """SHA256SUMS names every tar and its bytes."""
    listed = dict(reversed(line.split("  ")) for line in (SHARDS / "SHA256SUMS").read_text().splitlines())
    actual = {
        path.relative_to(SHARDS).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in SHARDS.rglob("*.tar")
    }
    assert actual == listed


@pytest.mark.parametrize("split", STYLES)
def test_every_image_decodes_at_64_px_in_its_styles(split: str) -> None:
    """All images are whole, of one size, from the artists the split is meant to show."""
    found = samples(split)
    for sample in found.values():
        with Image.open(io.BytesIO(sample["webp"])) as image:
            image.load()
            assert (image.size, image.mode) == ((64, 64), "RGB")
    assert {key.partition("-")[0] for key in found} == STYLES[split]


def test_captions_hold_name_and_tags() -> None:
    """Each train sample has a caption and, in its JSON, the parts that captions are varied from."""
    for key, sample in samples("train").items():
        assert set(sample) == {"webp", "txt", "json"}
        parts = json.loads(sample["json"])
        assert set(parts) == {"label", "tags", "group", "style"}
        assert key.startswith(f"{parts['style']}-")
        assert sample["txt"].decode() == f"{parts['label']}: {', '.join(parts['tags'])}".removesuffix(": ")


@pytest.mark.parametrize("test", TESTS)
def test_labels_fit_classnames(test: str) -> None:
    """At least 150 unique names; each has as many images as the test has artists, and no other occurs."""
    names = labels(test)
    numbers = [int(sample["cls"]) for sample in samples(test).values()]
    assert len(set(names)) == len(names) >= 150
    assert sorted(numbers) == sorted(list(range(len(names))) * len(STYLES[test]))


@pytest.mark.parametrize("test", TESTS)
def test_layout_is_clip_benchmarks(test: str) -> None:
    """Templates have a place for the class and nshards.txt counts the tars."""
    templates = (SHARDS / test / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert templates
    assert all("{c}" in template for template in templates)
    tars = {path.name for path in (SHARDS / test / "test").glob("*.tar")}
    assert tars == {f"{n}.tar" for n in range(int((SHARDS / test / "test" / "nshards.txt").read_text()))}


def test_unseen_concepts_are_unseen() -> None:
    """No concept of that test is in train, by code points or by name, whatever its sex or age."""

    def core(label: str) -> str:
        sexes = {"man", "woman", "person", "men", "women", "people", "boy", "girl", "child"}
        return " ".join(word for word in label.replace(":", "").split() if word not in sexes)

    assert not codes("emoji-unseen-concepts") & codes("train")
    unseen = {core(label) for label in labels("emoji-unseen-concepts")}
    assert not unseen & {core(label) for label in train_labels()}
    assert len(unseen) == len(labels("emoji-unseen-concepts"))


def test_unseen_style_shows_concepts_of_train() -> None:
    """That test asks for the same concepts, under the same names, from another artist."""
    assert codes("emoji-unseen-style") <= codes("train")
    assert set(labels("emoji-unseen-style")) <= train_labels()


def test_train_drawings_come_in_pairs() -> None:
    """Every train concept has both artists' drawings."""
    found = samples("train")
    assert {f"{style}-{code}" for style in STYLES["train"] for code in codes("train")} == set(found)


def test_no_test_image_is_in_train() -> None:
    """No test image equals a train image pixel by pixel."""

    def pixels(split: str) -> set[bytes]:
        return {Image.open(io.BytesIO(sample["webp"])).tobytes() for sample in samples(split).values()}

    train = pixels("train")
    assert not train & pixels("emoji-unseen-concepts")
    assert not train & pixels("emoji-unseen-style")


def test_licences_lie_beside_the_data() -> None:
    """The README names every source, its licence, and the file with its text."""
    readme = (SHARDS / "README.md").read_text(encoding="utf-8")
    for words in (
        "Noto Emoji",
        "Twemoji",
        "OpenMoji",
        "emojibase",
        "Apache-2.0",
        "CC BY 4.0",
        "CC BY-SA 4.0",
        "MIT",
    ):
        assert words in readme
    texts = sorted((SHARDS / "licenses").iterdir())
    assert len(texts) == 4
    for text in texts:
        assert f"licenses/{text.name}" in readme
        assert text.stat().st_size > 1000
