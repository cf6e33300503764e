"""The real server on a socket: many clients at once, oversized requests, and memory that stays flat."""

import gc
import http.client
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


def test_connections_beyond_the_cap_are_refused(model: Model) -> None:
    """Connections that were open before are served. A further one gets status 503 and is closed; when one of the others
    is closed, a new one is served."""
    with serving(create_app(model), connections=3) as (port, _):
        first, second = connect(port), connect(port)
        with connect(port) as third:
            third.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert rest(third).startswith(b"HTTP/1.1 503 ")
        for connection in (first, second):
            with connection:
                connection.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert rest(connection).startswith(b"HTTP/1.1 200 ")
        with connect(port) as later:
            later.sendall(b"GET /api/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert rest(later).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "words",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50),
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 40_000 + b"\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: -1\r\nConnection: close\r\n\r\n",
    ],
    ids=["TLS", "a long header", "a proxy's request", "no Host", "two Hosts", "two lengths", "a negative length"],
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
