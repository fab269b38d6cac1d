"""Administration of the Kafka log: its URL, questions about topics, and the creation of topics.

``parse_address`` reads a URL ``kafka://HOST:PORT[,HOST:PORT...][/PREFIX][?OPTION=VALUE&...]`` into an ``Address``
with its ``Options``. ``Topics`` asks the brokers which topics exist, with which id, and which offsets they have.
``make_topics`` creates the two topics, or compares existing ones with what they should be and returns a ``Finding``
for each setting. ``ingest.log.kafka_log`` and the command ``meterstream kafka`` use this module.
"""

import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from ingest.log.partitions import Limits, Places
from meters.log import USAGE_CONTROL, USAGE_EVENTS, TryAgain

# The URL. The topics are ``usage.events`` and ``usage.control``, with ``PREFIX.`` in front if there is one, so that
# several installations can share a cluster. Options are a closed list; an unknown option is refused. Passwords are
# never part of the URL, because URLs are shown and logged: they come from the environment.

PASSWORD, KEY_PASSWORD = "password", "key_password"

# Clients usually wait 30 s or more for an answer: a failed delivery is reported well before that.
DELIVERY_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S_RANGE = (1.0, 300.0)  # librdkafka's sockets wait no longer, and 0 would be for ever
# How long a record waits for others to join its batch. A request has a record for each of its customers' partitions,
# and a broker's cost is by batch more than by record. At 50,000 events/s the brokers take 9.3 us an event without the
# pause, 6.5 with this one and 5.7 with the 5 ms of Kafka's own client, which would make every client wait 5 ms
# longer.
LINGER_MS = 2.0
LINGER_MS_RANGE = (0.0, 500.0)  # a pause as long as the shortest delivery would leave no time for it

_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_COMPRESSIONS = ("none", "lz4", "zstd", "snappy", "gzip")
_PREFIX = re.compile(r"[a-zA-Z0-9._-]*")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may stand behind the question mark, by Kafka's names where Kafka has one."""

    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = ""  # PLAIN when empty
    sasl_username: str = ""
    ssl_ca: str = ""  # a file of certificates to trust; the system's when empty
    ssl_certificate: str = ""  # this client's own, where brokers ask for one
    ssl_key: str = ""
    organization: str = ""  # whose the records are that name none
    compression: str = "lz4"  # the cheapest for this client by far
    linger_ms: float = LINGER_MS
    delivery_timeout_s: float = DELIVERY_TIMEOUT_S
    holes: str = "refused"  # "allowed" where transactional producers write: their markers take up offsets


class Address(msgspec.Struct, frozen=True):
    """One installation's place in a cluster. ``secrets`` may hold PASSWORD and KEY_PASSWORD."""

    servers: str
    prefix: str
    options: Options
    secrets: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Address({self.servers}, {self.prefix!r})"  # nothing secret

    def topic(self, stream: str) -> str:
        """The topic that holds the stream."""
        return f"{self.prefix}.{stream}" if self.prefix else stream

    def client(self) -> dict[str, str]:
        """What every client of librdkafka is told, passwords included: not for showing."""
        options = self.options
        settings = {
            "bootstrap.servers": self.servers,
            "client.id": "meterstream",
            "security.protocol": options.security_protocol,
            "ssl.ca.location": options.ssl_ca,
            "ssl.certificate.location": options.ssl_certificate,
            "ssl.key.location": options.ssl_key,
            "ssl.key.password": self.secrets.get(KEY_PASSWORD, ""),
        }
        if options.security_protocol.startswith("SASL"):
            settings["sasl.mechanism"] = options.sasl_mechanism or "PLAIN"
            settings["sasl.username"] = options.sasl_username
            settings["sasl.password"] = self.secrets.get(PASSWORD, "")
        return {name: value for name, value in settings.items() if value}


def parse_address(url: str, secrets: Mapping[str, str]) -> Address:
    """Read the URL. Raises ValueError saying what is wrong with it."""
    if "#" in url:
        raise ValueError("a kafka URL has no #, which would cut off what follows: write %23 where a value has one")
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("a kafka URL has no user: say ?sasl_username=NAME, and give the password beside it")
    servers = parts.netloc.split(",")
    if not all(re.fullmatch(r"[^:\[\]]+:\d+|\[[^\]]+\]:\d+", server) for server in servers):
        raise ValueError(f"{url!r} names no brokers: expected kafka://HOST:PORT[,HOST:PORT]")
    prefix = parts.path.strip("/")
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"{prefix!r} cannot stand in a topic's name")
    given = parse_qsl(parts.query, keep_blank_values=True)
    twice = sorted(name for name, times in Counter(name for name, _ in given).items() if times > 1)
    if twice:
        raise ValueError(f"a kafka URL gives each option once, and this one gives {', '.join(twice)} more often")
    try:
        options = msgspec.convert(dict(given), Options, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"a kafka URL's options: {error}; known are {', '.join(Options.__struct_fields__)}") from None
    _check(options, secrets)
    return Address(",".join(servers), prefix, options, dict(secrets))


