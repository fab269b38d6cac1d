"""Which bodies the gateway takes: packed or not, large, too large, without length, no JSON."""

import gzip
import json
import threading
from collections import defaultdict
from types import FrameType
from typing import Any

import pytest
import zstandard

from ingest.admission import batching
from ingest.admission.duplicates import Fingerprints
from ingest.admission.partitioner import Spread
from ingest.limits import INLINE_BODY_BYTES_MAX
from ingest.log import open_log
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from tests.support.servers.gateway import RunningGateway, event

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


TWELVE = {USAGE_EVENTS: 12, USAGE_CONTROL: 1}
LASTING = {function.__code__: function.__name__ for function in (
    Fingerprints.of.__func__, Spread.entries, batching.accepted, batching.unprocessable)}  # fmt: skip


class Workers:
    """Which threads did what takes long, of the threads that start meanwhile."""

    def __init__(self) -> None:
        self.by_work: dict[str, set[str]] = defaultdict(set)

    def __enter__(self) -> "Workers":
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    def _note(self, frame: FrameType, happening: str, _: object) -> None:
        if happening == "call" and frame.f_code in LASTING:
            thread = threading.current_thread().name.partition("_")[0]
            self.by_work[LASTING[frame.f_code]].add(thread)


def many(count: int, name: str) -> dict[str, Any]:
    """So many events of as many customers, each with an id; every other request says the same again."""
    return {"events": [event(external_id=f"{name}-{number}", external_customer_id=f"customer-{number}")
                       for number in range(count)]}  # fmt: skip


def test_work_on_a_large_body_is_done_beside_the_event_loop() -> None:
    """What is made of its events, and an answer with all of them, keep nobody waiting; small bodies take no detour."""
    good, bad = many(5000, "large"), {"events": [{"name": "n" * 300}] * 1000}
    assert len(json.dumps(good)) > INLINE_BODY_BYTES_MAX < len(json.dumps(bad))
    for body, thread in ((good, "admission"), (many(5, "small"), "gateway")):
        with Workers() as workers, RunningGateway(open_log("memory:", partitions=TWELVE)) as gateway:
            first, second = (gateway.ingest(body, prefer="return=representation").json() for _ in range(2))
            assert gateway.ingest(bad if thread == "admission" else {"events": [{}]}).status_code == 422
        assert workers.by_work == {work: {thread} for work in LASTING.values()}
        count = len(body["events"])
        assert [row["verdict"] for row in first["events"]] == ["accepted"] * count
        assert [row["verdict"] for row in second["events"]] == ["duplicate"] * count
        assert (second["inserted"], second["duplicates"]) == (0, count)


def test_events_of_many_customers_lie_where_small_requests_put_them() -> None:
    """A large request is spread over the partitions like the small ones before and after it."""
    with RunningGateway(open_log("memory:", partitions=TWELVE)) as gateway:
        for body in (many(50, "a"), many(5000, "b"), many(50, "c")):
            assert gateway.ingest(body).status_code == 200
        places = gateway.log.ends(USAGE_EVENTS)
        records = gateway.log.read(USAGE_EVENTS, dict.fromkeys(places, 0), bytes_max=1 << 30)
    found = defaultdict(set)
    for record in records:
        for line in record.value.split(b"\n"):
            found[json.loads(line)["external_customer_id"]].add(record.partition)
    assert len(found) == 5000
    assert {len(partitions) for partitions in found.values()} == {1}


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


# ---- JSON that hurts

CONTENTS = [
    ("deep arrays", b'{"events":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("deep objects", b'{"events":[' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]}"),
    ("deep, unread", b'{"events":[],"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("5000 digits", b'{"events":[{"name":"n","external_customer_id":"u","metadata":{"k":' + b"9" * 5000 + b"}}]}"),
    ("1e999", b'{"events":[{"name":"n","external_customer_id":"u","metadata":{"k":1e999}}]}'),
    ("NaN", b'{"events":[{"name":"n","external_customer_id":"u","metadata":{"k":NaN}}]}'),
    ("BOM", b"\xef\xbb\xbf" + BODY),
    ("UTF-16", BODY.decode().encode("utf-16")),
    ("overlong UTF-8", BODY.replace(b"user-1", b"\xc0\xaf")),
    ("surrogate in UTF-8", BODY.replace(b"user-1", b"\xed\xa0\x80")),
    ("half a surrogate pair", BODY.replace(b"user-1", b"\\ud800")),
    ("NUL", BODY.replace(b"user-1", b"\\u0000")),
    ("half a body", BODY[:-1]),
    ("two bodies", BODY + BODY),
    ("commas", b'{"events":[' + b"," * 900_000 + b"]}"),
    ("nulls", b'{"events":[' + b"null," * 150_000 + b"null]}"),
]


@pytest.mark.parametrize("content", [row[1] for row in CONTENTS], ids=[row[0] for row in CONTENTS])
def test_json_that_hurts_is_unprocessable(gateway: RunningGateway, content: bytes) -> None:
    """422 with a detail list, whatever it is, and nothing is written."""
    before = len(gateway.lines())
    answer = gateway.ingest(content=content)
    assert answer.status_code == 422
    assert json.loads(answer.content, parse_int=str)["detail"]
    assert len(answer.content) < 300_000
    assert len(gateway.lines()) == before


def test_a_hundred_thousand_keys_are_taken() -> None:
    """Polar sets no limit to keys, so they are bounded by the body alone; the line is complete."""
    keys = {f"k{number}": number % 10 for number in range(60_000)}
    with RunningGateway() as other:
        assert other.ingest({"events": [event(metadata=keys)]}).status_code == 200
        assert json.loads(other.lines()[0])["metadata"] == keys
