"""Balances against an auditor who keeps the plainest books there are.

The auditor writes down every fact and adds everything up anew each time it is asked: no arrays, no SQL, no windows
kept from before. Whatever happens, in whatever order it becomes known, through restarts, deaths and rebuilds, three
numbers are one: the auditor's balance, the customer meter's, and the sum of the ledger's movements.
"""

import asyncio
import signal
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from msgspec.structs import replace

from aggregator.store.queries import usage
from aggregator.store.queries.scope import Scope
from ingest.log import open_log
from meters.aggregation import exact_sum
from meters.catalogue.catalogue import Customer, CustomerCreated
from meters.ledger.ledger import Account, CreditGranted, MeterReset
from meters.ledger.statement import statement
from meters.log import USAGE_CONTROL, USAGE_EVENTS
from meters.meter import Meter
from meters.timestamps import microseconds_of
from tests.support.faults.aggregator_process import AfterSo, start_life
from tests.support.records import NOW, ORGANIZATION, Running, created, decisions, entry, line, meter, organization

FUNCTIONS = ("count", "sum", "avg", "max", "min", "unique")
METERS = {
    function: meter(function, func=function, property="units") if function != "count" else meter(function)
    for function in FUNCTIONS
}
ANN, BOB = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
NAMES = {ANN: "ann", BOB: "bob"}
WIDE = Context(prec=60)
POINTS = 250  # of a life that opens the store and stores three events and a reset
UNITS = ["1", "2", "3.5", "-2", "0", "0.000000000001", "99999999999999999999", '"5"', "3.50"]


class Auditor:
    """Facts as they became known, and sums over all of them."""

    def __init__(self) -> None:
        self.usage: dict[str, tuple[str, datetime, str]] = {}  # by external id: whose, arrival, token
        self.credits: dict[str, CreditGranted] = {}
        self.resets: dict[str, MeterReset] = {}

    def since(self, customer: str) -> datetime:
        """The newest reset."""
        cuts = [reset.at for reset in self.resets.values() if reset.customer_id == customer]
        return max(cuts, default=datetime.min.replace(tzinfo=UTC))

    def consumed(self, customer: str, function: str) -> Decimal:
        """What arrived since then, put together as the function says."""
        since = self.since(customer)
        tokens = [token for whose, arrived, token in self.usage.values() if whose == customer and arrived >= since]
        numbers = [Decimal(token) for token in tokens if not token.startswith('"')]
        match function:
            case "count":
                return Decimal(len(tokens))
            case "unique":
                return Decimal(len(set(numbers)) + len({token for token in tokens if token.startswith('"')}))
        if not numbers:
            return Decimal(0)
        total = exact_sum(numbers)
        average = WIDE.divide(total, Decimal(len(numbers))).quantize(Decimal("1e-12"), context=WIDE)
        return {"sum": total, "avg": average, "max": max(numbers), "min": min(numbers)}[function]

    def credited(self, customer: str, function: str) -> Decimal:
        """Credits in the order of their times, never below zero; what a reset carries over is one of them."""
        since, steps = self.since(customer), []
        for credit in self.credits.values():
            if (credit.customer_id, credit.meter_id) == (customer, function):
                steps.append((credit.at, credit.id, credit.units))
        for reset in self.resets.values():
            if reset.customer_id == customer and function in reset.rollover:
                steps.append((reset.at, reset.id, reset.rollover[function]))
        total = Decimal(0)
        for at, _, units in sorted(steps):
            total = max(Decimal(0), total + units) if at >= since else total
        return total


