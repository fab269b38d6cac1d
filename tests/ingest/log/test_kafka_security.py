"""TLS, passwords, certificates and permissions, on a real broker that insists on them."""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
from ingest.client.transport import Taken, Unavailable
from ingest.log import open_log
from ingest.log.kafka_admin import Address, Finding, Unreachable, Wanted, make_topics, parse_address
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry, Log, TryAgain
from tests.support.certificates import make_certificate
from tests.support.kafka.cluster import running
from tests.support.kafka.jars import Missing
from tests.support.kafka.shared import need_kafka
from tests.support.ports import take_port
from tests.support.records import ORGANIZATION
from tests.support.servers.installation import meterstream
from tests.support.waiting import eventually

pytestmark = pytest.mark.kafka

BOTH = ("gateway", "aggregator")
USERS = (*BOTH, "serve", "producer", "init", "stranger")
CERTIFICATE = "certificate"  # instead of a mechanism
PASSWORDS = {"PLAIN": "plain-secret-1", "SCRAM-SHA-256": "scram-secret-2", "SCRAM-SHA-512": "scram-secret-3"}
SECRETS = {mechanism: {"password": password} for mechanism, password in PASSWORDS.items()} | {
    CERTIFICATE: {"key_password": "key-secret-4"}
}
"""What a user has besides the URL, for each way to log in."""
WRONG = "not-the-password-5"
PREFIX, FRESH, COMMANDED = "guarded", "fresh", "commanded"  # topics that are there, and topics that a user makes

GATEWAY = {USAGE_EVENTS: ("WRITE", "DESCRIBE"), USAGE_CONTROL: ("READ", "DESCRIBE")}
AGGREGATOR = {USAGE_EVENTS: ("READ", "DESCRIBE"), USAGE_CONTROL: ("READ", "WRITE", "DESCRIBE")}
SERVE = {stream: tuple({*GATEWAY[stream], *AGGREGATOR[stream]}) for stream in GATEWAY}
PRODUCER = {USAGE_EVENTS: ("WRITE", "DESCRIBE")}
INIT = dict.fromkeys(GATEWAY, ("CREATE", "DESCRIBE", "DESCRIBE_CONFIGS"))
REPAIR = dict.fromkeys(GATEWAY, ("ALTER_CONFIGS",))
"""What each process needs, as the documentation of the log tells operators."""


class Guarded(NamedTuple):
    """A broker with two listeners for strangers: TLS with a password, or a certificate; permissions for each topic."""

    address: str
    certifying: str  # the address where certificates are asked for
    trusted: Path  # the broker's certificate
    folder: Path  # with the certificates of users
    admin: AdminClient

    def url(self, user: str, mechanism: str, prefix: str = PREFIX) -> str:
        """The log's URL for the user."""
        if mechanism == CERTIFICATE:
            own = f"ssl_certificate={self.folder / user}.pem&ssl_key={self.folder / user}.key"
            return f"{self.anonymous(prefix)}&{own}"
        login = f"security_protocol=SASL_SSL&sasl_mechanism={mechanism}&sasl_username={user}"
        return f"kafka://{self.address}/{prefix}?{login}&ssl_ca={self.trusted}"

    def anonymous(self, prefix: str = PREFIX) -> str:
        """The log's URL where certificates are asked for, without one."""
        return f"kafka://{self.certifying}/{prefix}?security_protocol=SSL&ssl_ca={self.trusted}"

    def allow(self, user: str, topics: Mapping[str, tuple[str, ...]], prefix: str = PREFIX) -> None:
        """Give the user these permissions."""
        bindings = [
            AclBinding(ResourceType.TOPIC, f"{prefix}.{topic}", ResourcePatternType.LITERAL, f"User:{user}", "*",
                       AclOperation[operation], AclPermissionType.ALLOW)
            for topic, operations in topics.items() for operation in operations
        ]  # fmt: skip
        for made in self.admin.create_acls(bindings).values():
            made.result(30)


