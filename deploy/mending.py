"""Repairs of what a reconciliation found. Nothing edits the truth.

The store is a view of the log, so a wrong store is made again from the log. Polar is told what it lacks once more, with
the same ids, so whatever it has already it takes for a repetition. Everything else is a person's decision. What was
done is appended to ``reconcile/repairs.jsonl`` in the data directory, with the differences that were the reason.
"""

from collections import Counter
from datetime import UTC, datetime

import msgspec

from aggregator.reconcile.report import Difference, Done, Repair, Report
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp

REPAIRS = "repairs.jsonl"
_SENTENCES = {
    Repair.REBUILD: "the store is made again from the log (the server has to be stopped)",
    Repair.RESTART: "the server is restarted by whoever runs it: it counts its totals anew",
    Repair.SEND: "the missing events are sent to Polar again, with the ids they have",
    Repair.CORRECT: "nothing is done automatically: Polar cannot remove an event, so a person decides on a correction",
    Repair.WAIT: "nothing: the events are on their way",
    Repair.DECIDE: "nothing is done automatically: a person has to decide",
}


def plan(report: Report) -> list[Done]:
    """What a repair would do, by kind."""
    counts: Counter[Repair] = Counter()
    for difference in report.differences:
        counts[difference.repair] += difference.count
    return [
        Done(repair, f"{count} of the differences: {_SENTENCES[repair]}", count)
        for repair, count in counts.items() if repair in _SENTENCES
    ]  # fmt: skip


def rebuilt(data: DataDirectory, differences: list[Difference]) -> Done | None:
    """Make the store again if that mends anything. Raises GiveUp while a server runs."""
    from deploy.rebuild import rebuild

    count = sum(difference.count for difference in differences if difference.repair is Repair.REBUILD)
    if not count:
        return None
    tallies = rebuild(data, lambda _done, _all: None)
    lines = ", ".join(f"{number} {name}" for name, number in tallies.items())
    return Done(Repair.REBUILD, f"The store was made again from the log: {lines}.", count)


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
