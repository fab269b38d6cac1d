"""How many events a second the gateway takes durably, and what the usual stack takes on the same machine.

Gateways run alone, one or two on the same log, so nothing is counted meanwhile; the log is real and every answer waits
for its sync. At the end the log is read back: it holds as many events as were acknowledged. In turns with them
(``contenders``) runs an endpoint as most teams write it (``usual_stack``: a row per event into SQLite, a commit per
request); beside them stand the machine's limits for the same bodies (``limits``).

    python -m benchmarks.accept [--seconds 4.5]
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contenders import SHAPES, TURNS, contender, in_turns
from benchmarks.limits import floor
from benchmarks.load import Bodies
from benchmarks.report import Report
from benchmarks.server import TOKEN
from benchmarks.usual_stack import Store
from ingest.log import open_log
from meters.catalogue.access import digest
from meters.catalogue.catalogue import Change, Organization, OrganizationCreated, Token, TokenCreated, encode_change
from meters.log import USAGE_CONTROL, USAGE_EVENTS, Entry

ORGANIZATION = "b0c3f6b4-6a39-4b0e-9b5e-0f6d1d9a7b11"
GATEWAYS_MAX = 2
READ_BYTES = 8_000_000


def prepare(url: str) -> None:
    """Make the log at the URL know one token."""
    now = datetime.now(UTC)
    token = Token(
        id="t",
        organization_id=ORGANIZATION,
        name="bench",
        sha256=digest(TOKEN),
        scopes=["events:write"],
        created_at=now,
    )
    changes: list[Change] = [OrganizationCreated(Organization(ORGANIZATION, "bench", now)), TokenCreated(token)]
    log = open_log(url)
    asyncio.run(log.append(USAGE_CONTROL, [Entry(encode_change(change)) for change in changes]))
    log.close()


def logged(url: str) -> int:
    """Events in the log at the URL."""
    log = open_log(url)
    positions, events = dict.fromkeys(log.ends(USAGE_EVENTS), 0), 0
    while records := log.read(USAGE_EVENTS, positions, bytes_max=READ_BYTES):
        events += sum(record.value.count(b"\n") + 1 for record in records)
        positions |= {record.partition: record.offset + 1 for record in records}
    log.close()
    return events


def beside(row: dict[str, Any], usual: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """A row of ours with the usual stack and the machine's limits beside it, as ratios of CPU time an event."""
    return {
        **row, "times usual per CPU": usual["CPU us/event"] / row["CPU us/event"], **limits,
        "times limit": row["CPU us/event"] / sum(limits.values()),
    }  # fmt: skip


def main() -> None:
    """Run and report; exit 3 when the log does not hold what was acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.5, help="of each row")
    arguments = parser.parse_args()
    report = Report("accept", "durable events a second, gateways alone")
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        file, data = str(Path(directory) / "usual.sqlite"), Path(directory) / "data"
        data.mkdir()
        prepare(str(data))
        gateway = ["-m", "deploy.cli", "gateway", "--data", str(data), "--port", "PORT"]
        with contextlib.ExitStack() as undo:
            usual = undo.enter_context(contender(["-m", "benchmarks.usual_stack", file, "PORT"]))
            ours = [undo.enter_context(contender(gateway, servers)) for servers in range(1, GATEWAYS_MAX + 1)]
            for shape, _, one in in_turns([usual, *ours]):
                one.take(shape, arguments.seconds / TURNS)
        stored = Store(file, metered=False).stored()
        is_all = stored == usual.acknowledged
        report.check(f"the usual stack acknowledged {usual.acknowledged:,} and stored {stored:,}", is_all)
        found, acknowledged = logged(str(data)), sum(one.acknowledged for one in ours)
        report.check(f"gateways acknowledged {acknowledged:,}, in the log are {found:,}", found == acknowledged)
    limits = {shape: floor(Bodies(0, shape[0]).make()[0], *shape) for shape in SHAPES}
    for one in ours:
        for shape in SHAPES:
            report.add(server="meterstream", **beside(one.row(shape), usual.row(shape), limits[shape]))
    for shape in SHAPES:
        report.add(server="usual stack", **usual.row(shape))
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
