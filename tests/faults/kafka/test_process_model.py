"""Any story told to real processes over a real broker ends with the reference's numbers.

``test_model.py`` tells its stories to an aggregator inside the test; here gateway and aggregator are processes of their
own, which end politely between two steps or die of SIGKILL while they work. Events come through the gateway, from a
client that repeats whatever was not answered, and from a Kafka producer beside it. All stories are told to one
installation; each has ids and customers of its own.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import msgspec
import pytest
from confluent_kafka import Producer
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from meters.aggregation import evaluate
from meters.event import Event, check_line
from meters.event_values import Facts, facts
from meters.log import USAGE_EVENTS
from meters.meter import Meter
from tests.support.faults.sender import Sender
from tests.support.faults.store_checks import CUSTOMERS, metered, usage
from tests.support.kafka.cluster import Cluster
from tests.support.kafka.installation import LOOK_AGAIN_S, TOKEN, KafkaInstallation, Process
from tests.support.records import NOW, ORGANIZATION
from tests.support.waiting import eventually

STORIES = 8  # ten times as many with --long
IDS = 6  # few, so that repetitions and contradictions come by themselves
TOKENS = ("1", "0.000000000001", "99999999999999.5")
BROKEN = (b"{broken", b"\xff\xfe", b'{"name":"nameless"}')
Who = Literal["gateway", "aggregator"]


class Send(NamedTuple):
    """Events, so many in a request or record. Who ``dies`` does so meanwhile, and is started again at once."""

    lines: tuple[tuple[int, str], ...]  # number of the id, tokens
    size: int
    through: Literal["gateway", "producer"]
    dies: Who | None


class Break(NamedTuple):
    """A producer's record that holds no event."""

    raw: bytes


class Restart(NamedTuple):
    """SIGTERM, and another life."""

    who: Who


class Look(NamedTuple):
    """Everybody catches up, and is compared."""


Step = Send | Break | Restart | Look
_who: st.SearchStrategy[Who] = st.sampled_from(("gateway", "aggregator"))
_lines = st.lists(st.tuples(st.integers(0, IDS - 1), st.sampled_from(TOKENS)), min_size=1, max_size=12).map(tuple)
_sends = st.builds(
    Send, _lines, st.integers(1, 5), st.sampled_from(("gateway", "gateway", "producer")), st.none() | _who
)
_others = st.one_of(st.builds(Break, st.sampled_from(BROKEN)), st.builds(Restart, _who), st.just(Look()))
stories: st.SearchStrategy[list[Step]] = st.lists(_sends | _others, min_size=3, max_size=9)


