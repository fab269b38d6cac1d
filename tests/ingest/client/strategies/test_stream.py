"""Bytes as usage: every kind of stream, ended in every way, gives one event with what really passed."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ingest.client.strategies.stream import Stream
from ingest.client.testing import RecordingIngestion


@pytest.fixture
def ingestion() -> RecordingIngestion:
    """What was captured."""
    return RecordingIngestion()


@pytest.fixture
def stream(ingestion: RecordingIngestion) -> Stream:
    """The strategy."""
    return ingestion.strategy(Stream, "bytes", kind="test")


def told(ingestion: RecordingIngestion) -> tuple[int, bool]:
    """What the only event says."""
    metadata = ingestion.one("bytes")["metadata"]
    assert metadata["strategy"] == "Stream"
    assert metadata["kind"] == "test"
    return metadata["bytes"], metadata["finished"]


def _into(file: Any) -> None:
    file.readinto(bytearray(4))
    file.readinto(memoryview(bytearray(100)))


READS: dict[str, Callable[[Any], object]] = {
    "read": lambda file: (file.read(3), file.read()), "lines": list,
    "readline": lambda file: [*iter(file.readline, b"")],
    "readlines": lambda file: file.readlines(), "into": _into, "next": lambda file: [next(file), next(file)],
    "read1": lambda file: file.read1(100), "into1": lambda file: file.readinto1(bytearray(100)),
}  # fmt: skip


@pytest.mark.parametrize("way", READS)
def test_what_is_read_of_a_file_counts(stream: Stream, ingestion: RecordingIngestion, tmp_path: Path, way: str) -> None:
    """However it is read."""
    (tmp_path / "file").write_bytes(b"first\nsecond")
    with stream.file("u", (tmp_path / "file").open("rb")) as file:
        READS[way](file)

    assert told(ingestion) == (12, True)


def test_what_is_read_of_a_raw_file_counts(stream: Stream, ingestion: RecordingIngestion, tmp_path: Path) -> None:
    """Also all at once."""
    (tmp_path / "file").write_bytes(b"first\nsecond")
    with stream.file("u", (tmp_path / "file").open("rb", buffering=0)) as file:
        file.read(3)
        assert file.readall() == b"st\nsecond"

    assert told(ingestion) == (12, True)


def test_what_is_written_to_a_file_counts(stream: Stream, ingestion: RecordingIngestion, tmp_path: Path) -> None:
    """Bytes, lines, and text as UTF-8; everything else is the file's own."""
    with stream.file("u", (tmp_path / "file").open("w", encoding="utf-8")) as file:
        file.write("ä")
        file.writelines(["b", "c"])
        assert file.writable()

    assert told(ingestion) == (4, True)
    assert (tmp_path / "file").read_bytes() == "äbc".encode()


def test_text_that_is_not_utf_8_counts_too(stream: Stream, ingestion: RecordingIngestion, tmp_path: Path) -> None:
    """Python keeps bytes that are no text as surrogates; what the file takes the meter takes."""
    with stream.file("u", (tmp_path / "file").open("w", encoding="utf-8", errors="surrogateescape")) as file:
        file.write("\u00e4\udcff")

    assert (tmp_path / "file").read_bytes() == b"\xc3\xa4\xff"
    assert told(ingestion) == (5, True)


def test_a_file_is_told_of_once_however_it_ends(stream: Stream, ingestion: RecordingIngestion) -> None:
    """An error in its block, a second close, the collector: one event, and the error goes on."""
    def fail() -> None:
        with stream.file("u", io.BytesIO(b"12345")) as file:
            file.read(2)
            raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        fail()
    assert told(ingestion) == (2, False)
    ingestion.clear()

    file = stream.file("u", io.BytesIO(b"12345"))
    file.read()
    file.close()
    file.close()
    del file
    assert told(ingestion) == (5, True)
    ingestion.clear()

    forgotten = stream.file("u", io.BytesIO(b"12345"))
    forgotten.read(1)
    del forgotten
    assert told(ingestion) == (1, False)


def chunks(fails: bool = False) -> Iterator[bytes]:
    """Three of them, or two and an error."""
    yield b"12"
    yield memoryview(b"345")  # type: ignore[misc]
    if fails:
        raise OSError("mine")
    yield b"6"


async def async_chunks(fails: bool = False) -> AsyncIterator[bytes]:
    """The same."""
    for chunk in chunks(fails):
        yield chunk


def consume(iterator: Iterator[Any], steps: int) -> None:
    """Take so many and close."""
    for _, _ in zip(range(steps), iterator, strict=False):
        pass
    iterator.close()  # type: ignore[attr-defined]


async def consume_async(iterator: Any, steps: int) -> None:
    """The same."""
    taken = 0
    async for _ in iterator:
        taken += 1
        if taken == steps:
            break
    await iterator.aclose()


@pytest.mark.parametrize(("fails", "steps", "expected"), [(False, 9, (6, True)), (False, 1, (2, False)),
                                                          (True, 9, (5, False))])  # fmt: skip
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_iterator_is_counted_to_its_end(
    stream: Stream, ingestion: RecordingIngestion, kind: str, fails: bool, steps: int, expected: tuple[int, bool]
) -> None:
    """Read out, closed early, or broken: what passed until then."""
    try:
        if kind == "sync":
            consume(stream.iterate("u", chunks(fails)), steps)
        else:
            asyncio.run(consume_async(stream.iterate_async("u", async_chunks(fails)), steps))
    except OSError:
        assert fails

    assert told(ingestion) == expected


