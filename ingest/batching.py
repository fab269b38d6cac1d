"""Ordinary bodies that came in the same round of the event loop are read, written and answered as one.

What Python does for a request of one event costs more than its event, and it is the same for all of them: the call of
the loops that read it, a record, a look at what is known, the words of the answer. Under load the sockets have bodies
of many requests each time they are looked at, so all of that is done for an organization's bodies together; what is
left for each is its head and one write. A request that comes alone is read alone, and nobody waits for company.

Nothing of one request shows in another's answer. A body that is odd to the compiled loops is taken alone, between those
before and those behind it; one whose partition is away keeps nobody who has no lines for it (``ingest.gather``); and
where a log refuses the common record as too large, each is written by itself.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from ingest.admission import Admitted, Tenant, admit_together
from ingest.answers import Answer, failed
from ingest.gather import Gather, Outcome
from ingest.limits import PARTITIONS_TOGETHER_MAX
from ingest.outcome import counted, inserted_of
from ingest.recent import Fingerprints, RecentIdentities
from ingest.request import Asked
from ingest.spread import Spread, entries_together
from ingest.turns import Turns
from meters.catalogue import Token
from meters.log import Refused

TURN_BYTES_MAX = 128 * 1024
"""Of bodies that are read in one turn: two tenths of a millisecond, in which nobody else is served."""

BODIES_MAX = 1024
"""Bodies that are read as one. Behind an odd one it is one, and twice as many each time that all are ordinary: a client
whose bodies are all odd has each of them looked at twice, and not once more for every other."""

ODD_TIMES = 16
"""How many times longer it takes to read a body that is odd to compiled loops, about."""

ALL = -1  # a mask with every partition

logger = logging.getLogger("ingest.batching")


Written = Mapping[int, int]  # by partition, the position behind


class Taker(NamedTuple):
    """What requests share, and what is done for one that is not ordinary."""

    gather: Gather
    recent: RecentIdentities
    spread: Spread
    tenant: Callable[[Token], Tenant]
    partitions: Callable[[], int]
    written: Callable[[Outcome], Written | Answer]  # raises what nobody expects
    take_alone: Callable[[Asked, bytes], None]


class _Batch(NamedTuple):
    """Requests of one organization that were read as one."""

    admitted: Admitted
    asked: Sequence[Asked]
    masks: Sequence[int]  # the sum of ``1 << partition`` of each one's lines

    def rows(self, number: int) -> slice:
        """Which events are those of a request."""
        return slice(self.admitted.rows[number - 1] if number else 0, self.admitted.rows[number])

    @property
    def fingerprints(self) -> Fingerprints:
        """Of all events."""
        return Fingerprints(*(self.admitted.fingerprints or ((), ())))


class Batching:
    """Takes bodies of requests without preferences. For one event loop."""

    def __init__(self, turns: Turns, taker: Taker) -> None:
        self._turns, self._taker = turns, taker
        self._waiting: dict[str, list[tuple[Asked, bytes]]] = {}  # by organization
        self._bodies_max = BODIES_MAX

    def put(self, asked: Asked, body: bytes) -> None:
        """Take the body when the sockets have given what they have."""
        organization_id = asked.opened.token.organization_id
        waiting = self._waiting.get(organization_id)
        if waiting is None:
            waiting = self._waiting[organization_id] = []
            self._turns.do(functools.partial(self._turn, organization_id))
        waiting.append((asked, body))

    def _turn(self, organization_id: str) -> None:
        """Take an organization's bodies for as long as a turn may last; the others wait for another one."""
        waiting = self._waiting.pop(organization_id)
        taken = taken_bytes = 0
        while taken < len(waiting) and taken_bytes < TURN_BYTES_MAX:
            some = _begin(waiting, taken, TURN_BYTES_MAX - taken_bytes, self._bodies_max)
            count = self._take([asked for asked, _ in some], [body for _, body in some])
            taken, taken_bytes = taken + count, taken_bytes + sum([len(body) for _, body in some[:count]])
            if count == len(some) < self._bodies_max:
                break  # there are no more, or no room for the next one
            self._bodies_max = min(2 * self._bodies_max, BODIES_MAX) if count == len(some) else 1
            if count < len(some):
                self._take_alone(*some[count])
                taken, taken_bytes = taken + 1, taken_bytes + ODD_TIMES * len(some[count][1])
        if taken < len(waiting):
            later = self._waiting.get(organization_id)
            self._waiting[organization_id] = waiting[taken:] + (later or [])
            if later is None:
                self._turns.do(functools.partial(self._turn, organization_id))

    def _take_alone(self, asked: Asked, body: bytes) -> None:
        try:
            self._taker.take_alone(asked, body)
        except Exception:  # those behind it are to be taken all the same
            logger.exception("a request could not be taken")

    def _take(self, asked: Sequence[Asked], bodies: Sequence[bytes]) -> int:
        """Take as many bodies as are ordinary, from the first on; how many that are."""
        token, taker = asked[0].opened.token, self._taker
        partitions = taker.partitions()
        if not 0 < partitions <= PARTITIONS_TOGETHER_MAX:
            return 0
        try:
            admitted = admit_together(bodies, taker.tenant(token), datetime.now(UTC))
            if admitted is None:
                return 0
            entries, masks = entries_together(admitted, token.organization_id, partitions)
            batch = _Batch(admitted, asked[: len(masks)], masks)
            taker.gather.put_together(entries, masks, functools.partial(self._written, batch))
        except Exception:
            logger.exception("ingest requests failed")
            _tell_all(asked, [failed()] * len(asked))
            return len(asked)
        return len(batch.asked)

    def _written(self, batch: _Batch, numbers: Sequence[int], outcome: Outcome) -> None:
        """The lines of some requests are durable, or may not be."""
        if isinstance(outcome, Refused) and len(batch.asked) > 1:
            for number in numbers:
                self._write_alone(batch, number)
            return
        try:
            found = self._answers(batch, numbers, self._taker.written(outcome))
        except Exception:
            logger.exception("ingest requests failed")
            found = [failed()] * len(numbers)
        _tell_all([batch.asked[number] for number in numbers], found)

    def _answers(self, batch: _Batch, numbers: Sequence[int], position: Written | Answer) -> list[Answer]:
        """What each of some requests hears; who hears the same gets the same."""
        if isinstance(position, Answer):
            return [position] * len(numbers)
        fingerprints, recent = batch.fingerprints, self._taker.recent
        rows = [batch.rows(number) for number in numbers]
        if len(numbers) == len(batch.asked):
            verdicts = recent.take(fingerprints)
            of_each = [verdicts[some] if verdicts is not None else None for some in rows]
        else:
            of_each = [recent.take(fingerprints.some(some)) for some in rows]
        counts = [some.stop - some.start for some in rows]
        masks = [batch.masks[number] for number in numbers]
        kinds = list(zip(inserted_of(counts, of_each), counts, masks, strict=True))
        by_kind = {
            (inserted, count, mask): counted(inserted, count, {at: position[at] for at in position if mask >> at & 1})
            for inserted, count, mask in set(kinds)
        }
        return [by_kind[kind] for kind in kinds]

    def _write_alone(self, batch: _Batch, number: int) -> None:
        """Write the lines of one request into records of its own."""
        asked, rows, taker = batch.asked[number], batch.rows(number), self._taker
        try:
            lines = [batch.admitted.lines[row] for row in range(rows.start, rows.stop)]
            fingerprints = batch.fingerprints.some(rows)
            alone = Admitted(
                lines, [], range(len(lines)), named=True, refusals=[], distinct_keys=True, fingerprints=fingerprints,
                rows=[len(lines)],
            )  # fmt: skip
            tenant = taker.tenant(asked.opened.token)
            entries = taker.spread.entries(alone, tenant.organization_id, tenant.catalogue, taker.partitions())
            taker.gather.put(entries, functools.partial(self._written, _Batch(alone, [asked], [ALL]), [0]))
        except Exception:
            logger.exception("an ingest request failed")
            _tell_all([asked], [failed()])


def _begin(
    waiting: Sequence[tuple[Asked, bytes]], begin: int, bytes_max: int, count_max: int
) -> Sequence[tuple[Asked, bytes]]:
    """Those from a place on, up to a number of them, that have so many bytes together; one at least."""
    end, last = begin + 1, min(len(waiting), begin + count_max)
    left = bytes_max - len(waiting[begin][1])
    while end < last and (left := left - len(waiting[end][1])) >= 0:
        end += 1
    return waiting[begin:end]


def _tell_all(asked: Sequence[Asked], found: Sequence[Answer]) -> None:
    for (_, tell), answer in zip(asked, found, strict=True):
        try:
            tell(answer)
        except Exception:  # the others are to be told all the same
            logger.exception("a request could not be told")
