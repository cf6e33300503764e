"""The package outside the clone: what `pip install .` gives is enough for the main job."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
BUILD = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
DRIVE = """
import sys
from mmssl.cli.main import main
def run(*words):
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
run("presets")
run("show", "small")
run("train", "--data", "my.csv", "--run", "chosen", "train.epochs=null", "train.steps=2", "data.batch_size=8")
small = ["model.vision.image_size=32", "data.batch_size=8", "train.minutes=null", "train.steps=2"]
run("train", "small", "run_dir=preset", "data.train=chosen/shards/*.tar", *small)
import mmssl
assert mmssl.__file__.startswith(sys.argv[1]), mmssl.__file__
"""


def test_a_wheel_trains_from_an_empty_folder(tmp_path: Path) -> None:
    """With only the files of the wheel, outside the clone: `presets`, `show PRESET`, `train --data my.csv` and
    `train PRESET`."""
    source, wheels, installed, work = (tmp_path / name for name in ("source", "wheels", "installed", "work"))
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "mmssl", source / "mmssl", ignore=shutil.ignore_patterns("__pycache__"))
    wheels.mkdir()
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(wheels)], cwd=source, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    work.mkdir()
    random = np.random.default_rng(0)
    rows = ["image,caption"]
    for number in range(40):
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(work / f"{number}.png")
        rows.append(f"{number}.png,a drawing with the number {number}")
    (work / "my.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVE, str(installed)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "small  " in done.stdout
    for run in ("chosen", "preset"):
        assert (work / run / "model" / "model.safetensors").is_file()
