"""Distinct values are kept in memory while they are few; of more the store is asked, and says the same."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.totals import accumulators as module
from aggregator.totals.accumulators import IDENTITY_LENGTH_MAX, DistinctValues, MeterWindows
from aggregator.view import EVER
from meters.catalogue.catalogue import Names
from meters.ledger.ledger import customer_meter_id
from tests.support.records import line
from tests.support.servers.query_api import Tenant

BY_AMOUNT = ["consumed_units", "-consumed_units", "balance", "-balance"]
BOUND = 6
LONG = "a" * IDENTITY_LENGTH_MAX
VALUES = ["a", "b", LONG, LONG + "a", LONG + "b", "é" + LONG, None]
used = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(VALUES)), max_size=12)


@contextlib.contextmanager
def bounded(values: int) -> Iterator[None]:
    """So many values and customers of a meter are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DISTINCT_MAX", values)
        yield


def add(windows: MeterWindows, rows: list[tuple[int, str | None]], at: int) -> None:
    """Who used which value; all of it arrived at the same time."""
    subjects = np.array([subject for subject, _ in rows], np.intp)
    identities = pa.array([value for _, value in rows], pa.string())
    windows.add(subjects, identities, np.arange(len(rows)), np.full(len(rows), at, np.int64))


@given(st.lists(used, max_size=4))
def test_what_is_known_is_exact(rounds: list[list[tuple[int, str | None]]]) -> None:
    """Values are told apart by all of their letters, and nothing is said of more than are kept."""
    with bounded(BOUND):
        windows = MeterWindows("unique")
        for rows in rounds:
            add(windows, rows, 1)
        found = windows.consumed([0, 1], EVER)
    everything = [row for rows in rounds for row in rows]
    held = {(subject, value) for subject, value in everything if value is not None}
    customers = {subject for subject, _ in everything}
    mine = [value for subject, value in everything if subject in (0, 1)]
    if not mine:
        assert found is not None
        assert found.count == 0
    elif len(held) + len(customers) > BOUND:
        assert found is None
    else:
        assert found is not None
        assert (found.count, found.value) == (len(mine), Decimal(len({*mine} - {None})))


def test_what_is_not_known_takes_no_memory() -> None:
    """Everything that a meter kept is let go, and nothing is taken in again."""
    kept = DistinctValues()
    with bounded(BOUND):
        for number in range(BOUND):
            kept.add(np.array([0]), pa.array([str(number)]), np.array([0]))
    assert kept.value([0]) is None
    assert (kept._values, kept._counts, kept._held) == ({}, {}, 0)


def test_a_window_may_be_known_where_the_whole_is_not() -> None:
    """After a reset few values may be left, however many there were before; they are counted on."""
    with bounded(BOUND):
        windows = MeterWindows("unique")
        add(windows, [(0, str(number)) for number in range(BOUND)], 1)
        assert windows.begin_windows({0: 5})
        add(windows, [(0, "a"), (0, "b"), (0, "a")], 7)
        found = windows.consumed([0], 5)
        assert found is not None
        assert (found.count, found.value) == (3, 2)
        add(windows, [(0, "c" + str(number)) for number in range(BOUND)], 8)
        assert windows.consumed([0], 5) is None


def test_forgetting_a_customer_makes_room() -> None:
    """A window that is begun again holds what arrived since, and what it held before does not count."""
    with bounded(BOUND):
        windows = MeterWindows("unique")
        for since in range(2, 50, 2):
            assert windows.begin_windows({0: since})
            add(windows, [(0, "a"), (0, "b"), (0, "c")], since + 1)
            found = windows.consumed([0], since)
            assert found is not None
            assert (found.count, found.value) == (3, 3)


@pytest.fixture
def story(tenant: Tenant) -> tuple[Tenant, dict[str, str]]:
    """Three customers used models: ann under two names, bob before and after a reset, cid none that has a name."""
    server = tenant.server
    names = {name: tenant.customer(external_id=name) for name in ("ann", "bob", "cid", "dan")}
    names |= {"unique": tenant.meter(func="unique", property="model"), "sum": tenant.meter(func="sum", property="n")}
    for number, name in enumerate(("ann", "ann", "ann", "bob", "bob", "cid")):
        metadata = {"n": number} | ({} if name == "cid" else {"model": f"m{number % 4}"})
        tenant.send(line(f"{number}", external_customer_id=name, metadata=metadata))
    other = f'"customer_id": "{names["ann"]}"'.encode()
    tenant.send(line("id", metadata={"model": "own"}).replace(b'"external_customer_id": "ann"', other))
    server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{names['bob']}/resets", {"meter_ids": "all"})
    server.now += timedelta(minutes=1)
    tenant.post(f"/v1/customers/{names['ann']}/credits", {"meter_id": names["unique"], "units": 20})
    tenant.send(line("again", external_customer_id="bob", metadata={"model": "m3", "n": 0.5}))
    return tenant, names


def answers(tenant: Tenant, names: dict[str, str]) -> dict[str, Any]:
    """Everything that tells what customers used of the meters."""
    found = {}
    for by in BY_AMOUNT:  # no two are equal: longer lists have equals in another order
        for page in (1, 2):
            found[f"{by} {page}"] = tenant.get("/v1/customer-meters/", sorting=by, limit=2, page=page)
    for name in ("ann", "bob", "cid"):
        one = f"/v1/customer-meters/{customer_meter_id(names[name], names['unique'])}"
        found |= {path: tenant.get(path) for path in (one, f"/v1/customers/{names[name]}/state")}
        entries = tenant.get(f"{one}/ledger")["items"]  # of how many events, grows with those that add nothing, too
        found[f"{name}'s entries"] = [entry | {"events": None} for entry in entries]
        found[name] = tenant.get("/v1/customer-meters/", customer_id=names[name])
    return found


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ("service.balances.RECOUNTED_MAX", 100),
        ("service.balances.RECOUNTED_MAX", 2),
        ("api.customer_meters.PAIRS_AT_ONCE", 0),
    ],
    ids=["one by one", "more than are counted one by one", "a long list"],
)
def test_answers_are_the_same_when_memory_does_not_know(
    story: tuple[Tenant, dict[str, str]], monkeypatch: pytest.MonkeyPatch, limit: str, most: int
) -> None:
    """Balances, lists in every order, states and ledgers say from the store what they said from memory."""
    tenant, names = story
    monkeypatch.setattr(f"aggregator.{limit}", most)
    before = answers(tenant, names)
    with bounded(0):  # an event of nobody's, and one that adds nothing to bob's window
        tenant.send(line("eve", external_customer_id="eve", metadata={"model": "m0"}))
        tenant.send(line("more", external_customer_id="bob", metadata={"model": "m3"}))
    view = tenant.server.aggregator
    for name in ("ann", "bob"):
        account = view.ledger.account(names[name], names["unique"])
        numbers = view.directory.find(tenant.id, Names((names[name],), (name,)))
        unique = view.catalogue.meters[names["unique"]]
        assert view.totals.consumed(unique, numbers, account.since if account else None) is None
    assert answers(tenant, names) == before
