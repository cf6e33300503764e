"""Hard captions from labelled or captioned shards: one attribute of a name exchanged, for `mmssl eval --task pairs`.

    python -m scripts.hard_pairs 'data/val-*.tar' --out hard
    mmssl eval RUN hard --task pairs

writes two datasets. hard/captions: each image whose name has an attribute (a colour, a direction ...), with its name
and one wrong one. The wrong name is that of another image if exchanging an attribute gives one; else an attribute is
replaced by another that occurs in the data. hard/groups: two images of the same set and style, whose names differ by
one attribute; each is in one group at most.
"""

import argparse
import io
import json
import random
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmssl.errors import UserError
from mmssl.evaluate import open_dataset
from mmssl.evaluate.datasets import Dataset, read
from mmssl.evaluate.labels import class_indices
from mmssl.types import Sample

ATTRIBUTES = {  # attribute -> sets of words that exclude each other
    "colour": ["red orange yellow green blue purple brown black white pink gray"],
    "direction": ["left right up down up-left up-right down-left down-right"],
    "gender": ["man woman", "men women", "boy girl"],
    "number": ["one two three four five six seven eight nine ten eleven twelve"],
    "shape": ["circle square triangle diamond hexagon heart star"],
    "sign": ["plus minus check x"],
    "size": ["small medium large"],
    "state": ["open closed", "horizontal vertical", "high low", "full empty"],
    "style": ["thin bold fill duotone"],
}
TONES = [f"{tone} skin tone" for tone in ("light", "medium-light", "medium", "medium-dark", "dark")]
RIVALS = {  # word -> its attribute, and the words that exclude it
    word: (attribute, tuple(words))
    for attribute, words in [("skin tone", TONES), *((a, s.split()) for a, sets in ATTRIBUTES.items() for s in sets)]
    for word in words
}
WORDS = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(map(re.escape, RIVALS), key=len, reverse=True))})(?![\w-])")


@dataclass(frozen=True)
class Named:
    """An image and its name in lower case."""

    sample: Sample
    name: str


@dataclass(frozen=True)
class Wrong:
    """A wrong name."""

    name: str
    attribute: str
    """That differs from the right name."""


def named_samples(dataset: Dataset, field: str | None) -> list[Named]:
    """Every image with its name: a field, the name of its class, or its first caption up to a colon.

    Raises:
        UserError: an image has none.
    """
    samples = list(read(dataset))
    if not samples:
        raise UserError(f"{dataset.name} has no usable image; give shards with images")
    if field is None and dataset.classnames is not None:
        classes, labels = class_indices(dataset, samples)
        names = [classes[label] for label in labels.tolist()]
    else:
        names = [str(s.fields.get(field, "")) if field else s.caption.partition("\n")[0].split(":")[0] for s in samples]
    unnamed = next((s for s, name in zip(samples, names, strict=True) if not name.strip()), None)
    if unnamed is not None:
        where = f"field {field!r}" if field else "class or caption"
        raise UserError(f"{unnamed.key} in {unnamed.shard} has no {where}; name the field of the names: --field FIELD")
    return [Named(s, " ".join(name.lower().split())) for s, name in zip(samples, names, strict=True)]


def exchanges(name: str, chosen: Sequence[str]) -> Iterator[Wrong]:
    """The names that differ by one of some attributes: a word replaced, or two words of one attribute exchanged."""
    found = [place for place in WORDS.finditer(name) if RIVALS[place[0]][0] in chosen]
    for place in found:
        attribute, words = RIVALS[place[0]]
        for word in words:
            if word != place[0]:
                yield Wrong(name[: place.start()] + word + name[place.end() :], attribute)
    for number, first in enumerate(found):
        for second in found[number + 1 :]:
            attribute, words = RIVALS[first[0]]
            if second[0] in words and second[0] != first[0]:
                between = name[first.end() : second.start()]
                yield Wrong(name[: first.start()] + second[0] + between + first[0] + name[second.end() :], attribute)


