"""Balances against credits, resets and usage; the forwarder's books."""

import asyncio
import contextlib
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

import deploy.reconcile.local
from aggregator.forward.state import State
from aggregator.reconcile.ledger_check import Balance, check_ledger
from aggregator.reconcile.lines import StoppedStore
from aggregator.reconcile.report import Cause, Report, Worth
from deploy.client import Session
from deploy.console import Output
from deploy.errors import GiveUp
from deploy.reconcile.local import RunningStore, Task, _books, _compare, reconcile
from deploy.server.control import Control
from deploy.settings import Settings
from meters.catalogue.catalogue import Customer, CustomerCreated
from meters.ledger.ledger import CreditGranted
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from meters.meter import Meter
from tests.support.faults.store_checks import usage
from tests.support.polar.two_servers import TwoSides, numbered
from tests.support.records import NOW, ORGANIZATION, created, decisions, entry, meter, organization, together
from tests.support.servers.installation import Installation
from tests.support.servers.stopped_installation import Left

ANN = "11111111-1111-4111-8111-111111111111"


def credited(id: str, units: int) -> CreditGranted:
    """A credit of ann's."""
    return CreditGranted(
        id=id, organization_id=ORGANIZATION, customer_id=ANN, meter_id="m", units=Decimal(units), at=NOW
    )


def ledger_of_ann(path: Path) -> Left:
    """A data directory with a customer who has two credits."""
    place = Left(path)
    customer = Customer(id=ANN, organization_id=ORGANIZATION, created_at=NOW, external_id="ann")
    changes = [
        organization(), *created(meter("m", func="sum", property="tokens")), CustomerCreated(customer),
        credited("c1", 100), credited("c2", 50),
    ]  # fmt: skip
    with place.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions(changes)))
    place.count()
    return place


@pytest.fixture
def left(tmp_path: Path) -> Left:
    """See there."""
    return ledger_of_ann(tmp_path)


def test_credits_of_the_log_and_of_the_store_agree(left: Left) -> None:
    """Every decision is there, and every account's entries add up."""
    check = left.check("ledger")

    assert check.differences == []
    assert [counted.compared for counted in check.counted] == [5, 1]


def test_a_missing_credit_is_lost(left: Left) -> None:
    """A credit that the store does not have."""
    left.spoil("DELETE FROM control WHERE log_offset = 3")

    (difference,) = left.check("ledger").differences

    assert difference.cause is Cause.LOST
    assert difference.quantities == {"meter m": Decimal(-100)}


@pytest.mark.parametrize(("gone", "count"), [("log_offset = 4", 1), ("true", 5)], ids=["the last", "all"])
def test_decisions_at_the_end_of_the_store_are_missed_too(left: Left, gone: str, count: int) -> None:
    """What the store says that it has read is what it must have, whichever rows are left."""
    left.spoil(f"DELETE FROM control WHERE {gone}")

    differences = left.check("ledger").differences

    assert [difference.cause for difference in differences] == [Cause.LOST] * count
    assert differences[-1].quantities == {"meter m": Decimal(-50)}


def test_decisions_that_a_store_has_yet_to_read_are_not_missed(left: Left) -> None:
    """They were taken after the server stopped, and are counted by the next start."""
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, decisions([credited("c3", 7)])))

    assert left.check("ledger").differences == []


def test_every_credit_of_one_decision_is_named(left: Left) -> None:
    """What was decided together is lost together: the difference has the units of all of it, and whose they are."""
    entries = [together([credited("c3", 7), credited("c4", 5)]), *decisions([credited("c5", 1)])]
    with left.log() as log:
        asyncio.run(log.append(USAGE_CONTROL, entries))
    left.count()
    assert left.check("ledger").differences == []
    left.spoil("""UPDATE control SET value = replace(value, '"units":5,', '"units":6,') WHERE log_offset = 5""")
    (changed,) = left.check("ledger").differences
    assert (changed.cause, changed.quantities) == (Cause.CHANGED, {"meter m": Decimal(1)})
    assert changed.where == "meter m, customer ann, credit c4"

    left.spoil("DELETE FROM control WHERE log_offset = 5")
    (lost,) = left.check("ledger").differences

    assert (lost.cause, lost.quantities) == (Cause.LOST, {"meter m": Decimal(-12)})
    assert lost.where == "meter m, customer ann, credit c3; meter m, customer ann, credit c4"


