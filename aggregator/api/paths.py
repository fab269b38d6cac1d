"""Paths in which a name may hold a slash.

An organization calls its customers what it likes, ``acme/eu`` for one. In a path that is ``acme%2Feu``, one segment,
but servers hand over the path decoded, in which it looks like two: the request would be about another customer. So
routes are found by a path whose segments were decoded one by one and keep ``%2F``, and ``%25`` beside it, as they are;
a parameter of the kind ``name`` is decoded when its segment is known. Whoever is redirected is sent to a path that says
the same.
"""

from urllib.parse import quote, unquote

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send


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


class _Name(Convertor[str]):
    regex = "[^/]+"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("name", _Name())

BY_EXTERNAL_ID = "/v1/customers/external/{external_id:name}"
"""The path of a customer by the id that its organization gave it."""
