"""The nightly proof: what was taken, what is counted and what Polar has are the same, or a report says where not.

It is one run of ``meterstream reconcile``: every check that was asked for, and the repair if one was.
"""

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from aggregator.reconcile.report import Check, Difference, Done, Repair, Report
from deploy.giving_up import USAGE, GiveUp
from deploy.proof.local import Task, reconcile, timed
from deploy.proof.mending import not_done, plan, rebuilt, write_down
from deploy.proof.own_server import own_server
from deploy.session import Session

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
    from deploy.proof.upstream import Range, compare

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
    from deploy.proof.repair import correct, send_again

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
