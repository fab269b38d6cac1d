"""One run of ``meterstream reconcile``: every check that was asked for, and the repair if one was."""

import contextlib
import time
from datetime import UTC, datetime

import httpx

from aggregator.reconcile.report import Check, Done, Repair, Report
from deploy.giving_up import GiveUp
from deploy.mending import not_done, plan, rebuilt, write_down
from deploy.own_server import own_server
from deploy.reconcile import Task, reconcile, timed
from deploy.session import Session

LOCAL = {"log", "store", "ledger"}
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
    made_again = rebuilt(here.data, report.differences)
    told = _told_polar(here, report)
    done = [step for step in (made_again, *told) if step is not None]
    after = _look(here, task) if done else report
    if any(told):
        _until_counted(here, task, after)
    after.mended = report.differences if done else []
    after.done = [*done, *not_done(after)]
    write_down(here.data, after.done, report.differences)
    return after


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
        if not any(one.repair in (Repair.SEND, Repair.CORRECT) for one in report.checks[-1].differences):
            return
        time.sleep(pause_s)
        report.checks[-1] = timed(lambda: _upstream(here, task))


def _upstream(here: Session, task: Task) -> Check:
    from deploy.upstream_proof import Range, compare

    if not here.settings.polar_token:
        return Check(name="upstream", sides="our events and Polar's", skipped="METERSTREAM_POLAR_TOKEN is not set")
    range_ = Range(task.since, task.until, task.settle)
    try:
        with own_server(here) as api, contextlib.closing(here.data.open_log()) as log:
            return compare(here.settings, here.data, log, api, range_, datetime.now(UTC))
    except GiveUp as reason:  # what was compared besides is worth a report all the same
        return Check(name="upstream", sides="our events and Polar's", skipped=str(reason), has_failed=True)


def _told_polar(here: Session, report: Report) -> list[Done | None]:
    from deploy.upstream_proof import correct, send_again

    if not any(difference.check == "upstream" for difference in report.differences):
        return []
    with own_server(here) as api:
        try:
            return [step(here.settings, here.data, api, report.differences) for step in (send_again, correct)]
        except httpx.TransportError as error:
            raise api.unreachable(error) from None
