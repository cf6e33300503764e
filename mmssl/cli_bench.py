"""`mmssl bench`: what parts of a run cost on this machine, beside their peers."""

from typing import Annotated

import typer

bench_app = typer.Typer(
    help="Measure parts of a run on this machine, beside their peers.", no_args_is_help=True, rich_markup_mode=None
)


@bench_app.command("plan")
def plan(
    samples: Annotated[int, typer.Option(min=1, help="Samples of the set.")] = 10_000_000,
    shards: Annotated[int, typer.Option(min=1, help="Shards they stand in.")] = 10_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 4096,
) -> None:
    """What the order of a very large set costs: an epoch's plan, and the first batch of a run that is resumed.

    The set is made up: one small shard under many names. Needs about 100 MB on disk for 10,000 shards.
    """
    from mmssl.bench.plan import bench_plan

    print(bench_plan(samples, shards, batch_size).text())
