"""Send events from files: batches, retries, refusals by line, and conflicts.

``deliver`` sends ``Line`` objects in batches (``batches``) and returns a ``Delivery`` with a ``Problem`` for each
refused line. Every event has its external_id before the first attempt, so a retry after a lost answer is a duplicate
that the server recognizes. Lines that a 422 names are taken out of their batch, and the rest is sent again; this
works with every server of Polar's API. ``find_conflicts`` reports events whose external_id exists with other content.
"""

import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import httpx
import msgspec

from deploy.client import Api, complaints, refused
from deploy.console import note
from deploy.errors import GiveUp
from ingest.limits import BODY_BYTES_MAX
from meters import exact
from meters.backoff import Backoff, retry_after_s
from meters.log import format_position, parse_position

# Delivery.

INGEST_PATH = "/v1/events/ingest"
BATCH_EVENTS = 500  # fills a request well, and a repetition is still cheap
BATCH_BYTES_MAX = 4 * 1024 * 1024  # well below the 10 MiB that a gateway takes
EVENT_BYTES_MAX = BODY_BYTES_MAX - 1024  # alone in a request, with an id that it was given
PATIENCE_S = 120.0  # outlasts a restart of the server; longer is for the person to decide
BACKOFF = Backoff(0.25, 10.0, jitter=(1.0, 1.0))  # one command of one person has nobody to come back together with
BUSY = (429, 500, 502, 503, 504)  # another attempt may succeed; the ids make it harmless


class Line(msgspec.Struct, frozen=True):
    """One event as JSON, with the line of the file it stands in."""

    number: int
    event: bytes


class Problem(msgspec.Struct, frozen=True):
    """Why the event of a line was not taken."""

    line: int
    message: str


class Delivery(msgspec.Struct):
    """What became of the events so far."""

    inserted: int = 0
    duplicates: int = 0
    log_position: str = ""
    records: dict[int, "array[int]"] = {}  # that hold them: offsets by partition, a few bytes for each batch
    problems: list[Problem] = []
    safe_line: int = 0  # up to here every line was answered for
    doubtful_line: int = 0  # up to here lines went out, and nobody said what became of them
    is_told: bool = False  # that the server does not answer, and is asked again


def batches(lines: Iterable[Line | None], events_max: int) -> Iterator[list[Line]]:
    """Lines in groups that fit into a request. A None ends a group: nobody knows when the next line comes."""
    group: list[Line] = []
    size_bytes = 0
    for line in lines:
        if group and (line is None or len(group) == events_max or size_bytes + len(line.event) > BATCH_BYTES_MAX):
            yield group
            group, size_bytes = [], 0
        if line is not None:
            group.append(line)
            size_bytes += len(line.event) + 1
    if group:
        yield group


def deliver(
    api: Api, lines: Iterable[Line | None], *, into: Delivery | None = None, events_max: int = BATCH_EVENTS,
    progress: Callable[[int], None] | None = None,
) -> Delivery:
    """Send every line; ``progress`` hears how many events each batch had. Raises GiveUp when the server is lost.

    What became of the events so far is in ``into``, however it ends.
    """
    delivery = into or Delivery()
    for batch in batches(lines, events_max):
        _send_batch(api, batch, delivery)
        delivery.safe_line = batch[-1].number
        if progress:
            progress(len(batch))
    return delivery


def _send_batch(api: Api, batch: list[Line], delivery: Delivery) -> None:
    """Send a batch without what the server refuses of it."""
    while batch:
        response = _persist(api, batch, delivery)
        if response.is_success:
            answer = exact.decode(response.content)
            delivery.inserted += answer["inserted"]
            delivery.duplicates += answer["duplicates"]
            delivery.log_position = response.headers.get("Log-Position", delivery.log_position)
            for partition, end in (parse_position(response.headers.get("Log-Position", "")) or {}).items():
                delivery.records.setdefault(partition, array("q")).append(end - 1)
            return
        faults = refused_events(response)
        if not faults:
            raise refused(response)
        delivery.problems += [Problem(batch[index].number, message) for index, message in sorted(faults.items())]
        batch = [line for index, line in enumerate(batch) if index not in faults]


def refused_events(response: httpx.Response) -> dict[int, str]:
    """Return the events that a 422 names, by their place in the batch, each with its first reason.

    The client library reads a refusal alike (``ingest/client/transport.py``); a table test compares the two.
    """
    faults: dict[int, str] = {}
    for one in complaints(response) if response.status_code == 422 else ():
        match one.loc:
            case [_, "events", int(index), *path]:
                # Polar names the variant of an event that it tried, which nobody wrote.
                field = ".".join(str(part) for part in path if not str(part).startswith("EventCreate"))
                faults.setdefault(index, ": ".join(filter(None, (field, one.words))))
            case _:
                return {}  # something else is wrong, too: no index can be trusted
    return faults