def test_only_generators_are_closed_with_the_loop(stream: Stream) -> None:
    """A file, a cursor or a response is the application's, which may go on with it, as after any other loop."""
    closed: list[str] = []

    def sync() -> Iterator[bytes]:
        try:
            yield from (b"1", b"2")
        finally:
            closed.append("generator")

    class Response:
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"1"

        async def aclose(self) -> None:
            closed.append("response")

    file = io.BytesIO(b"a\nb\n")
    assert list(stream.iterate("u", file)) == [b"a\n", b"b\n"]
    assert file.seek(0) == 0
    asyncio.run(consume_async(stream.iterate_async("u", Response()), 9))
    inner = sync()
    consume(stream.iterate("u", inner), 1)
    assert closed == ["generator"]


def ask(app: Any, type: str = "http", breaks_after: int = 99, method: str = "GET") -> list[dict[str, Any]]:
    """One ASGI request; the client hangs up after so many messages."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        if len(sent) == breaks_after:
            raise OSError("client is gone")
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(app({"type": type, "method": method, "state": {"user": "u"}}, receive, send))
    return sent


async def answering(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI application: three chunks."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"12345", "more_body": True})
    await send({"type": "http.response.body", "body": b"67", "more_body": True})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(("breaks_after", "expected"), [(99, (7, True)), (2, (5, False)), (0, (0, False))])
def test_an_asgi_response_is_counted(
    stream: Stream, ingestion: RecordingIngestion, breaks_after: int, expected: tuple[int, bool]
) -> None:
    """What was really sent, also when the client hangs up; the application's errors go on."""
    app = stream.asgi(answering, customer=lambda scope: scope["state"]["user"])
    try:
        assert len(ask(app, breaks_after=breaks_after)) == 4
    except OSError:
        assert breaks_after < 4

    assert told(ingestion) == expected


def test_what_the_server_leaves_out_or_sends_itself(
    stream: Stream, ingestion: RecordingIngestion, tmp_path: Path
) -> None:
    """The answer to HEAD has no body, whatever the application says; a file may be the server's to send."""
    (tmp_path / "file").write_bytes(b"123456789")

    async def sends_a_path(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.pathsend", "path": str(tmp_path / "file")})

    ask(stream.asgi(answering, customer=lambda scope: "u"), method="HEAD")
    assert told(ingestion) == (0, True)
    ingestion.clear()
    ask(stream.asgi(sends_a_path, customer=lambda scope: "u"))
    assert told(ingestion) == (9, True)


def test_a_file_hears_how_its_block_ended(stream: Stream, ingestion: RecordingIngestion) -> None:
    """One that gives up what is half written on an error does so."""
    class Upload(io.BytesIO):
        end: object = None

        def __exit__(self, kind: Any, *rest: Any) -> None:
            self.end = kind
            super().__exit__(kind, *rest)

    def fail() -> None:
        with stream.file("u", file) as metered:
            metered.write(b"12")
            raise OSError("mine")

    file = Upload()
    with pytest.raises(OSError, match="mine"):
        fail()
    assert file.end is OSError
    assert told(ingestion) == (2, False)


def test_what_is_nobodys_is_not_counted(stream: Stream, ingestion: RecordingIngestion) -> None:
    """None, an error in finding out, and connections that are no requests pass through."""
    def unknown(scope: Any) -> str:
        raise KeyError("user")

    for app in (stream.asgi(answering, customer=lambda scope: None), stream.asgi(answering, customer=unknown)):
        assert len(ask(app)) == 4
    assert len(ask(stream.asgi(answering, customer=lambda scope: "u"), type="websocket")) == 4

    assert ingestion.events == []


class Body:
    """A WSGI body that must be closed."""

    def __init__(self, fails: bool) -> None:
        self.is_closed, self._chunks = False, chunks(fails)

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def close(self) -> None:
        """As PEP 3333 has it."""
        self.is_closed = True


@pytest.mark.parametrize(("fails", "steps", "expected"), [(False, 9, (8, True)), (False, 1, (4, False)),
                                                          (True, 9, (7, False))])  # fmt: skip
def test_a_wsgi_response_is_counted(
    stream: Stream, ingestion: RecordingIngestion, fails: bool, steps: int, expected: tuple[int, bool]
) -> None:
    """What was written and what was iterated, until the server closes it."""
    body, written = Body(fails), []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [])(b"ab")
        return body

    metered = stream.wsgi(app, customer=lambda environ: environ["REMOTE_USER"])
    response: Any = metered({"REMOTE_USER": "u"}, lambda status, headers: written.append)
    try:
        for _, _ in zip(range(steps), response, strict=False):
            pass
    except OSError:
        assert fails
    response.close()

    assert (body.is_closed, written) == (True, [b"ab"])
    assert told(ingestion) == expected


def test_a_wsgi_application_that_fails_before_its_body(stream: Stream, ingestion: RecordingIngestion) -> None:
    """One event of nothing, and the error goes on."""
    def app(environ: Any, start_response: Any) -> Any:
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        stream.wsgi(app, customer=lambda environ: "u")({}, lambda *arguments: None)
    assert told(ingestion) == (0, False)
