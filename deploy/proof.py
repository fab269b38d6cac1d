"""One run of ``meterstream reconcile``: every check that was asked for, and the repair if one was."""

from aggregator.reconcile.report import Report
from deploy.mending import plan, rebuilt, write_down
from deploy.reconcile import Task, reconcile
from deploy.session import Session


def prove(here: Session, task: Task) -> Report:
    """The report; after a repair, the report of a second look. Raises GiveUp."""
    report = reconcile(here.data, task)
    if task.repair is None:
        return report
    report.plan = plan(report)
    if task.repair == "plan":
        return report
    done = [step for step in [rebuilt(here.data, report.differences)] if step is not None]
    write_down(here.data, done, report.differences)
    if not done:
        return report
    after = reconcile(here.data, task)
    after.done, after.mended = done, report.differences
    return after