def test_balances_of_a_running_server_follow_from_their_entries(
    servers: tuple[Installation, Installation], sides: TwoSides
) -> None:
    """Credits, a reset and usage after it: what is shown is what the log's entries and the raw events make."""
    side = sides.here
    customer = side.post("/v1/customers/", {"external_id": "ann", "email": "ann@example.com"})["id"]
    tokens = next(one["id"] for one in side.api.pages("/v1/meters/") if one["name"] == "tokens")
    side.send(*numbered(10))
    side.post(f"/v1/customers/{customer}/credits", {"meter_id": tokens, "units": 100})
    side.post(f"/v1/customers/{customer}/resets", {"meter_ids": [tokens]})
    side.send(*({**event, "external_id": f"after-{event['external_id']}"} for event in numbered(6)))

    report = ledger(servers[0])

    assert report.differences == []
    compared = {counted.what: counted.compared for counted in report.checks[0].counted}
    assert compared["balances of tokens as shown"] >= 1


class Follower(RunningStore):
    """A running server's store that has some of the decisions, and more of them with each look if it is moving."""

    def __init__(self, path: Path, *, is_moving: bool) -> None:
        self._path, self._is_moving, self._looks = path, is_moving, 0

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """What the file has, but for the newest decisions."""
        with contextlib.closing(StoppedStore(self._path)) as stopped:
            found = stopped.ask(question, asked, **parameters)
        if question == "decided":
            self._looks += self._is_moving
            return pa.table({"next_offset": [3 + self._looks % 2]})
        return found.slice(0, 3 + self._looks % 2) if question == "control" else found

    def balances(self, meter: Meter) -> list[Balance]:
        """One credit of ann's."""
        return [Balance(ANN, Decimal(100))]


def test_balances_of_another_moment_than_the_decisions_are_no_differences(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While decisions come in it is given up; a store that lacks one for good is what is looked for."""
    monkeypatch.setattr(deploy.reconcile.local, "AGAIN_S", 0)
    with left.log() as log:
        with pytest.raises(GiveUp, match="decisions are taken too fast"):
            _books(log, Follower(left.data.store, is_moving=True), None)
        behind = Follower(left.data.store, is_moving=False)
        check = check_ledger(_books(log, behind, None), Worth(Control(log).catalogue))

    assert [difference.quantities for difference in check.differences] == [{"meter m": Decimal(-50)}]


def test_what_else_was_compared_is_told_where_the_ledger_could_not_be(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost event is a difference also on a night on which decisions are taken too fast."""
    monkeypatch.setattr(deploy.reconcile.local, "AGAIN_S", 0)
    with left.log() as log:
        asyncio.run(log.append(USAGE_EVENTS, [entry(usage("a"))]))
    left.count()
    left.spoil("DELETE FROM events")
    store, task = Follower(left.data.store, is_moving=True), Task(checks=("log", "ledger"))
    with left.log() as log:
        report = _compare(log, store, task, lambda: None, lambda _: contextlib.nullcontext(store))

    of_log, of_ledger = report.checks
    assert [difference.cause for difference in of_log.differences] == [Cause.LOST]
    assert of_ledger.skipped.startswith("decisions are taken too fast")
    assert (report.is_equal, report.has_failed) == (False, True)


def test_the_forwarder_s_books_add_up_or_are_named(left: Left) -> None:
    """Taken is accepted, waiting and refused together; one event that is in none of them is lost."""
    state = State(left.data.forwarding)
    state.count("raw", taken=10, accepted=9)
    state.close()

    (difference,) = left.check("ledger").differences

    assert (difference.cause, difference.count) == (Cause.LOST, 1)


def ledger(server: Installation) -> Report:
    """The ledger check of a running server."""
    return reconcile(Session(Settings(data=server.data), Output.json), Task(checks=("ledger",)))
