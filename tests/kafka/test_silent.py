"""Connections to a real broker that stay open and carry no answer any more, as behind a firewall that forgot them."""

import asyncio
import contextlib
from pathlib import Path

from ingest.log import open_log
from ingest.log.kafka_address import parse_address
from ingest.log.kafka_init import Wanted, make_topics
from meters.log import USAGE_EVENTS, Entry, TryAgain
from tests.faults.cutting import CuttingProxy
from tests.faults.kafka_installation import own_brokers
from tests.ports import take_port


def test_a_reader_gets_past_them(tmp_path: Path) -> None:
    """librdkafka waits a minute for an answer; a reader gives its clients up sooner, and goes on with others."""
    behind, told_later = take_port(), 0
    address = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{behind}"}

    def write(value: bytes) -> None:
        with contextlib.closing(open_log(url)) as other:
            asyncio.run(other.append(USAGE_EVENTS, [Entry(value)]))

    def read_at(offset: int) -> bytes:
        nonlocal told_later
        while True:
            try:
                if records := log.read(USAGE_EVENTS, {0: offset}, bytes_max=1):
                    return records[0].value
            except TryAgain:
                told_later += 1

    with (
        own_brokers(tmp_path, settings=address, start=False) as cluster,
        CuttingProxy(cluster.nodes[0].port, behind) as proxy,
    ):
        cluster.start()
        url = f"kafka://{cluster.bootstrap}/silent"
        make_topics(parse_address(url, {}), Wanted(partitions=1))
        with contextlib.closing(open_log(url)) as log:
            write(b"before")
            assert read_at(0) == b"before"
            proxy.silence()
            write(b"after")
            assert read_at(1) == b"after"

    assert told_later <= 2  # for the ends, and for the record: each question found a client that heard nothing
