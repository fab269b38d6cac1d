"""Requests that moved a balance under an Idempotency-Key, and the answers that they were given.

``RequestAnswered`` is a decision in the control stream, in one record with the movements that the request caused: both
are durable or neither. ``AnsweredRequests`` folds them. A request is decided once: if it was decided again, because
nobody knew of the first time, the movements of the first time stand, and its answer.
"""

from hashlib import sha256
from typing import NamedTuple

import msgspec

KEY_LENGTH_MAX = 255
"""Characters of an Idempotency-Key: what other payment APIs take."""


class RequestAnswered(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="request.answered"):
    """The organization's request under ``key`` to ``method`` and ``path`` is answered, now and whenever it is repeated.

    ``content`` is the digest of its body. ``body`` is the text of the answer, empty where it has none. ``movements``
    are the ids of the credits and resets that it caused.
    """

    organization_id: str
    method: str
    path: str
    key: str
    content: str
    status: int
    body: str
    movements: list[str] = []


class Kept(NamedTuple):
    """What is kept of a request in memory: about a kilobyte, most of it the answer."""

    content: str
    status: int
    body: str
    movements: tuple[str, ...]


def request_name(organization_id: str, method: str, path: str, key: str) -> bytes:
    """The request that a key stands for: the same key of another organization, method or path is another request."""
    return sha256("\0".join((organization_id, method, path, key)).encode()).digest()


class AnsweredRequests:
    """The requests that were answered, by name. ``apply`` takes them in the order of the control stream."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Kept] = {}
        self._repeated: set[str] = set()  # movements of requests that were decided before

    def apply(self, change: RequestAnswered) -> None:
        """Take in an answer, before the movements that are decided with it."""
        told = Kept(change.content, change.status, change.body, tuple(change.movements))
        name = request_name(change.organization_id, change.method, change.path, change.key)
        first = self._kept.setdefault(name, told)
        self._repeated.update(set(told.movements) - set(first.movements))

    def find(self, name: bytes) -> Kept | None:
        """The answer to a request."""
        return self._kept.get(name)

    def is_repeated(self, movement_id: str) -> bool:
        """Whether a movement is of a request that had moved the balance before: it moves nothing."""
        return movement_id in self._repeated
