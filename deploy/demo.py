"""The demonstration ``meterstream demo``: a trace of model calls, metered and recounted.

``run`` starts a server on a free port with an empty data directory, creates three meters, sends the trace over HTTP
in small bodies, and asks for usage. ``recount`` adds the trace up with none of the product's code, and ``compare``
checks every total. The demonstration prints no total that it has not compared.
"""

import csv
import itertools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from deploy.client import Api
from deploy.console import note, show_table
from deploy.errors import MISMATCH, USAGE, GiveUp
from deploy.files.sending import Line, deliver
from deploy.server.control import new_secret
from meters import exact
from meters.log import format_position, parse_position
from meters.timestamps import END_MAX, RANGE_DAYS_MAX, START_MIN, Interval

# The workload. The trace is a CSV file with one row per request: TIMESTAMP (UTC unless it states an offset, 100 ns
# digits), ContextTokens, GeneratedTokens, as in the Azure LLM inference trace of 2023 (CC-BY 4.0; P. Patel et al.,
# Splitwise, ISCA 2024). The file names no customers, so the requests are distributed: customer k of 200 gets a share
# proportional to 1/k (Zipf), drawn with a fixed seed. Arrival times and token counts are unchanged.

TRACE_NAME = "AzureLLMInferenceTrace_conv.csv"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
CUSTOMERS = 200
SEED = 2023
EVENT_NAME = "llm.request"
# Prices in cents per token: 2.50 and 10 dollars per million.
CONTEXT_CENTS = Decimal("0.00025")
GENERATED_CENTS = Decimal("0.001")

GENERATED_ROWS = 19_366  # as many as the Azure trace has, over the same hour
GENERATED_START = datetime(2023, 11, 16, 18, 15, 46, tzinfo=UTC)
GENERATED_GAP_S = 0.181  # mean seconds between requests


class Request(NamedTuple):
    """One row of the trace."""

    timestamp: datetime
    context_tokens: int
    generated_tokens: int
    customer: str
    line: int  # of the file


def find_trace(repository: Path) -> Path | None:
    """A copy of the Azure trace in ``data/azure-llm-2023`` of the repository or of a folder beside it."""
    name = f"data/azure-llm-2023/{TRACE_NAME}"
    return next(iter([*repository.glob(name), *sorted(repository.parent.glob(f"*/{name}"))]), None)


def make_trace(path: Path, rows: int = GENERATED_ROWS) -> None:
    """Write a trace of the same shape: random gaps, long-tailed token counts, always the same ones."""
    draw = random.Random(SEED)  # noqa: S311 (a workload, no secret)
    instant = GENERATED_START
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for _ in range(rows):
            instant += timedelta(seconds=draw.expovariate(1 / GENERATED_GAP_S))
            context, generated = int(draw.lognormvariate(6.5, 1.0)) + 1, int(draw.lognormvariate(5.0, 0.8)) + 1
            writer.writerow((f"{instant:%Y-%m-%d %H:%M:%S.%f}0", context, generated))


def customers() -> Iterator[str]:
    """Whose each next request is, by the rule above."""
    draw = random.Random(SEED)  # noqa: S311
    names = [f"customer-{number:03d}" for number in range(1, CUSTOMERS + 1)]
    shares = list(itertools.accumulate(1 / number for number in range(1, CUSTOMERS + 1)))
    while True:
        yield from draw.choices(names, cum_weights=shares, k=1000)


def moment(text: str) -> datetime:
    """The time of a row, in UTC. Raises ValueError or OverflowError for what is none."""
    found = datetime.fromisoformat(text)
    return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


def read_trace(path: Path, rows: int | None) -> Iterator[Request]:
    """The first ``rows`` requests, or all. Raises GiveUp for a file that is no such trace."""
    line = 1
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if set(COLUMNS) - set(reader.fieldnames or ()):
                raise GiveUp(f"{path} should have the columns {', '.join(COLUMNS)}", USAGE)
            for row, customer in zip(itertools.islice(reader, rows), customers(), strict=False):
                line = reader.line_num
                yield _request(row, customer, line)
    except OSError as error:
        raise GiveUp(f"cannot read {path}: {error.strerror}", USAGE) from None
    except (ValueError, OverflowError, csv.Error) as error:
        raise GiveUp(f"{path}, line {line}, cannot be read as a trace: {error}", USAGE) from None


def _request(row: Mapping[str, str | None], customer: str, line: int) -> Request:
    if missing := [column for column in COLUMNS if row[column] is None]:
        raise ValueError(f"the row has no cell for {', '.join(missing)}")
    timestamp, *tokens = (row[column] or "" for column in COLUMNS)
    for column, cell in zip(COLUMNS[1:], tokens, strict=True):
        if not (cell.isascii() and cell.isdigit()):
            raise ValueError(f"{column} is {cell!r}, and should be a whole number of tokens")
    context, generated = map(int, tokens)
    return Request(moment(timestamp), context, generated, customer, line)


