"""The running server of an installation, for commands that read all of it.

Whoever has the data directory reaches the aggregator on its socket, with a token made for this alone; everybody else
gives an address and a token, which needs the scope ``audit:read`` to see the store's rows.
"""

import contextlib
from collections.abc import Iterator

from deploy.client import Api
from deploy.control import new_secret, new_token, open_control
from deploy.data import DataDirectory
from deploy.giving_up import USAGE, GiveUp
from deploy.session import Session
from meters.access import AUDIT
from meters.catalogue import TokenCreated

SCOPES = ("events:read", "meters:read", "customers:read", "customer_meters:read", AUDIT)


@contextlib.contextmanager
def own_server(here: Session) -> Iterator[Api]:
    """A connection to it. Raises GiveUp when there is no way to it."""
    if here.data.socket.exists():
        token = _token(here.data, here.settings.polar_organization)
        with Api("http://meterstream", token, here.data.socket) as api:
            yield api
    elif here.settings.token:
        with Api(here.settings.url, here.settings.token) as api:
            yield api
    else:
        raise GiveUp(
            f"no server runs on {here.data.path}: start it, or give --url and a --token with the scope {AUDIT}", USAGE
        )


def _token(data: DataDirectory, organization: str | None) -> str:
    """A token for reconciliation alone, made once by whoever may write the data directory."""
    path = data.path / "reconcile" / "token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists():
            return path.read_text().strip()
        with open_control(data) as control:
            owner = control.organization(organization or next(iter(control.catalogue.organizations), None))
            secret = new_secret()
            control.decide([TokenCreated(new_token(owner, "reconcile", secret, SCOPES))])
        path.touch(0o600)
        path.write_text(secret)
    except OSError as error:
        raise GiveUp(f"{path} cannot be written: {error.strerror}; give --url and a --token instead") from None
    return secret
