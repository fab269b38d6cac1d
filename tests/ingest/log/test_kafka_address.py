"""What a kafka URL may ask of the producer, and what is said where there is none. No broker is needed for it."""

import contextlib
from pathlib import Path

import certifi
import pytest

from ingest.log import open_log
from ingest.log.kafka_admin import PASSWORD, Wanted, make_topics, parse_address
from ingest.log.kafka_log import Writer
from ingest.log.partitions import Limits
from meters.log import USAGE_EVENTS, TryAgain

URL = "kafka://127.0.0.1:1/nobody"


@pytest.mark.parametrize("number", ["0", "-1", "0.001", "301", "inf", "nan"])
def test_a_delivery_has_a_bounded_time(number: str) -> None:
    """What librdkafka would refuse, or take for "for ever", is refused with the URL and not at the first event."""
    with pytest.raises(ValueError, match="delivery_timeout_s is a number from 1 to 300, and not"):
        parse_address(f"{URL}?delivery_timeout_s={number}", {})


@pytest.mark.parametrize("number", ["-1", "501", "20000", "inf", "nan"])
def test_a_pause_for_more_records_is_shorter_than_any_delivery(number: str) -> None:
    """Or there would be no time left to deliver."""
    with pytest.raises(ValueError, match="linger_ms is a number from 0 to 500, and not"):
        parse_address(f"{URL}?linger_ms={number}", {})


@pytest.mark.parametrize("protocol", ["", "security_protocol=SASL_PLAINTEXT&sasl_username=me&"])
@pytest.mark.parametrize("option", ["ssl_ca", "ssl_certificate", "ssl_key"])
def test_certificates_are_not_for_plain_text(protocol: str, option: str) -> None:
    """Whoever names one wants TLS, and is told how to say so."""
    with pytest.raises(ValueError, match=f"{option} needs security_protocol=SSL or SASL_SSL"):
        parse_address(f"{URL}?{protocol}{option}=a.pem", {PASSWORD: "secret"})


@pytest.mark.parametrize("option", ["ssl_certificate", "ssl_key"])
def test_a_certificate_has_its_key(option: str) -> None:
    """One without the other would not be shown to anybody, and brokers would ask for it in vain."""
    with pytest.raises(ValueError, match="go together: name both"):
        parse_address(f"{URL}?security_protocol=SSL&{option}=a.pem", {})


@pytest.mark.parametrize("protocol", ["", "security_protocol=SSL&"])
@pytest.mark.parametrize("option", ["sasl_mechanism=SCRAM-SHA-512", "sasl_mechanism=PLAIN", "sasl_username=me"])
def test_a_login_is_not_for_a_protocol_without_one(protocol: str, option: str) -> None:
    """A mechanism without one is no more than a name without one: nobody would be asked for a password."""
    with pytest.raises(ValueError, match=f"{option.partition('=')[0]} needs security_protocol=SASL_SSL"):
        parse_address(f"{URL}?{protocol}{option}", {PASSWORD: "secret"})


def test_a_login_is_plain_unless_another_is_named() -> None:
    """By either protocol that has one."""
    for named, mechanism in (("", "PLAIN"), ("&sasl_mechanism=SCRAM-SHA-256", "SCRAM-SHA-256")):
        url = f"{URL}?security_protocol=SASL_SSL&sasl_username=me{named}"
        assert parse_address(url, {PASSWORD: "secret"}).client()["sasl.mechanism"] == mechanism


@pytest.mark.parametrize("end", ["#", "?security_protocol=SSL&ssl_ca=a#b.pem", "-a#b?linger_ms=0"])
def test_nothing_of_a_url_is_cut_off(end: str) -> None:
    """What stands behind a # is no part of it: options there would count for nothing."""
    with pytest.raises(ValueError, match="write %23"):
        parse_address(f"{URL}{end}", {})
    assert parse_address(f"{URL}?security_protocol=SSL&ssl_ca=a%23b.pem", {}).options.ssl_ca == "a#b.pem"


@pytest.mark.parametrize("delivery_timeout_s", [1, 300])
@pytest.mark.parametrize("linger_ms", [0, 500])
def test_whatever_a_url_may_say_makes_a_producer(delivery_timeout_s: int, linger_ms: int) -> None:
    """The ends of both ranges together, too."""
    address = parse_address(f"{URL}?delivery_timeout_s={delivery_timeout_s}&linger_ms={linger_ms}", {})
    Writer(address, Limits()).close()


def test_a_producer_that_cannot_be_made_is_asked_for_again(tmp_path: Path) -> None:
    """Certificates may be gone for a moment while somebody replaces them: that is TryAgain, and no bug."""
    address = parse_address(f"{URL}?security_protocol=SSL&ssl_ca={tmp_path / 'gone.pem'}", {})
    with pytest.raises(TryAgain, match="certificate"):
        Writer(address, Limits())


def test_certificates_that_are_not_there_are_the_url_s_fault(tmp_path: Path) -> None:
    """Whoever opens the log, or makes its topics, is told which options to mend: no bug, and nothing to wait for."""
    url = f"{URL}?security_protocol=SSL&ssl_ca={tmp_path / 'gone.pem'}"
    with pytest.raises(ValueError, match="mend its ssl_ca"):
        open_log(url)
    with pytest.raises(ValueError, match="mend its ssl_ca"):
        make_topics(parse_address(url, {}), Wanted())


def test_certificates_that_go_later_are_waited_for(tmp_path: Path) -> None:
    """A log that is open goes on asking with the client it has."""
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(Path(certifi.where()).read_bytes())
    with contextlib.closing(open_log(f"{URL}?security_protocol=SSL&ssl_ca={trusted}")) as log:
        trusted.unlink()
        for _ in range(2):
            with pytest.raises(TryAgain, match="do not answer"):
                log.ends(USAGE_EVENTS)