def check_span(requests: Sequence[Request]) -> None:
    """Raises GiveUp where usage by the hour could not be shown for all of them."""
    first, last = min(requests).timestamp, max(requests).timestamp
    days, days_max = (last.date() - first.date()).days, RANGE_DAYS_MAX[Interval.HOUR]
    if first < START_MIN or last > END_MAX:
        raise GiveUp(
            f"the trace goes from {first.date()} to {last.date()}, and usage is shown from {START_MIN.date()} to "
            f"{END_MAX.date()}; move its times", USAGE,
        )
    if days > days_max:
        raise GiveUp(
            f"the trace goes from {first.date()} to {last.date()}, and usage by the hour is shown for {days_max} days; "
            "take its first rows (--rows, or DEMO_ROWS), or another part of it", USAGE,
        )


def event(request: Request, trace_id: str) -> Line:
    """A request as the event a service would send."""
    cost = request.context_tokens * CONTEXT_CENTS + request.generated_tokens * GENERATED_CENTS
    tokens = request.context_tokens + request.generated_tokens
    body = {
        "name": EVENT_NAME,
        "external_customer_id": request.customer,
        "external_id": f"{trace_id}:{request.line}",
        "timestamp": request.timestamp,
        "metadata": {
            "customer": request.customer,
            "tokens": tokens,
            "context_tokens": request.context_tokens,
            "generated_tokens": request.generated_tokens,
            "_cost": {"amount": cost, "currency": "usd"},
        },
    }
    return Line(request.line, msgspec.json.Encoder(decimal_format="number").encode(body))


# The auditor. It uses only ``csv`` and ``Decimal`` over the file, and from the workload only the rules for customer,
# time and price. It uses nothing that sends or counts.

class Figures(msgspec.Struct):
    """Everything that the demonstration prints. Hours are keyed by their beginning, ``2023-11-16T18``, in UTC."""

    requests: Decimal = Decimal(0)
    tokens: Decimal = Decimal(0)
    active_customers: Decimal = Decimal(0)
    cost_cents: Decimal = Decimal(0)
    tokens_by_customer: dict[str, Decimal] = {}
    requests_by_customer: dict[str, Decimal] = {}
    tokens_by_hour: dict[str, Decimal] = {}
    requests_by_hour: dict[str, Decimal] = {}
    customers_by_hour: dict[str, Decimal] = {}


def recount(path: Path, rows: int | None) -> Figures:
    """Add the trace up."""
    tokens_of: Counter[str] = Counter()
    requests_of: Counter[str] = Counter()
    tokens_at: Counter[str] = Counter()
    requests_at: Counter[str] = Counter()
    seen_at: dict[str, set[str]] = {}
    cost = Decimal(0)
    with path.open(newline="") as file:
        for row, customer in zip(islice(csv.DictReader(file), rows), customers(), strict=False):
            context, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            hour = f"{moment(row['TIMESTAMP']):%Y-%m-%dT%H}"
            tokens_of[customer] += context + generated
            requests_of[customer] += 1
            tokens_at[hour] += context + generated
            requests_at[hour] += 1
            seen_at.setdefault(hour, set()).add(customer)
            cost += context * CONTEXT_CENTS + generated * GENERATED_CENTS
    return Figures(
        requests=Decimal(requests_of.total()),
        tokens=Decimal(tokens_of.total()),
        active_customers=Decimal(len(requests_of)),
        cost_cents=cost,
        tokens_by_customer=_exact(tokens_of),
        requests_by_customer=_exact(requests_of),
        tokens_by_hour=_exact(tokens_at),
        requests_by_hour=_exact(requests_at),
        customers_by_hour={hour: Decimal(len(names)) for hour, names in seen_at.items()},
    )


def _exact(counter: Counter[str]) -> dict[str, Decimal]:
    return {name: Decimal(count) for name, count in counter.items()}


def compare(measured: Figures, recounted: Figures) -> tuple[int, list[str]]:
    """How many figures were compared, and a line for each that differs. What one side lacks counts as zero."""
    compared = 0
    differences: list[str] = []
    for name in Figures.__struct_fields__:
        ours, theirs = getattr(measured, name), getattr(recounted, name)
        pairs = {"": (ours, theirs)} if isinstance(ours, Decimal) else {
            key: (ours.get(key, Decimal(0)), theirs.get(key, Decimal(0))) for key in sorted({*ours, *theirs})
        }
        compared += len(pairs)
        differences += [
            f"{name}{f' of {key}' if key else ''}: the pipeline says {pair[0]}, the trace adds up to {pair[1]}"
            for key, pair in pairs.items() if pair[0] != pair[1]
        ]
    return compared, differences


