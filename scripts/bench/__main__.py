"""`mmssl bench`: what parts of a run cost on this machine, beside their peers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmssl.errors import UserError

bench_app = typer.Typer(
    help="Measure parts of a run on this machine, beside their peers.", no_args_is_help=True, rich_markup_mode=None
)


@bench_app.command("data")
def data(
    shards: Annotated[
        str | None, typer.Option(help="Shards to read. Default: seeded photographs, made for the measurement.")
    ] = None,
    sides: Annotated[
        list[int] | None, typer.Option("--side", help="Shorter side of the photographs; repeat. Default: 512 and 1024.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the photographs that are made.")] = 90,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is measured, in turn.")] = 3,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 256 a measurement.")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Workers of either side.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs over which memory is watched, 2 or more; 0: none.")] = 20,
    peer_python: Annotated[
        str | None,
        typer.Option(
            help="Interpreter with open_clip_torch 3.3.0 and webdataset 0.2.86. Default: makes an environment."
        ),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Measure OpenCLIP too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Samples per CPU-second of the training stream, beside OpenCLIP's own loader and the attainable limit.

    Both read the same shards and make the same 224-px images (random resized crop, bicubic) and token ids. CPU time
    is that of the whole process tree, user and system, after a warm-up. The limit is decoding and resizing alone, by
    the same libraries, on one thread. For steady figures pin it to a core: taskset -c 1 mmssl bench data
    """
    if epochs == 1:
        raise UserError("--epochs 1 shows no growth; give 2 or more, or 0")
    from scripts.bench.data import Options, bench_data
    from scripts.bench.peer import make_environment

    python = (peer_python or make_environment()) if peer else None
    options = Options(python, batches=batches, workers=workers, rounds=rounds, quality=quality, epochs=epochs)
    with Console(stderr=True).status("starting") as status:
        report = bench_data(options, sides=sides or (512, 1024), shards=shards, progress=status.update)
    print(report.text())
    if json_file is not None:
        try:
            json_file.write_text(report.json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}") from None


@bench_app.command("plan")
def plan(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the set.")] = 10_000_000,
    shards: Annotated[int, typer.Option(min=1, help="Shards they stand in.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 4096,
) -> None:
    """What the order of a very large set costs: an epoch's plan, and the first batch of a run that is resumed.

    The set is made up: one small shard under many names. Needs about 100 MB on disk for 10,000 shards.
    """
    from scripts.bench.plan import bench_plan

    print(bench_plan(samples, shards, batch_size).text())


@bench_app.command("loss")
def loss(
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Pairs; repeat. Default: 4096, 8192 and 16384.")
    ] = None,
    kind: Annotated[str, typer.Option("--loss", help="contrastive or siglip.")] = "contrastive",
    form: Annotated[str, typer.Option(help="plain, blocked or auto.")] = "auto",
    dim: Annotated[int, typer.Option(min=1, help="Size of the features.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each side, in turn.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    peer_up_to: Annotated[int, typer.Option(help="Largest batch at which open_clip is measured.")] = 16384,
) -> None:
    """Time and memory of a loss, forward and backward, beside open_clip's; each measurement in a fresh process."""
    from scripts.bench.loss import bench_loss, table

    if kind not in ("contrastive", "siglip") or form not in ("auto", "plain", "blocked"):
        raise UserError(f"no loss {kind!r} in form {form!r}; there are contrastive and siglip; plain, blocked and auto")
    sizes = batches or (4096, 8192, 16384)
    print(
        table(
            bench_loss(
                sizes,
                loss="siglip" if kind == "siglip" else "contrastive",
                form="plain" if form == "plain" else "blocked" if form == "blocked" else "auto",
                dim=dim,
                rounds=rounds,
                device=device,
                threads=threads,
                peer_up_to=peer_up_to,
            )
        )
    )


@bench_app.command("step")
def step(
    config: Annotated[str, typer.Argument(help="A YAML file, for example configs/vit_b32_bert.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the configuration.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Objectives joined by '+', for example contrastive or 'contrastive(mask_ratio=0.75)+mlm'; repeat. "
            "Default: all, the configuration's own mix."
        ),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Measure open_clip's model and loss on the same towers too.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each side, in turn.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a measurement.")] = 4,
    peak_tflops: Annotated[
        float | None, typer.Option(help="The device's best TFLOP/s at this precision, for its utilisation (MFU).")
    ] = None,
) -> None:
    """Time and memory of a training step, beside open_clip's on the same towers, weights and real captions.

    Sides take turns, each measurement in a process of its own; ratios are to the first side.
    """
    from mmssl.config import load_config
    from scripts.bench.step import bench_step

    settings = load_config(config, overrides or [])
    found = bench_step(settings, mix or ["all"], peer=peer, rounds=rounds, steps=steps)
    print(found.text(peak_tflops))


@bench_app.command("embed")
def embed(
    model: Annotated[str, typer.Argument(help="A run or a model folder.")],
    data: Annotated[str, typer.Argument(help="A folder in CLIP_benchmark's layout, or a pattern of shards.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images a forward pass, on both sides.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Processes of clip_benchmark's loader, one a shard at most.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each side, in turn.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    tower: Annotated[
        bool, typer.Option("--tower", help="Compare mmssl embed with the tower's forward on rendered images instead.")
    ] = False,
) -> None:
    """Images a second from shards to features, beside clip_benchmark's own loop on the same model and shards."""
    from mmssl.evaluate.datasets import open_dataset
    from mmssl.inference.model import load
    from scripts.bench.embed import bench_embed
    from scripts.bench.embed_tower import bench_tower

    dataset = open_dataset(data)
    judged = load(model).to(device)
    if tower:
        print(bench_tower(judged, dataset.shards, batch_size=batch_size, rounds=rounds).text())
        return
    print(bench_embed(judged, dataset, batch_size=batch_size, workers=workers, rounds=rounds).text())
