"""Which bodies the gateway takes: packed or not, large, too large, without length, no JSON."""

import gzip
import json
from typing import Any

import pytest
import zstandard

from tests.ingest.running import RunningGateway, event

BODY = json.dumps({"events": [event()]}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "zstd", "identity", "GZIP"])
def test_packed_bodies_are_taken(gateway: RunningGateway, encoding: str) -> None:
    """gzip, zstd, or neither, in whatever letters."""
    packed = {"gzip": gzip.compress, "zstd": zstandard.compress}.get(encoding.strip().lower().removeprefix("x-"), bytes)
    answer = gateway.ingest(content=packed(BODY), content_encoding=encoding)
    assert answer.json() == {"inserted": 1, "duplicates": 0}


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)  # a test is named by its bytes, and has one name in all processes of a run


def _zstd_of_unknown_size(body: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(body)


@pytest.mark.parametrize(
    ("encoding", "content", "status"),
    [
        ("br", BODY, 415),
        ("gzip, gzip", _gzip(_gzip(BODY)), 415),
        ("gzip", BODY, 400),
        ("gzip", b"", 400),
        ("gzip", _gzip(BODY)[:-1], 400),
        ("gzip", _gzip(BODY) + b"garbage", 400),
        ("gzip", _gzip(BODY) + _gzip(BODY), 400),
        ("gzip", _gzip(b" " * 20_000_000), 413),
        ("zstd", BODY, 400),
        ("zstd", b"", 400),
        ("zstd", zstandard.compress(BODY)[:-1], 400),
        ("zstd", zstandard.compress(BODY) + b"garbage", 400),
        ("zstd", _zstd_of_unknown_size(BODY)[:-1], 400),
        ("zstd", _zstd_of_unknown_size(BODY) + b"garbage", 400),
        ("zstd", zstandard.compress(b" " * 20_000_000), 413),
        ("zstd", _zstd_of_unknown_size(b" " * 20_000_000), 413),
        ("gzip", _gzip(_gzip(BODY)), 422),
    ],
)
def test_a_packed_body_is_whole_alone_and_small_enough(
    gateway: RunningGateway, encoding: str, content: bytes, status: int
) -> None:
    """Unknown or nested encodings, damage, more than one stream, and bombs: each has its status, and none is taken."""
    before = len(gateway.lines())
    answer = gateway.ingest(content=content, content_encoding=encoding)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert len(gateway.lines()) == before


@pytest.mark.parametrize("encode", [bytes, gzip.compress])
def test_a_large_body_is_taken_whole(gateway: RunningGateway, encode: Any) -> None:
    """Ten thousand events in one request are one record."""
    body = json.dumps({"events": [event(metadata={"number": number}) for number in range(10_000)]}).encode()
    headers = {"content_encoding": "gzip"} if encode is gzip.compress else {}
    assert gateway.ingest(content=encode(body), **headers).json() == {"inserted": 10_000, "duplicates": 0}
    assert len(gateway.records()[-1].value.split(b"\n")) == 10_000


def test_a_body_over_the_limit_is_refused() -> None:
    """By its length, before it is read; the limit itself still passes."""
    with RunningGateway(body_bytes_max=1000) as gateway:
        fitting = BODY + b" " * (1000 - len(BODY))
        assert gateway.ingest(content=fitting).status_code == 200
        answer = gateway.ingest(content=fitting + b" ")
        assert answer.status_code == 413
        assert answer.json()["error"] == "RequestBodyTooLarge"


def test_a_body_without_length_is_refused(gateway: RunningGateway) -> None:
    """Chunked uploads are 411, as with Polar."""
    answer = gateway.client.post("/v1/events/ingest", content=iter([BODY]), headers=gateway.authorization)
    assert answer.status_code == 411
    assert answer.json()["error"] == "LengthRequired"


@pytest.mark.parametrize(
    ("content", "kind", "loc"),
    [(b"", "missing", ["body"]), (b"{", "json_invalid", ["body", 1]), (b"[1", "json_invalid", ["body", 2])],
)
def test_a_body_that_is_no_json_is_unprocessable(
    gateway: RunningGateway, content: bytes, kind: str, loc: list[Any]
) -> None:
    """422 and not 400, with the offset, as Polar's clients expect."""
    answer = gateway.ingest(content=content)
    assert answer.status_code == 422
    assert answer.json()["error"] == "RequestValidationError"
    assert [(entry["type"], entry["loc"]) for entry in answer.json()["detail"]] == [(kind, loc)]