class LedgerMachine(RuleBasedStateMachine):
    """Everything that can happen to an account, in any order."""

    grants = Bundle("grants")
    running: Any = None

    @initialize()
    def begin(self) -> None:
        """One tenant, six meters; bob is not a customer yet."""
        self.directory = TemporaryDirectory()
        self.now, self.number = NOW, 0
        self.log_directory = Path(self.directory.name) / "log"
        self.log = open_log(str(self.log_directory), clock_us=lambda: microseconds_of(self.now))
        self.auditor = Auditor()
        self._open("store.duckdb")
        ann = Customer(id=ANN, organization_id=ORGANIZATION, external_id="ann", created_at=NOW)
        self._decide(organization(), *created(*METERS.values()), CustomerCreated(ann))

    def teardown(self) -> None:
        """Let go of everything."""
        if hasattr(self, "directory"):
            if self.running is not None:
                self.running.__exit__()
            self.log.close()
            self.directory.cleanup()

    def _open(self, name: str) -> None:
        if self.running is not None:
            self.running.__exit__()
        self.running = Running(self.log, Path(self.directory.name) / name)
        self.running.__enter__()

    def _decide(self, *changes: Any) -> None:
        asyncio.run(self.log.append(USAGE_CONTROL, decisions(changes)))

    def _next(self, what: str) -> str:
        self.number += 1
        self.now += timedelta(minutes=self.number % 7)
        return f"{what}{self.number}"

    @rule(customer=st.sampled_from([ANN, BOB]), by_id=st.booleans(),
          tokens=st.lists(st.sampled_from(UNITS), max_size=4))
    def use(self, customer: str, by_id: bool, tokens: list[str]) -> None:
        """Usage arrives, under either name; some of it says that it happened long ago."""
        lines = []
        for place, token in enumerate(tokens):
            id = self._next("use")
            named = {"external_customer_id": NAMES[customer]}
            past = {"timestamp": (self.now - timedelta(days=place)).isoformat()}
            text = line(id, metadata=f'{{"units": {token}}}', **named, **past)
            if by_id and (customer == ANN or BOB in self._customers()):
                text = text.replace(f'"external_customer_id": "{NAMES[customer]}"'.encode(),
                                    f'"customer_id": "{customer}"'.encode())  # fmt: skip
            lines.append((id, token, text))
        if not lines:
            return
        asyncio.run(self.log.append(USAGE_EVENTS, [entry(*(text for *_, text in lines))]))
        for id, token, text in lines:
            self.auditor.usage[id] = customer, self.now, token
            self.last = text
        self.check()

    def _customers(self) -> set[str]:
        return set(self.running.engine.catalogue.customers)

    @rule()
    def repeat(self) -> None:
        """A line is sent again, later."""
        self._next("")
        if hasattr(self, "last"):
            asyncio.run(self.log.append(USAGE_EVENTS, [entry(self.last)]))
            self.check()

    @rule(target=grants, customer=st.sampled_from([ANN, BOB]), function=st.sampled_from(FUNCTIONS),
          units=st.integers(-60, 100), rollover=st.booleans(), days=st.integers(0, 2), times=st.integers(1, 2))
    def credit(self, customer: str, function: str, units: int, rollover: bool, days: int, times: int) -> CreditGranted:
        """Units are given as of some time, and perhaps told twice."""
        made = CreditGranted(
            id=self._next("credit"), organization_id=ORGANIZATION, customer_id=customer, meter_id=function,
            units=Decimal(units), rollover=rollover, at=self.now - timedelta(minutes=5 * days),
        )  # fmt: skip
        self._decide(*[made] * times)
        self.auditor.credits[made.id] = made
        self.check()
        return made

    @rule(given=consumes(grants), again=st.integers(0, 2), backward=st.booleans())
    def revoke(self, given: CreditGranted, again: int, backward: bool) -> None:
        """Units are taken back, and perhaps once more, by whoever did not hear that they were."""
        self._next("")
        made = CreditGranted(
            id=f"{given.id}-revoked", organization_id=ORGANIZATION, customer_id=given.customer_id,
            meter_id=given.meter_id, units=-given.units, at=self.now, cause="revoke", reference=given.id,
        )  # fmt: skip
        news = [made, *(replace(made, at=made.at + timedelta(minutes=number + 1)) for number in range(again))]
        self._decide(*(reversed(news) if backward else news))
        self.auditor.credits[made.id] = made
        self.check()

    @rule(customer=st.sampled_from([ANN, BOB]), minutes=st.integers(0, 30), carried=st.integers(0, 20),
          cycle=st.booleans(), backward=st.booleans())
    def reset(self, customer: str, minutes: int, carried: int, cycle: bool, backward: bool) -> None:
        """Meters begin anew, now or earlier; a cycle credits again, and the news may come in the other order."""
        id = self._next("reset")
        at = self.now - timedelta(minutes=minutes)
        rollover = {function: Decimal(carried) for function in FUNCTIONS[:3] if carried}
        cut = MeterReset(
            id=id, organization_id=ORGANIZATION, customer_id=customer, meter_ids=list(FUNCTIONS), at=at,
            rollover=rollover,
        )  # fmt: skip
        again = CreditGranted(
            id=f"cycle{id}", organization_id=ORGANIZATION, customer_id=customer, meter_id="sum", units=Decimal(100),
            at=at, cause="cycle",
        )  # fmt: skip
        news = [cut, again] if cycle else [cut]
        self._decide(*(reversed(news) if backward else news))
        self.auditor.resets[id] = cut
        if cycle:
            self.auditor.credits[again.id] = again
        self.check()

    @rule()
    def know_bob(self) -> None:
        """The customer is made, long after the events."""
        if BOB not in self._customers():
            self._decide(CustomerCreated(
                Customer(id=BOB, organization_id=ORGANIZATION, external_id="bob", created_at=self.now)
            ))  # fmt: skip
            self.check()

    @rule()
    def restart(self) -> None:
        """Another life over the same store."""
        self._open(Path(self.running.path).name)
        self.check()

    @rule(tokens=st.lists(st.sampled_from(UNITS), min_size=1, max_size=3), minutes=st.integers(0, 9))
    def end_in_the_middle(self, tokens: list[str], minutes: int) -> None:
        """The engine ends while usage and a reset are on their way; some of it may be stored and some not."""
        self._use_and_reset(tokens, minutes)
        self._open(Path(self.running.path).name)
        self.check()

    @rule(tokens=st.lists(st.sampled_from(UNITS), min_size=1, max_size=3), minutes=st.integers(0, 9),
          points=st.integers(1, POINTS))
    def die_in_the_middle(self, tokens: list[str], minutes: int, points: int) -> None:
        """The same, and the process that stores them dies of SIGKILL at a statement or step of it."""
        path, self.running = Path(self.running.path), self.running.__exit__()
        self._use_and_reset(tokens, minutes)
        life = start_life(self.log_directory, path, AfterSo(points), path.with_name("last-words"))
        life.join()
        assert life.exitcode in (-signal.SIGKILL, 0)
        self._open(path.name)
        self.check()

    def _use_and_reset(self, tokens: list[str], minutes: int) -> None:
        lines = [(self._next("use"), token) for token in tokens]
        texts = [line(id, metadata=f'{{"units": {token}}}') for id, token in lines]
        asyncio.run(self.log.append(USAGE_EVENTS, [entry(text) for text in texts]))
        for id, token in lines:
            self.auditor.usage[id] = ANN, self.now, token
        cut = MeterReset(
            id=self._next("reset"), organization_id=ORGANIZATION, customer_id=ANN, meter_ids=list(FUNCTIONS),
            at=self.now - timedelta(minutes=minutes),
        )  # fmt: skip
        self._decide(cut)
        self.auditor.resets[cut.id] = cut

    @rule()
    def rebuild(self) -> None:
        """The store is made again from the log."""
        self._open(f"rebuilt{self._next('')}.duckdb")
        self.check()

    def check(self) -> None:
        """The three numbers, for every customer and every meter."""
        engine = self.running.catch_up()
        for customer in (ANN, BOB):
            known = engine.catalogue.customers.get(customer)
            if known is None:
                continue
            subjects = engine.directory.find(ORGANIZATION, engine.catalogue.names_of(known))
            for function, measured in METERS.items():
                account = engine.ledger.account(customer, function) or Account()
                used = engine.totals.consumed(engine.catalogue.meters[function], subjects, account.since)
                assert used is not None, "memory does not know"
                assert used.value == self.auditor.consumed(customer, function), (customer, function)
                assert account.credited == self.auditor.credited(customer, function), (customer, function)
                entries = statement(measured.aggregation, account, self._usages(measured, account, subjects))
                assert exact_sum(move.units for move in entries) == WIDE.subtract(account.credited, used.value)

    def _usages(self, measured: Meter, account: Account, subjects: list[int]) -> Any:
        engine = self.running.engine
        organization = engine.directory.organizations.get(ORGANIZATION)
        if organization is None:
            return []
        scope = Scope(organization=organization.number, subjects=subjects)
        cuts = sorted({reset.at for reset in account.resets})
        with engine.store.read() as snapshot:
            return usage.by_quarter(snapshot.connection, measured, scope, cuts)


TestLedger = pytest.mark.timeout(600)(LedgerMachine.TestCase)  # some lives in other processes, on a busy machine
# Nothing is shrunk: a step opens stores and may end a process, so a shorter story costs more than a long one read.
# Much is filtered: a revocation that is drawn while no credit is left to revoke is drawn anew.
TestLedger.settings = settings(
    max_examples=10, stateful_step_count=14, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip
