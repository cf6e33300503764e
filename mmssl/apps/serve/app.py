"""The application: the page at / and the API under /api."""

import base64
import hashlib
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import StringConstraints

from mmssl.apps.search import Index
from mmssl.apps.serve.handlers import Method, RefusalError, Service
from mmssl.apps.serve.limits import BusyError, ServerLimits, Worker
from mmssl.apps.serve.schemas import ErrorAnswer, Guesses, Hits, Map, ModelFacts, ServerStatus
from mmssl.apps.serve.server import RETRY, Guard
from mmssl.inference import Model

Image = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]
IMAGE_THREADS = 2
"""Threads that read images from shards."""
DEFAULT_HITS = 24
NO_CONDITION: list[str] = []
_MAX_ROW = 2**53
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "The request cannot be read.",
        403: "The request comes from a page of another site.",
        404: "No such page, route or image.",
        408: "The request arrived too slowly.",
        413: "The upload or its image is too large.",
        415: "The upload is not an image.",
        421: "The Host header is not one of this server's names.",
        422: "A field is missing, wrong or too long, or the image is broken.",
        431: "The request has too many headers, or too long ones.",
        500: "The server failed.",
        503: "The server is busy; Retry-After says when to try again.",
    }.items()
}


def create_app(model: Model, index: Index | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """A FastAPI application that serves a model.

    Args:
        index: the images to search; without it there is no search. If it has the first dimensions only, the model uses
            these for everything.

    Raises:
        UserError: the index was made by another model.
    """
    if index is not None:
        model = index.fit(model)
    bounds = limits or ServerLimits()
    service = Service(model, index, bounds)
    page, policy = render_page()
    app = FastAPI(
        title="mmssl",
        version=version("mmssl"),
        description="Compare images and texts with one model. No route takes the path of a file on the server.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page would load scripts from another site
        redoc_url=None,
        responses=ERROR_RESPONSES,
    )
    app.add_middleware(Guard, limits=bounds, policy=policy)
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(BusyError, _busy)
    app.add_exception_handler(RequestValidationError, _invalid)
    # One thread for the model: its operations use all cores already. Maps have a thread of their own, so that they do
    # not delay the other requests.
    model_worker = Worker("model", 1, bounds.requests)
    _add_facts(app, service, page)
    _add_search(app, service, model_worker, Worker("images", IMAGE_THREADS, bounds.requests))
    _add_uploads(app, service, model_worker, Worker("maps", 1, bounds.maps))
    return app


def _add_facts(app: FastAPI, service: Service, page: str) -> None:
    facts = service.facts()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def home() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/api/health", summary="Check that the server answers")
    async def health() -> ServerStatus:
        return ServerStatus()

    @app.get("/api/model", summary="The model, the index and the limits")
    async def model() -> ModelFacts:
        return facts


def _add_search(app: FastAPI, service: Service, model_worker: Worker, image_worker: Worker) -> None:
    limits = service.limits
    default = min(DEFAULT_HITS, limits.hits)
    text_query = Query(min_length=1, max_length=limits.text_chars, pattern=r"\S")
    count = Query(ge=1, le=limits.hits, description="Number of images to find.")
    condition = StringConstraints(max_length=limits.text_chars)
    where_text = "Only images that meet this condition on a field, such as style=noto; repeat for further ones."
    conditions = Query(max_length=limits.conditions, description=where_text)
    conditions_form = Form(max_length=limits.conditions, description=where_text)
    row_number = Path(ge=0, le=_MAX_ROW, description="Row number of an image in the index.")

    @app.get("/api/search", summary="Find the images nearest to a text")
    async def search_text(
        text: Annotated[str, text_query],
        k: Annotated[int, count] = default,
        where: Annotated[list[Annotated[str, condition]], conditions] = NO_CONDITION,
    ) -> Hits:
        return await model_worker.run(lambda: service.by_text(text, k, where))

    @app.post("/api/search", summary="Find the images nearest to an uploaded image")
    async def search_image(
        image: Image,
        k: Annotated[int, Form(ge=1, le=limits.hits, description="Number of images to find.")] = default,
        where: Annotated[list[Annotated[str, condition]], conditions_form] = NO_CONDITION,
    ) -> Hits:
        return await model_worker.run(lambda: service.by_image(image.file, k, where))

    @app.get("/api/images/{row}/nearest", summary="Find the images nearest to an image of the index")
    async def search_row(
        row: Annotated[int, row_number],
        k: Annotated[int, count] = default,
        where: Annotated[list[Annotated[str, condition]], conditions] = NO_CONDITION,
    ) -> Hits:
        return await model_worker.run(lambda: service.by_row(row, k, where))

    @app.get(
        "/api/images/{row}",
        summary="A thumbnail of an image of the index",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def image(row: Annotated[int, row_number]) -> Response:
        content = await image_worker.run(lambda: service.thumbnail(row))
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})


def _add_uploads(app: FastAPI, service: Service, model_worker: Worker, map_worker: Worker) -> None:
    limits = service.limits
    label = StringConstraints(min_length=1, max_length=limits.text_chars, pattern=r"\S")

    @app.post("/api/labels", summary="Classify an uploaded image with the given labels")
    async def labels(
        image: Image,
        labels: Annotated[list[Annotated[str, label]], Form(min_length=1, max_length=limits.labels)],
        template: Annotated[
            str, Form(max_length=limits.text_chars, pattern=r"\{c\}", description="The prompt; {c} is the label.")
        ] = "{c}",
    ) -> Guesses:
        return await model_worker.run(lambda: service.labels(image.file, labels, template))

    @app.post("/api/map", summary="Map a text to places in an uploaded image")
    async def similarity_map(
        image: Image,
        text: Annotated[str, Form(min_length=1, max_length=limits.text_chars, pattern=r"\S")],
        method: Annotated[Method, Form()] = "rise",
    ) -> Map:
        return await map_worker.run(lambda: service.map(image.file, text, method))


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusalError)
    return JSONResponse({"detail": error.detail}, error.status)


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server is busy; try again"}, 503, RETRY)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the fields and the reasons, without the values that were sent."""
    assert isinstance(error, RequestValidationError)
    reasons = [f"{'.'.join(map(str, entry['loc'][1:]))}: {entry['msg']}" for entry in error.errors()[:5]]
    return JSONResponse({"detail": "; ".join(reasons)}, 422)


def render_page() -> tuple[str, str]:
    """The HTML document, and the Content-Security-Policy that allows only its own style and script.

    Captions, labels and words reach the page as text, never as HTML.
    """
    own, report = files("mmssl.apps.serve") / "assets", files("mmssl.apps.report") / "templates"
    # The style of the report, and the rules of this page.
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
