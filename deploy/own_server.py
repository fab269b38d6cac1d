"""The running server of an installation, for commands that read all of it.

Whoever has the data directory reaches the aggregator on its socket, with a token made for this alone; everybody else
gives an address and a token, which needs the scope ``audit:read`` to see the store's rows.
"""

import contextlib
import time
from collections.abc import Iterator

import httpx

from deploy.client import Api
from deploy.control import new_secret, new_token, open_control
from deploy.data import DataDirectory
from deploy.giving_up import USAGE, GiveUp
from deploy.session import Session
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
        token = _token(here.data, here.settings.polar_organization)
        with Api("http://meterstream", token, here.data.socket) as api:
            _wait_until_known(api)
            yield api
    elif here.settings.token:
        with Api(here.settings.url, here.settings.token) as api:
            yield api
    else:
        raise GiveUp(
            f"no server runs on {here.data.path}: start it, or give --url and a --token with the scope {AUDIT}", USAGE
        )


def _token(data: DataDirectory, organization: str | None) -> str:
    """The organization's token for reconciliation alone, made once by whoever may write the data directory.

    Without an organization it is the first one's: the store's rows are everybody's.
    """
    with open_control(data) as control:
        owner = control.organization(organization or next(iter(control.catalogue.organizations), None))
        path = data.path / "reconcile" / f"token-{owner.id}"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if path.exists():
                return path.read_text().strip()
            secret = new_secret()
            control.decide([TokenCreated(new_token(owner, "reconcile", secret, SCOPES))])
            path.touch(0o600)
            path.write_text(secret)
        except OSError as error:
            raise GiveUp(f"{path} cannot be written: {error.strerror}; give --url and a --token instead") from None
    return secret


def _wait_until_known(api: Api) -> None:
    """A token that was just made is good as soon as the server has read the decision. Raises GiveUp."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            known = api.send("GET", "/v1/meters/", params={"limit": 1}).status_code != UNAUTHORIZED
        except httpx.TransportError as error:
            raise api.unreachable(error) from None
        if known or time.monotonic() > deadline:
            return
        time.sleep(LOOK_S)