def _check(options: Options, secrets: Mapping[str, str]) -> None:
    chosen = {
        "security_protocol": (options.security_protocol, _PROTOCOLS),
        "sasl_mechanism": (options.sasl_mechanism or "PLAIN", _MECHANISMS),
        "compression": (options.compression, _COMPRESSIONS),
        "holes": (options.holes, ("refused", "allowed")),
    }
    for name, (value, known) in chosen.items():
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, and not {value!r}")
    ranges = {
        "linger_ms": (options.linger_ms, LINGER_MS_RANGE),
        "delivery_timeout_s": (options.delivery_timeout_s, DELIVERY_TIMEOUT_S_RANGE),
    }
    for name, (number, (least, most)) in ranges.items():
        if not least <= number <= most:
            raise ValueError(f"{name} is a number from {least:g} to {most:g}, and not {number:g}")
    if options.organization and not _UUID.fullmatch(options.organization):
        raise ValueError("organization is the id of one, a UUID in lower case")
    _check_protocol(options, secrets)


def _check_protocol(options: Options, secrets: Mapping[str, str]) -> None:
    """Whoever says how to encrypt, or who they are, is never spoken to in another way."""
    protocol = options.security_protocol
    sasl, tls = protocol.startswith("SASL"), protocol.endswith("SSL")
    if sasl and not (options.sasl_username and secrets.get(PASSWORD)):
        raise ValueError(f"{protocol} needs sasl_username, and the password from the environment")
    for name in ("sasl_username", "sasl_mechanism"):
        if getattr(options, name) and not sasl:
            raise ValueError(f"{name} needs security_protocol=SASL_SSL (or SASL_PLAINTEXT, which encrypts nothing)")
    for name in ("ssl_ca", "ssl_certificate", "ssl_key"):
        if getattr(options, name) and not tls:
            raise ValueError(f"{name} needs security_protocol=SSL or SASL_SSL: {protocol} encrypts nothing")
    if secrets.get(PASSWORD) and not sasl:
        raise ValueError(
            "there is a password and nobody whose it is: the URL needs security_protocol=SASL_SSL and sasl_username "
            "(or unset METERSTREAM_KAFKA_PASSWORD)"
        )
    if bool(options.ssl_certificate) != bool(options.ssl_key):
        raise ValueError("ssl_certificate and ssl_key go together: name both, the same file twice where it holds both")


# Questions about topics. Every question waits a bounded time and answers or raises TryAgain. A missing topic is
# TryAgain, too: an installation may start before its topics are created.

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
# TLS alerts about the other side's certificate (bad, unsupported, revoked, expired, unknown, of an unknown authority,
# required). OpenSSL has changed their words before; the protocol fixes their numbers.
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


# Creating topics. Topics are never created implicitly: a topic that a broker creates by itself has one partition,
# deletes records after a week and may be compacted. Existing topics are not changed unless asked to. Each setting
# that would lose records, or allow the loss of an acknowledged record, is reported with the value it should have.

EVENTS_PARTITIONS = 12
"""Enough for gateways and producers to write side by side; the store has one reader however many there are."""

REPLICAS_MAX = 3
RECORD_BYTES_MAX = 28 * 1024 * 1024  # a record of 24 MiB, with its batch around it
FUTURE_MS_MAX = 60 * 60 * 1000  # a producer's clock; without a bound one record could keep retention from ever acting
DAY_MS = 24 * 60 * 60 * 1000
CONFIRMING = "min.insync.replicas"
STUCK = "more than there are replicas, so nothing can be appended: add replicas, or set it to their number"
CONNECT_S_MAX = 5.0
CREATE_S_MAX = 30.0  # making a topic takes several brokers


class Wanted(msgspec.Struct, frozen=True):
    """What an operator decides. None takes what suits the cluster."""

    partitions: int | None = None  # of usage.events
    replicas: int | None = None
    retention_days: int = 0  # of usage.events; 0 keeps all
    flush: bool = False  # every record on the disk before it is acknowledged: for a single broker
    repair: bool = False  # change settings that differ


class Finding(msgspec.Struct, frozen=True):
    """One thing about one topic. ``wrong`` is empty where all is well."""

    topic: str
    subject: str
    done: str
    wrong: str = ""
    is_repairable: bool = False  # ``Wanted.repair`` would set it right


class Unreachable(Exception):
    """The brokers did not answer, or did not let us; the message says which."""


def make_topics(address: Address, wanted: Wanted) -> list[Finding]:
    """Make the topics that are not there and look at those that are. Raises Unreachable, ValueError for the address."""
    complaint = Complaint()
    admin = make_admin(address, complaint)
    try:
        return _make_topics(admin, address, wanted)
    except (KafkaException, TimeoutError) as error:
        admin.poll(0)
        said = error.args[0].str() if isinstance(error, KafkaException) else "no answer in time"
        reason = f"{said}; {complaint.last}" if complaint.last else said
        raise Unreachable(f"the brokers at {address.servers}: {reason}") from error


