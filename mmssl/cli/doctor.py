"""`mmssl doctor`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmssl.cli.common import status, stdout, verb

if TYPE_CHECKING:
    from mmssl.apps.doctor import Finding

COLORS = {"ok": "green", "warning": "yellow", "error": "red"}


@verb(60)
def doctor(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA]...", help="Shards to test for speed and index: paths, URLs or patterns."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON instead of a table.")] = False,
) -> None:
    """Check this machine and shards for training: versions, devices, precision, memory and limits, with remedies.

    Nothing is written and nothing is sent. The exit code is 1 if an error must be fixed before training.

    Example: mmssl doctor '/data/pairs/*.tar'
    """
    from mmssl.apps.doctor import examine, examine_shards, gather, worst

    with status("checking this machine"):
        findings = examine(gather(Path.cwd()))
        findings += examine_shards(data) if data else []
    state = worst(findings)
    if as_json:
        print(json.dumps({"state": state, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print_table(findings)
    if state == "error":
        raise typer.Exit(1)


def _print_table(findings: "list[Finding]") -> None:
    from rich.table import Column, Table
    from rich.text import Text

    # The remedy stands below what was found: four columns would be too narrow in a terminal of 80 characters.
    table = Table(Column("", overflow="fold"), Column("state", no_wrap=True), Column("found", ratio=1, overflow="fold"))
    for finding in findings:
        state = Text(finding.state, style=COLORS[finding.state])
        words = f"{finding.found}\n→ {finding.remedy}" if finding.remedy else finding.found
        table.add_row(Text(finding.name), state, Text(words))
    stdout().print(table)
