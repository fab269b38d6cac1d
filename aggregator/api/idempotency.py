"""Requests with an ``Idempotency-Key``: decided once, and answered alike whenever they are repeated.

Every route that moves a balance works inside ``only_once`` and ends with ``Once.decide``, which puts the answer into
the record of the decision. So a repetition gets the stored answer, without a time limit, also after a crash between the
decision and its answer, a restart and a rebuild. The same key with another body is refused, and so is a repetition
while the first request is in progress. What is refused leaves nothing behind: it may be repeated with another body.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Annotated, Any

from fastapi import Header, Request, Response

from aggregator.api.requests import body_of
from aggregator.api.schemas import Schema, gives
from aggregator.service.answers import Error
from aggregator.service.errors import Conflict, Refused
from aggregator.service.service import Desk
from meters import exact
from meters.catalogue.catalogue import Change, Token
from meters.ledger.ledger import CreditGranted, MeterReset
from meters.ledger.requests import KEY_LENGTH_MAX, Kept, RequestAnswered, request_name
from meters.log import format_position

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=KEY_LENGTH_MAX,
        description="Makes a repetition harmless: it is answered as the first time",
    ),
]  # fmt: skip


IN_PROGRESS: dict[int | str, Schema] = {409: gives(Error)[404]}
"""The entry in a route's ``responses`` of a request that is being worked on."""


class Once:
    """One request, and the answer that it was given before, if it was: ``answered``."""

    def __init__(self, desk: Desk, asked: RequestAnswered | None) -> None:
        self._desk, self._asked = desk, asked
        self.answered: Response | None = None

    def look(self) -> None:
        """Find the answer that was given before. Raises Refused where it was given to another body."""
        kept = self._find()
        if kept is not None:
            self.answered = self._response(kept.status, kept.body.encode())

    async def decide(
        self, body: object, status: int, *changes: Change, also: Sequence[Change] = ()
    ) -> Response:  # fmt: skip
        """Make the changes true, all or none, together with the answer, and return it; ``body`` None is no body.

        ``also`` says more of movements that were decided before. The caller holds ``desk.deciding``. Without a key the
        changes alone are decided. Raises Refused.
        """
        text = b"" if body is None else exact.encode(body)
        if self._asked is None:
            await self._desk.decide(*changes, *also)
            return self._response(status, text)
        moves = [one.id for one in changes if isinstance(one, CreditGranted | MeterReset)]
        asked = self._asked
        told = RequestAnswered(
            organization_id=asked.organization_id, method=asked.method, path=asked.path, key=asked.key,
            content=asked.content, status=status, body=text.decode(), movements=moves,
        )  # fmt: skip
        await self._desk.decide(told, *changes, *also)
        kept = self._find()  # another one, where the request had been decided and nobody knew
        return self._response(kept.status, kept.body.encode()) if kept else self._response(status, text)

    def _find(self) -> Kept | None:
        asked = self._asked
        if asked is None:
            return None
        name = request_name(asked.organization_id, asked.method, asked.path, asked.key)
        kept = self._desk.view.ledger.answered.find(name)
        if kept is not None and kept.content != asked.content:
            raise used_for_another(asked.key)
        return kept

    def _response(self, status: int, text: bytes) -> Response:
        headers = {"As-Of": format_position(self._desk.view.as_of)}
        return Response(text or None, status, headers, "application/json" if text else None)


def used_for_another(key: str) -> Refused:
    """What is raised for a key that stands for a request with another body."""
    message = "This Idempotency-Key was used for another request: take a new one."
    return Refused("idempotency_key", ("header", "Idempotency-Key"), message, key)


@asynccontextmanager
async def only_once(request: Request, desk: Desk, token: Token, key: str | None) -> AsyncIterator[Once]:
    """Work on a request that nobody else works on, and that may be ``answered`` already.

    Raises Conflict, Malformed, Refused, Unavailable.
    """
    if key is None:
        yield Once(desk, None)
        return
    method, path = request.method, request.scope["path"]
    content = _digest(await body_of(request, otherwise={}))
    asked = RequestAnswered(
        organization_id=token.organization_id, method=method, path=path, key=key, content=content, status=0, body=""
    )
    name = request_name(token.organization_id, method, path, key)
    if name in desk.requests_at_work:
        raise Conflict("A request with this Idempotency-Key is being worked on: ask again in a moment.")
    desk.requests_at_work.add(name)
    try:
        once = Once(desk, asked)
        async with desk.deciding:  # where it is in doubt whether it was decided, this waits until it is known
            once.look()
        yield once
    finally:
        desk.requests_at_work.discard(name)


def _digest(body: Any) -> str:
    """Of what a body says, in whatever order and with whatever blanks."""
    return sha256(exact.encode(_sorted(body))).hexdigest()


def _sorted(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _sorted(part[name]) for name in sorted(part)}
    return [_sorted(one) for one in part] if isinstance(part, list) else part
