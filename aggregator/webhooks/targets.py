"""Webhook targets: which addresses are allowed, and the lookup of host names.

A target's URL comes from an API client, but the request leaves from inside the operator's network, where it could
reach private services. So a target must be public and use https, unless the operator's setting allows others.
``refusal`` checks a URL when an endpoint is created. ``resolve`` looks the name up for each delivery, and the
connection goes to the checked address, so a later change of the name has no effect. ``Names`` runs the lookups.
"""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

# Lookups run in threads of their own.
#
# A call of the system's resolver cannot be cancelled: its thread stays busy until the resolver gives up. In a shared
# thread pool a few slow names would block all others. So each lookup has its own thread, and an organization may have
# only a few at a time; further ones are refused and retried later.

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


# Allowed addresses.

URL_LENGTH_MAX = 2000
"""Characters of an address: what every server takes."""

PORTS = {"https": 443, "http": 80}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # whose last 32 bits are an IPv4 address (RFC 6052)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Forbidden(Exception):
    """This target may not be reached; the message says why and repeats nothing secret."""


class Target(NamedTuple):
    """Where to connect to, and for whom: the request names ``host``, and so must the certificate."""

    url: str
    host: str
    server_name: str


def refusal(url: str, *, private_allowed: bool) -> str | None:
    """Why an address cannot be taken; None where it can. Its name is not resolved, which is done for each delivery."""
    try:
        _check(_parts(url, private_allowed), private_allowed)
    except Forbidden as reason:
        return str(reason)
    return None


async def resolve(url: str, look_up: Callable[[str, int], Awaitable[list[str]]], *, private_allowed: bool) -> Target:
    """The address to connect to, of those that a name's lookup gives. Raises Forbidden, OSError, what that raises."""
    parts = _parts(url, private_allowed)
    host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    addresses = [host] if _is_address(host) else await look_up(host, port)
    for address in addresses:
        _check_address(address, private_allowed)
    if not addresses:
        raise OSError("the name has no address")
    literal = f"[{addresses[0]}]" if ":" in addresses[0] else addresses[0]
    return Target(parts._replace(netloc=f"{literal}:{port}").geturl(), parts.netloc, host)


def _parts(url: str, private_allowed: bool) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.hostname and (parts.port or PORTS.get(parts.scheme))
    except ValueError as error:
        raise Forbidden("the URL cannot be read") from error
    if parts.scheme not in (PORTS if private_allowed else ("https",)):
        raise Forbidden("the URL should begin with https://")
    if not known or len(url) > URL_LENGTH_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise Forbidden(f"the URL should name a host, in ASCII, with at most {URL_LENGTH_MAX} characters")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise Forbidden("the URL should carry no user, no password and no fragment")
    return parts


def _check(parts: SplitResult, private_allowed: bool) -> None:
    host = parts.hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        host = "127.0.0.1"
    if _is_address(host):
        _check_address(host, private_allowed)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False  # a name
    return True


def _check_address(address: str, private_allowed: bool) -> None:
    if private_allowed:
        return
    for place in _leads_to(ipaddress.ip_address(address.partition("%")[0])):
        if not place.is_global or place.is_multicast or place.is_reserved or getattr(place, "is_site_local", False):
            raise Forbidden("the URL leads to an address that is not public; the operator may allow such targets")


def _leads_to(address: Address) -> list[Address]:
    """The address itself, and the IPv4 one that it stands for where a network translates it."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)]
    return [address, *(inner for inner in [address.sixtofour] if inner is not None)]
