"""One run of ``meterstream reconcile``: every check that was asked for, and the repair if one was."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime

from aggregator.reconcile.report import Check, Done, Report
from deploy.client import Api
from deploy.control import new_secret, new_token, open_control
from deploy.data import DataDirectory
from deploy.giving_up import GiveUp
from deploy.mending import plan, rebuilt, write_down
from deploy.reconcile import Task, reconcile, timed
from deploy.session import Session
from meters.access import AUDIT
from meters.catalogue import TokenCreated

SCOPES = ("events:read", "meters:read", "customers:read", "customer_meters:read", AUDIT)
LOCAL = {"log", "store"}


def prove(here: Session, task: Task) -> Report:
    """The report; after a repair, the report of a second look. Raises GiveUp."""
    report = _look(here, task)
    if task.repair is None:
        return report
    report.plan = plan(report)
    if task.repair == "plan":
        return report
    steps = [rebuilt(here.data, report.differences), _sent_again(here, report)]
    done = [step for step in steps if step is not None]
    write_down(here.data, done, report.differences)
    if not done:
        return report
    after = _look(here, task)
    after.done, after.mended = done, report.differences
    return after


def _look(here: Session, task: Task) -> Report:
    if LOCAL & set(task.checks):
        report = reconcile(here.data, task)
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
    with own_server(here) as api, contextlib.closing(here.data.open_log()) as log:
        return compare(here.settings, here.data, log, api, range_, datetime.now(UTC))


def _sent_again(here: Session, report: Report) -> Done | None:
    from deploy.upstream_proof import send_again

    if not any(difference.check == "upstream" for difference in report.differences):
        return None
    with own_server(here) as api:
        return send_again(here.settings, here.data, api, report.differences)


@contextlib.contextmanager
def own_server(here: Session) -> Iterator[Api]:
    """The running server: the token's, or by the socket in the data directory with a token of its own. GiveUp."""
    if here.settings.token:
        with Api(here.settings.url, here.settings.token) as api:
            yield api
        return
    with Api("http://meterstream", _token(here.data, here.settings.polar_organization), here.data.socket) as api:
        yield api


def _token(data: DataDirectory, organization: str | None) -> str:
    """A token for reconciliation alone, made once by whoever may write the data directory."""
    path = data.path / "reconcile" / "token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists():
            return path.read_text().strip()
        secret = new_secret()
        path.touch(0o600)
        path.write_text(secret)
    except OSError as error:
        raise GiveUp(f"{path} cannot be written: {error.strerror}; give a --token instead") from None
    with open_control(data) as control:
        control.decide([TokenCreated(new_token(control.organization(organization), "reconcile", secret, SCOPES))])
    return secret
