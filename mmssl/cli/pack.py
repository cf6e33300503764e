"""`mmssl shards pack`: shards from folders, tables, datasets and other shards."""

from collections.abc import Callable, Mapping, Sequence
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmssl.cli.common import (
    CaptionColumn,
    CaptionMember,
    Encoding,
    ImageColumn,
    ImageMember,
    Separator,
    counted,
    progress_bar,
)
from mmssl.cli.shards import known_images, shard_limits, shards_app
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.data.packing import Exclusion, Packed, Records
    from mmssl.data.shards import SampleLimits

_Source = Annotated[
    Path,
    typer.Argument(
        help="Folder of images with NAME.txt or NAME.json beside them, a table, a saved dataset, or shards."
    ),
]
_Out = Annotated[Path, typer.Option(help="Folder of the shards. Run the same command again to resume.")]
_Splits = Annotated[
    list[str] | None,
    typer.Option(
        "--split",
        metavar="NAME=FRACTION",
        help="Split and its fraction of the samples, for example train=0.95; repeat. Default: all in train.",
    ),
]
_ShardSamples = Annotated[int, typer.Option(min=1, help="Samples per shard.")]
_Resize = Annotated[int | None, typer.Option(min=1, help="Shrink larger images to this shorter side, in pixels.")]
_Format = Annotated[Literal["keep", "jpeg", "png", "webp"], typer.Option(help="Format of the packed images.")]
_Quality = Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEG and WebP.")]
_MaxPixels = Annotated[
    int,
    typer.Option(
        min=1, help="Images with more pixels are left out. Each thread takes up to 17 bytes per pixel of an image."
    ),
]
_KeyColumn = Annotated[str | None, typer.Option(help="Column of keys. Default: found by name, else numbers.")]
_WithoutCopies = Annotated[
    list[str] | None,
    typer.Option(help="Shards: leave out images that are copies or near copies of theirs. Repeat for several."),
]
_WithoutLeaks = Annotated[
    bool,
    typer.Option(
        "--without-leaks",
        help="With --split: leave out of a larger split the copies and near copies of images in a smaller one.",
    ),
]
_GroupBy = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD",
        help="With --split: column of a table or field of the .json; pairs with the same value, such as a patient, "
        "stay in one split.",
    ),
]
_SplitBy = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD",
        help="In place of --split: column of a table or field of the .json that names the split of each pair; "
        "`folder` for a folder of images with folders train, val ...",
    ),
]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads. Default: one per core.")]


@shards_app.command("pack")
def pack(
    source: _Source,
    out: _Out,
    splits: _Splits = None,
    shard_samples: _ShardSamples = 2000,
    resize: _Resize = None,
    format: _Format = "keep",
    quality: _Quality = 90,
    max_pixels: _MaxPixels = 89_478_485,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    separator: Separator = None,
    encoding: Encoding = None,
    key_column: _KeyColumn = None,
    without_copies_of: _WithoutCopies = None,
    without_leaks: _WithoutLeaks = False,
    group_by: _GroupBy = None,
    split_by: _SplitBy = None,
    threads: _Threads = None,
    image_member: ImageMember = None,
    caption_member: CaptionMember = None,
) -> None:
    """Pack images and captions into shards, and index them.

    SOURCE is a folder of images, a table of paths (or images) and captions, or a Hugging Face dataset saved with
    save_to_disk. Tables are CSV, TSV, JSON and Parquet files, also compressed; their separator, encoding and columns
    are recognised and printed. Shards ('a/*.tar', in quotes) are packed again: members that lie apart are joined, and
    unusable samples left out. A hash of its key assigns each sample to a split, so splits do not change when samples
    are added; --split-by reads the split from a field instead. Unusable samples are counted by cause, and listed in
    bad_samples.jsonl.

    Example: mmssl shards pack photos/ --out shards/ --split train=0.95 --split val=0.05 --resize 512
    """
    from mmssl.data import packing

    if split_by is not None and splits:
        raise UserError("--split draws splits and --split-by reads them from a field; give one of them")
    exclusion = _exclusion(without_copies_of or [], without_leaks)
    table = {
        "image_column": image_column,
        "caption_column": caption_column,
        "key_column": key_column,
        "separator": separator,
        "encoding": encoding,
    }
    records = _open(source, shard_limits(64.0, image_member, caption_member), table)
    if records.describe():
        print(records.describe())
    with progress_bar("samples", text="packing") as bar:
        packed = packing.pack(
            records,
            out,
            splits=split_by or _parse_splits(splits),
            shard_samples=shard_samples,
            encoding=packing.Encoding(resize, format, quality, max_pixels),
            threads=threads,
            progress=bar.update,
            exclusion=exclusion,
            group_by=group_by,
        )
    _report(packed, source, out)


