"""The sender: threads that take batches from the outbox, send them, and settle their events.

``Sender`` isolates an event that the server will never accept, so that the rest of its batch goes on. If the answer
names events by index, those are rejected; otherwise the batch is halved until one event is left. A batch that fails
for no stated reason waits while others are sent, and is halved only when others succeed. While no request succeeds,
everything waits and nothing is given up.
"""

import logging
import time
from collections.abc import Callable
from threading import Thread

import msgspec

from ingest.client.event import Rejection
from ingest.client.outbox import Again, Batch, Outbox
from ingest.client.spool import Row
from ingest.client.transport import Detail, Failed, Outcome, Refused, Taken, Transport, Unavailable

logger = logging.getLogger(__name__)

OnRejected = Callable[[Rejection], object]

_EARLY_TRIES_MAX = 3  # waits for a server's clock to reach an event's time
_EARLY_S_MAX = 600.0  # a clock further ahead than this is not drift: the event is rejected
_PAUSE_S = 1.0  # after what should not happen
_FINAL_TRIES = 5  # of a single event that is answered with an unexplained 4xx
_PASSES_MISSED_MAX = 15.0
"""What a single event may miss that is told to wait while others pass. A server that sends requests away at random, be
it nine of ten, treats one so with a probability of e^-15: one in three million."""


