"""Paths in which a name may hold a slash, and redirects that name a path and no host.

An organization calls its customers what it likes, ``acme/eu`` for one. In a path that is ``acme%2Feu``, one segment,
but servers hand over the path decoded, in which it looks like two: the request would be about another customer. So
routes are found by a path whose segments were decoded one by one and keep ``%2F``, and ``%25`` beside it, as they are;
a parameter of the kind ``name`` is decoded when its segment is known. Whoever is redirected is sent to a path that says
the same.

A path without its closing slash is answered with 307 to the path with it, as Polar does. The framework writes the
whole URL there, made of what it sees: plain http and a Host that a proxy may have changed. A path alone is right
behind every proxy, and cannot lead a client from https to http.
"""

from urllib.parse import quote, unquote, urlsplit, urlunsplit

from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Segments:
    """ASGI middleware before the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, under the path by which routes are found."""
        if scope["type"] == "http":
            scope["path"] = "/".join(map(_routed, scope["raw_path"].decode("ascii").split("/")))
        await self._app(scope, receive, send)


def _routed(segment: str) -> str:
    return unquote(segment).replace("%", "%25").replace("/", "%2F")


class RelativeRedirects:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; shorten the ``Location`` of the answer."""

        async def shorten(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if "location" in headers:
                    headers["location"] = urlunsplit(("", "", *urlsplit(headers["location"])[2:]))
            await send(message)

        await self._app(scope, receive, shorten)


class _Name(Convertor[str]):
    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("name", _Name())

BY_EXTERNAL_ID = "/v1/customers/external/{external_id:name}"
"""The path of a customer by the id that its organization gave it."""
