"""Command line of the benchmarks: `python -m scripts.bench VERB`, run from the root of the repository."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mmssl.errors import UserError

app = typer.Typer(
    help="Measure parts of a run on this machine, beside other libraries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each side. The sides take turns.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
ModelPath = Annotated[str, typer.Argument(help="A run or a model folder.")]
DataPath = Annotated[str, typer.Argument(help="A folder in CLIP_benchmark's layout, or a pattern of shards.")]


@app.command()
def data(
    shards: Annotated[str | None, typer.Option(help="Shards to read. Default: make photographs from a seed.")] = None,
    sides: Annotated[
        list[int] | None, typer.Option("--side", help="Shorter side of the photographs; repeat. Default: 512 and 1024.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the photographs.")] = 90,
    rounds: Rounds = 3,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 256 per measurement.")] = 6,
    workers: Annotated[int, typer.Option(min=1, help="Workers of each loader.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs over which memory is recorded: 2 or more, or 0 for none.")] = 20,
    peer_python: Annotated[
        str | None,
        typer.Option(
            help="Interpreter with open_clip_torch 3.3.0 and webdataset 0.2.86. Default: create an environment."
        ),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Measure OpenCLIP too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all measurements to this file.")] = None,
) -> None:
    """Samples per CPU-second of the training loader, beside OpenCLIP's loader and the attainable limit.

    Both read the same shards and make the same 224-px images (random resized crop, bicubic) and token ids. CPU time
    is that of the process tree, user and system, after a warm-up. The limit is decoding and resizing alone, with
    the same libraries, on one thread. Pin it to one core for steady results: taskset -c 1 python -m scripts.bench data
    """
    if epochs == 1:
        raise UserError("--epochs 1 shows no growth; give 2 or more, or 0")
    from scripts.bench.data import Options, bench_data
    from scripts.bench.openclip_env import make_environment

    python = (peer_python or make_environment()) if peer else None
    options = Options(python, batches=batches, workers=workers, rounds=rounds, quality=quality, epochs=epochs)
    with Console(stderr=True).status("starting") as status:
        report = bench_data(options, sides=sides or (512, 1024), shards=shards, progress=status.update)
    print(report.text())
    if json_file is not None:
        try:
            json_file.write_text(report.json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {json_file}: {error.strerror}; give another path") from None


@app.command()
def cache(
    side: Annotated[int, typer.Option(min=8, help="Shorter side of the photographs.")] = 2048,
    resize: Annotated[int, typer.Option(min=1, help="Shorter side of the images that are kept.")] = 512,
    samples: Annotated[int, typer.Option(min=64, help="Photographs of an epoch.")] = 512,
    mode: Annotated[Literal["quality", "fast"], typer.Option("--decode", help="How JPEGs are decoded.")] = "quality",
    rounds: Rounds = 3,
) -> None:
    """Samples per CPU-second of the training loader with data.cache.resize, in the first and the second epoch.

    The photographs are made from a seed. CPU time is that of the process, user and system.
    """
    from scripts.bench.cache import bench_cache

    with Console(stderr=True).status("starting") as status:
        print(bench_cache(side, resize, samples, mode=mode, rounds=rounds, progress=status.update).text())


@app.command()
def sources(
    files: Annotated[int, typer.Option(min=2, help="Files of the folder, half of them images.")] = 200_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 2_000_000,
) -> None:
    """Cost of opening large sources: time to the first sign of progress, total time, and memory.

    Both are generated. They need about 1 GB on disk.
    """
    from scripts.bench.sources import bench_sources

    print(bench_sources(files, rows))


@app.command()
def plan(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the dataset.")] = 10_000_000,
    shards: Annotated[int, typer.Option(min=1, help="Shards that hold them.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 4096,
    files: Annotated[bool, typer.Option(help="Begin runs from files too, about 100 MB for 10,000 shards.")] = True,
) -> None:
    """Cost of ordering a very large dataset: the plan of an epoch, and the first batch of a resumed run.

    The dataset is synthetic: indexes in memory for the plan, and one small shard under many names for the runs.
    """
    from scripts.bench.plan import bench_plan

    print(bench_plan(samples, shards, batch_size, files=files).text())


@app.command()
def loss(
    batches: Annotated[
        list[int] | None, typer.Option("--batch", help="Pairs per batch; repeat. Default: 4096, 8192 and 16384.")
    ] = None,
    kind: Annotated[Literal["contrastive", "siglip"], typer.Option("--loss", help="Loss to measure.")] = "contrastive",
    form: Annotated[
        Literal["auto", "plain", "blocked", "triton"], typer.Option(help="How the logits are computed.")
    ] = "auto",
    dim: Annotated[int, typer.Option(min=1, help="Dimension of the features.")] = 512,
    rounds: Rounds = 3,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's own choice.")] = None,
    peer_up_to: Annotated[int, typer.Option(help="Largest batch at which open_clip is measured.")] = 16384,
) -> None:
    """Time and memory of a loss, forward and backward, beside open_clip's; each measurement in a fresh process."""
    from scripts.bench.loss import bench_loss, table

    comparisons = bench_loss(
        batches or (4096, 8192, 16384),
        loss=kind,
        form=form,
        dim=dim,
        rounds=rounds,
        device=device,
        threads=threads,
        peer_up_to=peer_up_to,
    )
    print(table(comparisons))


