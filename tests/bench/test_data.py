"""The comparison with OpenCLIP's loader: fair images, honest accounts of CPU time, right ratios."""

import io
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mmssl.errors import UserError
from scripts.bench.data import LoaderComparison, Memory, Options, Rates, bench_data, cpu_seconds
from scripts.bench.photographs import QUALITY, photographs, write_shards
from tests.helpers.images import photo

BURN = "import time\ndef burn(s):\n    end = time.process_time() + s\n    while time.process_time() < end: pass\n"


def test_photographs_are_seeded_and_cost_what_photographs_cost() -> None:
    """The same seed gives the same bytes; shapes vary; bits a pixel are those of a real photograph, within a third."""
    first = list(photographs(320, 12))
    assert first == list(photographs(320, 12))
    assert first != list(photographs(320, 12, seed=1))
    sizes = [Image.open(io.BytesIO(image)).size for image in first]
    assert {min(size) for size in sizes} == {320}
    assert len(set(sizes)) > 2
    made = sum(map(len, first)) * 8 / sum(width * height for width, height in sizes)
    file, real = io.BytesIO(), photo(512, 512)
    real.save(file, "JPEG", quality=QUALITY)
    assert 2 / 3 < made / (len(file.getvalue()) * 8 / (real.width * real.height)) < 3 / 2


def test_shards_hold_every_pair(tmp_path: Path) -> None:
    """The asked number of pairs, in equal shards, keys unique, captions not empty."""
    paths = write_shards(tmp_path, 32, samples=10, shards=3, distinct=4)
    names, images = [], set()
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                names.append(member.name)
                body = content.read()
                assert body
                if member.name.endswith(".jpg"):
                    images.add(body)
    assert sorted(names) == sorted(f"{i:07}.{extension}" for i in range(10) for extension in ("jpg", "txt"))
    assert len(images) == 4


def test_only_the_cpu_time_of_the_measured_part_counts_with_its_processes(tmp_path: Path) -> None:
    """A second burnt before `ready` is not counted; 0.4 s burnt by a child process afterwards are."""
    script = BURN + (
        "import subprocess, sys\n"
        "burn(1.0)\nprint('noise')\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        f"code = {BURN!r} + 'burn(0.4)\\nprint(1, flush=True)\\ninput()'\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdin=-1, stdout=-1)\n"
        "child.stdout.readline()\nprint('done', flush=True)\nsys.stdin.readline()\nchild.communicate(b'\\n')\n"
    )
    assert 0.39 <= cpu_seconds([sys.executable, "-c", script], tmp_path / "log") < 1.0


def test_a_side_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    """The error of the process, not a hang."""
    with pytest.raises(UserError, match="exit status 1: ZeroDivisionError"):
        cpu_seconds([sys.executable, "-c", "1 / 0"], tmp_path / "log")


def test_ratios_are_of_the_same_round() -> None:
    """Times OpenCLIP and part of the limit are medians of the rounds' own ratios."""
    rates = [
        Rates("stream", "quality", [400.0, 500.0, 900.0]),
        Rates("open_clip", "quality", [100.0, 100.0, 300.0]),
        Rates("limit", "quality", [800.0, 625.0, 1000.0]),
    ]
    ours, theirs = LoaderComparison("shards", 10, rates).text().splitlines()[2:4]
    assert ours.split() == ["mmssl,", "quality", "500", "[400,", "900]", "4.00", "[3.00,", "5.00]", "80%"]
    assert theirs.split() == ["open_clip", "100", "[100,", "300]"]


def test_growth_of_memory_is_of_the_later_half() -> None:
    """A loader that grows shows it, one that does not shows none; the first epoch, which fills caches, is left out."""
    mib = 2**20
    assert Memory(4, [10 * mib, *[100 * mib] * 9]).text().endswith("+0.0%")
    assert Memory(4, [100 * mib, 100 * mib, 100 * mib, 110 * mib, 110 * mib]).text().endswith("+6.7%")


@pytest.mark.slow
def test_the_whole_comparison_without_openclip() -> None:
    """Every case of ours is measured on images made for it, and memory is watched."""
    options = Options(None, image_size=32, batch_size=8, batches=4, warm_up=1, rounds=1, epochs=3)
    report = bench_data(options, sides=[64])
    (comparison,) = report.comparisons
    assert [(r.kind, r.mode) for r in comparison.rates] == [
        ("stream", "quality"),
        ("stream", "fast"),
        ("normalised", "quality"),
        ("limit", "quality"),
        ("limit", "fast"),
    ]
    assert all(rate > 0 for r in comparison.rates for rate in r.per_cpu_second)
    assert report.memory is not None
    assert len(report.memory.held) == 3
