"""`mmssl presets`."""

from typing import Annotated

import typer

from mmssl.cli.common import verb
from mmssl.errors import UserError


@verb(155)
def presets(
    name: Annotated[
        str | None, typer.Argument(help="Print this preset's YAML: mmssl presets small > mine.yaml")
    ] = None,
) -> None:
    """List the configurations that come with the package, or print one.

    `mmssl train` and `mmssl show` take a preset's name in place of a file:
    mmssl train small 'data.train=/data/pairs/*.tar' run_dir=runs/mine
    """
    from mmssl.config import preset_names, preset_text

    names = preset_names()
    if name is not None:
        if name not in names:
            raise UserError(f"no preset is named {name!r}; there are: {', '.join(names)}")
        print(preset_text(name), end="")
        return
    width = max(map(len, names))
    for each in names:
        print(f"{each:{width}}  {preset_text(each).splitlines()[0].removeprefix('# ')}")
