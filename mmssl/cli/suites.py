"""`mmssl suites`."""

from typing import Annotated

import typer

from mmssl.cli.common import stdout, verb


@verb(156)
def suites(
    name: Annotated[str | None, typer.Argument(help="List the datasets of this suite.")] = None,
) -> None:
    """List published suites of datasets, or the datasets of one: folder on the Hugging Face hub, and metric.

    Nothing is downloaded. mmssl eval RUN --suite NAME downloads the test splits and evaluates them.
    """
    from rich.table import Column, Table

    from mmssl.evaluate.published import SUITES, find_suite

    if name is None:
        table = Table("suite", "datasets", "what it is")
        for each, suite in SUITES.items():
            table.add_row(each, str(len(suite.sets)), suite.text)
    else:
        table = Table(Column("dataset of the hub", no_wrap=True), Column("metric", overflow="fold"))
        for one in find_suite(name).sets:
            table.add_row(one.hub, one.metric)
    stdout().print(table)
