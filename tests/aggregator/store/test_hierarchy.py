"""Parents are found whatever the order of arrival."""

import asyncio
from pathlib import Path

import pytest

from aggregator.store import hierarchy
from aggregator.store.hierarchy import DEPTH_MAX
from ingest.log import open_log
from meters.event import event_id, identity
from meters.log import USAGE_EVENTS
from tests.support.records import ORGANIZATION, Running, entry, line, rows

Batches = list[list[tuple[str, str | None]]]


def linked(tmp_path: Path, batches: Batches) -> tuple[dict[str, tuple[str, str, int]], set[str]]:
    """{event: (parent, root, depth)} and the events that wait, after these batches of (event, parent)."""
    log = open_log("memory:")
    with Running(log, tmp_path / "store.duckdb") as running:
        for batch in batches:
            lines = [line(name, parent_id=parent) if parent else line(name) for name, parent in batch]
            asyncio.run(log.append(USAGE_EVENTS, [entry(*lines)]))
            running.catch_up()
        store = running.engine.store
        names = {identity(ORGANIZATION, name): name for batch in batches for name, _ in batch}
        found = rows(store, "SELECT * FROM hierarchy")
        waiting = rows(store, "SELECT id_hi, id_lo FROM pending")
    log.close()
    chains = {names[r[0], r[1]]: (names[r[2], r[3]], names[r[4], r[5]], r[6]) for r in found}
    return chains, {names[pair] for pair in waiting}


@pytest.mark.parametrize(
    "batches",
    [
        [[("root", None), ("child", "root"), ("leaf", "child")]],
        [[("leaf", "child"), ("child", "root"), ("root", None)]],
        [[("leaf", "child")], [("child", "root")], [("root", None)]],
        [[("root", None)], [("leaf", "child")], [("child", "root")]],
    ],
)
def test_a_chain_is_linked_in_any_order(tmp_path: Path, batches: Batches) -> None:
    """Parent, root and depth are the same whichever came first."""
    chains, waiting = linked(tmp_path, batches)

    assert chains == {"child": ("root", "root", 1), "leaf": ("child", "root", 2)}
    assert set() == waiting


def test_a_late_parent_of_many_is_linked_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children, theirs, and those that come in the same round: each once, at its own depth."""
    monkeypatch.setattr(hierarchy, "CANDIDATES_AT_ONCE", 2)
    waiting = [[(f"c{number}", "root"), (f"l{number}", f"c{number}")] for number in range(5)]
    chains, left = linked(tmp_path, [*waiting, [("c5", "root"), ("l5", "c5"), ("root", None), ("late", "l0")]])

    expected = {f"c{number}": ("root", "root", 1) for number in range(6)}
    expected |= {f"l{number}": (f"c{number}", "root", 2) for number in range(6)}
    assert chains == expected | {"late": ("l0", "root", 3)}
    assert set() == left


def test_a_parent_may_be_named_by_its_event_id(tmp_path: Path) -> None:
    """The id that reads give out works as well as the sender's own."""
    root_id = event_id(*identity(ORGANIZATION, "root"))
    chains, _ = linked(tmp_path, [[("child", root_id)], [("root", None)]])

    assert chains == {"child": ("root", "root", 1)}


def test_an_event_is_never_its_own_parent_and_an_orphan_waits(tmp_path: Path) -> None:
    """Neither is an error; both stay pending."""
    chains, waiting = linked(tmp_path, [[("own", "own"), ("orphan", "nobody")]])

    assert chains == {}
    assert {"own", "orphan"} == waiting


def test_a_chain_longer_than_the_limit_stays_pending_below_it(tmp_path: Path) -> None:
    """The walk up is bounded."""
    chain = [("e0", None)] + [(f"e{n}", f"e{n - 1}") for n in range(1, DEPTH_MAX + 3)]
    chains, waiting = linked(tmp_path, [chain])

    assert len(chains) == DEPTH_MAX
    assert {f"e{DEPTH_MAX + 1}", f"e{DEPTH_MAX + 2}"} == waiting
