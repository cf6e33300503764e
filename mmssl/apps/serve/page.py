"""The page: one HTML document that asks nothing but this server's API."""

import base64
import hashlib
from importlib.resources import files


def render_page() -> tuple[str, str]:
    """The document, and the policy under which only its own style and script count.

    What comes from data (captions, labels, words) reaches the page as text, never as HTML.
    """
    own, report = files("mmssl.apps.serve") / "assets", files("mmssl.apps.report") / "templates"
    # The report's look, and what only this page has.
    style = (report / "page.css").read_text(encoding="utf-8") + (own / "page.css").read_text(encoding="utf-8")
    script = (own / "page.js").read_text(encoding="utf-8")
    page = (own / "page.html").read_text(encoding="utf-8")
    page = page.replace("<style></style>", f"<style>{style}</style>").replace(
        "<script></script>", f"<script>{script}</script>"
    )
    policy = (
        f"default-src 'self'; img-src 'self' data: blob:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    )
    return page, policy


def _digest(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
