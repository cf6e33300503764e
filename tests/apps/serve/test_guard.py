"""Hostile requests are refused with the right status, as JSON, at no cost."""

import asyncio
import threading
from typing import Any

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mmssl.apps.search import Index
from mmssl.apps.serve import ServerLimits, create_app
from mmssl.apps.serve.limits import BusyError, Worker
from mmssl.apps.serve.server import Guard
from mmssl.inference import Model
from tests.helpers.uploads import bomb, image, sent

UPLOAD = image()
HEADERS = ("content-security-policy", "x-content-type-options", "x-frame-options", "referrer-policy")


@pytest.mark.parametrize(
    ("name", "content", "status"),
    [
        ("text", b"hello", 415),
        ("empty", b"", 415),
        ("script", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", 415),
        ("PostScript, for which other readers start a program", b"%!PS-Adobe-3.0 EPSF-3.0\n", 415),
        ("cut in its header", UPLOAD[:20], 415),
        ("cut in its pixels", UPLOAD[:-400], 422),
        ("cut JPEG", image(kind="JPEG")[:200], 415),
        ("changed inside", UPLOAD[:60] + b"\0" * 60 + UPLOAD[120:], 422),
        ("a bomb of 900 million pixels", bomb(30_000, 30_000), 413),
        ("a strip that would be made very long", bomb(20_000, 1), 422),
        ("more bytes than allowed", b"\x89PNG\r\n\x1a\n" + bytes(300_000), 413),
    ],
)
def test_what_is_no_image_is_refused(model: Model, index: Index, name: str, content: bytes, status: int) -> None:
    """By each route that takes one: the status says which kind of wrong, the answer is JSON with a reason in a line."""
    client = TestClient(create_app(model, index, ServerLimits(upload_bytes=200_000)), base_url="http://localhost")
    for route, form in (("search", {}), ("labels", {"labels": "a"}), ("map", {"text": "a"})):
        answer = client.post(f"/api/{route}", files=sent(content), data=form)
        assert answer.status_code == status, (name, answer.text)
        assert list(answer.json()) == ["detail"]
        assert "Traceback" not in answer.text
        assert answer.headers["content-type"] == "application/json"


_SCAN = b"\xff\xda"


def test_a_jpeg_of_many_scans_is_refused(client: TestClient) -> None:
    """Scans of a few bytes, each of which takes the time of an image, are counted before any is decoded; a usual
    progressive JPEG passes."""
    usual = image(kind="JPEG", progressive=True)
    assert client.post("/api/search", files=sent(usual)).status_code == 200
    hostile = usual[:-2] + 200 * usual[usual.rindex(_SCAN) : -2] + usual[-2:]
    answer = client.post("/api/search", files=sent(hostile))
    assert (answer.status_code, answer.json()["detail"]) == (
        413,
        f"the JPEG has {hostile.count(_SCAN)} scans; save it anew",
    )


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "a\0b.png", "C:\\con.png", "x" * 2000, "<script>.png", "\u202egnp.exe", ";.png"]
)
def test_file_names_mean_nothing(client: TestClient, name: str) -> None:
    """A hostile file name changes no answer."""
    expected = client.post("/api/search", files=sent(UPLOAD)).json()
    assert client.post("/api/search", files=sent(UPLOAD, name)).json() == expected


