"""One run of ``meterstream reconcile``: the requested checks, then the repairs.

``prove`` runs the checks (``deploy.reconcile.local``, ``deploy.reconcile.polar``) and, if asked, repairs what they
found, then checks again. ``send_again`` and ``correct`` bring Polar into line, ``rebuilt`` rebuilds a wrong store,
and ``write_down`` records what was done. Nothing edits the log. Differences that only a person can decide are listed,
not repaired.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aggregator.forward.feed_client import FeedPage, item_of
from aggregator.forward.planner import ENVELOPE_BYTES, Accepted, counts_of
from aggregator.forward.polar_client import BODY_BYTES_MAX, INGEST_PATH, Denied, NoAnswer, Upstream
from aggregator.reconcile.polar_pairing import instead
from aggregator.reconcile.report import Cause, Check, Difference, Done, Repair, Report
from deploy.client import Api, Session
from deploy.errors import USAGE, GiveUp
from deploy.reconcile.local import Task, own_server, reconcile, timed
from deploy.reconcile.polar import connected
from deploy.server.data import DataDirectory
from deploy.settings import Settings
from meters.timestamps import utc_text

# Repairs at Polar. Missing events are sent again, and events counted wrongly are corrected. Every request has ids
# that are always the same, so a repeated repair changes nothing. Requests share the forwarder's rate limit and size.

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
        window = {"start_timestamp": utc_text(since), "end_timestamp": utc_text(until)}
        given = {**window, "position": position, "limit": 10_000}
        page = msgspec.json.decode(here.answer("GET", "/v1/feed/", params=given).content, type=FeedPage)
        for entry in page.items:
            item = item_of(entry, "repair")
            if wanted.pop(item.external_id, None) is not None:
                yield item.body
        if page.position == position:
            return
        position = page.position


# Choosing repairs. A wrong store is rebuilt from the log. Polar deduplicates what it has already; an excess is
# corrected by another event, if only sums count it. Everything else is a person's decision. What was done, what was
# not and why, is appended to ``reconcile/repairs.jsonl`` in the data directory, with the differences that were the
# reason.

REPAIRS = "repairs.jsonl"
PLANNED_MAX = 50  # differences that a plan speaks of one by one, where a person has to act
_SENTENCES = {
    Repair.REBUILD: "the store is made again from the log (the server has to be stopped)",
    Repair.RESTART: "the server is restarted by whoever runs it: it counts its totals anew",
    Repair.SEND: "the missing events are sent to Polar again, with the ids they have",
    Repair.CORRECT: "an event each takes back what Polar counts wrongly, and what is right is sent in its place",
    Repair.WAIT: "nothing: the events are on their way",
}
_ADVICE = {
    Cause.LOST: "give it by hand on the side that lacks it",
    Cause.DOUBLED: "credit the customer: Polar cannot remove an event, and not only sums count this one, so no other "
                   "event can take it back",
    Cause.CHANGED: "decide which content is right, and credit or charge the difference: Polar cannot change an event, "
                   "and not only sums count this one",
    Cause.UNFOUNDED: "find out who tells Polar past this server; send it here as well if it is true, else credit it",
    Cause.LATE: "see whether both times lie in one billing period; if not, credit it in one and charge it in the other",
    Cause.CONFLICT: "decide which of the two contents is right; here the first one counts",
    Cause.FILTER_SEMANTICS: "give the meter a filter that compares values of one type, here and at Polar, and correct "
                            "what was invoiced",
}  # fmt: skip
_A_PERSON = {Repair.RESTART, Repair.DECIDE}


def plan(report: Report) -> list[Done]:
    """What a repair would do, by kind, and what is left to a person, one by one."""
    counts: Counter[Repair] = Counter()
    for difference in report.differences:
        counts[difference.repair] += difference.count
    kinds = [
        Done(repair, f"{count} of the differences: {_SENTENCES[repair]}", count)
        for repair, count in counts.items() if repair in _SENTENCES
    ]  # fmt: skip
    return kinds + [_by_hand(one) for one in report.differences if one.repair is Repair.DECIDE][:PLANNED_MAX]


def not_done(report: Report) -> list[Done]:
    """What of a plan no repair does, and why."""
    return [Done(one.repair, f"Not done: {one.what}", one.count) for one in plan(report) if one.repair in _A_PERSON]


def _by_hand(difference: Difference) -> Done:
    advice = _ADVICE.get(difference.cause, "a person has to decide") if difference.check != "log" else difference.what
    advice = difference.payload.get("doubt", advice)
    where = f"{difference.where} ({difference.moved})" if difference.moved else difference.where
    return Done(Repair.DECIDE, f"{where}: {advice}", difference.count)


def rebuilt(data: DataDirectory, differences: list[Difference]) -> Done | None:
    """Make the store again if that mends anything. Raises GiveUp while a server runs."""
    from deploy.rebuild import rebuild

    count = sum(difference.count for difference in differences if difference.repair is Repair.REBUILD)
    if not count:
        return None
    kept: list[Path] = []
    tallies = rebuild(data, kept=kept.append)
    lines = ", ".join(f"{number} {name}" for name, number in tallies.items())
    old = "".join(f" The old one, which is not known to be of this log, is {path}." for path in kept)
    return Done(Repair.REBUILD, f"The store was made again from the log: {lines}.{old}", count)


def write_down(data: DataDirectory, done: list[Done], mended: list[Difference]) -> None:
    """Append to the record of repairs. Raises GiveUp."""
    if not done:
        return
    folder = data.path / "reconcile"
    entry = {"at": datetime.now(UTC), "done": done, "differences": mended}
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        with (folder / REPAIRS).open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
    except OSError as error:
        raise GiveUp(f"the repair was made, but cannot be recorded in {folder}: {error.strerror}") from None


# The run.

LOCAL = {"log", "store", "ledger"}
TOLD = (Repair.SEND, Repair.CORRECT)
COUNTED_AFTER_S = (1.0, 2.0, 4.0)
"""Pauses between looks at what Polar was just told: it counts a moment after it answered."""


def prove(here: Session, task: Task) -> Report:
    """The report; after a repair, the report of a second look. Raises GiveUp."""
    report = _look(here, task)
    if task.repair is None:
        return report
    if task.repair == "plan":
        report.plan = plan(report)
        return report
    done: list[Done] = []
    try:
        for step in _repairs(here, task, report):
            done.append(step)
        is_changed = any(step.count for step in done)
        after = _look(here, task) if is_changed else report
        if any(step.count for step in done if step.repair in TOLD):
            _until_counted(here, task, after)
        done += not_done(after)
    finally:  # what was done stays done, whatever became of the rest
        write_down(here.data, done, report.differences)
    after.mended = report.differences if is_changed else []
    after.done = done
    return after


def _repairs(here: Session, task: Task, report: Report) -> Iterator[Done]:
    """Do what can be done, step by step, up to one that cannot be: each as it is done, and why there are no more."""
    try:
        made_again = rebuilt(here.data, report.differences)
        if made_again is not None:
            yield made_again
        yield from _told_polar(here, task, report)
    except GiveUp as reason:
        yield Done(Repair.DECIDE, f"Not done: {reason}", 0)


def _look(here: Session, task: Task) -> Report:
    if LOCAL & set(task.checks):
        report = reconcile(here, task)
    else:
        report = Report(made_at=datetime.now(UTC), as_of="", since=task.since, until=task.until, checks=[])
    if "upstream" in task.checks:
        report.checks.append(timed(lambda: _upstream(here, task)))
    return report


def _until_counted(here: Session, task: Task, report: Report) -> None:
    """What still seems to be missing at Polar is looked at again."""
    for pause_s in COUNTED_AFTER_S:
        if not any(one.repair in TOLD for one in report.checks[-1].differences):
            return
        time.sleep(pause_s)
        report.checks[-1] = timed(lambda: _upstream(here, task))


def _upstream(here: Session, task: Task) -> Check:
    from deploy.reconcile.polar import Range, compare

    if not here.settings.polar_token:
        return Check(name="upstream", sides="our events and Polar's", skipped="METERSTREAM_POLAR_TOKEN is not set")
    range_ = Range(task.since, task.until, task.settle)
    try:
        with own_server(here) as api, contextlib.closing(here.data.open_log()) as log:
            return compare(here.settings, here.data, log, api, range_, datetime.now(UTC))
    except GiveUp as reason:  # what was compared besides is worth a report all the same
        if reason.exit_code == USAGE and not LOCAL & set(task.checks):
            raise
        return Check(name="upstream", sides="our events and Polar's", skipped=str(reason), has_failed=True)


def confirmed(here: Session, task: Task, report: Report) -> tuple[list[Difference], Done | None]:
    """What is to be corrected at Polar and a second look finds again, and what to say of the rest.

    Both sides go on while they are read, and taking back what is right would take away usage.
    """
    wrong = [one for one in report.differences if one.repair is Repair.CORRECT]
    if not wrong:
        return [], None
    again = [(one.cause, one.payload) for one in _upstream(here, task).differences]
    sure = [one for one in wrong if (one.cause, one.payload) in again]
    left = sum(one.count for one in wrong) - sum(one.count for one in sure)
    if not left:
        return sure, None
    what = f"Not corrected at Polar: {left} events that a second look did not find in the same way; run this again."
    return sure, Done(Repair.CORRECT, what)


def _told_polar(here: Session, task: Task, report: Report) -> Iterator[Done]:

    if not any(difference.check == "upstream" for difference in report.differences):
        return
    wrong, unsure = confirmed(here, task, report)
    if unsure is not None:
        yield unsure
    with own_server(here) as api:
        for tell, differences in ((send_again, report.differences), (correct, wrong)):
            step = tell(here.settings, here.data, api, differences)
            if step is not None:
                yield step
