"""kill -9 at random moments under load: what was acknowledged is stored, once.

A client sends bodies with ids of its own and remembers which were acknowledged. Every body that was not, it sends
again after the next start, as a careful client does, and some of the acknowledged ones too. Killed is the whole server,
or the gateway alone, or the aggregator alone; the supervisor has to start those two again by itself.
"""

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest

from ingest.log import open_log
from tests.support.faults.sender import Sender
from tests.support.faults.store_checks import SEED, assert_store_tells, count, export
from tests.support.servers.killable_server import TOKEN, Server

ROUNDS = 20
LOAD_S = (0.05, 0.6)  # the moment of death, after the first acknowledgment
VICTIMS = ("server", "server", "gateway", "aggregate")
SINGLE_DEATHS_MAX = 4  # in a row: at the sixth within a minute the supervisor rightly gives up


@pytest.mark.timeout(1800)  # with --long a hundred rounds
def test_every_acknowledged_event_is_stored_once(
    tmp_path: Path, long: bool, record_property: Callable[[str, object], None]
) -> None:
    """Twenty deaths at random moments: nothing acknowledged is lost, nothing is stored twice, nothing is invented."""
    choose, rounds = random.Random(SEED), ROUNDS * 5 if long else ROUNDS
    server, sender = Server(tmp_path / "data", tmp_path / "server.log"), Sender(SEED, TOKEN)
    restarts_s: dict[str, list[float]] = {name: [] for name in VICTIMS}
    single_deaths = 0

    async def strike() -> None:
        await asyncio.sleep(choose.uniform(*LOAD_S))  # the random moment that this test is about
        await asyncio.to_thread(server.kill, victim)

    try:
        server.start()
        for _ in range(rounds):
            victim = choose.choice(VICTIMS) if single_deaths < SINGLE_DEATHS_MAX else "server"
            single_deaths = 0 if victim == "server" else single_deaths + 1
            asyncio.run(sender.load(str(server.client.base_url), strike, refused=True))
            restarts_s[victim].append(server.start(victim))
        answered = server.calls()
    finally:
        server.close()

    log = open_log(str(server.data))
    tables = export(server.data / "store.duckdb")
    ids = [row[_EXTERNAL_ID] for row in tables["events"] if row[_NAME] == "call"]
    outcome = sender.outcome(ids)
    restarts = (f"{name} {median(s):.2f} s (max {max(s):.2f}, n={len(s)})" for name, s in restarts_s.items() if s)
    record_property("figures",
        f"kill -9: seed {SEED}, rounds {rounds}, {outcome}, repeated {sender.repeated}; "
        f"answering again after the death of the {', '.join(restarts)}"
    )
    assert_store_tells(tables, count(log))
    log.close()

    assert outcome.lost == 0
    assert outcome.doubled == 0
    assert set(ids) <= sender.sent
    assert len(ids) == answered


_EXTERNAL_ID, _NAME = 13, 9  # columns of ``events``
