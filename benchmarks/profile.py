"""Where the processor time of the gateway and of the aggregator goes under full load, as text in ``profiles/``.

A server takes the load of ``benchmarks.end_to_end`` at full speed. Meanwhile py-spy samples one of its processes: which
Python function holds the interpreter's lock, in which thread. Then perf does, if it is there: which machine code runs,
with and without that lock. Both need the right to look into another process.

    python -m benchmarks.profile [gateway] [aggregate] [--seconds 10]
"""

import argparse
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.end_to_end import Phase, meters
from benchmarks.report import environment
from benchmarks.server import Server, usage

PROFILES = Path("benchmarks/profiles")
SAMPLES_A_SECOND = 250
SHOWN = 30
WARM_UP_CPU_S = 1.0  # of the process, before it is looked at: the sender makes its bodies first
PY_SPY = str(Path(sys.executable).with_name("py-spy"))


def py_spy(pid: int, seconds: int, scratch: Path) -> str:
    """Functions by their share of the samples in which a thread held the interpreter's lock."""
    raw = scratch / f"{pid}.raw"
    command = [PY_SPY, "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(SAMPLES_A_SECOND)]
    how = ["--gil", "--threads", "--format", "raw", "--output", str(raw)]
    subprocess.run([*command, *how], check=True, capture_output=True)
    stacks = [(line.rsplit(" ", 1)[0].split(";"), int(line.rsplit(" ", 1)[1])) for line in raw.read_text().splitlines()]
    total = sum(count for _, count in stacks)
    threads, own, below = Counter[str](), Counter[str](), Counter[str]()
    for frames, count in stacks:
        threads[frames[0].rpartition(": ")[2]] += count
        own[_name(frames[-1])] += count
        for name in set(map(_name, frames[1:])):
            below[name] += count
    parts = {"threads": threads, "in the function itself": own, "with what it calls": below}
    return "\n".join(line for title, counts in parts.items() for line in _shares(f"py-spy: {title}", counts, total))


def _name(frame: str) -> str:
    """``function (file.py)`` without the line, and without where the file is installed."""
    function, _, place = frame.partition(" (")
    return f"{function} ({'/'.join(place.split(':')[0].rstrip(')').rsplit('/', 2)[-2:])})"


def _shares(title: str, counts: Counter[str], total: int) -> Iterator[str]:
    yield f"\n## {title}\n"
    for name, count in counts.most_common(SHOWN):
        yield f"{100 * count / total:6.1f} %  {name}"


def perf(pid: int, seconds: int, scratch: Path) -> str:
    """Libraries and their functions by their share of the cycles."""
    command = shutil.which("perf")
    if command is None:
        return "\n## perf is not installed"
    data = scratch / f"{pid}.perf"
    record = [command, "record", "--freq", str(4 * SAMPLES_A_SECOND), "--pid", str(pid), "--output", str(data)]
    subprocess.run([*record, "--", "sleep", str(seconds)], check=True, capture_output=True)
    return "\n".join(
        line for sort in ("dso", "dso,symbol")
        for line in (f"\n## perf: {sort.replace(',', ' and ')}\n", *_reported(command, data, sort))
    )  # fmt: skip


def _reported(command: str, data: Path, sort: str) -> Iterable[str]:
    report = subprocess.run(
        [command, "report", "--stdio", "--no-children", "--sort", sort, "--input", str(data)],
        check=True, capture_output=True, text=True,
    )
    lines = [line.rstrip(" -") for line in report.stdout.splitlines() if line.strip() and not line.startswith("#")]
    return lines[:SHOWN]


def profiled(server: Server, process: str, run: int, seconds: int) -> str:
    """Both profiles of one process while a stretch of load lasts."""
    pid, parts = server.pids()[process], list[str]()

    def sample() -> None:
        goal_s = usage(pid)["cpu_s"] + WARM_UP_CPU_S
        while usage(pid)["cpu_s"] < goal_s:
            time.sleep(0.1)
        parts.extend(tool(pid, seconds, server.data) for tool in (py_spy, perf))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    phase = Phase(server, run, 4 * seconds, None)
    sampler.join()
    cpu_us = 1e6 * phase.cpu_s[process] / phase.ledger.events
    head = environment()
    return (
        f"# {process} at full load, slowed by being looked at: {phase.rate:,.0f} events/s, {cpu_us:.1f} us an event\n"
        f"\n{head['command']}, commit {head['commit']}, {head['at']}, {head['cpus']} cores ({head['cpu']}), "
        f"load {head['load']}\n" + "\n".join(parts) + "\n"
    )


def main() -> None:
    """Profile, and write a file for each process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("processes", nargs="*", default=["gateway", "aggregate"])
    parser.add_argument("--seconds", type=int, default=10, help="of each tool")
    arguments = parser.parse_args()
    PROFILES.mkdir(exist_ok=True, parents=True)
    with Server() as server:
        server.create_meters(meters())
        for run, process in enumerate(arguments.processes, 1):
            text = profiled(server, process, run, arguments.seconds)
            (PROFILES / f"{process}.txt").write_text(text)
            print(text)


if __name__ == "__main__":
    main()
