"""The running server of an installation, for commands that read all of it.

Whoever has the data directory reaches the aggregator on its socket, with a token made for this alone; everybody else
gives an address and a token, which needs the scope ``audit:read`` to see the store's rows.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from deploy.client import Api
from deploy.control import new_secret, new_token, open_control
from deploy.data import DataDirectory
from deploy.giving_up import USAGE, GiveUp
from deploy.private import private_files
from deploy.session import Session
from deploy.settings import fits_header
from meters.access import AUDIT
from meters.catalogue import TokenCreated

PATIENCE_S = 10.0  # a decision is applied within a round
LOOK_S = 0.05
UNAUTHORIZED = 401
SCOPES = ("events:read", "meters:read", "customer_meters:read", AUDIT)


@contextlib.contextmanager
def own_server(here: Session) -> Iterator[Api]:
    """A connection to it, for the organization that is forwarded. Raises GiveUp when there is no way to it."""
    if here.data.socket.exists():
        with contextlib.ExitStack() as hung_up:
            api = hung_up.enter_context(_connected(here))
            if not _is_known_soon(api):  # it was revoked, or the log is a copy from before it was made
                api = hung_up.enter_context(_connected(here, anew=True))
                _is_known_soon(api)
            yield api
    elif here.settings.token:
        with Api(here.settings.url, here.settings.token) as api:
            yield api
    else:
        raise GiveUp(
            f"no server runs on {here.data.path}: start it, or give --url and a --token with the scope {AUDIT}", USAGE
        )


def _connected(here: Session, *, anew: bool = False) -> Api:
    return Api("http://meterstream", _token(here.data, here.settings.polar_organization, anew), here.data.socket)


def _token(data: DataDirectory, organization: str | None, anew: bool) -> str:
    """The organization's token for reconciliation alone, made by whoever may write the data directory, and kept.

    Without an organization it is the first one's: the store's rows are everybody's.
    """
    with open_control(data) as control:
        owner = control.organization(organization or next(iter(control.catalogue.organizations), None))
        path = data.path / "reconcile" / f"token-{owner.id}"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            kept = path.read_text("ascii", "replace").strip() if path.exists() and not anew else ""
            if kept and fits_header(kept):
                return kept
            secret = new_secret()
            control.decide([TokenCreated(new_token(owner, "reconcile", secret, SCOPES))])
            _keep(secret, path)
        except OSError as error:
            raise GiveUp(f"{path} cannot be written: {error.strerror}; give --url and a --token instead") from None
    return secret


def _keep(secret: str, path: Path) -> None:
    """Write it whole or not at all: half a token would be refused every night."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with private_files(), unfinished.open("w") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _is_known_soon(api: Api) -> bool:
    """Whether the token is good; one that was just made is when the server has read the decision. Raises GiveUp."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            is_known = api.send("GET", "/v1/meters/", params={"limit": 1}).status_code != UNAUTHORIZED
        except httpx.TransportError as error:
            raise api.unreachable(error) from None
        if is_known or time.monotonic() > deadline:
            return is_known
        time.sleep(LOOK_S)