@app.command()
def step(
    config: Annotated[str, typer.Argument(help="A YAML file, for example configs/vit_b32_bert.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the configuration.")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="Objectives joined by '+', for example contrastive or 'contrastive(mask_ratio=0.75)+mlm'; repeat. "
            "Default: all, the objectives of the configuration."
        ),
    ] = None,
    peer: Annotated[bool, typer.Option(help="Measure open_clip's model and loss on the same towers too.")] = True,
    rounds: Rounds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per measurement.")] = 4,
    peak_tflops: Annotated[
        float | None, typer.Option(help="Peak TFLOP/s of the device at this precision, for its utilisation (MFU).")
    ] = None,
) -> None:
    """Time and memory of a training step, beside open_clip's on the same towers, weights and captions.

    The sides take turns, each measurement in a process of its own. Ratios are to the first side.
    """
    from mmssl.config import load_config
    from scripts.bench.step import bench_step

    measured = bench_step(load_config(config, overrides or []), mix or ["all"], peer=peer, rounds=rounds, steps=steps)
    print(measured.text(peak_tflops))


@app.command()
def scale(
    config: Annotated[str, typer.Argument(help="A YAML file or a preset.")] = "configs/ci_tiny.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the configuration.")
    ] = None,
    ranks: Annotated[
        list[int] | None,
        typer.Option("--ranks", min=1, help="Processes; repeat. Default: 1, 2 and 4; of GPUs 8, 64 and 512."),
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, help="Global batches; repeat. Default: 128 and 512; of GPUs 32k to 512k."),
    ] = None,
    rounds: Rounds = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per training.")] = 8,
    gpus: Annotated[bool, typer.Option("--gpus", help="Print what the model says for H100s; measure nothing.")] = False,
    utilisation: Annotated[float, typer.Option(help="With --gpus: share of the peak FLOP/s that is reached.")] = 0.4,
    load_rate: Annotated[float, typer.Option(help="With --gpus: pairs per CPU-second of the loader.")] = 500.0,
    micro_batch: Annotated[int, typer.Option(min=1, help="With --gpus: pairs whose activations a GPU holds.")] = 2048,
) -> None:
    """A step's time over the number of ranks: a model of its parts, compared with training on CPU processes here.

    Constants are fitted to one process and to exchanges between two; the other trainings are predicted. All processes
    are taken to share one core: taskset -c 1 python -m scripts.bench scale
    """
    if gpus:
        from mmssl.config import load_config
        from scripts.bench.scale_gpus import project

        projection = project(load_config(config, overrides or []), utilisation, load_rate, micro_batch)
        print(projection.text(batches or [2**k for k in range(15, 20)], ranks or (8, 64, 512)))
        return
    from scripts.bench.scale import Training, bench_scale

    training = Training(config, overrides or [], steps)
    with Console(stderr=True).status("starting") as status:
        print(bench_scale(training, ranks or (1, 2, 4), batches or (128, 512), rounds, status.update).text())


@app.command()
def busy(
    config: Annotated[str, typer.Argument(help="A YAML file or a preset.")] = "configs/quickstart.yaml",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the configuration.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps per run.")] = 12,
    rounds: Rounds = 3,
    neighbours: Annotated[int, typer.Option(min=1, help="Busy processes that it starts beside the run.")] = 1,
) -> None:
    """Speed of training beside busy processes, relative to its speed alone."""
    from scripts.bench.busy import bench_busy

    print(bench_busy(config, overrides or [], steps, rounds, neighbours).text())


@app.command()
def embed(
    model: ModelPath,
    data: DataPath,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass, on both sides.")] = 64,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of clip_benchmark's loader, at most one per shard.")
    ] = 4,
    rounds: Rounds = 3,
    device: Device = "cpu",
    tower: Annotated[
        bool, typer.Option("--tower", help="Compare `mmssl embed` with the vision tower alone on decoded images.")
    ] = False,
) -> None:
    """Images per second from shards to features, beside clip_benchmark's own loop on the same model and shards."""
    from mmssl.evaluate import open_dataset
    from mmssl.inference import load
    from scripts.bench.embed import bench_embed
    from scripts.bench.embed_tower import bench_tower

    dataset = open_dataset(data)
    loaded = load(model).to(device)
    if tower:
        print(bench_tower(loaded, dataset.shards, batch_size=batch_size, rounds=rounds).text())
        return
    print(bench_embed(loaded, dataset, batch_size=batch_size, workers=workers, rounds=rounds).text())