def _make_topics(admin: AdminClient, address: Address, wanted: Wanted) -> list[Finding]:
    cluster = admin.list_topics(timeout=CONNECT_S_MAX)
    brokers = len(cluster.brokers)  # that answer now; others may be away for a while
    replicas = wanted.replicas or min(REPLICAS_MAX, brokers)
    few = "" if wanted.replicas or replicas == REPLICAS_MAX else f"; {REPLICAS_MAX} need as many brokers to answer"
    partitions = {USAGE_EVENTS: wanted.partitions or EVENTS_PARTITIONS, USAGE_CONTROL: 1}
    new = {stream for stream in partitions if address.topic(stream) not in cluster.topics}
    if new and replicas > brokers:
        what = f"{brokers} brokers answer, too few for {replicas} replicas"
        raise Unreachable(f"{what}: start the others, or ask for fewer with --replicas")
    found: list[Finding] = []
    for stream, count in partitions.items():
        topic = address.topic(stream)
        if stream in new:
            _make(admin, NewTopic(topic, count, replicas, config=_settings(stream, replicas, wanted)))
            found.append(Finding(topic, "topic", f"made with {count} partitions, {replicas} replicas{few}"))
        else:
            has = _shape(admin, topic)
            asked = count if stream == USAGE_CONTROL or wanted.partitions else has[0]
            found.append(_compare_shape(topic, has, (asked, replicas)))
            found += _compare(admin, topic, has[1], _settings(stream, has[1], wanted), wanted.repair)
    return found


def _make(admin: AdminClient, topic: NewTopic) -> None:
    admin.create_topics([topic])[topic.topic].result(CREATE_S_MAX)
    _await_topic(admin, topic.topic)


def _await_topic(admin: AdminClient, topic: str) -> None:
    """The controller has made it; the brokers hear of it a moment later."""
    deadline_s = time.monotonic() + CREATE_S_MAX
    while topic not in admin.list_topics(timeout=CREATE_S_MAX).topics and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _settings(stream: str, replicas: int, wanted: Wanted) -> dict[str, str]:
    days = wanted.retention_days if stream == USAGE_EVENTS else 0  # decisions are kept for ever
    settings = {
        "cleanup.policy": "delete",
        "retention.ms": str(days * DAY_MS) if days else "-1",
        "retention.bytes": "-1",
        CONFIRMING: str(max(1, replicas - 1)),
        "unclean.leader.election.enable": "false",
        "message.timestamp.type": "CreateTime",
        "message.timestamp.after.max.ms": str(FUTURE_MS_MAX),
        "max.message.bytes": str(RECORD_BYTES_MAX),
    }
    return settings | ({"flush.messages": "1"} if wanted.flush else {})


def _shape(admin: AdminClient, topic: str) -> tuple[int, int]:
    """How many partitions it has, and how many replicas each of them, on brokers that are away too."""
    described: Any = admin.describe_topics(TopicCollection([topic]))[topic].result(CREATE_S_MAX)
    return len(described.partitions), min(len(partition.replicas) for partition in described.partitions)


def _compare_shape(topic: str, has: tuple[int, int], wanted: tuple[int, int]) -> Finding:
    """Partitions and replicas. Neither is ever changed here."""
    wrong = []
    if has[0] != wanted[0]:
        way = "kafka-topics.sh --alter adds some" if has[0] < wanted[0] else "Kafka cannot take any away"
        wrong.append(f"has {has[0]} partitions and not {wanted[0]}: {way}")
    if has[1] < wanted[1]:
        wrong.append(f"has {has[1]} replicas and not {wanted[1]}: kafka-reassign-partitions.sh adds some")
    return Finding(topic, "topic", f"was there, with {has[0]} partitions, {has[1]} replicas", "; ".join(wrong))


def _compare(admin: AdminClient, topic: str, replicas: int, settings: dict[str, str], repair: bool) -> list[Finding]:
    resource = ConfigResource(ResourceType.TOPIC, topic)
    found: Any = admin.describe_configs([resource])[resource].result(CREATE_S_MAX)
    held = {name: found[name].value if name in found else "unknown to this Kafka" for name in settings}
    differing = {name: (held[name], value) for name, value in settings.items() if not _fits(name, held[name], value)}
    stuck = _count(held[CONFIRMING]) > replicas
    left = [Finding(topic, CONFIRMING, f"left at {held[CONFIRMING]}", STUCK)] if stuck else []
    if repair and differing:
        changes = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
            for name, (_, value) in differing.items()
        ]
        changed = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=changes)
        admin.incremental_alter_configs([changed])[changed].result(CREATE_S_MAX)
        return left + [Finding(topic, name, f"changed from {was} to {new}") for name, (was, new) in differing.items()]
    return left + [
        Finding(topic, name, f"left at {was}", f"should be {new}", is_repairable=True)
        for name, (was, new) in differing.items()
    ]


def _fits(name: str, held: str, value: str) -> bool:
    """More replicas that have to confirm are somebody's decision for safety; a repair never makes them fewer."""
    return held == value or (name == CONFIRMING and _count(held) > int(value))


def _count(held: str) -> int:
    return int(held) if held.isdigit() else 0
