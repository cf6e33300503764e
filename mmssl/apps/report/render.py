"""Rendering of the templates. Captions, class names and paths are escaped; only the page's own script runs."""

import base64
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmssl.apps.report.curves import Curves
from mmssl.apps.report.space import SHEET_COLUMNS, SHEET_SIDE

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
    """The templates of the package: HTML is escaped, Markdown is not; an undefined name is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("mmssl.apps.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment


def _source(environment: "Environment", name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