@pytest.mark.parametrize(
    "path",
    [
        "/api/images/..%2f..%2f..%2fetc%2fpasswd",
        "/api/images/%2e%2e/%2e%2e/etc/passwd",
        "/api/images//etc/passwd",
        "/api/images/0/../../../../etc/passwd",
        "/api/images/-1",
        "/api/images/1e3",
        "/api/images/" + "9" * 5000,
        "/api/images/0%00.jpg",
        "/assets/page.html",
        "/..%5c..%5cetc",
        "/index.json",
        "/docs",
    ],
)
def test_no_path_leads_to_the_disk(client: TestClient, path: str) -> None:
    """Every path that is not a route's, or whose row is none, is a plain 404 or 422."""
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert list(answer.json()) == ["detail"]
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    ("route", "form"),
    [
        ("labels", {}),
        ("labels", {"labels": ["a"] * 101}),
        ("labels", {"labels": ["a" * 301]}),
        ("labels", {"labels": [" "]}),
        ("labels", {"labels": ["a"], "template": "no place"}),
        ("map", {"text": ""}),
        ("map", {"text": "a " * 200}),
        ("map", {"text": "a", "method": "gradcam"}),
        ("search", {"k": "0"}),
        ("search", {"k": "101"}),
        ("search", {"k": "many"}),
    ],
)
def test_fields_are_bounded(client: TestClient, route: str, form: dict[str, Any]) -> None:
    """What is missing, too long or too much is named in a line, without being sent back."""
    answer = client.post(f"/api/{route}", files=sent(UPLOAD), data=form)
    assert answer.status_code == 422
    assert any(field in answer.json()["detail"] for field in ("labels", "template", "text", "method", "k:"))
    assert len(answer.text) < 500


def test_forms_that_are_none_are_refused(client: TestClient) -> None:
    """A name without end, no boundary, a cut form, a text where the image should be, and no body at all."""
    wrong: list[dict[str, Any]] = [
        {"files": sent(UPLOAD, "x" * 50_000)},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--b\r\nContent-Dis", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        {"data": {"image": "../../etc/passwd"}},
        {"json": {"image": "x"}},
        {},
    ]
    for request in wrong:
        answer = client.post("/api/search", **request)
        assert answer.status_code in (400, 422), request
        assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("192.168.1.7", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("::1", True),
        ("images.example.org", True),
        ("images.example.org:443", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("localhost:8000@evil.example", False),
        ("[::1", False),
        ("evil.example:::1", False),
        ("", False),
    ],
)
def test_only_own_names_are_answered(model: Model, host: str, allowed: bool) -> None:
    """Addresses, localhost and the names that were given; a page whose name was pointed here (DNS rebinding) gets
    nothing, neither by Host nor by Origin."""
    app = create_app(model, None, ServerLimits(hosts=("images.example.org",)))
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/api/model", headers={"Host": host}).status_code == (200 if allowed else 421)
    assert client.get("/", headers={"Origin": f"https://{host}"}).status_code == (200 if allowed else 403)
    assert client.get("/", headers={"Origin": "null"}).status_code == 403


