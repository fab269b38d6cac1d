"""``meterstream demo``: a trace through the real pipeline, every printed total checked against a plain recount.

Starts a server on a free port with an empty data directory, creates three meters, sends the trace over HTTP in small
bodies as services would, and asks for usage. It prints nothing about usage that it did not compare.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.client import Api
from deploy.control import new_secret
from deploy.demo import trace
from deploy.demo.recount import Figures, compare, recount
from deploy.demo.report import measure, print_report
from deploy.giving_up import MISMATCH, GiveUp
from deploy.output import note
from deploy.sending import Line, deliver
from meters.log import format_position, parse_position

BODY_EVENTS = 100
CONNECTIONS = 4  # so that the log's group commit has something to group
START_PATIENCE_S = 60.0  # two processes on a machine that is busy with other things
CATCH_UP_PATIENCE_S = 120.0
PROBLEMS_SHOWN_MAX = 3  # of what one connection sent; whoever has more of them has one cause
WAIT_S = 20  # that one answer may be kept back; the server's own limit is 30
METERS: dict[str, dict[str, str]] = {
    "tokens": {"func": "sum", "property": "tokens"},
    "requests": {"func": "count"},
    "customers": {"func": "unique", "property": "customer"},
}


class Sent(NamedTuple):
    """How the sending went."""

    events: int
    elapsed_s: float
    fresh_after_s: float  # from the last 2xx until an answer covered its position


def run(trace_file: Path | None, rows: int | None) -> None:
    """The whole demonstration. Raises GiveUp, with exit code 3 when a figure differs from the recount."""
    with tempfile.TemporaryDirectory(prefix="meterstream-demo-") as scratch:
        path = _choose_trace(trace_file, Path(scratch))
        requests = list(trace.read_trace(path, rows))
        if not requests:
            raise GiveUp(f"{path} has no rows")
        trace.check_span(requests)
        lines = [trace.event(request, path.stem) for request in requests]
        note(f"{len(lines):,} requests, spread over {trace.CUSTOMERS} customers (Zipf, seed {trace.SEED}).")
        note(f"Priced at {trace.CONTEXT_CENTS} cents a context token, {trace.GENERATED_CENTS} cents a generated token.")
        with running_server(Path(scratch) / "data") as (url, token), Api(url, token) as api:
            meter_ids = {name: _create_meter(api, name)["id"] for name in METERS}
            sent = _send(url, token, api, lines)
            measured = measure(api, meter_ids, lines)
        recounted = recount(path, rows)
    print_report(measured, sent.events, sent.elapsed_s, sent.fresh_after_s)
    conclude(measured, recounted)


def conclude(measured: Figures, recounted: Figures) -> None:
    """Say that both agree. Raises GiveUp with exit code 3, after a line for each figure that differs."""
    compared, differences = compare(measured, recounted)
    for difference in differences:
        note(difference)
    if differences:
        raise GiveUp(f"{len(differences)} of {compared} figures differ from a plain recount of the trace", MISMATCH)
    print(f"All {compared} figures equal a plain recount of the trace.")


def _choose_trace(trace_file: Path | None, scratch: Path) -> Path:
    """The file asked for, the Azure trace where there is a copy, or a generated one of the same shape."""
    found = trace_file or trace.find_trace(Path(__file__).resolve().parents[2])
    if found:
        note(f"Trace: {found.name}.")
        return found
    made = scratch / "generated.csv"
    trace.make_trace(made)
    note(f"No copy of {trace.TRACE_NAME} here: the trace is generated, in its shape. TRACE=file.csv takes another.")
    return made


@contextmanager
def running_server(data: Path) -> Iterator[tuple[str, str]]:
    """A server of our own on a free port: its address and its token. It ends with the block, or with this process."""
    secret = new_secret()
    lifeline, held_end = os.pipe()
    server = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--data", str(data), "--token", secret,
         "--lifeline", str(lifeline)],
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, pass_fds=[lifeline], text=True,
    )
    assert server.stdout is not None
    try:
        words = server.stdout.readline().split()
        if words[:3] != ["Meterstream", "listens", "on"]:
            raise GiveUp("the server did not start; the lines above say why")
        url = words[3].rstrip(",")
        _await_ready(url, secret)
        yield url, secret
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
        os.close(held_end)
        os.close(lifeline)


def _await_ready(url: str, token: str) -> None:
    deadline = time.monotonic() + START_PATIENCE_S
    with Api(url, token) as api:
        while (status := api.send("GET", "/v1/meters/").status_code) != 200:
            if time.monotonic() > deadline:
                raise GiveUp(f"the server was not ready after {START_PATIENCE_S:.0f} s (its last answer was {status})")
            time.sleep(0.05)


def _create_meter(api: Api, name: str) -> dict[str, Any]:
    clause = {"property": "name", "operator": "eq", "value": trace.EVENT_NAME}
    meter: dict[str, Any] = api.post(
        "/v1/meters/",
        {"name": name, "aggregation": METERS[name], "filter": {"conjunction": "and", "clauses": [clause]}},
    )
    return meter


def _send(url: str, token: str, api: Api, lines: list[Line]) -> Sent:
    began = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        positions = list(pool.map(lambda part: _send_part(url, token, part), _parts(lines)))
    answered = time.perf_counter()
    _await_position(api, positions)
    return Sent(len(lines), answered - began, time.perf_counter() - answered)


def _parts(lines: list[Line]) -> list[list[Line]]:
    """A share for each connection, in whole bodies."""
    bodies = [lines[start : start + BODY_EVENTS] for start in range(0, len(lines), BODY_EVENTS)]
    return [[line for body in bodies[first::CONNECTIONS] for line in body] for first in range(CONNECTIONS)]


def _send_part(url: str, token: str, part: list[Line]) -> str:
    with Api(url, token) as api:
        delivery = deliver(api, part, events_max=BODY_EVENTS)
    if delivery.problems:
        hidden = len(delivery.problems) - PROBLEMS_SHOWN_MAX
        shown = [f"line {problem.line}: {problem.message}" for problem in delivery.problems[:PROBLEMS_SHOWN_MAX]]
        raise GiveUp("; ".join(shown + ([f"and {hidden} more"] if hidden > 0 else [])))
    if delivery.inserted != len(part):
        raise GiveUp(f"the server took {delivery.inserted} of {len(part)} events", MISMATCH)
    return delivery.log_position


def _await_position(api: Api, positions: list[str]) -> None:
    """Ask until an answer is true as of every position; the server keeps one back until it is. Raises GiveUp."""
    wanted: dict[int, int] = {}
    for position in positions:
        for partition, offset in (parse_position(position) or {}).items():
            wanted[partition] = max(wanted.get(partition, 0), offset)
    headers = {"Prefer": f"wait={WAIT_S}", "Log-Position": format_position(wanted)}
    deadline = time.monotonic() + CATCH_UP_PATIENCE_S
    while time.monotonic() < deadline:
        answer = api.answer("GET", "/v1/meters/", params={"limit": 1}, headers=headers)
        as_of = parse_position(answer.headers.get("As-Of", "")) or {}
        if all(as_of.get(partition, 0) >= offset for partition, offset in wanted.items()):
            return
    raise GiveUp(f"the events were not queryable within {CATCH_UP_PATIENCE_S:.0f} s")
