"""Questions to the brokers about topics: which there are, which id they have, from where to where they reach.

Every question waits a bounded time and answers or raises TryAgain. A topic that is not there is TryAgain too: an
installation may start before its topics are made.
"""

import itertools
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from ingest.log.kafka_address import Address
from ingest.log.limits import Limits
from ingest.log.places import Places
from meters.log import USAGE_CONTROL, USAGE_EVENTS, TryAgain

STREAMS = (USAGE_EVENTS, USAGE_CONTROL)
REQUEST_S_MAX = 3.0
"""Seconds that brokers get for an answer. Who asked will ask again, and a stop should not have to wait longer."""

OPENING_S_MAX = 1.0
"""Seconds that opening waits for the brokers; without them it goes on, and the first use asks again."""

CLIENT_END_S_MAX = 3.0
"""Seconds that whoever gives up a client waits for its end: milliseconds, or for ever where it met a broker that died
(librdkafka's issues 3470, 4131 and 5476)."""

FUTURE_GRACE_S = 0.5  # librdkafka keeps its own time, and is asked to be punctual

NAME_A_CERTIFICATE = "they want a client's certificate: name one that they trust with ssl_certificate and ssl_key"
# The alerts of TLS about the other side's certificate (bad, unsupported, revoked, expired, unknown, of an unknown
# authority, required); OpenSSL has changed their words before, and their numbers are the protocol's.
_UNCERTIFIED = re.compile(r"SSL alert number (4[2-68]|116)\b")


