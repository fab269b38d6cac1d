"""Names become addresses in threads of their own.

The system's resolver cannot be stopped: who no longer waits for it leaves a thread behind until it gives up. Were that
a thread of a pool that others use, a few slow names would keep everybody waiting. So each lookup has its own, an
organization has a few at a time, and beyond that is asked to come again: nobody waits here for another's name.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future

RESOLVE_S_MAX = 5.0
"""Seconds for a name: half of what a delivery has."""

LOOKUPS_AT_ONCE = 4
"""Lookups of one organization, with those that nobody waits for any more."""


class Unresolved(OSError):
    """There was no answer in time: an attempt that failed."""


class Crowded(Exception):
    """The organization's lookups all go on still. Nothing was tried: ask again a little later."""


class Names:
    """Looks up names; one for a sender."""

    def __init__(self) -> None:
        self._lookups: dict[str, list[threading.Thread]] = {}

    async def addresses(self, organization_id: str, host: str, port: int) -> list[str]:
        """What a name of an organization means now. Raises Crowded, Unresolved, OSError, ValueError."""
        going_on = [lookup for lookup in self._lookups.get(organization_id, []) if lookup.is_alive()]
        if len(going_on) >= LOOKUPS_AT_ONCE:
            raise Crowded
        found: Future[list[str]] = Future()
        found.set_running_or_notify_cancel()  # or whoever stops waiting would cancel what the thread is to set
        lookup = threading.Thread(target=_look_up, args=(host, port, found), daemon=True)
        lookup.start()
        self._lookups[organization_id] = [*going_on, lookup]
        try:
            async with asyncio.timeout(RESOLVE_S_MAX):
                return await asyncio.wrap_future(found)
        except TimeoutError as error:
            raise Unresolved(f"the name could not be resolved in {RESOLVE_S_MAX:g} s") from error


def _look_up(host: str, port: int, found: Future[list[str]]) -> None:
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except Exception as error:  # whatever it is, whoever waits is told
        found.set_exception(error)
    else:
        found.set_result([str(place[4][0]) for place in places])
