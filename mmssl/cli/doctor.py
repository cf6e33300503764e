"""`mmssl doctor`: the verb."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA]...", help="Shards whose speed and index to look at: paths, URLs or patterns."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON instead of a table.")] = False,
) -> None:
    """Check versions, devices, precision, memory, limits and shards of this machine, each problem with its remedy.

    Reads only: nothing is written and nothing is sent. Exit code 1 when something must be mended before training.

    Example: mmssl doctor '/data/pairs/*.tar'
    """
    from mmssl.apps.doctor import examine, examine_shards, gather, worst

    with Console(stderr=True).status("looking at this machine"):
        findings = examine(gather(Path.cwd()))
        findings += examine_shards(data) if data else []
    state = worst(findings)
    if as_json:
        print(json.dumps({"state": state, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        table = Table(
            Column("", no_wrap=True), "state", Column("found", overflow="fold"), Column("remedy", overflow="fold")
        )
        for finding in findings:
            color = COLORS[finding.state]
            table.add_row(
                finding.name, f"[{color}]{finding.state}[/{color}]", *map(escape, (finding.found, finding.remedy))
            )
        Console().print(table)
    if state == "error":
        raise typer.Exit(1)
