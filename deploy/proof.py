"""One run of ``meterstream reconcile``: every check that was asked for, and the repair if one was."""

import contextlib
from datetime import UTC, datetime

import httpx

from aggregator.reconcile.report import Check, Done, Report
from deploy.giving_up import GiveUp
from deploy.mending import not_done, plan, rebuilt, write_down
from deploy.own_server import own_server
from deploy.reconcile import Task, reconcile, timed
from deploy.session import Session

LOCAL = {"log", "store", "ledger"}


def prove(here: Session, task: Task) -> Report:
    """The report; after a repair, the report of a second look. Raises GiveUp."""
    report = _look(here, task)
    if task.repair is None:
        return report
    if task.repair == "plan":
        report.plan = plan(report)
        return report
    steps = [rebuilt(here.data, report.differences), *_told_polar(here, report)]
    done = [step for step in steps if step is not None]
    after = _look(here, task) if done else report
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
