"""The environment is read once, checked, and says what is wrong with it."""

from pathlib import Path

import pytest

from deploy.errors import USAGE, GiveUp
from deploy.settings import read_environment
from ingest.log.kafka_admin import parse_address


def test_a_variable_sets_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """METERSTREAM_ and the field's name in capitals; what is not set has its default."""
    monkeypatch.setenv("METERSTREAM_PORT", "9000")
    monkeypatch.setenv("METERSTREAM_DATA", "elsewhere")
    monkeypatch.setenv("METERSTREAM_DEBUG", "true")

    settings = read_environment()

    assert settings.port == 9000
    assert settings.data == Path("elsewhere")
    assert settings.debug is True
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("METERSTREAM_PROT", "1", "METERSTREAM_PROT is not a setting; did you mean METERSTREAM_PORT?"),
        ("METERSTREAM_QQQQ", "1", "METERSTREAM_QQQQ is not a setting; known are"),
        ("METERSTREAM_PORT", "high", "METERSTREAM_PORT: Expected `int`"),
        ("METERSTREAM_PORT", "65536", "METERSTREAM_PORT: Expected `int` <= 65535"),
        ("METERSTREAM_LOG", "Kafka://h:1", "METERSTREAM_LOG: Expected an empty value for a file in the data, or kafka://H"),
        ("METERSTREAM_LOG", "embedded:d", "METERSTREAM_LOG: Expected an empty value for a file in the data, or kafka://H"),
        ("METERSTREAM_UPSTREAM", "host:1", "METERSTREAM_UPSTREAM: Expected an empty value, http://HOST:PORT or https"),
        ("METERSTREAM_POLAR_SERVER", "test", "METERSTREAM_POLAR_SERVER: Expected production, sandbox, or an address"),
        ("METERSTREAM_LOG_LEVEL", "loud", "METERSTREAM_LOG_LEVEL: Invalid enum value 'loud'; expected debug, info, "),
        ("METERSTREAM_POLAR_FILTER", "name=a", "METERSTREAM_POLAR_FILTER: Expected a filter as JSON, such as {"),
        ("METERSTREAM_POLAR_FILTER", '{"clauses":[]}', "METERSTREAM_POLAR_FILTER: filter.conjunction: "),
        ("METERSTREAM_POLAR_FROM", "end", "METERSTREAM_POLAR_FROM: Invalid enum value 'end'; expected beginning, now"),
    ],
)
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str) -> None:
    """Unknown and malformed variables end the program, each with its name and what it should be."""
    monkeypatch.setenv(name, value)

    with pytest.raises(GiveUp) as raised:
        read_environment()

    assert str(raised.value).startswith(complaint)
    assert raised.value.exit_code == USAGE


def test_an_option_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is typed wins; what is not typed stays, and the result is checked like the environment."""
    monkeypatch.setenv("METERSTREAM_PORT", "9000")
    settings = read_environment()

    assert settings.but(port=1, host=None).port == 1
    assert settings.but(host="::1").port == 9000
    with pytest.raises(GiveUp, match="--port: Expected"):
        settings.but(port=-1)


def test_a_token_does_not_show_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings may end up in a log; their token may not."""
    monkeypatch.setenv("METERSTREAM_TOKEN", "polar_oat_hush")

    settings = read_environment()

    assert settings.token == "polar_oat_hush"
    assert "hush" not in repr(settings)


def test_the_version_of_the_image_is_the_compose_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is exported for ``deploy/compose.yaml``, and no command is refused for it."""
    monkeypatch.setenv("METERSTREAM_VERSION", "1.2.3")
    assert read_environment().port == 8000


@pytest.mark.parametrize(
    ("url", "secrets", "complaint"),
    [
        ("kafka://h:1?linger_ms=1&linger_ms=2", {}, "gives linger_ms more often"),
        ("kafka://h:1", {"password": "p"}, "there is a password and nobody whose it is"),
    ],
)
def test_a_kafka_url_says_one_thing(url: str, secrets: dict[str, str], complaint: str) -> None:
    """An option with two values, and a password that is never used, are refused rather than guessed."""
    with pytest.raises(ValueError, match=complaint):
        parse_address(url, secrets)
