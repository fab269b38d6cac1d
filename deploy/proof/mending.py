"""Repairs of what a reconciliation found. Nothing edits the truth.

The store is a view of the log, so a wrong store is made again from the log. Polar is told what it lacks once more, with
the same ids, so whatever it has already it takes for a repetition; what it counts too much is taken back by another
event where only sums count it. Everything else is a person's decision. What was done, and what was not and why, is
appended to ``reconcile/repairs.jsonl`` in the data directory, with the differences that were the reason.
"""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from aggregator.reconcile.report import Cause, Difference, Done, Repair, Report
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp

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