# Queries and tables.

TOP = 10


def measure(api: Api, meter_ids: dict[str, str], lines: list[Line]) -> Figures:
    """Everything that is printed, as the API answers it."""
    events = [exact.decode(line.event) for line in lines]
    names = sorted({event["external_customer_id"] for event in events})
    moments = [event["timestamp"] for event in events]
    last_hour = datetime.fromisoformat(f"{max(moments)[:13]}:00:00Z")
    window = {"start": f"{min(moments)[:13]}:00:00Z", "end": (last_hour + timedelta(hours=1)).isoformat()}
    hours = {
        name: api.get("/v1/usage", meter_id=meter, interval="hour", **window) for name, meter in meter_ids.items()
    }
    by_customer = {
        name: {customer: _total(api, meter_ids[name], customer) for customer in names}
        for name in ("tokens", "requests")
    }
    return Figures(
        requests=_whole(hours["requests"]),
        tokens=_whole(hours["tokens"]),
        active_customers=_whole(hours["customers"]),
        cost_cents=_cost(api, min(moments)[:10], max(moments)[:10]),
        tokens_by_customer=by_customer["tokens"],
        requests_by_customer=by_customer["requests"],
        tokens_by_hour=_by_hour(hours["tokens"]),
        requests_by_hour=_by_hour(hours["requests"]),
        customers_by_hour=_by_hour(hours["customers"]),
    )


def _whole(answer: dict[str, Any]) -> Decimal:
    return Decimal(answer["totals"][0]["value"])


def _total(api: Api, meter_id: str, customer: str) -> Decimal:
    """From the running totals, where the hours come from the store: both ways to count are compared."""
    return Decimal(api.get(f"/v1/meters/{meter_id}/usage", external_customer_id=customer)["value"])


def _by_hour(answer: dict[str, Any]) -> dict[str, Decimal]:
    return {row["start"][:13]: Decimal(row["value"]) for row in answer["rows"]}


def _cost(api: Api, first_day: str, last_day: str) -> Decimal:
    answer = api.get("/v1/metrics/", start_date=first_day, end_date=last_day, interval="day", metrics="costs")
    return Decimal(answer["totals"]["costs"])


def print_report(figures: Figures, events: int, elapsed_s: float, fresh_after_s: float) -> None:
    """Usage by customer and by hour, what it cost, and how fast it went."""
    requests, tokens = figures.requests_by_customer, figures.tokens_by_customer
    top = [name for name, _ in Counter(tokens).most_common(TOP)]
    rows: list[dict[str, Any]] = [{"customer": n, "requests": requests[n], "tokens": tokens[n]} for n in top]
    show_table(rows, ("customer", "requests", "tokens"), title=f"Usage by customer, the first {TOP}", chart="tokens")
    by_hour = [
        {"hour": hour, "requests": figures.requests_by_hour[hour], "tokens": count,
         "customers": figures.customers_by_hour[hour]}
        for hour, count in sorted(figures.tokens_by_hour.items())
    ]
    show_table(by_hour, ("hour", "requests", "customers", "tokens"), title="Usage by hour (UTC)", chart="tokens")
    total = {
        "requests": figures.requests,
        "customers": figures.active_customers,
        "tokens": figures.tokens,
        "cost (cents)": figures.cost_cents,
        "cents per 1,000 tokens": _rounded(figures.cost_cents * 1000, figures.tokens),
    }
    show_table([total], tuple(total), title=f"In all, as the API says ({EVENT_NAME})")
    print(f"{events / elapsed_s:,.0f} events/s over HTTP, each durable before its answer ({elapsed_s:.2f} s).")
    print(f"Queryable {fresh_after_s * 1000:,.0f} ms after the last answer.")


def _rounded(numerator: Decimal, denominator: Decimal) -> Decimal:
    return (numerator / denominator).quantize(Decimal("0.0001")) if denominator else Decimal(0)


# The run.

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
        requests = list(read_trace(path, rows))
        if not requests:
            raise GiveUp(f"{path} has no rows")
        check_span(requests)
        lines = [event(request, path.stem) for request in requests]
        note(f"{len(lines):,} requests, spread over {CUSTOMERS} customers (Zipf, seed {SEED}).")
        note(f"Priced at {CONTEXT_CENTS} cents a context token, {GENERATED_CENTS} cents a generated token.")
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
    found = trace_file or find_trace(Path(__file__).resolve().parents[2])
    if found:
        note(f"Trace: {found.name}.")
        return found
    made = scratch / "generated.csv"
    make_trace(made)
    note(f"No copy of {TRACE_NAME} here: the trace is generated, in its shape. TRACE=file.csv takes another.")
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
    clause = {"property": "name", "operator": "eq", "value": EVENT_NAME}
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