def _open(source: Path, limits: "SampleLimits", table: Mapping[str, Any]) -> "Records":
    """The records of a folder, tables or shards, opened with a progress bar.

    Args:
        table: how to read a table: options of `open_records`.
    """
    from mmssl.data import packing

    is_pattern = has_magic(str(source)) or "{" in str(source)
    if is_pattern and not source.exists() and packing.table_suffix(source.name) is None:
        return packing.ShardRecords(_tars(source), limits)
    words = ("files", "listing") if source.is_dir() else ("rows", "reading the table")
    with progress_bar(words[0], text=words[1]) as bar:
        return packing.open_records(source, limits=limits, progress=lambda done: bar.update(done, None), **table)


def _report(packed: "Packed", source: Path, out: Path) -> None:
    """Print the shards, what to do next, and the account of all pairs.

    Raises:
        UserError: no pair is usable.
    """
    from mmssl.data.packing import BAD
    from mmssl.data.transforms import captions

    for name, paths in packed.shards.items():
        print(f"{name}: {counted(len(paths), 'shard')}, {counted(packed.counts[name], 'sample')}")
    if packed.kept:
        print(f"{counted(packed.kept, 'shard')} existed already")
    if packed.shards.get("train"):
        print(f"train on them with data.train='{out}/train-*.tar'")
    if packed.long_captions:
        print(
            f"{counted(packed.long_captions, 'caption')} of more than {captions.LONGEST:,} characters: training leaves "
            "these pairs out; shorten them, or raise data.max_caption_chars"
        )
    if packed.account.omitted:
        print(f"pairs left out are listed in {out / BAD}")
    print(packed.account.text())
    if packed.account.used == 0:
        raise UserError(f"no pair of {source} is usable, so there is no shard; see the causes above")


def _tars(pattern: Path) -> list[str]:
    """The local shards that a pattern names.

    Raises:
        UserError: it names something else.
    """
    from mmssl.data import expand
    from mmssl.data.shards import is_remote

    names = expand(str(pattern))
    other = next((name for name in names if is_remote(name) or Path(name).suffix != ".tar"), None)
    if other is not None:
        raise UserError(f"{other} is not a local .tar file; a pattern to pack names shards on a disk")
    return names


def _exclusion(patterns: Sequence[str], leaks: bool) -> "Exclusion | None":
    """What `pack` leaves out: copies of images in given shards, and of those in smaller splits."""
    from mmssl.data import expand
    from mmssl.data.health import read_known_images
    from mmssl.data.packing import Exclusion

    if not patterns and not leaks:
        return None
    given = expand(patterns) if patterns else []
    known = known_images(given)

    def finder(smaller: Sequence[Path]) -> Callable[[bytes], str | None]:
        others = read_known_images([*map(str, smaller)] if leaks else [])
        return lambda image: known.find(image) or others.find(image)

    return Exclusion(f"copies of {given}{' and of smaller splits' if leaks else ''}", finder)


def _parse_splits(splits: Sequence[str] | None) -> dict[str, float] | None:
    """Split name -> fraction, from `NAME=FRACTION` words."""
    if not splits:
        return None
    fractions = {}
    for split in splits:
        name, _, fraction = split.partition("=")
        try:
            fractions[name] = float(fraction)
        except ValueError:
            raise UserError(f"--split {split} is not NAME=FRACTION, for example train=0.95") from None
        if not name or "/" in name:
            raise UserError(f"--split {split} has no valid name; give it as in train=0.95")
    return fractions
