"""`mmssl report`."""

from pathlib import Path
from typing import Annotated

import typer

from mmssl.cli.common import Device, parse_device, status, verb


@verb(90)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html, the only file of the report.")] = Path("report"),
    images: Annotated[
        int, typer.Option(min=0, help="Images to encode per dataset, for examples and the map; 0: none.")
    ] = 1000,
    method: Annotated[
        str | None, typer.Option(help="Method of the example maps, as in mmssl explain. Default: rise.")
    ] = None,
    device: Device = None,
) -> None:
    """Write an HTML page about runs: curves, metrics, examples with maps, searches, and commands to repeat them."""
    from rich.text import Text

    from mmssl.apps.report import write_report

    with status("reading") as spinner:
        page, notes = write_report(
            runs,
            out,
            images=images,
            method=method,
            device=parse_device(device),
            progress=lambda text: spinner.update(Text(text)),
        )
    for note in notes:
        print(f"note: {note}")
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB)")