class Sender:
    """Sends what is in the outbox, with as many threads as requests may be in flight."""

    def __init__(self, outbox: Outbox, transport: Transport, reject: OnRejected) -> None:
        self._outbox, self._transport, self._reject = outbox, transport, reject
        self._threads: list[Thread] = []
        self.requests = self.retries = self.duplicates = 0
        self.last_problem: str | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is a thread at least."""
        return bool(self._threads)

    def start(self) -> None:
        """Start the threads that do not run yet. Raises RuntimeError when the system has none left."""
        for number in range(len(self._threads), self._outbox.limits.in_flight_max):
            thread = Thread(target=self._run, name=f"meterstream-client-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self, deadline_s: float) -> None:
        """Wait for the threads to end, until a time of the monotonic clock."""
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _run(self) -> None:
        while not self._outbox.is_closing:
            try:
                batch = self._outbox.take()
            except Exception:  # the thread must live
                logger.exception("no batch could be taken")
                time.sleep(_PAUSE_S)
                continue
            if batch is not None:
                self._send(batch)

    def _send(self, batch: Batch) -> None:
        again: list[Again] = [(batch, 0.0)]
        try:
            again = self._settled(batch, self._transport.send([line for _, line in batch.rows]))
        except Exception:  # the thread must live; the batch steps aside and is tried again
            logger.exception("sending failed unexpectedly")
            batch.tries += 1
            again = [(batch, self._outbox.pace.backoff_s(batch.tries))]
        finally:
            self._outbox.land(batch, again)

    def _settled(self, batch: Batch, outcome: Outcome) -> list[Again]:
        """Do what the outcome says; what is left to be sent again, and after how many seconds."""
        self.requests += 1
        if isinstance(outcome, Taken):
            self._outbox.settle(batch.rows, is_acknowledged=True)
            self.duplicates += outcome.duplicates
            return []
        self.retries += 1
        self.last_problem = outcome.cause
        if isinstance(outcome, Unavailable):
            return self._unavailable(batch, outcome)
        if isinstance(outcome, Failed):
            return self._failed(batch, outcome)
        return self._refused(batch, outcome)

    def _unavailable(self, batch: Batch, outcome: Unavailable) -> list[Again]:
        """The whole client waits, unless it happens again to these events when others get through: then they do."""
        outbox = self._outbox
        with outbox.turn():
            passed, waited = outbox.acknowledged_batches - batch.acknowledged_before, outbox.waits - batch.waits_before
            is_again = batch.waits > 0 and passed > 0
            is_suspect = is_again and outcome.may_be_events
            batch.waits += 1
            outbox.waits += 1
            batch.acknowledged_before, batch.waits_before = outbox.acknowledged_batches, outbox.waits
            delay_s = outbox.pace.backoff_s(batch.waits) if is_again else 0.0
            if not is_suspect or outcome.retry_after_s is not None:
                self._put_off(outcome)
        if not is_suspect:
            return [(batch, delay_s)]
        if len(batch.rows) > 1:
            return [(Batch(rows, batch.tries, batch.acknowledged_before, batch.waits, batch.waits_before), delay_s)
                    for rows in _halves(batch.rows)]  # fmt: skip
        batch.passes_missed += passed / (passed + waited)
        if batch.passes_missed < _PASSES_MISSED_MAX:
            return [(batch, delay_s)]
        self._hand_over(batch.rows[0], Detail(outcome.cause, (), "The server takes other events, and not this one"))
        return []

    def _put_off(self, outcome: Unavailable) -> None:
        """The whole client waits. The turn is the caller's."""
        pace = self._outbox.pace
        pace.failed(time.monotonic(), outcome.retry_after_s)
        if pace.failures == 1:
            self._outbox.turns.complain("the server cannot be reached or asks to wait", outcome.cause)

    def _failed(self, batch: Batch, outcome: Failed) -> list[Again]:
        """Step aside; halve once it is clear that others get through."""
        outbox, tries = self._outbox, batch.tries + 1
        with outbox.turn():
            others_pass = outbox.acknowledged_batches > batch.acknowledged_before
            delay_s = outbox.pace.backoff_s(tries)
            if not others_pass:
                outbox.pace.failed(time.monotonic())
        logger.warning("a request failed", extra={"cause": outcome.cause, "events": len(batch.rows), "tries": tries})
        if len(batch.rows) == 1 and outcome.is_final and tries >= _FINAL_TRIES and others_pass:
            self._hand_over(batch.rows[0], Detail(outcome.cause, (), "The server does not take this event"))
            return []
        parts = _halves(batch.rows) if others_pass and len(batch.rows) > 1 else [batch.rows]
        return [(Batch(rows, tries, outbox.acknowledged_batches), delay_s) for rows in parts]

    def _refused(self, batch: Batch, outcome: Refused) -> list[Again]:
        """Hand over the events that the answer names, or halve until one stands alone."""
        with self._outbox.turn():
            self._outbox.pace.worked()
        named = {index: detail for index, detail in outcome.details.items() if 0 <= index < len(batch.rows)}
        if not named and len(batch.rows) > 1:
            return [(Batch(rows, batch.tries), 0.0) for rows in _halves(batch.rows)]
        named = named or {0: Detail("refused", (), f"The server refused the event ({outcome.cause})")}
        early = self._early(batch, named, outcome.ahead_s)
        for index, detail in named.items():
            if index not in early:
                self._hand_over(batch.rows[index], detail)
        rest = [row for index, row in enumerate(batch.rows) if index not in named]
        later = [batch.rows[index] for index in early]
        parts = [(Batch(rest), 0.0), (Batch(later, batch.tries + 1), outcome.ahead_s + 1)]
        return [(part, delay_s) for part, delay_s in parts if part.rows]

    def _early(self, batch: Batch, named: dict[int, Detail], ahead_s: float) -> list[int]:
        """Events refused only because this machine's clock is ahead of the server's: later they will be taken."""
        if not 0 < ahead_s <= _EARLY_S_MAX or batch.tries >= _EARLY_TRIES_MAX:
            return []
        return sorted(index for index, detail in named.items() if _is_about_the_future(detail))

    def _hand_over(self, row: Row, detail: Detail) -> None:
        event = msgspec.json.decode(row[1])
        id = event.get("external_id")
        self._reject(Rejection(event, id, detail.type, detail.loc, detail.msg, "server"))
        self._outbox.settle([row], is_acknowledged=False)


def _halves(rows: list[Row]) -> list[list[Row]]:
    middle = len(rows) // 2
    return [rows[:middle], rows[middle:]]


def _is_about_the_future(detail: Detail) -> bool:
    return detail.loc[-1:] == ("timestamp",) and detail.type == "value_error"
