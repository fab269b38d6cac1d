"""Connections to a real broker that carry no answer any more, as behind a firewall that forgot them, or a slow one."""

import asyncio
import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import Consumer

from ingest.log import kafka_log, open_log
from ingest.log.kafka_admin import Topics, Wanted, make_topics, parse_address
from ingest.log.partitions import MEBIBYTE, Limits
from meters.log import USAGE_EVENTS, Entry, Log, Record, TryAgain
from tests.support.faults.cutting_proxy import CuttingProxy
from tests.support.kafka.installation import own_brokers
from tests.support.ports import take_port

pytestmark = pytest.mark.kafka

LIMITS = Limits(value_bytes_max=MEBIBYTE)  # so much comes at once


class Behind(NamedTuple):
    """A log, and the proxy in front of its broker."""

    proxy: CuttingProxy
    log: Log
    url: str

    def write(self, *values: bytes) -> None:
        """Through connections of their own, which are gone then."""
        with contextlib.closing(open_log(self.url)) as other:
            asyncio.run(other.append(USAGE_EVENTS, [Entry(value) for value in values]))

    def read(self, offset: int, bytes_max: int = 1) -> tuple[list[Record], int]:
        """The next records, and how often it was to be tried again."""
        for times in range(1000):
            with contextlib.suppress(TryAgain):
                return self.log.read(USAGE_EVENTS, {0: offset}, bytes_max=bytes_max), times
        raise AssertionError("never read")


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[Behind]:
    """With one record, which was read."""
    port = take_port()
    address = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"}
    with (
        own_brokers(tmp_path, settings=address, start=False) as cluster,
        CuttingProxy(cluster.nodes[0].port, port) as proxy,
    ):
        cluster.start()
        url = f"kafka://{cluster.bootstrap}/silent"
        make_topics(parse_address(url, {}), Wanted(partitions=1))
        with contextlib.closing(open_log(url, limits=LIMITS)) as log:
            made = Behind(proxy, log, url)
            made.write(b"before")
            ((first,), _) = made.read(0)
            assert first.value == b"before"
            yield made


def test_a_reader_gets_past_silence(behind: Behind) -> None:
    """librdkafka waits a minute for an answer; a reader gives its clients up sooner, and goes on with others."""
    behind.proxy.silence()
    behind.write(b"after")
    ((record,), times) = behind.read(1)

    assert record.value == b"after"
    assert times <= 2  # for the ends, and for the record: each question found a client that heard nothing


@pytest.mark.parametrize("question", ["starts", "ends"])
def test_a_broker_that_goes_between_two_questions_loses_no_position(
    behind: Behind, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    """librdkafka gives an offset below zero for an answer that did not come; taken for one, it ended whoever read."""
    ask = getattr(Topics, question)

    def go_and_ask(topics: Topics, stream: str, partitions: Iterable[int]) -> dict[int, int]:
        behind.proxy.silence()
        found: dict[int, int] = ask(topics, stream, partitions)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Topics, question, go_and_ask)
        with pytest.raises(TryAgain, match="do not answer"):
            behind.log.read(USAGE_EVENTS, {0: 0}, bytes_max=1)
    ((record,), _) = behind.read(0)
    assert record.value == b"before"


def test_a_reader_keeps_what_is_slow(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog that takes longer than a fetch may take comes through one consumer: another would begin anew."""
    values = [os.urandom(MEBIBYTE // 2) for _ in range(48)]  # nothing to compress
    made = list[Consumer]()
    monkeypatch.setattr(kafka_log, "FETCH_S_MAX", 2.0)

    def noted(settings: dict[str, str]) -> Consumer:
        made.append(Consumer(settings))
        return made[-1]

    monkeypatch.setattr(kafka_log, "Consumer", noted)
    behind.write(*values)
    behind.proxy.pause_s = 0.01  # 6 MB/s
    rounds, read = 0, list[bytes]()
    while len(read) < len(values):
        records, _ = behind.read(1 + len(read), bytes_max=1 << 30)
        rounds, read = rounds + 1, read + [record.value for record in records]

    assert read == values
    assert rounds > 1
    assert made == []