def settings_of(folder: Path, password_port: int, certificate_port: int) -> dict[str, str]:
    """The broker's, with a certificate of its own and those of two users, which it trusts."""
    broker = make_certificate(folder, "broker", reached_as="DNS:localhost")
    own = folder / "broker-with-key.pem"
    own.write_bytes(broker.key.read_bytes() + broker.path.read_bytes())
    users = [make_certificate(folder, user, password=SECRETS[CERTIFICATE]["key_password"]) for user in BOTH]
    trusted = folder / "users.pem"
    trusted.write_bytes(b"".join(user.path.read_bytes() for user in users))
    module = "org.apache.kafka.common.security"
    plain = " ".join(f'user_{user}="{PASSWORDS["PLAIN"]}"' for user in USERS)
    strangers = f"SECURE://localhost:{password_port},CERTIFYING://localhost:{certificate_port}"
    return {
        "listeners": f"PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{{controller_port}},{strangers}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{{port}},{strangers}",
        "listener.security.protocol.map":
            "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL,CERTIFYING:SSL",
        "sasl.enabled.mechanisms": ",".join(PASSWORDS),
        "listener.name.secure.plain.sasl.jaas.config": f"{module}.plain.PlainLoginModule required {plain};",
        "listener.name.secure.scram-sha-256.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        "listener.name.secure.scram-sha-512.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(own),
        "listener.name.certifying.ssl.client.auth": "required",
        "listener.name.certifying.ssl.truststore.type": "PEM",
        "listener.name.certifying.ssl.truststore.location": str(trusted),
        "listener.name.certifying.ssl.principal.mapping.rules": "RULE:^CN=(.*)$/$1/",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }  # fmt: skip


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The broker, its topics, and gateway and aggregator as users that can log in either way."""
    folder, ports = tmp_path_factory.mktemp("guarded"), (take_port(), take_port())
    scram = [f"--add-scram={mechanism}=[name={user},password={PASSWORDS[mechanism]}]"
             for mechanism in PASSWORDS if mechanism != "PLAIN" for user in BOTH]  # fmt: skip
    settings = settings_of(folder, *ports)
    try:
        with running(folder / "cluster", settings=settings, format_options=scram) as cluster:
            make_topics(parse_address(f"kafka://{cluster.bootstrap}/{PREFIX}", {}), Wanted(partitions=2))
            where = (f"localhost:{port}" for port in ports)
            place = Guarded(*where, folder / "broker.pem", folder, cluster.admin())
            place.allow("gateway", GATEWAY)
            place.allow("aggregator", AGGREGATOR)
            place.allow("serve", SERVE)
            place.allow("producer", PRODUCER)
            place.allow("init", INIT, FRESH)
            place.allow("gateway", INIT, COMMANDED)
            yield place
    except Missing as reason:
        need_kafka(reason)


def soon(question: Callable[[], dict[int, int]]) -> dict[int, int]:
    """The answer, once there is one: the first handshakes with a broker that has just begun take their time."""
    def asked() -> dict[int, int]:
        with contextlib.suppress(TryAgain):
            return question()
        return {}

    found: dict[int, int] = eventually(asked)
    return found


@pytest.mark.parametrize("mechanism", SECRETS)
def test_the_documented_permissions_are_enough(guarded: Guarded, mechanism: str) -> None:
    """With each way to log in: the gateway appends events and follows decisions, the aggregator the other way."""
    gateway = open_log(guarded.url("gateway", mechanism), secrets=SECRETS[mechanism])
    aggregator = open_log(guarded.url("aggregator", mechanism), secrets=SECRETS[mechanism])
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


@pytest.mark.parametrize(("mechanism", "variable"), [("SCRAM-SHA-256", "PASSWORD"), (CERTIFICATE, "KEY_PASSWORD")])
def test_commands_log_in_with_what_the_environment_has(guarded: Guarded, mechanism: str, variable: str) -> None:
    """The secret of either kind comes from its variable."""
    [secret] = SECRETS[mechanism].values()
    url = guarded.url("gateway", mechanism, COMMANDED)
    done = meterstream("kafka", "init", "--log", url, **{f"METERSTREAM_KAFKA_{variable}": secret})

    assert done.returncode == 0, done.stderr


def test_serve_needs_what_both_need(guarded: Guarded) -> None:
    """It appends and reads both streams."""
    log = open_log(guarded.url("serve", "PLAIN"), secrets=SECRETS["PLAIN"])
    try:
        for stream in GATEWAY:
            end = soon(functools.partial(log.ends, stream))[0]
            assert asyncio.run(log.append(stream, [Entry(b"{}")])) == [end]
            assert [record.value for record in log.read(stream, {0: end}, bytes_max=100)] == [b"{}"]
    finally:
        log.close()


def test_other_producers_need_no_more_than_to_write(guarded: Guarded) -> None:
    """As the client does that writes straight to Kafka. Decisions are not theirs."""
    url = parse_address(guarded.url("producer", "PLAIN"), SECRETS["PLAIN"])
    for stream, outcome in ((USAGE_EVENTS, Taken), (USAGE_CONTROL, Unavailable)):
        settings = url.client() | {"log_level": 0}
        sent = KafkaTransport(url.servers, ORGANIZATION, topic=url.topic(stream), settings=settings)
        with contextlib.closing(sent):
            assert isinstance(sent.send([b'{"external_customer_id":"ann"}']), outcome)


def test_making_topics_needs_no_permission_for_the_cluster(guarded: Guarded) -> None:
    """To make them and to look at them takes three for each; to change their settings takes one more."""
    address = parse_address(guarded.url("init", "PLAIN", FRESH), SECRETS["PLAIN"])
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


def refusals(url: str, secrets: Mapping[str, str], word: str) -> list[str]:
    """What a log at the URL is told, once that has the word, and what whoever makes topics is told."""
    def of_the_log() -> str:
        with contextlib.closing(open_log(url, secrets=secrets)) as log:
            return str(eventually(lambda: refusal(log, word)))

    def of_topics() -> str:
        with pytest.raises(Unreachable) as unreachable:
            make_topics(parse_address(url, secrets), Wanted())
        return str(unreachable.value)

    with ThreadPoolExecutor() as pool:  # each waits for seconds, whether a broker may still let it in
        return [asked.result() for asked in [pool.submit(of_the_log), pool.submit(of_topics)]]


def refusal(log: Log, word: str) -> str:
    """What the log says, if it has the word."""
    with pytest.raises(TryAgain) as refused:
        log.ends(USAGE_EVENTS)
    said = str(refused.value)
    return said if word in said else ""


def test_a_wrong_password_is_said_and_not_shown(guarded: Guarded) -> None:
    """By each mechanism: who cannot log in is told so, by commands too; the password appears nowhere."""
    secrets = {"password": WRONG}
    urls = [guarded.url("gateway", mechanism) for mechanism in PASSWORDS]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda url: refusals(url, secrets, "uthenticat"), urls))

    assert all("uthenticat" in said for both in found for said in both)
    assert WRONG not in f"{found} {parse_address(urls[0], secrets)!r}"


def test_brokers_that_ask_for_a_certificate_say_so(guarded: Guarded, tmp_path: Path) -> None:
    """Who has none, or one that they do not trust, is told which options name one; nobody waits for ever."""
    make_certificate(tmp_path, "gateway", password=SECRETS[CERTIFICATE]["key_password"])
    urls = [guarded.anonymous(), guarded._replace(folder=tmp_path).url("gateway", CERTIFICATE)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda url: refusals(url, SECRETS[CERTIFICATE], "certificate"), urls))

    assert all("name one that they trust with ssl_certificate and ssl_key" in said for both in found for said in both)


def test_a_key_that_stays_locked_is_the_url_s_fault(guarded: Guarded) -> None:
    """Without its password, or with another one, nothing is tried; what is to be mended is said and not shown."""
    url = guarded.url("gateway", CERTIFICATE)
    for secrets in ({}, {"key_password": WRONG}):
        with pytest.raises(ValueError, match="or the key's password") as refused:
            open_log(url, secrets=secrets)
        assert WRONG not in str(refused.value)


def test_a_user_without_permission_learns_nothing(guarded: Guarded) -> None:
    """Topics that one may not describe look like topics that are not there; the gateway would wait."""
    log = open_log(guarded.url("stranger", "PLAIN"), secrets=SECRETS["PLAIN"])
    try:
        with pytest.raises(TryAgain):
            log.ends(USAGE_EVENTS)
    finally:
        log.close()


def test_a_certificate_that_is_not_trusted_ends_the_talk(guarded: Guarded, tmp_path: Path) -> None:
    """A client that trusts another certificate sends no password."""
    other = guarded._replace(trusted=make_certificate(tmp_path, "other", reached_as="DNS:localhost").path)
    log = open_log(other.url("gateway", "PLAIN"), secrets=SECRETS["PLAIN"])
    try:
        with pytest.raises(TryAgain):
            log.ends(USAGE_EVENTS)
    finally:
        log.close()
