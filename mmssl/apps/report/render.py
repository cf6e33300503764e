"""Rendering of the templates. Captions, class names and paths are escaped; only the page's own script runs."""

import base64
import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmssl.apps.report.curves import Curves
from mmssl.apps.report.space import SHEET_COLUMNS, SHEET_SIDE
from mmssl.errors import printable

if TYPE_CHECKING:
    from jinja2 import Environment


def render_page(*, title: str, views: Sequence[Any], curves: Curves, comparison: Any) -> str:
    """The HTML page. Its policy blocks all requests, and all scripts except the one with the given digest."""
    from markupsafe import Markup

    environment = templates()
    style, script = (Markup(_source(environment, name)) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()
    spaces = {e.id: e.gallery.space.points for v in views for e in v.evaluations if e.gallery and e.gallery.space}
    sanity = [{"run": v.run.name, **v.run.sanity} for v in views if v.run.sanity is not None]
    data = {"charts": [chart.json() for chart in curves.all()], "spaces": spaces, "sanity": sanity}
    return environment.get_template("page.html").render(
        title=title,
        views=views,
        curves=curves,
        comparison=comparison,
        style=style,
        script=script,
        digest=digest,
        data=data,
        sheet={"side": SHEET_SIDE, "columns": SHEET_COLUMNS},
    )


def render_card(**facts: Any) -> str:
    """The model card, Markdown."""
    return templates().get_template("card.md").render(**facts)


def templates() -> "Environment":
    """The templates of the package; an undefined name is an error.

    HTML is escaped. In Markdown, the filters `md` and `code` escape text of the data.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("mmssl.apps.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": _markdown, "code": _code}
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


def _source(environment: "Environment", name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _markdown(text: object) -> str:
    """Text that Markdown shows as it is: no tags, links, code or cells."""
    return re.sub(r"([\\`<>\[\]|])", r"\\\1", printable(" ".join(str(text).split())))


def _code(text: object) -> str:
    """Text for between backticks in a cell."""
    return printable(" ".join(str(text).split())).replace("`", "'").replace("|", "\\|")