class World:
    """An installation with meters, and what its answers must be."""

    def __init__(self, installation: KafkaInstallation) -> None:
        self._installation = installation
        self._meters = [(self._made(meter), meter) for meter in metered()]
        self._producer = Producer(
            {"bootstrap.servers": installation.cluster.bootstrap, "partitioner": "murmur2_random", "acks": "all"}
        )
        self._first: dict[str, Facts] = {}
        self.stories = 0
        self.deaths = 0

    @property
    def ids(self) -> set[str]:
        """Of all events, in all stories."""
        return set(self._first)

    def _made(self, meter: Meter) -> str:
        everything = {"conjunction": "and", "clauses": []}
        aggregation = msgspec.to_builtins(meter.aggregation)
        body = {"name": meter.name, "filter": everything, "aggregation": aggregation}
        found = self._installation.client.post(f"{self._installation.address}/v1/meters/", json=body)
        assert found.status_code == 201, found.text
        return str(found.json()["id"])

    def tell(self, story: list[Step]) -> None:
        """A story of its own, and what is counted at its end."""
        self.stories += 1
        for step in story:
            match step:
                case Send():
                    with self._dying(step.dies):
                        self._send(step)
                case Break(raw):
                    self._produce(CUSTOMERS[0], [raw])
                case Restart(who):
                    process = self._process(who)
                    ends = (0, -signal.SIGTERM)  # at once, where it has only begun
                    assert process.stop() in ends, process.output[-2000:]
                    process.start()
                case Look():
                    self.compare()
        self.compare()

    def _process(self, who: Who) -> Process:
        return self._installation.gateway if who == "gateway" else self._installation.aggregator

    @contextlib.contextmanager
    def _dying(self, who: Who | None) -> Iterator[None]:
        """Kill it while the block runs."""

        def again() -> None:
            if who is not None:
                self._process(who).kill()
                self._process(who).start()
                self.deaths += 1

        death = threading.Thread(target=again)
        death.start()
        try:
            yield
        finally:
            death.join()

    def _send(self, step: Send) -> None:
        customer = [CUSTOMERS[number % len(CUSTOMERS)] for number in range(IDS)]
        ids = [(f"{self.stories}-{number}", customer[number], tokens) for number, tokens in step.lines]
        for start in range(0, len(ids), step.size):
            taken = ids[start : start + step.size]
            group = [(whose, usage(id, self._name(whose), tokens)) for id, whose, tokens in taken]
            for _, line in group:
                event = check_line(line, organization_id=ORGANIZATION, now=NOW)
                assert isinstance(event, Event)
                self._first.setdefault(event.external_id or "", facts(event, NOW))
            if step.through == "gateway":
                self._post([line for _, line in group])
            else:
                for name in CUSTOMERS:
                    self._produce(name, [line for whose, line in group if whose == name])

    def _name(self, customer: str) -> str:
        return f"{customer}-{self.stories}"

    def _post(self, lines: list[bytes]) -> None:
        body = b'{"events":[' + b",".join(lines) + b"]}"

        def taken() -> bool:
            with contextlib.suppress(httpx.TransportError):
                address = f"{self._installation.address}/v1/events/ingest"
                found = self._installation.client.post(address, content=body)
                assert found.status_code in (200, 503), found.text
                return found.status_code == 200
            return False

        eventually(taken, look_again_s=LOOK_AGAIN_S)

    def _produce(self, customer: str, lines: list[bytes]) -> None:
        """As the README shows it to producers."""
        if lines:
            topic, key = f"{self._installation.prefix}.{USAGE_EVENTS}", f"{ORGANIZATION}:{self._name(customer)}"
            self._producer.produce(topic, b"\n".join(lines), key, headers={"organization": ORGANIZATION})
            assert self._producer.flush(60) == 0

    def compare(self) -> None:
        """What the API says of this story's customers, and the reference."""
        self._installation.catch_up()
        for id, meter in self._meters:
            for customer in map(self._name, CUSTOMERS):
                taken = [event for event in self._first.values() if event.external_customer_id == customer]
                found = eventually(self._asking(f"/v1/meters/{id}/usage", external_customer_id=customer))
                assert evaluate(meter.aggregation, taken) == Decimal(found["value"])

    def _asking(self, path: str, **parameters: str) -> Callable[[], Any]:
        def asked() -> Any:
            with contextlib.suppress(httpx.TransportError):
                found = self._installation.client.get(f"{self._installation.address}{path}", params=parameters)
                return json.loads(found.content) if found.status_code == 200 else None
            return None

        return asked


@pytest.mark.timeout(1800)  # with --long sixty stories
def test_stories_told_to_processes(
    kafka: Cluster, tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Repetitions, contradictions, garbage, restarts and deaths: each event counts once, to the last decimal."""
    installation = KafkaInstallation(kafka, tmp_path)
    with contextlib.closing(installation):
        installation.start()
        world = World(installation)

        # What does not become true is waited for, so to look for a shorter story would take hours.
        @settings(max_examples=STORIES * (10 if long else 1), phases=(Phase.generate,), derandomize=not long)
        @given(story=stories)
        def tell(story: list[Step]) -> None:
            world.tell(story)

        tell()
        _, counted, _ = installation.end(Sender(0, TOKEN))
    figures = f"kafka, stories: {world.stories} told to processes, {world.deaths} killed, {counted.tallies}"
    record_property("figures", figures)

    assert world.ids == {id for _, id in counted.stored}
