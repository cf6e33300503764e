# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy==2.4.6", "pillow==13.0.0", "resvg-py==0.5.0"]
# ///
"""Build the embedded shards from freely licensed emoji drawings, byte for byte the same every time.

    uv run scripts/make_shards.py [--out shards] [--cache ~/.cache/mmssl-shards]

The packages come through `npm pack`. Each concept (variants in sex or age and near-identical series count as
one) falls on one side of the split: its Noto and Twemoji drawings go to train or to the unseen-concepts test,
and for some of the train concepts the OpenMoji drawing goes to the unseen-style test.
"""

import argparse
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

PACKAGES = {  # name@version -> SHA-256 of the packed file
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "openmoji@17.0.0": "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    "emojibase-data@17.0.0": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
DRAWINGS = {  # style -> package, folder of its drawings
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/"),
    "openmoji": ("openmoji@17.0.0", "package/color/svg/"),
}
SEED = "mmssl"
SIDE = 64
MIN_PSNR = 36.0  # dB
UNSEEN_CONCEPTS = 230
UNSEEN_STYLE = 400
TRAIN_SHARDS = 4
TAR_BYTES = 8 * 2**20 - 96 * 2**10  # of all tars together; the rest of the 8 MiB is for texts
TEST_SAMPLE_BYTES = 2500  # on average, and a little more
TEMPLATES = "{c}\n"

# Signs and country flags are writing: what an unseen one is called cannot be seen from others.
SKIPPED_GROUPS = {"components", "symbols", "flags"}
# Concepts that differ by sex or age only, under code points that do not say so.
SAME = (
    ("child", "boy", "girl"),
    ("older person", "old man", "old woman"),
    ("person with crown", "prince", "princess"),
    ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    ("pregnant person", "pregnant woman", "pregnant man"),
    ("person feeding baby", "breast-feeding"),
    ("woman dancing", "man dancing"),
    ("people holding hands", "women holding hands", "men holding hands", "woman and man holding hands"),
)
# Concepts whose drawings differ by a number or a degree only.
SERIES = (
    r"(?P<name>family|kiss|couple with heart)(:.*)?$",
    r"\w+(-thirty| o’clock)$",
    r"\d\w\w place medal$",
    r"speaker \w+ volume$",
    r"globe showing .*$",
    r"(waxing|waning) (crescent|gibbous) moon$|(first|last) quarter moon$",
    r"(first|last) quarter moon face$",
)


@dataclass(frozen=True)
class Concept:
    """One thing with a name; `code` is its code points without presentation selectors, `order` Unicode's."""

    order: int
    code: str
    label: str
    tags: tuple[str, ...]
    group: str

    @property
    def caption(self) -> str:
        """Name and tags in a line."""
        return f"{self.label}: {', '.join(self.tags)}" if self.tags else self.label


def fetch(package: str, cache: Path) -> Path:
    """The packed file of an npm package, from the cache or the registry; its digest is checked."""
    name, version = package.split("@")
    path = cache / f"{name}-{version}.tgz"
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", package, "--silent", "--pack-destination", str(cache)], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != PACKAGES[package]:
        raise ValueError(f"{path} has SHA-256 {digest}, expected {PACKAGES[package]}; delete it and run again")
    return path


def normal_code(name: str) -> str:
    """Code points in upper case without the presentation selectors, which the sources write differently."""
    return "-".join(part for part in name.upper().split("-") if part not in ("FE0E", "FE0F"))


def read_folder(packed: Path, folder: str) -> dict[str, bytes]:
    """Code points -> file content, for the drawings right inside `folder` of a packed package."""
    with tarfile.open(packed) as tar:
        members = (m for m in tar if m.isfile() and m.name.rpartition("/")[0] + "/" == folder)
        return {normal_code(Path(m.name).stem): tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def read_concepts(packed: Path) -> list[Concept]:
    """All named emoji in Unicode order (skin tones are nested below these and left out)."""
    with tarfile.open(packed) as tar:
        data, messages = (json.load(tar.extractfile(f"package/en/{n}.json")) for n in ("data", "messages"))  # type: ignore[arg-type]
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    return [
        Concept(e["order"], normal_code(e["hexcode"]), e["label"], tuple(e["tags"]), groups[e["group"]])
        for e in sorted((e for e in data if "group" in e), key=lambda e: e["order"])
    ]


def family_keys(concept: Concept) -> list[str]:
    """Two concepts that share a key are variants of one thing."""
    sexless = [c for c in concept.code.split("-") if c not in ("200D", "2640", "2642", "27A1")]
    keys = ["code " + "-".join("1F9D1" if c in ("1F468", "1F469") else c for c in sexless)]
    keys += [f"same {i}" for i, labels in enumerate(SAME) if concept.label in labels]
    for i, series in enumerate(SERIES):
        if match := re.match(series, concept.label):
            keys.append(f"series {i} {match.groupdict().get('name')}")
    return keys


def representatives(concepts: Iterable[Concept]) -> list[Concept]:
    """One concept of each family: the first in Unicode order of those that name no sex, or else of all."""
    family_of: dict[str, int] = {}
    families: dict[int, list[Concept]] = {}
    for number, concept in enumerate(concepts):
        keys = family_keys(concept)
        met = sorted({family_of[key] for key in keys if key in family_of})
        home = met[0] if met else number
        families.setdefault(home, []).append(concept)
        for other in met[1:]:
            families[home] += families.pop(other)
            family_of = {key: home if family == other else family for key, family in family_of.items()}
        family_of |= dict.fromkeys(keys, home)
    return [min(family, key=neutrality) for family in families.values()]


def neutrality(concept: Concept) -> tuple[bool, int]:
    """Sorts a form that names no sex first."""
    return re.search(r"\b((wo)?m[ae]n|boy|girl)\b", concept.label) is not None, concept.order


def by_hash(items: Iterable[Concept], purpose: str) -> list[Concept]:
    """A shuffle that depends on the names alone, so that it survives additions to the sources."""
    return sorted(items, key=lambda c: hashlib.sha256(f"{SEED} {purpose} {c.code}".encode()).digest())


def draw(content: bytes) -> Image.Image:
    """A drawing (PNG, or SVG) on white, SIDE x SIDE."""
    if b"<svg" in content[:1000]:
        content = bytes(resvg_py.svg_to_bytes(svg_string=content.decode(), width=SIDE, height=SIDE))
    drawing = Image.open(io.BytesIO(content)).convert("RGBA")
    assert drawing.size == (SIDE, SIDE), drawing.size
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return page.convert("RGB")


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Likeness of two images in dB."""
    error = np.square(np.asarray(image, np.float64) - np.asarray(other, np.float64)).mean()
    return 10 * math.log10(255**2 / max(error, 1e-2))


def encode(image: Image.Image) -> bytes:
    """Lossless WebP of a palette: as few tar blocks as MIN_PSNR allows, then as many colours as they hold."""

    def reduced(colours: int) -> Image.Image:
        palette = image.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
        return palette.convert("RGB")

    def webp(reduced_image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        reduced_image.save(buffer, "WEBP", lossless=True, quality=80, method=4)
        return buffer.getvalue()

    low = next(n for n in (8, 12, 16, 24, 32, 48, 64, 96, 128, 256) if psnr(image, reduced(n)) >= MIN_PSNR)
    best, high = webp(reduced(low)), 192
    room = math.ceil(len(best) / 512) * 512
    while high - low > 8:
        colours = (low + high) // 2
        trial = webp(reduced(colours))
        if len(trial) <= room:
            best, low = trial, colours
        else:
            high = colours
    return best


Record = list[tuple[str, bytes]]
"""The members of one sample: name and content."""


def tar_size(record: Record) -> int:
    """Bytes of a sample in a tar: a header block for each member, and content in whole blocks."""
    return sum(512 + -(-len(content) // 512) * 512 for _, content in record)


def write_tar(path: Path, records: Iterable[Record]) -> None:
    """A plain tar whose bytes depend on names and contents alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            for name, content in record:
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o644
                tar.addfile(info, io.BytesIO(content))


def train_record(concept: Concept, style: str, image: bytes) -> Record:
    """Image, caption, and the caption's parts."""
    key = f"{style}-{concept.code}"
    parts = {"label": concept.label, "tags": concept.tags, "group": concept.group, "style": style}
    text = json.dumps(parts, ensure_ascii=False)
    return [(f"{key}.webp", image), (f"{key}.txt", concept.caption.encode()), (f"{key}.json", text.encode())]


def test_record(concept: Concept, style: str, image: bytes, label: int) -> Record:
    """Image and class number."""
    key = f"{style}-{concept.code}"
    return [(f"{key}.webp", image), (f"{key}.cls", str(label).encode())]


def write_test(folder: Path, classes: Sequence[Concept], styles: Sequence[str], images: dict) -> None:
    """A test in CLIP_benchmark's folder layout."""
    records = [test_record(c, s, images[s, c.code], n) for n, c in enumerate(classes) for s in styles]
    write_tar(folder / "test" / "0.tar", records)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("".join(f"{c.label}\n" for c in classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text(TEMPLATES)


def choose(concepts: Sequence[Concept], sizes: dict[str, int]) -> dict[str, list[Concept]]:
    """Split -> its concepts. Train takes what fits beside the tests; `sizes`: code -> bytes in train."""
    order = by_hash(concepts, "split")
    unseen, seen = order[:UNSEEN_CONCEPTS], order[UNSEEN_CONCEPTS:]
    room = TAR_BYTES - (len(unseen) * 2 + UNSEEN_STYLE) * TEST_SAMPLE_BYTES
    train = [c for c, used in zip(seen, np.cumsum([sizes[c.code] for c in seen]), strict=True) if used <= room]
    style = by_hash(train, "style")[:UNSEEN_STYLE]
    return {"train": train, "unseen-style": in_order(style), "unseen-concepts": in_order(unseen)}


def in_order(concepts: Iterable[Concept]) -> list[Concept]:
    """Unicode order, which puts like beside like."""
    return sorted(concepts, key=lambda c: c.order)


def write_train(folder: Path, concepts: Sequence[Concept], images: dict) -> None:
    """Both drawings of each concept, mixed over the shards."""
    records = [(c, s) for c in concepts for s in ("noto", "twemoji")]
    records.sort(key=lambda r: hashlib.sha256(f"{SEED} order {r[1]} {r[0].code}".encode()).digest())
    for shard in range(TRAIN_SHARDS):
        part = records[shard::TRAIN_SHARDS]
        write_tar(folder / f"train-{shard:05d}.tar", [train_record(c, s, images[s, c.code]) for c, s in part])


def report(out: Path, splits: dict[str, list[Concept]], fidelity: list[float], spare: int) -> None:
    """Write SHA256SUMS and print what was made."""
    tars = sorted(out.rglob("*.tar"))
    sums = [f"{hashlib.sha256(t.read_bytes()).hexdigest()}  {t.relative_to(out).as_posix()}\n" for t in tars]
    (out / "SHA256SUMS").write_text("".join(sums))
    print(f"{'split':<18}{'samples':>8}{'classes':>8}{'bytes':>10}")
    for name, concepts in splits.items():
        own = [t for t in tars if name in t.relative_to(out).parts[0]]
        samples = len(concepts) * (1 if name == "unseen-style" else 2)
        print(f"{name:<18}{samples:>8}{len(concepts):>8}{sum(t.stat().st_size for t in own):>10}")
    total = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    print(f"left out for lack of room: {spare} concepts; bytes in all: {total}")
    print(f"PSNR of the images: median {np.median(fidelity):.1f} dB, lowest {min(fidelity):.1f} dB")


def main() -> None:
    """Fetch, choose, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "shards")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "mmssl-shards")
    args = parser.parse_args()

    drawings = {s: read_folder(fetch(package, args.cache), folder) for s, (package, folder) in DRAWINGS.items()}
    concepts = [
        c
        for c in representatives(read_concepts(fetch("emojibase-data@17.0.0", args.cache)))
        if c.group not in SKIPPED_GROUPS and all(c.code in drawn for drawn in drawings.values())
    ]
    images = {(s, c.code): draw(drawn[c.code]) for s, drawn in drawings.items() for c in concepts}
    encoded = {key: encode(image) for key, image in images.items() if key[0] != "openmoji"}
    sizes = {
        c.code: sum(tar_size(train_record(c, s, encoded[s, c.code])) for s in ("noto", "twemoji")) for c in concepts
    }
    splits = choose(concepts, sizes)
    encoded |= {("openmoji", c.code): encode(images["openmoji", c.code]) for c in splits["unseen-style"]}

    for folder in ("train", "emoji-unseen-style/test", "emoji-unseen-concepts/test"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    write_train(args.out / "train", splits["train"], encoded)
    write_test(args.out / "emoji-unseen-style", splits["unseen-style"], ["openmoji"], encoded)
    write_test(args.out / "emoji-unseen-concepts", splits["unseen-concepts"], ["noto", "twemoji"], encoded)
    fidelity = [psnr(images[key], Image.open(io.BytesIO(content)).convert("RGB")) for key, content in encoded.items()]
    used = len(splits["train"]) + len(splits["unseen-concepts"])
    report(args.out, splits, fidelity, len(concepts) - used)


if __name__ == "__main__":
    main()
