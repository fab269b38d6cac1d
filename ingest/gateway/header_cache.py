"""The header cache: recognize a connection's previous request head by its bytes.

A client sends one head with every request, except for the length of the body, and parsing it takes a dozen calls into
Python. So a connection keeps the bytes of its last ordinary head as a ``KnownHead``, and ``known_head`` recognizes
them with another length. ``ordinary_headers`` decides whether a head is ordinary.

A head is compared only with earlier heads of its own connection, whose sender knows them, so the timing reveals
nothing.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

LENGTH_DIGITS_MAX = 8
"""Of a length that is read here: ten times what a body may have. A longer one is for the parser."""

Headers = dict[bytes, bytes]

UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"polar-version", b"origin"})
"""Headers that only the ASGI application understands. A request that has one of them takes no short way."""

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*(?=\r\n)", re.IGNORECASE)
_END = b"\r\n\r\n"


def ordinary_headers(headers: Collection[tuple[bytes, bytes]]) -> Headers | None:
    """Return the headers by name if a short way can serve a request with them, else None."""
    by_name = dict(headers)
    if len(by_name) < len(headers) or b"host" not in by_name:  # the ASGI application refuses what is ambiguous
        return None
    return by_name if UNUSUAL.isdisjoint(by_name) else None


class KnownHead(NamedTuple):
    """The bytes before and behind the digits of the length, and the headers as the parser gave them."""

    before: bytes
    behind: bytes
    headers: Headers

    def find(self, data: bytes) -> tuple[int, int] | None:
        """The length of the body, and where it begins, if this head begins the data and is whole; else None."""
        if not data.startswith(self.before):
            return None
        begin = len(self.before)
        end = data.find(b"\r", begin, begin + LENGTH_DIGITS_MAX + 1)
        if end < 0 or not data.startswith(self.behind, end) or not (digits := data[begin:end]).isdigit():
            return None
        return int(digits), end + len(self.behind)


def known_head(data: bytes, headers: Headers) -> KnownHead | None:
    """The head that begins the data, whose parser found these headers; None if it is not whole, or says no length."""
    end = data.find(_END)
    found = _LENGTH.search(data, 0, end + len(_END)) if end >= 0 else None
    if found is None:
        return None
    return KnownHead(data[: found.start(1)], data[found.end(1) : end + len(_END)], headers)
