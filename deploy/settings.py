"""Settings: everything that the environment may say, read once at the start of a process.

``read_environment`` returns ``Settings``. A variable is the field's name in capitals behind ``METERSTREAM_``:
``METERSTREAM_PORT=9000``. A command's option overrides its variable. An unknown ``METERSTREAM_`` variable is refused,
because a misspelled setting without effect would be found too late.

``Settings`` is a msgspec struct: importing pydantic-settings takes a quarter of a second, half of a gateway's restart
time.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from deploy.errors import USAGE, GiveUp

PREFIX = "METERSTREAM_"


class Secret(str):
    """A text that does not show itself in logs, errors or a debugger's listing."""

    def __repr__(self) -> str:
        return "Secret(...)"


class Token(Secret):
    """A secret that is sent in a header."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one process was told. Paths are relative to where it was started."""

    data: Path = Path("data")  # the directory of the store, and of the log where that is a file
    log: Annotated[str, msgspec.Meta(pattern=r"^(kafka://.+)?$")] = ""  # kafka://HOST:PORT; empty: a file in the data
    kafka_password: Secret | None = None  # for the sasl_username in the log's URL
    kafka_key_password: Secret | None = None  # of the key file that the log's URL names
    upstream: Annotated[str, msgspec.Meta(pattern=r"^(https?://.+)?$")] = ""  # where a gateway finds an aggregator
    host: str = "127.0.0.1"  # where serve and gateway listen, and an aggregate over Kafka
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 8000  # 0 takes any free one
    url: str = "http://127.0.0.1:8000"  # where the command line finds a running server
    token: Token | None = None  # the command line's, and the first one that serve makes
    retention_days: Annotated[int, msgspec.Meta(ge=0)] = 0  # records older than this leave the log; 0 keeps all
    requests_per_minute: Annotated[int, msgspec.Meta(ge=0)] = 0  # of a token or customer at one gateway; 0: no limit
    polar_token: Token | None = None  # of the Polar organization that events are forwarded to; without one, none are
    polar_server: Annotated[str, msgspec.Meta(pattern=r"^(production|sandbox|https?://.+)$")] = "production"
    polar_organization: str | None = None  # whose events, by id or name; not needed where there is only one
    polar_requests_per_minute: Annotated[int, msgspec.Meta(ge=1)] = 300  # never more in any 60 seconds
    polar_batch_events: Annotated[int, msgspec.Meta(ge=1)] = 2_000  # of one request, if they fit into 10 MiB
    polar_timeout_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0  # for an answer of Polar's
    polar_events: str = ""  # names of the events to forward, comma separated; all by default
    polar_meter: str | None = None  # forward what this meter's filter lets through (id or name)
    polar_filter: str | None = None  # and this filter, as JSON
    polar_from: Literal["beginning", "now"] = "beginning"  # where forwarding begins, the first time
    polar_rollup: str = ""  # meters (ids or names, comma separated) whose usage is sent added up instead
    polar_rollup_seconds: Annotated[int, msgspec.Meta(ge=1, le=86400)] = 60  # the window of such a sum
    webhook_private_targets: bool = False  # webhooks may go to addresses that are not public, and without https
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    debug: bool = False  # show a traceback for what should not happen

    def but(self, **changes: Any) -> "Settings":
        """These settings with every change that is not None, checked like the environment's.

        Raises GiveUp naming the setting and what it should be.
        """
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        fields |= {name: value for name, value in changes.items() if value is not None}
        return _checked(fields, lambda field: f"--{field}")


def fits_header(text: str) -> bool:
    """Whether a header may have the text as its value."""
    return text.isascii() and text.isprintable()


def _own(kind: type, value: Any) -> Any:
    """What msgspec does not know how to make: a Path and a Secret, each from a text."""
    if issubclass(kind, Secret) and isinstance(value, str):
        value = value.strip()  # a file that holds one mostly ends with a newline, which no header may have
    if kind is Token and not fits_header(value):
        raise ValueError("Expected a token, which has letters, digits and signs of ASCII")
    return value if isinstance(value, kind) else kind(value)


# Descriptions of valid values, shown in place of a regular expression.
_IN_WORDS = {
    "log": "an empty value for a file in the data, or kafka://HOST:PORT[,HOST:PORT...]",
    "upstream": "an empty value, http://HOST:PORT or https://HOST:PORT",
    "polar_server": "production, sandbox, or an address that begins with http:// or https://",
}


def _checked(fields: dict[str, Any], name: Callable[[str], str]) -> Settings:
    try:
        settings = msgspec.convert(fields, Settings, strict=False, dec_hook=_own)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        if "matching regex" in reason:
            reason = f"Expected {_IN_WORDS[field]}"
        elif "enum value" in reason:
            reason += f"; expected {', '.join(get_args(get_type_hints(Settings)[field]))}"
        raise GiveUp(f"{name(field)}: {reason}", USAGE) from None
    if settings.polar_filter:
        _check_filter(settings.polar_filter, name("polar_filter"))
    return settings


def _check_filter(text: str, name: str) -> None:
    """Raises GiveUp for what the feed would refuse later, when nobody looks."""
    from meters import exact  # a start without a filter does without these
    from meters.filters import Filter, parse_filter

    try:
        found = parse_filter(exact.decode(text), ("filter",))
    except ValueError as error:
        raise GiveUp(f"{name}: Expected a filter as JSON, such as {FILTER}: {error}", USAGE) from None
    if not isinstance(found, Filter):
        where = ".".join(map(str, found[0]["loc"]))
        raise GiveUp(f"{name}: {where}: {found[0]['msg']}; expected a filter such as {FILTER}", USAGE)


FILTER = '{"conjunction":"and","clauses":[{"property":"name","operator":"eq","value":"llm.call"}]}'
OF_OTHERS = frozenset({f"{PREFIX}VERSION"})
"""Variables that belong to the shipped files: ``deploy/compose.yaml`` takes the image's version from this one."""


def _variable(field: str) -> str:
    return f"{PREFIX}{field.upper()}"


def read_environment() -> Settings:
    """The settings of this process. Raises GiveUp for an unknown or malformed variable, naming it."""
    found = {name: value for name, value in os.environ.items() if name.startswith(PREFIX) and name not in OF_OTHERS}
    known = {_variable(field): field for field in Settings.__struct_fields__}
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name.removeprefix(PREFIX).lower(), known.values(), n=1)
            hint = f"did you mean {_variable(close[0])}?" if close else f"known are {', '.join(known)}"
            raise GiveUp(f"{name} is not a setting; {hint}", USAGE)
    return _checked({known[name]: value for name, value in found.items()}, _variable)