def wrong_names(images: Sequence[Named], chosen: Sequence[str], seed: int) -> list[tuple[Named, Wrong, bool]]:
    """A wrong name for each image that has one, and whether it is the name of another image."""
    names = {row.name for row in images}
    vocabulary = {word for name in names for word in WORDS.findall(name)}
    found = []
    for row in images:
        wrong = [w for w in exchanges(row.name, chosen) if w.name not in row.sample.caption.lower()]
        real = [w for w in wrong if w.name in names]
        made = [w for w in wrong if vocabulary.issuperset(WORDS.findall(w.name))]
        if real or made:
            found.append((row, random.Random(f"{seed} {row.sample.key}").choice(real or made), bool(real)))
    return found


def groups(
    images: Sequence[Named], chosen: Sequence[str], same: Sequence[str], seed: int
) -> list[tuple[Named, Named, str]]:
    """Two different images each, whose names differ by one attribute, and that attribute.

    Args:
        chosen: attributes.
        same: fields whose values both images share.
    """
    places: dict[tuple[str, ...], list[Named]] = {}
    for row in images:
        places.setdefault((row.name, *(str(row.sample.fields.get(field)) for field in same)), []).append(row)
    order, taken, found = list(images), set[int](), []
    random.Random(seed).shuffle(order)
    for row in order:
        context = tuple(str(row.sample.fields.get(field)) for field in same)
        partners = [(other, w) for w in exchanges(row.name, chosen) for other in places.get((w.name, *context), [])]
        free = [(o, w) for o, w in partners if o.sample.id not in taken and o.sample.image != row.sample.image]
        if free and row.sample.id not in taken:
            partner, wrong = free[0]
            taken |= {row.sample.id, partner.sample.id}
            found.append((row, partner, wrong.attribute))
    return found


def write(folder: Path, records: Sequence[tuple[Named, dict[str, object]]]) -> None:
    """A dataset of one shard: images with their names as captions, and fields."""
    path = folder / "test" / "0.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (named, fields) in enumerate(records):
            with Image.open(io.BytesIO(named.sample.image)) as image:
                suffix = str(image.format).lower()
            members = {suffix: named.sample.image, "txt": named.name.encode(), "json": json.dumps(fields).encode()}
            for kind, content in members.items():
                info = tarfile.TarInfo(f"{number:06d}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, exchange, write, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a folder in CLIP_benchmark's layout, or a pattern of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for the datasets")
    parser.add_argument("--field", help="JSON entry of the names. Default: the class name, else the caption to a colon")
    parser.add_argument("--same", default="set,style", help="JSON entries that both images of a group share")
    parser.add_argument("--attribute", action="append", help=f"only this one; repeat it. {', '.join(known())}")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among several wrong names")
    args = parser.parse_args(arguments)
    chosen = args.attribute or known()
    if unknown := [name for name in chosen if name not in known()]:
        raise UserError(f"--attribute {unknown[0]} is unknown; choose among: {', '.join(known())}")
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty; name another folder: --out FOLDER")
    images = named_samples(open_dataset(args.data), args.field)
    singles = wrong_names(images, chosen, args.seed)
    doubles = groups(images, chosen, args.same.split(","), args.seed)
    if not singles:
        raise UserError(f"no name in {args.data} has a word of: {', '.join(chosen)}; name another field: --field FIELD")
    write(args.out / "captions", [(row, {"negatives": [w.name], "attribute": w.attribute}) for row, w, _ in singles])
    if doubles:
        both = [(row, n, attribute) for n, (*pair, attribute) in enumerate(doubles) for row in pair]
        write(args.out / "groups", [(row, {"group": n, "attribute": attribute}) for row, n, attribute in both])
    captions, real = Counter(w.attribute for _, w, _ in singles), Counter(w.attribute for _, w, true in singles if true)
    pairs = Counter(attribute for *_, attribute in doubles)
    print(f"{'attribute':<12}{'captions':>10}{'wrong one of another image':>30}{'groups':>8}")
    for name in (name for name in known() if captions[name]):
        print(f"{name:<12}{captions[name]:>10}{real[name]:>30}{pairs[name]:>8}")
    print(f"{'all':<12}{len(singles):>10}{sum(real.values()):>30}{len(doubles):>8}")


def known() -> list[str]:
    """The attributes."""
    return sorted({attribute for attribute, _ in RIVALS.values()})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
