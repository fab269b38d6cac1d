"""Dead letters: what arrived and could not be counted. Ours; Polar has no such thing.

A mended event is sent through ``POST /v1/events/ingest`` like any other, because there is one door for events. What is
done here is to say that the letter is taken care of, so that the list stays short.

A line whose organization is not known, or is none, belongs to nobody; only a producer that skips the gateway can write
one. The operator looks after these with the first organization's tokens: the one that ``serve`` made.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from aggregator.api.requests import AtDesk, WhichPage, allow, answer, body_of, listed
from aggregator.api.schemas import gives, page_of
from aggregator.letters import LetterPlace
from aggregator.service import answers
from aggregator.service.errors import NotFound, Refused
from aggregator.service.serializers import letter_shape
from aggregator.service.service import Here
from aggregator.store.queries import dead_letters
from aggregator.store.queries.dead_letters import DeadLetter, Letters, Whose
from meters.access import reading, writing
from meters.catalogue import DeadLetterReplayed, Token
from meters.log import is_count

router = APIRouter(tags=["dead letters"])
Reader = Annotated[Token, Depends(allow(reading("events")))]
Writer = Annotated[Token, Depends(allow(writing("events")))]


@router.get("/v1/dead-letters/", responses=gives(page_of(answers.DeadLetter)))
async def list_dead_letters(desk: AtDesk, token: Reader, page: WhichPage, include_replayed: bool = False) -> Response:
    """The lines that could not be counted, newest first, with their reason and their bytes.

    Of a line of more than 16 KiB, which then ``is_cut``, these are the first; ``/v1/dead-letters/{id}`` has all of it.
    Lines of no known organization are shown to the first one that was made, the operator's.
    """

    def question(here: Here) -> Letters:
        return dead_letters.page(
            here.connection, _whose(desk, token), replayed=include_replayed, limit=page.limit, offset=page.offset
        )

    (letters, total), as_of = await desk.ask(token, question)
    return answer(listed([letter_shape(letter, token.organization_id) for letter in letters], total, page), as_of)


@router.get("/v1/dead-letters/{id}", responses=gives(answers.DeadLetter))
async def get_dead_letter(desk: AtDesk, token: Reader, id: str) -> Response:
    """One dead letter, with all its bytes."""
    letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    return answer(letter_shape(letter, token.organization_id), as_of)


@router.post("/v1/dead-letters/{id}/replay", responses=gives(answers.DeadLetter))
async def replay_dead_letter(request: Request, desk: AtDesk, token: Writer, id: str) -> Response:
    """Take the letter off the list, once its mended event was ingested or is not worth it. Repeating is harmless."""
    body = await body_of(request, otherwise={})
    if body != {}:
        message = "Send the mended event to /v1/events/ingest first, then this without a body."
        raise Refused("value_error", ("body",), message, body)
    letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    if letter.replayed_at is None:
        place = letter.log_partition, letter.log_offset, letter.line
        async with desk.deciding:
            await desk.decide(DeadLetterReplayed(*place, desk.now()))
        letter, as_of = await desk.ask(token, lambda here: _find(here, desk, token, id))
    return answer(letter_shape(letter, token.organization_id), as_of)


def _find(here: Here, desk: AtDesk, token: Token, id: str) -> DeadLetter:
    place = _place(id)
    letter = dead_letters.one(here.connection, _whose(desk, token), place) if place else None
    if letter is None:
        raise NotFound
    return letter


def _whose(desk: AtDesk, token: Token) -> Whose:
    known = list(desk.catalogue.organizations)  # in the order in which they were made
    return Whose(token.organization_id, token.organization_id == known[0], known)


def _place(id: str) -> LetterPlace | None:
    parts = id.split("-")
    if len(parts) != 3 or not all(map(is_count, parts)):
        return None
    partition, offset, line = map(int, parts)
    return partition, offset, line
