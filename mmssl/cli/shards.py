"""`mmssl shards`: index, check and show WebDataset shards."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import (
    CaptionMember,
    ImageMember,
    check_file,
    counted,
    group,
    progress_bar,
    status,
    stdout,
    writing,
)
from mmssl.errors import UserError

if TYPE_CHECKING:
    from mmssl.data.health import KnownImages
    from mmssl.data.shards import SampleLimits, ShardIndex

shards_app = group(
    210, "shards", "Index, check, show and pack shards: tars of KEY.jpg (png, webp, ...) with KEY.txt, KEY.json."
)

_LISTED = 20
"""Damaged shards that are listed one by one."""

Patterns = Annotated[
    list[str],
    typer.Argument(
        metavar="PATTERN...",
        help="Shards: files, folders, URLs, globs ('a/*.tar', in quotes) and braces ('a/{00000..00099}.tar').",
    ),
]
Template = Annotated[
    str, typer.Option("--caption", help="Caption template: {txt}, or fields of the .json, as in '{label}: {tags}'.")
]
MaxMember = Annotated[
    float, typer.Option("--max-member-mib", help="Largest member in MiB; samples with a larger one are left out.")
]


@shards_app.command("index")
def index(
    patterns: Patterns,
    processes: Annotated[int, typer.Option(min=0, help="Processes that read headers; 0: threads only.")] = 0,
    max_member_mib: MaxMember = 64.0,
    image_member: ImageMember = None,
    caption_member: CaptionMember = None,
) -> None:
    """Write the index of shards: the offset of every sample, in NAME.tar.idx and mmssl-index.json.

    Training indexes local shards by itself. Remote ones (s3://, gs://) need this command once; for shards behind a web
    server, run it where the files are stored. Only new and changed shards are read.

    Example: mmssl shards index '/data/pairs/*.tar'
    """
    from rich.filesize import decimal

    from mmssl.data import expand
    from mmssl.data.sources import account_of_indexes, make_index
    from mmssl.data.storage import Access

    names = expand(patterns)
    with progress_bar("shards", text="indexing") as bar:
        limits = shard_limits(max_member_mib, image_member, caption_member)
        found = make_index(names, limits, Access(), processes, bar.update)
    samples, size = sum(i.samples for i in found), sum(i.bytes for i in found)
    print(f"{counted(len(found), 'shard')}, {counted(samples, 'sample')}, {decimal(size)}")
    account, problems = account_of_indexes(found), [f"{i.shard}: {problem}" for i in found for problem in i.problems]
    if problems:
        print(f"{counted(len(problems), 'damaged shard')}:", *problems[:_LISTED], sep="\n  ")
    if len(problems) > _LISTED:
        print("  ...")
    print(account.text())
    if problems or account.omitted:
        print("for a full report: mmssl shards check PATTERN")
    unwritten = sorted({str(Path(i.shard).parent) for i in found if i.offsets is not None and "://" not in i.shard})
    if unwritten:
        raise UserError(
            f"{', '.join(unwritten)} cannot be written, so the index was not kept; copy the shards elsewhere"
        )
    if account.used == 0:
        raise UserError(f"no sample of {names[0]}{_more(len(names))} is usable; see the causes above")


@shards_app.command("check")
def check(
    patterns: Patterns,
    caption: Template = "{txt}",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="Tokenizer to measure captions with: a folder, a hub name, clip, or train for one that is learnt from "
            "these captions, as in training."
        ),
    ] = "train",
    vocab_size: Annotated[int, typer.Option(min=64, help="Largest vocabulary of a learnt tokenizer.")] = 8192,
    max_tokens: Annotated[int, typer.Option(min=4, help="Length at which training cuts captions, in tokens.")] = 77,
    image_size: Annotated[int, typer.Option(min=1, help="Side of the model's images, in pixels.")] = 224,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Batch size for the expected number of false negatives.")
    ] = 256,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Shards of another split: count the images that are copies or near copies of theirs. Repeat."
        ),
    ] = None,
    first: Annotated[int | None, typer.Option(min=1, help="Check only the first N samples.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all statistics to this file.")] = None,
    image: Annotated[Path | None, typer.Option(help="Draw the distributions to this PNG.")] = None,
    max_member_mib: MaxMember = 64.0,
    image_member: ImageMember = None,
    caption_member: CaptionMember = None,
) -> None:
    """Check every sample and report the health of a dataset, with a list of what to fix, most serious first.

    The report covers sample counts, samples left out and why, image sizes and formats, exact and near duplicates,
    caption lengths, repetitions and scripts, captions that the tokenizer cuts or does not know, captions too short for
    masked words, and expected false negatives per batch.

    Examples: mmssl shards check '/data/pairs/*.tar' --image health.png;
    mmssl shards check 'out/train-*.tar' --against 'out/val-*.tar'
    """
    from mmssl.data import expand
    from mmssl.data.health import check_health, draw_report, survey_shards
    from mmssl.data.shards import is_remote
    from mmssl.data.transforms import captions, load_tokenizer, train_tokenizer

    captions.check_templates([caption])
    names, limits = expand(patterns), shard_limits(max_member_mib, image_member, caption_member)
    others = expand(against) if against else []
    check_file(json_file, "--json")
    check_file(image, "--image")
    tokens = None if tokenizer == "train" else load_tokenizer(tokenizer, max_tokens)
    indexed = _indexed([name for name in names if not is_remote(name)], limits)
    total = None if len(indexed) < len(names) else sum(i.groups for i in indexed)
    if first is not None:
        total = first if total is None else min(first, total)
    problems = [f"{i.shard}: {problem}" for i in indexed for problem in i.problems]
    with progress_bar("samples", text="checking") as bar:
        found = survey_shards(
            names,
            template=caption,
            limits=limits,
            first=first,
            problems=problems,
            progress=lambda done: bar.update(done, total),
        )
    if tokens is None and len(found):
        with status("learning a tokenizer"):
            tokens = train_tokenizer(found.captions, vocab_size, max_tokens)
    known = known_images(others, max_member_mib) if others else None
    health = check_health(found, tokenizer=tokens, image_size=image_size, batch_size=batch_size, against=known)
    if json_file is not None:
        with writing(json_file, "--json", "give another file"):
            json_file.write_text(health.json(), encoding="utf-8", errors="backslashreplace")
    if image is not None:
        with writing(image, "--image", "give another file"):
            draw_report(found, health, image, tokens)
    terminal = stdout()
    print(health.text(terminal.width if terminal.is_terminal else None))
    if not len(found):
        raise UserError(f"no sample of {names[0]}{_more(len(names))} is usable; see the causes above")


@shards_app.command("show")
def show(
    patterns: Patterns,
    key: Annotated[
        str | None, typer.Option(help="Show one sample: its key in the tar, or shard:key as in logs.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images on the sheet.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of the random choice.")] = 0,
    columns: Annotated[int, typer.Option(min=1, help="Images per row.")] = 8,
    side: Annotated[int, typer.Option(min=32, help="Side of an image on the sheet, in pixels.")] = 160,
    caption: Template = "{txt}",
    out: Annotated[Path | None, typer.Option(help="PNG to write. Default: sheet.png; with --key, none.")] = None,
    image_member: ImageMember = None,
    caption_member: CaptionMember = None,
) -> None:
    """Draw a sheet of random samples with their captions, or print one sample in full.

    Examples: mmssl shards show '/data/pairs/*.tar' --out sheet.png;
    mmssl shards show '/data/pairs/*.tar' --key 000012345
    """
    from mmssl.data import expand
    from mmssl.data.health import browse
    from mmssl.data.transforms import captions
    from mmssl.plotting import has_font

    captions.check_templates([caption])
    names, limits = expand(patterns), shard_limits(64.0, image_member, caption_member)
    out = Path("sheet.png") if out is None and key is None else out
    check_file(out, "--out")
    with status("reading"):
        samples = [browse.find(names, key, limits)] if key is not None else browse.pick(names, count, seed, limits)
        if not samples:
            raise UserError(f"no sample of {names[0]} can be used; run: mmssl shards check PATTERN")
        if out is not None:
            shown = browse.entries(samples, [caption])
            sheet = browse.contact_sheet(shown, min(columns, len(samples)), side)
            with writing(out, remedy="give another file"):
                sheet.save(out, "PNG")
    if key is not None:
        print(browse.describe(samples[0]))
    if out is not None:
        print(out)
        boxes = sum(not has_font(entry.caption) for entry in shown)
        if boxes:
            print(f"{boxes} captions have letters that no installed font shows; install one, such as Noto Sans CJK")


def known_images(shards: Sequence[str], max_member_mib: float = 64.0) -> "KnownImages":
    """The images of other shards, read with a progress bar."""
    from mmssl.data.health import read_known_images

    with progress_bar("images", text="reading the other shards") as bar:
        return read_known_images(shards, shard_limits(max_member_mib), lambda done: bar.update(done, None))


def _more(count: int) -> str:
    """Words for the shards behind the first of `count`."""
    return "" if count == 1 else f" and {count - 1:,} more"


def shard_limits(
    max_member_mib: float = 64.0, image_member: list[str] | None = None, caption_member: list[str] | None = None
) -> "SampleLimits":
    from mmssl.data import MemberNames
    from mmssl.data.shards import SampleLimits

    return SampleLimits(int(max_member_mib * 2**20), MemberNames.of(image_member or [], caption_member or []))


def _indexed(shards: Sequence[str], limits: "SampleLimits") -> "list[ShardIndex]":
    """The index of local shards; missing entries are made."""
    from mmssl.data.shards import index_shards

    with progress_bar("shards", text="indexing") as bar:
        return index_shards(shards, limits, progress=bar.update)