class Topics:
    """The two topics of one installation, for any thread."""

    def __init__(self, address: Address, limits: Limits) -> None:
        """Raises ValueError for an address that no client can be made of."""
        self._address = address
        self._retry_after_s = limits.retry_after_s
        self._complaint = Complaint()
        self._admin: AdminClient | None = make_admin(address, self._complaint)
        self._turn = 0  # how many there were before it
        self._lock = threading.Lock()
        self._questions = itertools.count(1)
        self._answered = 0  # the newest question that was answered
        self.places: Places | None = None

    def learn(self, wait_s: float = REQUEST_S_MAX) -> Places:
        """The partitions of both streams as the brokers have them now. Raises TryAgain.

        Nobody waits for another's question: while the brokers are away each would wait for all before it.
        """
        question = next(self._questions)
        counts = {stream: partitions for stream, (_, partitions) in self.describe(STREAMS, wait_s).items()}
        with self._lock:
            is_newest = question > self._answered  # an older answer may lack what was added since
            if self.places is None or (is_newest and self.places.partitions != counts):
                self.places = Places(counts)
            self._answered = max(self._answered, question)
            return self.places

    def describe(self, streams: Iterable[str], wait_s: float = REQUEST_S_MAX) -> dict[str, tuple[str, int]]:
        """Each stream's topic id and number of partitions. Raises TryAgain."""
        topics = {self._address.topic(stream): stream for stream in streams}
        turn = self._turn
        futures = self._client().describe_topics(TopicCollection(list(topics)), request_timeout=wait_s)
        found = {topics[name]: self._result(turn, future, wait_s, name) for name, future in futures.items()}
        return {stream: (str(topic.topic_id), len(topic.partitions)) for stream, topic in found.items()}

    def starts(self, stream: str, partitions: Iterable[int]) -> dict[int, int]:
        """The offset of the oldest record, by partition. Raises TryAgain."""
        return self._offsets(stream, partitions, OffsetSpec.earliest())  # type: ignore[no-untyped-call]

    def ends(self, stream: str, partitions: Iterable[int]) -> dict[int, int]:
        """The offset that the next record will get, by partition. Raises TryAgain."""
        return self._offsets(stream, partitions, OffsetSpec.latest())  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Let go of the connections; later questions raise TryAgain."""
        with self._lock:
            former, self._admin = [self._admin], None
        end_apart(former.clear)

    def _offsets(self, stream: str, partitions: Iterable[int], which: OffsetSpec) -> dict[int, int]:
        topic = self._address.topic(stream)
        asked = {TopicPartition(topic, partition): which for partition in partitions}
        if not asked:
            return {}
        turn = self._turn
        futures = self._client().list_offsets(
            asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=REQUEST_S_MAX
        )
        found = {
            place.partition: self._result(turn, future, REQUEST_S_MAX, topic).offset
            for place, future in futures.items()
        }
        if any(offset < 0 for offset in found.values()):  # how the client says that a leader did not answer in time
            raise self._given_up(turn, TimeoutError(), topic)
        return found

    def _client(self) -> AdminClient:
        if self._admin is None:
            raise TryAgain("the log is closed", self._retry_after_s)
        return self._admin

    def _result(self, turn: int, future: "Future[Any]", wait_s: float, topic: str) -> Any:
        try:
            result = future.result(wait_s + FUTURE_GRACE_S)
            self._complaint.last = ""
            return result
        except (KafkaException, TimeoutError) as error:
            raise self._given_up(turn, error, topic) from error

    def _given_up(self, turn: int, error: Exception, topic: str) -> TryAgain:
        """Why, for a person; and another client for the next question.

        librdkafka goes on asking the leaders that it knows, for minutes after one of them was lost; a new client asks
        who leads now.
        """
        try:
            return self.later(error, topic)
        finally:
            self._take_turns(turn)

    def _take_turns(self, turn: int) -> None:
        """Another client for the one of a turn, unless somebody was quicker, or all is closed."""
        with self._lock:
            if self._admin is None or self._turn != turn:
                return
            try:
                made = make_admin(self._address, self._complaint)
            except ValueError:  # certificates that are just being replaced: this one goes on
                return
            former = [self._admin]
            self._admin, self._turn = made, turn + 1
        end_apart(former.clear)

    def later(self, error: Exception, topic: str) -> TryAgain:
        """Why a question went unanswered, for a person."""
        cause = error.args[0] if error.args else error
        code = cause.code() if isinstance(cause, KafkaError) else None
        if code in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            return TryAgain(f"there is no topic {topic} yet; `meterstream kafka init` makes it", self._retry_after_s)
        if self._admin is not None:
            self._admin.poll(0)
        reason = self._complaint.last or (cause.str() if isinstance(cause, KafkaError) else "no answer in time")
        return TryAgain(f"the brokers at {self._address.servers} do not answer: {reason}", self._retry_after_s)


class Complaint:
    """What a client last said about its connections: why nobody answers. It says so when it is polled."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, error: KafkaError) -> None:
        """librdkafka's ``error_cb``."""
        if error.code() != KafkaError._ALL_BROKERS_DOWN:  # says the same without the reason
            self.last = error.str() + (f"; {NAME_A_CERTIFICATE}" if _UNCERTIFIED.search(error.str()) else "")


def make_admin(address: Address, complaint: Complaint) -> AdminClient:
    """A client for questions. Raises ValueError when its certificates or its key cannot be used."""
    try:
        return AdminClient(quiet(address.client()) | {"error_cb": complaint})
    except KafkaException as error:
        reason = f"no Kafka client can be made of this URL ({error.args[0].str()})"
        raise ValueError(f"{reason}: mend its ssl_ca, ssl_certificate or ssl_key, or the key's password") from None


def end_apart(end: Callable[[], object]) -> None:
    """Have a client end in a thread, and wait for it no longer than CLIENT_END_S_MAX."""
    thread = threading.Thread(target=end, name="log-client-end", daemon=True)
    thread.start()
    thread.join(CLIENT_END_S_MAX)


def quiet(settings: dict[str, str]) -> dict[str, Any]:
    """The settings of a client that writes nothing to standard error: what matters is raised, or answered."""
    return {**settings, "log_level": 0, "socket.keepalive.enable": True, "reconnect.backoff.max.ms": 1000}
