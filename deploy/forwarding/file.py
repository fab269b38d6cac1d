"""The forwarder's file in a data directory, as every command opens it: what is wrong with it is one line."""

import contextlib
from collections.abc import Iterator

from aggregator.forward.opening import Unusable, explaining
from aggregator.forward.state import State
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp


@contextlib.contextmanager
def explained(data: DataDirectory) -> Iterator[None]:
    """Around whatever uses the file. Raises GiveUp where it cannot be used, whenever that shows."""
    try:
        with explaining(data.forwarding):
            yield
    except Unusable as reason:
        raise GiveUp(str(reason)) from reason


@contextlib.contextmanager
def open_state(data: DataDirectory) -> Iterator[State]:
    """The forwarder's state, made if there is none. Raises GiveUp as above."""
    with explained(data), contextlib.closing(State(data.forwarding)) as state:
        yield state