@app.command()
def search(
    vectors: Annotated[int, typer.Option(min=100, help="Stored embeddings; they are synthetic.")] = 1_000_000,
    dim: Annotated[int, typer.Option(min=2, help="Their dimension.")] = 512,
    graph: Annotated[bool, typer.Option(help="Build the graph and measure it too.")] = True,
) -> None:
    """Milliseconds per query among stored embeddings, exactly and through the graph, and the recall of the graph.

    Building the graph of a million embeddings of 512 dimensions takes tens of minutes on one core.
    """
    from scripts.bench.search import bench_search

    with Console(stderr=True).status("searching"):
        measured = bench_search(vectors, dim, graph)
    print(measured.text())


@app.command()
def update(
    model: ModelPath,
    data: DataPath,
    images: Annotated[int, typer.Option(min=100, help="Images of DATA that are embedded, in 100 shards.")] = 10_000,
    rounds: Rounds = 5,
) -> None:
    """Seconds of `mmssl embed` after one shard of 100 changed, and after none did, beside those of the first time."""
    from mmssl.evaluate import open_dataset
    from mmssl.inference import load
    from scripts.bench.update import bench_update

    with Console(stderr=True).status("embedding"):
        measured = bench_update(load(model), open_dataset(data).shards, images, rounds)
    print(measured.text())


@app.command()
def storage(
    model: ModelPath,
    data: DataPath,
    dims: Annotated[
        list[int] | None, typer.Option("--dim", min=1, help="First dimensions to measure too; repeat.")
    ] = None,
) -> None:
    """Recall of the 10 nearest images when embeddings are stored in 16 or 8 bits, or with fewer dimensions.

    Queries are images and captions of DATA; the true neighbours are those of float32 embeddings.
    """
    from mmssl.evaluate import open_dataset
    from mmssl.inference import load
    from scripts.bench.storage import bench_storage

    with Console(stderr=True).status("embedding"):
        measured = bench_storage(load(model), open_dataset(data).shards, dims or ())
    print(f"{'':24} {'bytes':>6} {'images':>8} {'captions':>8}")
    print("\n".join(recall.text() for recall in measured))


@app.command()
def explain(
    model: ModelPath,
    data: DataPath,
    out: Annotated[Path, typer.Option(help="Folder for sanity.json and deletion.png.")],
    images: Annotated[int, typer.Option(min=2, help="Images drawn from the dataset.")] = 200,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Methods; repeat. Default: all that suit the tower.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Test explanation maps: deletion curves against random order, and maps of a model with shuffled weights."""
    from mmssl.evaluate import open_dataset
    from mmssl.files import write_json
    from mmssl.inference.model import load
    from scripts.bench.explain import draw_sanity, sample_pairs, sanity

    loaded = load(model).to(device)
    with Console(stderr=True).status("covering patches"):
        pixels, texts = sample_pairs(loaded, open_dataset(data), images)
        measured = sanity(loaded.encoder, pixels, texts, methods)
    try:
        write_json(out / "sanity.json", measured.json())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another path") from None
    draw_sanity(out / "deletion.png", measured)
    print(measured.text())


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder for gpu.json and gpu.md, written anew after each part.")],
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="cuda, or cpu with --tiny.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny towers and batches, to try the checklist itself.")] = False,
    shards: Annotated[str, typer.Option(help="Shards that steps and trainings read.")] = "shards/train/*.tar",
    part: Annotated[
        list[str] | None,
        typer.Option(help="Run this part alone: losses, step, loader, fsdp2, mixes or tests; repeat. Default: all."),
    ] = None,
) -> None:
    """Check and measure one GPU: its tests, ViT-B/16 steps, the loader beside them, losses, mixes, FSDP2.

    A part that fails is reported and costs no other; the exit status is then 1. Takes about 8 minutes on an H100.
    """
    import torch

    from scripts.bench.gpu import FULL, TINY, bench_gpu

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device; --device cpu --tiny tries the checklist without one")
    if device == "cpu":
        if not tiny:
            raise UserError("a CPU takes hours for the full sizes; add --tiny")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with Console(stderr=True).status("starting") as status:
        found = bench_gpu(out, TINY if tiny else FULL, device, shards, part or [], status.update)
    print(found.table())
    if found.errors:
        raise typer.Exit(1)


@app.command("mteb")
def mteb_beside(
    model: ModelPath,
    data: DataPath,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="zero_shot, retrieval, image_retrieval, clustering or composed; repeat. Default: what fits the data."
        ),
    ] = None,
) -> None:
    """Metrics by mteb and by mmssl on tasks of mteb that are made from a dataset: both columns should be equal."""
    import mmssl
    from mmssl.evaluate import open_dataset

    try:
        from scripts.bench.mteb import bench_mteb, suitable_tasks
    except ImportError as error:
        raise UserError(f"{error}; pip install 'mmssl[mteb]'") from None
    dataset = open_dataset(data)
    for row in bench_mteb(mmssl.load(model), dataset, task or suitable_tasks(dataset)):
        print(f"{dataset.name} {row.task} {row.metric}: mmssl {row.ours:.6f}, mteb {row.theirs:.6f}")


def main() -> None:
    """Run a verb; a wrong input is reported in one line."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