@pytest.mark.parametrize(
    "request_of",
    [
        {"headers": {"X": "y" * 20_000}},
        {"headers": [("X", "y")] * 2000},
        {"headers": {"x" * 20_000: "y"}},
        {"params": {"text": "a", "x": "y" * 20_000}},
    ],
    ids=["value", "number", "name", "query"],
)
def test_heads_are_bounded(client: TestClient, request_of: dict[str, Any]) -> None:
    """20 kB of headers or query, and 2,000 headers, get 431 even if they arrive in one piece."""
    answer = client.get("/api/search", **request_of)
    assert answer.status_code == 431
    assert "16,384 bytes" in answer.json()["detail"]


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    """Found, missing, wrong, refused."""
    answers = [
        client.get("/"),
        client.get("/api/images/0"),
        client.get("/nothing"),
        client.get("/api/search"),
        client.delete("/api/search"),
        client.get("/api/model", headers={"Host": "evil.example"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 422, 405, 421]
    for answer in answers:
        assert [name for name in HEADERS if name not in answer.headers] == []


def test_a_failure_inside_says_nothing_of_the_inside(
    model: Model, index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 as JSON; the reason is in the log only."""
    client = TestClient(create_app(model, index), base_url="http://localhost")
    monkeypatch.setattr(index, "nearest", lambda *_, **__: 1 / 0)
    answer = client.get("/api/search", params={"text": "a"})
    assert answer.status_code == 500
    assert "zero" not in answer.text
    assert "/" not in answer.json()["detail"]
    assert "ZeroDivisionError" in caplog.text


SCOPE: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [(b"host", b"localhost")],
}


async def ask(guard: Guard, receive: Receive, headers: tuple[tuple[bytes, bytes], ...] = ()) -> tuple[int, Any]:
    """Status and headers of an answer."""
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    await guard({**SCOPE, "headers": [*SCOPE["headers"], *headers]}, receive, send)
    return got[0]["status"], {name.decode(): value.decode() for name, value in got[0]["headers"]}


async def empty() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def reader(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads the body and answers, as FastAPI does with what the reading raises."""
    try:
        while (await receive()).get("more_body"):
            continue
        response = Response(status_code=200)
    except HTTPException as error:
        response = Response(status_code=error.status_code, headers=dict(error.headers or {}))
    await response(scope, receive, send)


def test_more_requests_than_can_be_in_hand_are_told_to_come_back() -> None:
    """With as many in hand as may be, the next gets 503 and Retry-After at once; when one is done there is place."""

    async def scenario() -> list[int]:
        finish = asyncio.Event()

        async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
            await finish.wait()
            await reader(scope, receive, send)

        guard = Guard(waiting, ServerLimits(requests=3), "")
        held = [asyncio.create_task(ask(guard, empty)) for _ in range(3)]
        await asyncio.sleep(0)
        refused, headers = await ask(guard, empty)
        assert headers["retry-after"] == "1"
        finish.set()
        statuses = [status for status, _ in await asyncio.gather(*held)]
        return [refused, *statuses, (await ask(guard, empty))[0]]

    assert asyncio.run(scenario()) == [503, 200, 200, 200, 200]


def test_a_body_is_cut_off_by_size_and_by_time() -> None:
    """A body without a length is stopped at the cap, a silent one after its time; declared sizes are refused unread."""
    read = 0

    async def endless() -> Message:
        nonlocal read
        read += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"x" * 1000, "more_body": read % 50 != 0}

    async def silent() -> Message:
        await asyncio.sleep(3600)
        return await empty()

    limits = ServerLimits(upload_bytes=10_000, body_seconds=0.05)
    status, headers = asyncio.run(ask(Guard(reader, limits, ""), endless))
    assert (status, headers["connection"]) == (413, "close")
    status, headers = asyncio.run(ask(Guard(reader, limits, ""), silent))
    assert (status, headers["connection"]) == (408, "close")
    sizes = ((b"content-length", b"10001"), (b"expect", b"100-continue"))
    read = 0
    assert asyncio.run(ask(Guard(reader, limits, ""), endless, sizes))[0] == 413
    assert read == 0


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    """503, and its place is free again."""

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(3600)

    async def scenario() -> list[int]:
        guard = Guard(stuck, ServerLimits(requests=1, body_seconds=0.02, answer_seconds=0.02), "")
        return [(await ask(guard, empty))[0] for _ in range(2)]

    assert asyncio.run(scenario()) == [503, 503]


def test_a_worker_takes_no_more_than_it_may() -> None:
    """A call beyond the places is refused. Who gives up frees its place if the work had not begun, else at its end."""

    async def scenario() -> None:
        worker = Worker("test", threads=1, capacity=2)
        begun, finish = threading.Event(), threading.Event()

        def hold() -> int:
            begun.set()
            finish.wait()
            return 1

        first = asyncio.create_task(worker.run(hold))
        await asyncio.to_thread(begun.wait)
        second = asyncio.create_task(worker.run(lambda: 2))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await worker.run(lambda: 3)
        second.cancel()
        first.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        third = asyncio.create_task(worker.run(lambda: 4))
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await worker.run(lambda: 5)
        finish.set()
        assert await third == 4

    asyncio.run(scenario())
