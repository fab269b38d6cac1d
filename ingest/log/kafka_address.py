"""Where a log on Kafka is and how to speak to it, from its URL.

    kafka://HOST:PORT[,HOST:PORT...][/PREFIX][?OPTION=VALUE&...]

The topics are ``usage.events`` and ``usage.control``, with ``PREFIX.`` in front if there is one, so that several
installations share a cluster. Options are a closed list; a misspelled one is refused. Passwords are never part of the
URL, because URLs are shown and logged: they come beside it, from the environment.
"""

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

import msgspec

PASSWORD, KEY_PASSWORD = "password", "key_password"

# What clients wait for an answer is 30 s and more in general: a delivery that fails is told well before.
DELIVERY_TIMEOUT_S = 10.0
DELIVERY_TIMEOUT_S_RANGE = (1.0, 300.0)  # librdkafka's sockets wait no longer, and 0 would be for ever
# A pause for records of other requests to join a batch. A request has a record for each of its customers' partitions,
# and what a broker does costs more by the batch than by the record: at 50,000 events/s it takes 9.3 us an event without
# a pause, 6.5 with this one and 5.7 with the 5 ms of Kafka's own client. Those make every client wait 5 ms longer.
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
    try:
        options = msgspec.convert(dict(parse_qsl(parts.query, keep_blank_values=True)), Options, strict=False)
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
    if bool(options.ssl_certificate) != bool(options.ssl_key):
        raise ValueError("ssl_certificate and ssl_key go together: name both, the same file twice where it holds both")
