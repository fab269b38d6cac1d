"""TLS, passwords and permissions, on a real broker that insists on them."""

import asyncio
import contextlib
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from ingest.client import KafkaTransport
from ingest.client.answer import Taken, Unavailable
from ingest.log import open_log
from ingest.log.kafka_address import Address, parse_address
from ingest.log.kafka_init import Finding, Unreachable, Wanted, make_topics
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, TryAgain
from tests.aggregator.records import ORGANIZATION
from tests.kafka.cluster import running
from tests.kafka.jars import Missing
from tests.kafka.shared import need_kafka
from tests.ports import take_port
from tests.waiting import eventually

USERS = ("gateway", "aggregator", "serve", "producer", "init", "stranger")
STORE_PASSWORD = "changeit"
PASSWORDS = {"PLAIN": "plain-secret-1", "SCRAM-SHA-512": "scram-secret-2"}
WRONG = "not-the-password-3"
PREFIX, FRESH = "guarded", "fresh"  # topics that are there, and topics that a user makes

GATEWAY = {USAGE_EVENTS: ("WRITE", "DESCRIBE"), USAGE_CONTROL: ("READ", "DESCRIBE")}
AGGREGATOR = {USAGE_EVENTS: ("READ", "DESCRIBE"), USAGE_CONTROL: ("READ", "WRITE", "DESCRIBE")}
SERVE = {stream: tuple({*GATEWAY[stream], *AGGREGATOR[stream]}) for stream in GATEWAY}
PRODUCER = {USAGE_EVENTS: ("WRITE", "DESCRIBE")}
INIT = dict.fromkeys(GATEWAY, ("CREATE", "DESCRIBE", "DESCRIBE_CONFIGS"))
REPAIR = dict.fromkeys(GATEWAY, ("ALTER_CONFIGS",))
"""What each process needs, as the documentation of the log tells operators."""


class Guarded(NamedTuple):
    """A broker with a listener for strangers: TLS and a password there, permissions for each topic."""

    address: str
    certificate: Path
    admin: AdminClient

    def url(self, user: str, mechanism: str, prefix: str = PREFIX) -> str:
        """The log's URL for the user."""
        login = f"security_protocol=SASL_SSL&sasl_mechanism={mechanism}&sasl_username={user}"
        return f"kafka://{self.address}/{prefix}?{login}&ssl_ca={self.certificate}"

    def allow(self, user: str, topics: Mapping[str, tuple[str, ...]], prefix: str = PREFIX) -> None:
        """Give the user these permissions."""
        bindings = [
            AclBinding(ResourceType.TOPIC, f"{prefix}.{topic}", ResourcePatternType.LITERAL, f"User:{user}", "*",
                       AclOperation[operation], AclPermissionType.ALLOW)
            for topic, operations in topics.items() for operation in operations
        ]  # fmt: skip
        for made in self.admin.create_acls(bindings).values():
            made.result(30)