def _persist(api: Api, batch: list[Line], delivery: Delivery) -> httpx.Response:
    """Send one body until somebody answers for it. A server that was never there is not waited for."""
    body = b'{"events":[' + b",".join(line.event for line in batch) + b"]}"
    deadline = time.monotonic() + PATIENCE_S
    failures = 0
    while True:
        failures += 1
        pause_s = BACKOFF.pause_s(failures, 0.0)
        try:
            response = _sent(api, body, batch[-1].number, delivery)
            if response.status_code not in BUSY:
                return response
            trouble = refused(response)
            pause_s = _asked_pause(response, pause_s)
        except httpx.TransportError as error:
            trouble = api.unreachable(error)
            if isinstance(error, httpx.ConnectError) and not delivery.log_position:
                raise trouble from None
        if time.monotonic() + pause_s > deadline:
            raise GiveUp(f"{trouble} (tried for {PATIENCE_S:.0f} s)")
        if not delivery.is_told:
            note(f"{trouble}; trying again for {PATIENCE_S:.0f} s")
            delivery.is_told = True
        time.sleep(pause_s)


def _sent(api: Api, body: bytes, line: int, delivery: Delivery) -> httpx.Response:
    """One attempt; its lines are doubtful until it is known that nothing of them was taken, or noted what was."""
    before, delivery.doubtful_line = delivery.doubtful_line, line
    try:
        response = api.send("POST", INGEST_PATH, content=body)
    except httpx.ConnectError:
        delivery.doubtful_line = before  # nothing went out
        raise
    if response.is_client_error:
        delivery.doubtful_line = before
    return response


def _asked_pause(response: httpx.Response, pause_s: float) -> float:
    """The server's wish, within the bounds of a person's patience; without one, ``pause_s``."""
    asked_s = retry_after_s(response.headers.get("Retry-After"), time.time_ns() // 1000)
    return pause_s if asked_s is None else max(min(asked_s, BACKOFF.longest_s), BACKOFF.first_s)


# Conflicts. A gateway remembers only recent events, so it may answer that a conflicting event is a duplicate, or new.
# The aggregator decides: a conflicting event is a dead letter of a record that this delivery wrote.

PATH = "/v1/dead-letters/"
REASON = "conflict"
WAIT_S = 20  # that the answer may be kept back until all is counted; the server's own limit is 30
PAGE_LETTERS = 100
PAGES_MAX = 100  # whoever has more conflicts has one cause


class Conflicts(NamedTuple):
    """How many events are; ``is_all`` where nobody stopped counting them."""

    events: int
    is_all: bool = True


def find_conflicts(api: Api, delivery: Delivery) -> Conflicts | None:
    """Count them; None for a server that names no place in a log. Raises GiveUp where it cannot be known."""
    records = {partition: set(offsets) for partition, offsets in delivery.records.items()}
    if not records:
        return None
    found: set[str] = set()  # letters that come meanwhile move others to the next page
    for page in range(1, PAGES_MAX + 1):  # not Api.pages: each page waits for the records, and the search ends early
        try:
            answer = exact.decode(_page(api, page, records).content)
            letters: list[dict[str, Any]] = answer["items"]
            places = [(records.get(one["log_partition"], set()), one["log_offset"]) for one in letters]
            ours = zip(letters, places, strict=True)
            found |= {one["id"] for one, (own, offset) in ours if offset in own and one["reason"] == REASON}
            is_past = bool(letters) and not any(own and offset >= min(own) for own, offset in places)
            if is_past or page >= answer["pagination"]["max_page"]:
                return Conflicts(len(found))
        except (KeyError, TypeError, ValueError):
            raise GiveUp("what the server answers is no list of dead letters") from None
    return Conflicts(len(found), is_all=False)


def _page(api: Api, page: int, records: dict[int, set[int]]) -> httpx.Response:
    """A page of letters, the newest first, once every record is counted. Raises GiveUp."""
    wanted = {partition: max(offsets) + 1 for partition, offsets in records.items()}
    headers = {"Prefer": f"wait={WAIT_S}", "Log-Position": format_position(wanted)}
    try:
        response = api.send("GET", PATH, params={"page": page, "limit": PAGE_LETTERS}, headers=headers)
    except httpx.TransportError as error:
        raise api.unreachable(error) from None
    if not response.is_success:
        raise refused(response)
    as_of = parse_position(response.headers.get("As-Of", "")) or {}
    if any(as_of.get(partition, 0) < offset for partition, offset in wanted.items()):
        raise GiveUp(f"the server has not counted them after {WAIT_S} s")
    return response
