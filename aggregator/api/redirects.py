"""Redirects that name a path and no host.

A path without its closing slash is answered with 307 to the path with it, as Polar does. The framework writes the
whole URL there, made of what it sees: plain http and a Host that a proxy may have changed. A path alone is right
behind every proxy, and cannot lead a client from https to http.
"""

from urllib.parse import urlsplit, urlunsplit

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


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