def make_certificate(folder: Path) -> Path:
    """A key and a certificate for localhost, by Java's own tool; the certificate as a file that clients can trust."""
    keytool = shutil.which("keytool") or "keytool"
    store = ["-keystore", str(folder / "broker.p12"), "-storepass", STORE_PASSWORD, "-alias", "broker"]
    names = ["-dname", "CN=localhost", "-ext", "SAN=dns:localhost"]
    subprocess.run(
        [keytool, "-genkeypair", "-keyalg", "EC", "-groupname", "secp256r1", "-validity", "2", *names, *store],
        check=True, capture_output=True,
    )
    shown = subprocess.run([keytool, "-exportcert", "-rfc", *store], check=True, capture_output=True)
    certificate = folder / "broker.pem"
    certificate.write_bytes(shown.stdout)
    return certificate


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The broker, its topics, and users of both mechanisms for gateway and aggregator."""
    folder, port = tmp_path_factory.mktemp("guarded"), take_port()
    module = "org.apache.kafka.common.security"
    users = " ".join(f'user_{user}="{PASSWORDS["PLAIN"]}"' for user in USERS)
    settings = {
        "listeners": "PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port},"
                     f"SECURE://localhost:{port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{{port}},SECURE://localhost:{port}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-512",
        "listener.name.secure.plain.sasl.jaas.config": f"{module}.plain.PlainLoginModule required {users};",
        "listener.name.secure.scram-sha-512.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        "listener.name.secure.ssl.keystore.type": "PKCS12",
        "listener.name.secure.ssl.keystore.location": str(folder / "broker.p12"),
        "listener.name.secure.ssl.keystore.password": STORE_PASSWORD,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }  # fmt: skip
    scram = [f"--add-scram=SCRAM-SHA-512=[name={user},password={PASSWORDS['SCRAM-SHA-512']}]"
             for user in ("gateway", "aggregator")]  # fmt: skip
    try:
        certificate = make_certificate(folder)
        with running(folder / "cluster", settings=settings, format_options=scram) as cluster:
            make_topics(parse_address(f"kafka://{cluster.bootstrap}/{PREFIX}", {}), Wanted(partitions=2))
            place = Guarded(f"localhost:{port}", certificate, cluster.admin())
            place.allow("gateway", GATEWAY)
            place.allow("aggregator", AGGREGATOR)
            place.allow("serve", SERVE)
            place.allow("producer", PRODUCER)
            place.allow("init", INIT, FRESH)
            yield place
    except (Missing, FileNotFoundError) as reason:
        need_kafka(Missing(str(reason)))


def soon(question: Callable[[], dict[int, int]]) -> dict[int, int]:
    """The answer, once there is one: the first handshakes with a broker that has just begun take their time."""
    def asked() -> dict[int, int]:
        with contextlib.suppress(TryAgain):
            return question()
        return {}

    found: dict[int, int] = eventually(asked)
    return found


@pytest.mark.parametrize("mechanism", PASSWORDS)
def test_the_documented_permissions_are_enough(guarded: Guarded, mechanism: str) -> None:
    """Over TLS with a password: the gateway appends events and follows decisions, the aggregator the other way."""
    secrets = {"password": PASSWORDS[mechanism]}
    gateway = open_log(guarded.url("gateway", mechanism), secrets=secrets)
    aggregator = open_log(guarded.url("aggregator", mechanism), secrets=secrets)
    try:
        end = soon(lambda: aggregator.ends(USAGE_EVENTS))[1]
        soon(lambda: gateway.ends(USAGE_EVENTS))
        assert asyncio.run(gateway.append(USAGE_EVENTS, [Entry(b"usage", 1)])) == [end]
        assert [record.value for record in aggregator.read(USAGE_EVENTS, {1: end}, bytes_max=100)] == [b"usage"]
        [decided] = asyncio.run(aggregator.append(USAGE_CONTROL, [Entry(b"decision")]))
        assert [record.value for record in gateway.read(USAGE_CONTROL, {0: decided}, bytes_max=100)] == [b"decision"]
        assert gateway.identity(USAGE_EVENTS) == aggregator.identity(USAGE_EVENTS)

        with pytest.raises(TryAgain, match="authorization failed"):
            asyncio.run(gateway.append(USAGE_CONTROL, [Entry(b"not the gateway's to decide")]))
    finally:
        gateway.close()
        aggregator.close()


def test_serve_needs_what_both_need(guarded: Guarded) -> None:
    """It appends and reads both streams."""
    log = open_log(guarded.url("serve", "PLAIN"), secrets={"password": PASSWORDS["PLAIN"]})
    try:
        for stream in GATEWAY:
            end = soon(functools.partial(log.ends, stream))[0]
            assert asyncio.run(log.append(stream, [Entry(b"{}")])) == [end]
            assert [record.value for record in log.read(stream, {0: end}, bytes_max=100)] == [b"{}"]
    finally:
        log.close()


def test_other_producers_need_no_more_than_to_write(guarded: Guarded) -> None:
    """As the client does that writes straight to Kafka. Decisions are not theirs."""
    url = parse_address(guarded.url("producer", "PLAIN"), {"password": PASSWORDS["PLAIN"]})
    for stream, outcome in ((USAGE_EVENTS, Taken), (USAGE_CONTROL, Unavailable)):
        settings = url.client() | {"log_level": 0}
        sent = KafkaTransport(url.servers, ORGANIZATION, topic=url.topic(stream), settings=settings)
        with contextlib.closing(sent):
            assert isinstance(sent.send([b'{"external_customer_id":"ann"}']), outcome)


def test_making_topics_needs_no_permission_for_the_cluster(guarded: Guarded) -> None:
    """To make them and to look at them takes three for each; to change their settings takes one more."""
    address = parse_address(guarded.url("init", "PLAIN", FRESH), {"password": PASSWORDS["PLAIN"]})
    made = make_topics(address, Wanted(partitions=2))
    assert {finding.topic for finding in made} == {address.topic(stream) for stream in INIT}
    assert not any(finding.wrong for finding in [*made, *make_topics(address, Wanted(partitions=2))])

    other = Wanted(partitions=2, retention_days=30, repair=True)
    with pytest.raises(Unreachable, match="authorization failed"):
        make_topics(address, other)
    guarded.allow("init", REPAIR, FRESH)
    assert "changed from -1" in str(eventually(lambda: repaired(address, other)))


def repaired(address: Address, wanted: Wanted) -> list[Finding]:
    """What was found; nothing before brokers have heard of the permission."""
    with contextlib.suppress(Unreachable):
        return make_topics(address, wanted)
    return []


def test_a_wrong_password_is_said_and_not_shown(guarded: Guarded) -> None:
    """Whoever cannot log in is told so, by commands too; the password appears nowhere."""
    url = guarded.url("gateway", "PLAIN")
    log = open_log(url, secrets={"password": WRONG})
    said: list[str] = []

    def is_named() -> bool:
        with pytest.raises(TryAgain) as refusal:
            log.ends(USAGE_EVENTS)
        said.append(str(refusal.value))
        return "uthenticat" in said[-1]

    try:
        eventually(is_named)
    finally:
        log.close()
    with pytest.raises(Unreachable) as unreachable:
        make_topics(parse_address(url, {"password": WRONG}), Wanted())

    assert WRONG not in f"{said} {unreachable.value} {parse_address(url, {'password': WRONG})!r}"


def test_a_user_without_permission_learns_nothing(guarded: Guarded) -> None:
    """Topics that one may not describe look like topics that are not there; the gateway would wait."""
    log = open_log(guarded.url("stranger", "PLAIN"), secrets={"password": PASSWORDS["PLAIN"]})
    try:
        with pytest.raises(TryAgain):
            log.ends(USAGE_EVENTS)
    finally:
        log.close()


def test_a_certificate_that_is_not_trusted_ends_the_talk(guarded: Guarded, tmp_path: Path) -> None:
    """A client that trusts another certificate sends no password."""
    other = Guarded(guarded.address, make_certificate(tmp_path), guarded.admin)
    log = open_log(other.url("gateway", "PLAIN"), secrets={"password": PASSWORDS["PLAIN"]})
    try:
        with pytest.raises(TryAgain):
            log.ends(USAGE_EVENTS)
    finally:
        log.close()
