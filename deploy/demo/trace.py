"""The demonstration's workload: LLM requests as they were, given to customers and priced by a stated rule.

The trace is a CSV file with one row per request: TIMESTAMP (UTC where it says no offset, 100 ns digits), ContextTokens,
GeneratedTokens, as in the Azure LLM inference trace of 2023 (CC-BY 4.0; P. Patel et al., Splitwise, ISCA 2024). Such a
file names nobody, so the requests are spread over customers: customer k of 200 gets a share proportional to 1/k (Zipf),
drawn with a fixed seed. Arrival times and token counts stay as they are.
"""

import csv
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from deploy.giving_up import USAGE, GiveUp
from deploy.sending import Line
from meters.window import END_MAX, RANGE_DAYS_MAX, START_MIN, Interval

TRACE_NAME = "AzureLLMInferenceTrace_conv.csv"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
CUSTOMERS = 200
SEED = 2023
EVENT_NAME = "llm.request"
# Prices in cents per token: 2.50 and 10 dollars per million, what such a service costs today.
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
