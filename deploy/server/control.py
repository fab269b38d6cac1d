"""Create organizations and tokens, with or without a running server.

``open_control`` opens the log and returns ``Control``; ``Control.decide`` appends decisions to the control stream. A
running gateway and aggregator read them within moments, a stopped one when it starts. ``first_start`` creates the
first organization and its token.

The log has a token's digest only. Its secret exists in this process for as long as it takes to show it. Two kinds of
tokens that the product creates for itself are stored in the data directory: the forwarder's (``deploy.forwarding``)
and reconciliation's (``deploy.reconcile.local``), which can only read.
"""

import asyncio
import secrets
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime

import msgspec

from deploy.errors import USAGE, GiveUp
from deploy.server.data import DataDirectory
from meters.catalogue.access import SCOPES, TOKEN_PREFIX, digest
from meters.catalogue.catalogue import (
    Catalogue,
    Change,
    Organization,
    OrganizationCreated,
    Token,
    TokenCreated,
    TokenRevoked,
    decode_changes,
    encode_changes,
)
from meters.log import USAGE_CONTROL, Entry, Log, PositionLost, TryAgain

READ_BYTES = 4 * 1024 * 1024
SECRET_BYTES = 32  # 256 bits, more than anybody can guess


class NotYet(GiveUp):
    """The log cannot be read or written now; it may be soon."""


class Control:
    """The catalogue as the control stream has it, and the pen to write the next decision. Making one raises GiveUp."""

    def __init__(self, log: Log) -> None:
        self._log = log
        with _explained():
            self.catalogue = Catalogue(_changes(log))

    def decide(self, changes: Sequence[Change]) -> None:
        """Make decisions durable, all or none. Raises GiveUp when the log cannot take them now."""
        entry = Entry(encode_changes(changes), admitted=True)
        try:
            asyncio.run(self._log.append(USAGE_CONTROL, [entry]))
        except TryAgain as error:
            raise NotYet(f"the log cannot take this now ({error}); try again") from None
        for change in changes:
            self.catalogue.apply(change)

    def organization(self, wanted: str | None, option: str = "--organization") -> Organization:
        """The organization of this id or name; without one, the only one there is.

        Raises GiveUp naming the option, or the variable, that says which.
        """
        known = list(self.catalogue.organizations.values())
        found = [one for one in known if wanted is None or wanted in (one.id, one.name)]
        if len(found) == 1:
            return found[0]
        names = ", ".join(f"{one.name} ({one.id})" for one in known) or "none yet; see `meterstream orgs create`"
        raise GiveUp(f"say which organization with {option} (an id or a name); there are: {names}", USAGE)


@contextmanager
def _explained() -> Iterator[None]:
    """Why the stream cannot be read, as the command line says it."""
    try:
        yield
    except TryAgain as error:
        raise NotYet(f"the log's decisions cannot be read: {error}") from error
    except PositionLost as error:
        raise GiveUp(f"the log's decisions cannot be read: {error}; see `meterstream doctor`") from error


def was_started_before(data: DataDirectory) -> bool:
    """Whether there is an organization. It is the first decision of all, so this takes no time. Raises GiveUp."""
    data.make()
    with closing(data.open_log()) as log, _explained():
        return any(isinstance(change, OrganizationCreated) for change in _changes(log))


@contextmanager
def open_control(data: DataDirectory, *, create: bool = False) -> Iterator[Control]:
    """The control stream of a data directory. Raises GiveUp when there is none, unless it may be made."""
    if create:
        data.make()
    else:
        data.require()
    log = data.open_log()
    try:
        yield Control(log)
    finally:
        log.close()


def new_organization(name: str, id: str | None = None) -> Organization:
    """An organization that is not yet decided, with an id of its own where none is given."""
    return Organization(id=id or str(uuid.uuid4()), name=name, created_at=datetime.now(UTC))


def new_secret() -> str:
    """A token that nobody has seen."""
    return TOKEN_PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def new_token(
    organization: Organization,
    name: str,
    secret: str,
    scopes: Sequence[str] = SCOPES,
    expires_at: datetime | None = None,
) -> Token:
    """What is kept of a token that is not yet decided."""
    return Token(
        id=str(uuid.uuid4()), organization_id=organization.id, name=name, sha256=digest(secret), scopes=list(scopes),
        created_at=datetime.now(UTC), expires_at=expires_at,
    )


def first_start(control: Control, secret: str) -> str | None:
    """Make an organization with a token of this secret where there is none yet; the secret if it is new."""
    if control.catalogue.organizations:
        return None
    organization = new_organization("default")
    control.decide([OrganizationCreated(organization), TokenCreated(new_token(organization, "first", secret))])
    return secret


def revoked(token: Token) -> TokenRevoked:
    """The decision that a token is good no longer."""
    return TokenRevoked(token.id, datetime.now(UTC))


def shown(token: Token, catalogue: Catalogue) -> dict[str, object]:
    """A token as a person sees it: everything but the digest."""
    organization = catalogue.organizations.get(token.organization_id)
    row = {name: value for name, value in msgspec.structs.asdict(token).items() if name != "sha256"}
    return row | {"organization": organization.name if organization else token.organization_id}


def _changes(log: Log) -> Iterator[Change]:
    positions = log.starts(USAGE_CONTROL)
    while records := log.read(USAGE_CONTROL, positions, bytes_max=READ_BYTES):
        for record in records:
            positions[record.partition] = record.offset + 1
            yield from decode_changes(record.value)
