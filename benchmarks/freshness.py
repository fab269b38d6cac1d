"""How long an event takes from its ingestion to every total, at a quarter, half, three quarters and all of the load.

All of the load is what a first stretch at full speed got counted, so the machine sets the scale. Server, sender and a
reader of single totals share it. Beside it, in the same run, the usual stack counting in the request itself
(``usual_stack --meters``: its answers are always fresh, and its clients wait for it), and the machine's limits for the
same bodies. Each total is compared with the sum of what was acknowledged.

    python -m benchmarks.freshness [--seconds 10]
"""

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.contenders import contender
from benchmarks.end_to_end import Phase, check, meters, row, warmed
from benchmarks.limits import floor
from benchmarks.load import Bodies
from benchmarks.report import Report
from benchmarks.server import Server
from benchmarks.usual_stack import Store

RATE = 100_000  # events a second that are asked for besides, whatever full speed is
SHARES = (0.25, 0.5, 0.75, 1.0)
SHAPE = EVENTS, CONNECTIONS = 100, 32  # a body, at once


def ours(report: Report, seconds: float) -> float:
    """Rows of each load; microseconds of CPU an event at full speed, in all processes of the server."""
    with Server() as server:
        ids = server.create_meters(meters())
        warm, full = warmed(server), Phase(server, 1, seconds, None)
        report.add(**row("as fast as it goes", full))
        ledgers = [warm, full.ledger]
        loads = {f"{share:.0%} of that": share * full.rate for share in SHARES} | {f"at {RATE:,}/s": RATE}
        for run, (name, rate) in enumerate(loads.items(), 2):
            phase = Phase(server, run, seconds, rate)
            report.add(**row(name, phase))
            ledgers.append(phase.ledger)
        differences = check(server, ids, ledgers)
    report.check("; ".join(differences) or "counted = acknowledged, sums exact", not differences)
    return 1e6 * sum(full.cpu_s.values()) / full.ledger.events


def usual(report: Report, seconds: float, ours_us: float) -> None:
    """The row of the usual stack, and the ratios."""
    with tempfile.TemporaryDirectory(prefix="meterstream-bench-") as directory:
        file = str(Path(directory) / "usual.sqlite")
        with contender(["-m", "benchmarks.usual_stack", file, "PORT", "--meters"]) as stack:
            taken = stack.take(SHAPE, seconds)
        counted, _ = Store(file, metered=True).total("all tokens")
    found, acknowledged = stack.row(SHAPE), stack.acknowledged
    report.check(f"the usual stack acknowledged {acknowledged:,} and counted {counted:,}", counted == acknowledged)
    limits = floor(Bodies(0, EVENTS).make()[0], EVENTS, CONNECTIONS)
    report.add(phase="usual stack, as fast as it goes", events=taken, **{
        name: found[name] for name in ("events/s", "ack p50 ms", "ack p99 ms")
    })  # fmt: skip
    usual_us = found["CPU us/event"]
    report.add(phase="CPU of all processes", **{
        "ours us/ev": ours_us, "usual us/ev": usual_us, "times usual per CPU": usual_us / ours_us, **limits,
        "times limit": ours_us / sum(limits.values()),
    })  # fmt: skip


def main() -> None:
    """Run and report; exit 3 when a total is not what was acknowledged."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each stretch of load")
    arguments = parser.parse_args()
    report = Report("freshness", "from ingestion to every total under a part of the load, all processes on one machine")
    usual(report, arguments.seconds, ours(report, arguments.seconds))
    report.finish()
    sys.exit(report.code)


if __name__ == "__main__":
    main()
