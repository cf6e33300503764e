"""The application: the page at / and the API under /api."""

from importlib.metadata import version
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import StringConstraints

from mmssl.apps.search import Index
from mmssl.apps.serve.guard import LATER, Guard
from mmssl.apps.serve.handlers import Method, RefusalError, Service
from mmssl.apps.serve.limits import ServerLimits
from mmssl.apps.serve.page import render_page
from mmssl.apps.serve.schemas import ErrorAnswer, Guesses, Hits, Map, ModelFacts, ServerStatus
from mmssl.apps.serve.worker import BusyError, Worker
from mmssl.inference.model import Model

Image = Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP or TIFF.")]
READERS = 2
"""Threads that read images from shards."""
DEFAULT_HITS = 24
_LARGEST_ROW = 2**53
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": words}
    for status, words in {
        400: "The request cannot be read.",
        403: "A page of another site asked.",
        404: "There is no such thing here.",
        408: "The request arrived too slowly.",
        413: "The upload or its image is too large.",
        415: "The upload is no image.",
        421: "The Host header is not one of this server's names.",
        422: "A field is missing, wrong or too long, or the image is broken.",
        500: "The server failed.",
        503: "The server is busy; Retry-After says when to ask again.",
    }.items()
}


def create_app(model: Model, index: Index | None = None, limits: ServerLimits | None = None) -> FastAPI:
    """A FastAPI application that serves a model.

    Args:
        index: what is searched; without one there is no search.

    Raises:
        UserError: another model made the index.
    """
    if index is not None:
        index.check(model)
    bounds = limits or ServerLimits()
    service = Service(model, index, bounds)
    page, policy = render_page()
    app = FastAPI(
        title="mmssl",
        version=version("mmssl"),
        description="Images and texts compared by one model. No route names a file of the server.",
        openapi_url="/api/openapi.json",
        docs_url=None,  # its page would load scripts from another site
        redoc_url=None,
        responses=PROBLEMS,
    )
    app.add_middleware(Guard, limits=bounds, policy=policy)
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(BusyError, _busy)
    app.add_exception_handler(RequestValidationError, _invalid)
    # One thread for the model, whose operations use all cores by themselves; maps do not hold up the rest.
    thinking = Worker("model", 1, bounds.requests)
    _add_facts(app, service, page)
    _add_search(app, service, thinking, Worker("images", READERS, bounds.requests))
    _add_uploads(app, service, thinking, Worker("maps", 1, bounds.maps))
    return app


def _add_facts(app: FastAPI, service: Service, page: str) -> None:
    facts = service.facts()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page_() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/api/health", summary="Whether the server answers")
    async def health() -> ServerStatus:
        return ServerStatus()

    @app.get("/api/model", summary="What is served, and its limits")
    async def model() -> ModelFacts:
        return facts


def _add_search(app: FastAPI, service: Service, thinking: Worker, reading: Worker) -> None:
    limits = service.limits
    some = min(DEFAULT_HITS, limits.hits)
    words = Query(min_length=1, max_length=limits.text_chars, pattern=r"\S")
    count = Query(ge=1, le=limits.hits, description="Images to find.")
    number = Path(ge=0, le=_LARGEST_ROW, description="Number of an image in the index.")

    @app.get("/api/search", summary="The images nearest to words")
    async def search_text(text: Annotated[str, words], k: Annotated[int, count] = some) -> Hits:
        return await thinking.run(lambda: service.by_text(text, k))

    @app.post("/api/search", summary="The images nearest to an uploaded image")
    async def search_image(
        image: Image,
        k: Annotated[int, Form(ge=1, le=limits.hits, description="Images to find.")] = some,
    ) -> Hits:
        return await thinking.run(lambda: service.by_image(image.file, k))

    @app.get("/api/images/{row}/nearest", summary="The images nearest to one of the index")
    async def search_row(row: Annotated[int, number], k: Annotated[int, count] = some) -> Hits:
        return await thinking.run(lambda: service.by_row(row, k))

    @app.get(
        "/api/images/{row}",
        summary="An image of the index, small",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def image(row: Annotated[int, number]) -> Response:
        content = await reading.run(lambda: service.thumbnail(row))
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"})


def _add_uploads(app: FastAPI, service: Service, thinking: Worker, mapping: Worker) -> None:
    limits = service.limits
    label = StringConstraints(min_length=1, max_length=limits.text_chars, pattern=r"\S")

    @app.post("/api/labels", summary="How well each of some labels fits an uploaded image")
    async def labels(
        image: Image,
        labels: Annotated[list[Annotated[str, label]], Form(min_length=1, max_length=limits.labels)],
        template: Annotated[
            str, Form(max_length=limits.text_chars, pattern=r"\{c\}", description="The prompt; {c} is the label.")
        ] = "{c}",
    ) -> Guesses:
        return await thinking.run(lambda: service.labels(image.file, labels, template))

    @app.post("/api/map", summary="Where in an uploaded image a text comes from")
    async def map_(
        image: Image,
        text: Annotated[str, Form(min_length=1, max_length=limits.text_chars, pattern=r"\S")],
        method: Annotated[Method, Form()] = "rise",
    ) -> Map:
        return await mapping.run(lambda: service.map(image.file, text, method))


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusalError)
    return JSONResponse({"detail": error.detail}, error.status)


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "the server is busy; try again"}, 503, LATER)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Field and reason, without what was sent."""
    assert isinstance(error, RequestValidationError)
    reasons = [f"{'.'.join(map(str, entry['loc'][1:]))}: {entry['msg']}" for entry in error.errors()[:5]]
    return JSONResponse({"detail": "; ".join(reasons)}, 422)
