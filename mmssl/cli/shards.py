"""`mmssl shards`: index, check, look at and make WebDataset shards."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.data.packing import Format
    from mmssl.data.shards import SampleLimits, ShardIndex

shards_app = typer.Typer(
    help="Index, check, look at and make shards: tars of KEY.jpg (png, webp, ...) with KEY.txt, KEY.json.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Patterns = Annotated[
    list[str],
    typer.Argument(
        metavar="PATTERN...",
        help="Shards: files, folders, URLs, globs ('a/*.tar', in quotes) and braces ('a/{00000..00099}.tar').",
    ),
]
Template = Annotated[
    str, typer.Option("--caption", help="How a caption is made: {txt}, or fields of the .json as in '{label}: {tags}'.")
]
MaxMember = Annotated[float, typer.Option("--max-member-mib", help="Members above this make their sample unusable.")]


@shards_app.command("index")
def index(
    patterns: Patterns,
    processes: Annotated[int, typer.Option(min=0, help="Processes that read headers; 0: threads.")] = 0,
    max_member_mib: MaxMember = 64.0,
) -> None:
    """Find every sample of shards by their headers and write down where it stands: NAME.tar.idx, mmssl-index.json.

    Training does this by itself for local shards; remote ones (s3://, gs://) need it once, and a web server needs the
    files that were made where the shards are stored. Only what is missing or changed is read.

    Example: mmssl shards index '/data/pairs/*.tar'
    """
    from mmssl.data import expand
    from mmssl.data.shards import describe_problems
    from mmssl.data.sources import make_index
    from mmssl.data.storage import Access

    names = expand(patterns)
    with _bar("indexing", "shards") as tick:
        found = make_index(names, _limits(max_member_mib), Access(), processes, tick)
    print(
        f"{len(found):,} shards, {sum(i.samples for i in found):,} samples, {sum(i.bytes for i in found) / 1e9:.3g} GB"
    )
    lost = describe_problems(found)
    if lost is not None:
        print(f"{lost}\nfor a whole report: mmssl shards check PATTERN")
    unwritten = sorted({str(Path(i.shard).parent) for i in found if i.offsets is not None and "://" not in i.shard})
    if unwritten:
        raise UserError(
            f"{', '.join(unwritten)} cannot be written, so the index was not kept; copy the shards elsewhere"
        )


@shards_app.command("check")
def check(
    patterns: Patterns,
    caption: Template = "{txt}",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name: captions are then measured in its tokens, not in words.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=4, help="With --tokenizer: where training cuts captions.")] = 77,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the images that the model sees.")] = 224,
    batch_size: Annotated[int, typer.Option(min=2, help="Batch for which false negatives are expected.")] = 256,
    first: Annotated[int | None, typer.Option(min=1, help="Look at the first so many samples only.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    image: Annotated[Path | None, typer.Option(help="Draw the distributions to this PNG.")] = None,
    max_member_mib: MaxMember = 64.0,
) -> None:
    """Look at every sample and report the health of a data set, ending with what to fix, the gravest first.

    Counts; samples left out and why; sizes and formats of images; exact and near copies; caption lengths,
    repetitions and scripts; captions too short for masked words; false negatives to expect in a batch.

    Example: mmssl shards check '/data/pairs/*.tar' --image health.png
    """
    from mmssl.data import expand
    from mmssl.data.health import check_health, draw_report, survey_shards
    from mmssl.data.shards import is_remote
    from mmssl.data.transforms import captions, load_tokenizer

    captions.check_templates([caption])
    names, limits = expand(patterns), _limits(max_member_mib)
    _refuse_unwritable(json_file, image)
    tokens = None if tokenizer is None else load_tokenizer(tokenizer, max_tokens)
    known = _indexed([name for name in names if not is_remote(name)], max_member_mib)
    total = None if len(known) < len(names) else sum(i.groups for i in known)
    if first is not None:
        total = first if total is None else min(first, total)
    problems = [f"{i.shard}: {problem}" for i in known for problem in i.problems]
    with _bar("looking at", "samples") as tick:
        found = survey_shards(
            names,
            template=caption,
            limits=limits,
            first=first,
            problems=problems,
            progress=lambda done: tick(done, total),
        )
    health = check_health(found, tokenizer=tokens, image_size=image_size, batch_size=batch_size)
    if json_file is not None:
        with _writing(json_file):
            json_file.write_text(health.json(), encoding="utf-8")
    if image is not None:
        with _writing(image):
            draw_report(found, health, image, tokens)
    print(health.text())


@shards_app.command("show")
def show(
    patterns: Patterns,
    key: Annotated[
        str | None, typer.Option(help="Show this one sample: its key in the tar, or shard:key as logs name it.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 48,
    seed: Annotated[int, typer.Option(help="Another seed, other images.")] = 0,
    columns: Annotated[int, typer.Option(min=1, help="Images in a row.")] = 8,
    side: Annotated[int, typer.Option(min=32, help="Pixels of an image on the sheet.")] = 160,
    caption: Template = "{txt}",
    out: Annotated[
        Path | None, typer.Option(help="PNG to write. Default: sheet.png; none for one sample, unless given.")
    ] = None,
) -> None:
    """Draw a sheet of random samples with their captions, or tell all about one sample.

    Examples: mmssl shards show '/data/pairs/*.tar' --out sheet.png;
    mmssl shards show '/data/pairs/*.tar' --key 000012345
    """
    from mmssl.data import expand
    from mmssl.data.health import browse
    from mmssl.data.transforms import captions

    captions.check_templates([caption])
    names = expand(patterns)
    out = Path("sheet.png") if out is None and key is None else out
    _refuse_unwritable(out)
    with Console(stderr=True).status("reading"):
        samples = [browse.find(names, key)] if key is not None else browse.pick(names, count, seed)
        if not samples:
            raise UserError(f"no sample of {names[0]} can be used; run: mmssl shards check PATTERN")
        if out is not None:
            sheet = browse.contact_sheet(browse.entries(samples, [caption]), min(columns, len(samples)), side)
            with _writing(out):
                sheet.save(out, "PNG")
    if key is not None:
        print(browse.describe(samples[0]))
    if out is not None:
        print(out)


@shards_app.command("pack")
def pack(
    source: Annotated[
        Path,
        typer.Argument(help="Folder of images with NAME.txt or NAME.json beside them, a table, or a data set on disk."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the shards; calling again goes on where it was interrupted.")],
    splits: Annotated[
        list[str] | None,
        typer.Option("--split", metavar="NAME=SHARE", help="Repeat: train=0.95 val=0.05. Default: all in train."),
    ] = None,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 2000,
    resize: Annotated[
        int | None, typer.Option(min=1, help="Shrink images so that their shorter side has so many pixels.")
    ] = None,
    format: Annotated[str, typer.Option(help="keep, jpeg, png or webp.")] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 90,
    image_column: Annotated[str | None, typer.Option(help="Column of paths or images. Default: found by name.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column of captions. Default: found by name.")] = None,
    key_column: Annotated[
        str | None, typer.Option(help="Column of keys. Default: found by name, else counted.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one a core.")] = None,
) -> None:
    """Make shards of images with captions, with their index.

    SOURCE is a folder of images, a CSV, TSV, JSONL or Parquet table of paths (or images) and captions, or a
    Hugging Face data set saved with save_to_disk. Splits are drawn by a hash of each key, so they stay as they are
    when samples are added. What cannot be used is named in bad_samples.jsonl.

    Example: mmssl shards pack photos/ --out shards/ --split train=0.95 --split val=0.05 --resize 512
    """
    from mmssl.data.packing import Encoding, open_records
    from mmssl.data.packing import pack as write

    encoding = Encoding(resize=resize, format=_format(format), quality=quality)
    records = open_records(source, image_column, caption_column, key_column)
    with _bar("packing", "samples") as tick:
        packed = write(
            records,
            out,
            splits=_shares(splits),
            shard_samples=shard_samples,
            encoding=encoding,
            threads=threads,
            progress=tick,
        )
    for name, paths in packed.shards.items():
        print(f"{name}: {len(paths)} shards, {packed.counts[name]:,} samples")
    if packed.kept:
        print(f"{packed.kept} shards stood there already")
    if packed.bad:
        key, why = packed.bad[0]
        print(f"{len(packed.bad)} left out, named in {out / 'bad_samples.jsonl'}; first: {key}: {why}")
    print(f"train on them with data.train='{out}/train-*.tar'" if "train" in packed.shards else str(out))


class _Tick(Protocol):
    def __call__(self, done: int, total: int | None) -> None:
        """Move the bar."""


@contextmanager
def _bar(what: str, unit: str) -> Iterator[_Tick]:
    """A progress bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _limits(max_member_mib: float) -> "SampleLimits":
    from mmssl.data.shards import SampleLimits

    return SampleLimits(max_member_bytes=int(max_member_mib * 2**20))


def _indexed(shards: Sequence[str], max_member_mib: float) -> "list[ShardIndex]":
    """The index of local shards, made where it is missing."""
    from mmssl.data.shards import index_shards

    with _bar("indexing", "shards") as tick:
        return index_shards(shards, _limits(max_member_mib), progress=tick)


def _refuse_unwritable(*files: Path | None) -> None:
    """Raises UserError before the work is done, not after it."""
    for file in files:
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise UserError(f"cannot write {file}; name a file in a folder that exists and can be written")


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; name another file") from None


def _format(name: str) -> "Format":
    formats: tuple[Format, ...] = ("keep", "jpeg", "png", "webp")
    for known in formats:
        if name == known:
            return known
    raise UserError(f"no format {name!r}; there are {', '.join(formats)}")


def _shares(splits: Sequence[str] | None) -> dict[str, float] | None:
    """Split -> share of `NAME=SHARE` words."""
    if not splits:
        return None
    shares = {}
    for split in splits:
        name, _, share = split.partition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UserError(f"--split {split} is not NAME=SHARE, for example train=0.95") from None
        if not name or "/" in name:
            raise UserError(f"--split {split} has no usable name; for example train=0.95")
    return shares
