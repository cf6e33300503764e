"""Datasets of painted numbers."""

from pathlib import Path

import pytest

from tests.helpers.toy_encoder import pack, paint


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A folder in CLIP_benchmark's layout: 7 classes of numbers, the last without images; 40 images."""
    home = tmp_path / "numbers"
    records = [{"png": paint(100 + i % 6, variant=i), "cls": i % 6} for i in range(40)]
    pack(home / "test" / "0.tar", records[:25])
    pack(home / "test" / "1.tar", records[25:])
    (home / "test" / "nshards.txt").write_text("2")
    (home / "classnames.txt").write_text("\n".join(f"number {100 + c}" for c in range(7)) + "\n")
    (home / "zeroshot_classification_templates.txt").write_text("a {c}\nan image of the {c}.\n")
    return home


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A retrieval folder: 30 images with 1, 2 or 3 captions each."""
    home = tmp_path / "captioned"
    lines = [[f"{'a ' * k} number {200 + i}" for k in range(1 + i % 3)] for i in range(30)]
    records = [{"png": paint(200 + i, variant=i), "txt": "\n".join(lines[i]) + "\n"} for i in range(30)]
    pack(home / "test" / "0.tar", records)
    (home / "test" / "nshards.txt").write_text("1")
    (home / "dataset_type.txt").write_text("retrieval\n")
    return home
