"""What a Polar organization lacks is sent there again, and what it counts wrongly is taken back.

Everything goes under an id that is always the same, so doing it twice changes nothing. Requests share the forwarder's
limit, and are as large as the forwarder's may be.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from aggregator.forward.planner import ENVELOPE_BYTES, Accepted, counts_of
from aggregator.forward.polar_event import item_of
from aggregator.forward.source import FeedPage
from aggregator.forward.upstream import BODY_BYTES_MAX, INGEST_PATH, Denied, NoAnswer, Upstream
from aggregator.reconcile.correction import instead
from aggregator.reconcile.report import Difference, Done, Repair
from aggregator.reconcile.upstream_scope import text
from deploy.client import Api
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.proof.upstream import connected
from deploy.settings import Settings

BATCH_EVENTS = 500  # of one request: nobody waits for a repair, and Polar answers sooner


def send_again(settings: Settings, data: DataDirectory, here: Api, differences: Sequence[Difference]) -> Done | None:
    """Send what is missing over there, with the ids it has: all of it, or up to what keeps it from going on."""
    missing = [difference for difference in differences if difference.repair is Repair.SEND]
    if not missing:
        return None
    inserted, duplicates, end = _send_all(settings, data, missing, lambda difference: _bodies(here, difference))
    what = f"Sent to Polar again: {inserted} events were new there, {duplicates} it had already."
    return Done(Repair.SEND, what + end, inserted + duplicates)


def correct(settings: Settings, data: DataDirectory, here: Api, differences: Sequence[Difference]) -> Done | None:
    """Take back what Polar counts wrongly, and send what is right: all of it, or up to what keeps it from going on."""
    wrong = [difference for difference in differences if difference.repair is Repair.CORRECT]
    if not wrong:
        return None
    inserted, duplicates, end = _send_all(settings, data, wrong, lambda difference: _corrections(here, difference))
    what = f"Corrected at Polar: {inserted} events take others back or stand for them, {duplicates} it had already."
    return Done(Repair.CORRECT, what + end, inserted + duplicates)


def requests(
    bodies: Iterable[bytes], events_max: int = BATCH_EVENTS, bytes_max: int = BODY_BYTES_MAX
) -> Iterator[bytes]:
    """The bodies of requests that carry these events, in order, none of them larger than Polar takes."""
    batch: list[bytes] = []
    size = ENVELOPE_BYTES
    for body in bodies:
        if batch and (len(batch) == events_max or size + len(body) + 1 > bytes_max):
            yield _request(batch)
            batch, size = [], ENVELOPE_BYTES
        batch.append(body)
        size += len(body) + 1
    if batch:
        yield _request(batch)


def send(upstream: Upstream, body: bytes) -> Accepted:
    """What Polar says to a request that it takes; tried again while that may help. Raises GiveUp, NoAnswer."""
    try:
        return counts_of(upstream.insist("POST", INGEST_PATH, content=body))
    except Denied as error:
        raise GiveUp(f"Polar refuses the events: {error}") from error
    except ValueError as error:
        raise NoAnswer("it took the events, and what it said to them cannot be read") from error


def _send_all(
    settings: Settings, data: DataDirectory, differences: Iterable[Difference],
    bodies_of: Callable[[Difference], Iterable[bytes]],
) -> tuple[int, int, str]:  # fmt: skip
    """How many were new over there, how many were not, and what is to be said of the others."""
    inserted = duplicates = 0
    events_max = min(BATCH_EVENTS, settings.polar_batch_events)
    try:
        with connected(settings, data) as upstream:
            for difference in differences:
                for body in requests(bodies_of(difference), events_max):
                    answer = send(upstream, body)
                    inserted += answer.inserted
                    duplicates += answer.duplicates
    except GiveUp as reason:
        return inserted, duplicates, f" Not done: the rest, because of this: {reason}"
    return inserted, duplicates, ""


def _request(batch: Sequence[bytes]) -> bytes:
    return b'{"events":[' + b",".join(batch) + b"]}"


def _corrections(here: Api, difference: Difference) -> Iterator[bytes]:
    for body in difference.payload["corrections"]:
        yield body.encode()
    for sent in _bodies(here, difference):
        yield instead(sent)


def _bodies(here: Api, difference: Difference) -> Iterator[bytes]:
    """The events of a difference as the forwarder would send them."""
    wanted = dict(difference.payload["events"])
    assert difference.window is not None
    position, (since, until) = "", difference.window
    while wanted:
        given = {"start_timestamp": text(since), "end_timestamp": text(until), "position": position, "limit": 10_000}
        page = msgspec.json.decode(here.answer("GET", "/v1/feed/", params=given).content, type=FeedPage)
        for entry in page.items:
            item = item_of(entry, "repair")
            if wanted.pop(item.external_id, None) is not None:
                yield item.body
        if page.position == position:
            return
        position = page.position
