"""The demonstration's auditor: adds a trace up without any of the pipeline's code.

Only ``csv`` and ``Decimal``, over the file itself; from ``trace`` it takes the rule (whose a request is, when it was,
what a token costs) and nothing that sends or counts.
"""

import csv
from collections import Counter
from decimal import Decimal
from itertools import islice
from pathlib import Path

import msgspec

from deploy.demo.trace import CONTEXT_CENTS, GENERATED_CENTS, customers, moment


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
