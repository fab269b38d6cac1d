"""Whatever Polar answers: nothing is lost, nothing doubled there, and never more requests than allowed."""

from pathlib import Path
from typing import Any

from tests.deploy.installation import Installation
from tests.forward.polar import Polar, send, stored
from tests.forward.running import Clocks, Running


def events(name: str, number: int, customers: int = 10, **more: Any) -> list[dict[str, Any]]:
    """Events with an amount each, customer by customer in turn."""
    return [
        {"name": name, "external_customer_id": f"{name}-c{n % customers}", "external_id": f"{name}-{n}",
         "metadata": {"n": n}, **more}
        for n in range(number)
    ]  # fmt: skip


def arrived(upstream: Installation, name: str) -> list[dict[str, Any]]:
    """What the upstream has of a test, in its order."""
    return [event for event in stored(upstream) if event["name"] == name]


def test_what_was_counted_arrives(
    ours: Installation, upstream: Installation, polar: Polar, clocks: Clocks, state: Path, name: str
) -> None:
    """All of it, once, in order, as it was."""
    send(ours, events(name, 1_000))
    with Running(ours, polar.url, state, clocks=clocks, batch_events=300, selection=_named(name)) as running:
        running.until(lambda: running.done(1_000))
        assert running.books()["accepted"] == 1_000
    assert len(polar.arrivals_us) == 4
    assert arrived(upstream, name) == arrived(ours, name)


def _named(name: str) -> Any:
    from aggregator.forward.source import Selection

    return Selection(names=(name,))
