"""The real server on a socket: many clients at once, oversized requests, and memory that stays flat."""

import gc
import http.client
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import pytest
import uvicorn

from mmssl.apps.search import Index
from mmssl.apps.serve import ServerLimits, create_app, listen
from mmssl.errors import UserError
from mmssl.inference import Model
from tests.helpers.live_server import connect, rest, serving
from tests.helpers.uploads import image

HEAD = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
FORM = b"Content-Type: multipart/form-data; boundary=b\r\n"
GROWTH = 48 << 20
"""Bytes that the process may grow by over 300 uploads of 700 KB, after a warm-up."""


Live = tuple[int, uvicorn.Server]


@pytest.fixture(scope="module")
def live(model: Model, index: Index) -> Iterator[Live]:
    """A server as it comes, with place for a few requests."""
    with serving(create_app(model, index, ServerLimits(requests=8))) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(model: Model, index: Index) -> Iterator[Live]:
    """A server that waits for uploads for half a second."""
    with serving(create_app(model, index, ServerLimits(body_seconds=0.5))) as started:
        yield started


def body(content: bytes) -> bytes:
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="p.png"\r\n\r\n'
    return head + content + b"\r\n--b--\r\n"


def upload(port: int, content: bytes) -> tuple[int, str | None]:
    """Status, and Retry-After."""
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    try:
        connection.request("POST", "/api/search", body(content), {"Content-Type": "multipart/form-data; boundary=b"})
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.getheader("Retry-After")
    finally:
        connection.close()


def test_a_hundred_uploads_at_once(live: Live) -> None:
    """Each is answered or gets 503; afterwards no file is left open, and after a warm-up the process does not grow."""
    port, _ = live
    content = image(500, 470)
    process = psutil.Process()

    def round_of_uploads() -> Counter[int]:
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda _: upload(port, content), range(100)))
        assert all(retry == "1" for status, retry in answers if status == 503)
        return Counter(status for status, _ in answers)

    for _ in range(3):
        round_of_uploads()
    gc.collect()
    memory, files = process.memory_info().rss, process.num_fds()
    for _ in range(3):
        statuses = round_of_uploads()
        assert set(statuses) <= {200, 503}
        assert statuses[200] >= 8
        assert upload(port, content)[0] == 200
    gc.collect()
    assert process.memory_info().rss - memory < GROWTH
    deadline = time.monotonic() + 20
    while process.num_fds() > files and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.num_fds() <= files


def test_a_client_that_stops_in_its_upload_is_told_and_cut_off(impatient: Live) -> None:
    """408 as JSON, then the connection is closed; nothing is held for it."""
    with connect(impatient[0]) as connection:
        connection.sendall(HEAD + FORM + b"Content-Length: 5000\r\n\r\n" + body(b"x" * 2000)[:1000])
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'{"detail":"the request took too long to arrive"}' in answer


def test_an_upload_over_the_cap_is_told_so(live: Live) -> None:
    """With a declared size and in chunks without one: 413 as JSON, read by a client that sends everything first."""
    large = body(b"x" * (11 << 20))
    pieces = [large[start : start + 100_000] for start in range(0, len(large), 100_000)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    for words in (
        HEAD + FORM + b"Content-Length: %d\r\n\r\n" % len(large) + large,
        HEAD + FORM + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        HEAD + FORM + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
    ):
        with connect(live[0]) as connection:
            connection.sendall(words)
            answer = rest(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'{"detail":"the upload has more than 10,485,760 bytes"}' in answer


def test_idle_connections_keep_nobody_out(live: Live) -> None:
    """With 300 connections that send nothing, or half a request, a new one is answered at once; the oldest is closed,
    and one that has not waited long is answered later."""
    with ExitStack() as stack:
        held = [stack.enter_context(connect(live[0])) for _ in range(300)]
        for connection in held[::2]:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: local")
        begin = time.monotonic()
        for _ in range(5):
            with connect(live[0]) as connection:
                connection.sendall(HEALTH)
                assert rest(connection).startswith(b"HTTP/1.1 200 ")
        assert time.monotonic() - begin < 3
        assert rest(held[0]) == b""
        held[-1].sendall(HEALTH)
        assert rest(held[-1]).startswith(b"HTTP/1.1 200 ")


def test_connections_beyond_the_cap_are_refused(model: Model) -> None:
    """Connections whose request is in work keep their place. A further one gets status 503 and is closed; when one of
    the others is closed, a new one is served."""
    with serving(create_app(model), connections=3) as (port, server), connect(port) as first, connect(port) as second:
        for connection in (first, second):
            connection.sendall(HEAD + FORM + b"Content-Length: 5000\r\n\r\n" + body(b"x" * 2000)[:1000])
        _wait_until(lambda: len(server.server_state.tasks) == 2)
        with connect(port) as third:
            third.sendall(HEALTH)
            assert rest(third).startswith(b"HTTP/1.1 503 ")
        first.close()
        _wait_until(lambda: len(server.server_state.connections) == 1)
        with connect(port) as later:
            later.sendall(HEALTH)
            assert rest(later).startswith(b"HTTP/1.1 200 ")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_head_is_answered_as_get_without_a_body(live: Live) -> None:
    """Status, length and type of the page, an answer and an image are those of GET, and nothing follows them; a route
    that only takes uploads refuses both."""
    for path, status in (("/", 200), ("/api/model", 200), ("/api/images/0", 200), ("/api/labels", 405)):
        answers = []
        for method in ("GET", "HEAD"):
            with connect(live[0]) as connection:
                connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                answers.append(rest(connection).partition(b"\r\n\r\n"))
        (head_of_get, _, content), (head, _, nothing) = answers
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"\r\ncontent-length: %d\r\n" % len(content) in head
        assert _without_date(head) == _without_date(head_of_get)
        assert nothing == b""


def _without_date(head: bytes) -> list[bytes]:
    return [line for line in head.split(b"\r\n") if not line.startswith(b"date:")]


@pytest.mark.parametrize(
    "words",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 40_000 + b"\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        HEALTH[:-2] + b"X: " + b"y" * 20_000 + b"\r\n\r\n",
        HEALTH[:-2] + b"X: y\r\n" * 2000 + b"\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\nConnection: close\r\n\r\n",
    ],
    ids=[
        "TLS",
        "a long header",
        "a proxy's request",
        "no Host",
        "two Hosts",
        "20 kB",
        "many headers",
        "two lengths",
        "a negative length",
    ],
)
def test_what_is_no_request_gets_a_client_error(live: Live, words: bytes) -> None:
    """A status from 400 to 499, and the server goes on."""
    with connect(live[0]) as connection:
        connection.sendall(words)
        assert rest(connection).startswith(b"HTTP/1.1 4")
    assert upload(live[0], image())[0] == 200


def test_an_address_in_use_is_said(live: Live) -> None:
    """In one line that names it."""
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{live[0]}.*--port"):
        listen("127.0.0.1", live[0])
