"""What does it cost to check an event and make it a line for the log?

Processor time per event for bodies of 100 events, from the bytes of the body to the value of the record. Beside it, in
the same run, the usual stack: orjson and a pydantic model that checks the same rules, then orjson again for each line.
Kinds of bodies: plain events; events with a cost; with a cost and language model tokens; without ids of their own;
laid out on many lines; with a bracket in every hundredth text; with times as numbers, which are all read with care.

    python -m benchmarks.admission [--events 100] [--repeat 7]
"""

import argparse
import json
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
from pydantic import UUID4, AwareDatetime, BaseModel, Field

from benchmarks.report import Report
from ingest.admission.intake import Quick, RandomIds
from ingest.admission.kernels import BodyReader
from ingest.admission.validate import Admitted, Tenant, admit
from meters.catalogue.catalogue import Catalogue

TENANT = Tenant("6f8b1f9e-0f4e-4b8e-9a53-3f6f4f1d2c10", Catalogue(), RandomIds(), Quick(BodyReader()))
COST = {"_cost": {"amount": 0.0425, "currency": "usd"}}
TOKENS = {"input_tokens": 700, "output_tokens": 112, "total_tokens": 812}
LLM = {"_llm": {"vendor": "acme", "model": "m-1", **TOKENS}}
ROUNDS_S = 0.2  # of each repetition; the best of them is reported, since the others were disturbed


class CostModel(BaseModel):
    """A cost, as the usual stack states it."""

    amount: Annotated[float, Field(gt=-100_000, lt=100_000)]
    currency: Annotated[str, Field(pattern="usd")]


class LlmModel(BaseModel):
    """What a language model did, as the usual stack states it."""

    vendor: str
    model: str
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cached_input_tokens: int | None = None


Value = Annotated[str, Field(min_length=1, max_length=500)] | int | float | bool | CostModel | LlmModel


class EventModel(BaseModel):
    """An event, as the usual stack states it."""

    name: Annotated[str, Field(max_length=128)]
    external_customer_id: str | None = None
    customer_id: UUID4 | None = None
    timestamp: AwareDatetime | None = None
    external_id: str | None = None
    parent_id: str | None = None
    metadata: dict[str, Value] = {}


class BodyModel(BaseModel):
    """A request, as the usual stack states it."""

    events: list[EventModel]


def events(count: int, extra: dict[str, Any], *, named: bool = True) -> list[dict[str, Any]]:
    """Events of some 250 bytes, and what is added to their metadata."""
    return [
        {
            "name": "chat.completion",
            "external_customer_id": f"customer-{number % 50}",
            "timestamp": "2026-03-01T10:00:00Z",
            "metadata": {
                "model": "gpt-4.1-nano", "tokens": 812 + number, "cached": False, "region": "eu-west-1",
                "duration_ms": 12.5, **extra,
            },
            **({"external_id": str(uuid.UUID(int=number + (4 << 76) + (1 << 63)))} if named else {}),
        }
        for number in range(count)
    ]  # fmt: skip


def bodies(count: int) -> dict[str, bytes]:
    """The kinds of bodies, by name."""
    def compact(found: list[dict[str, Any]]) -> bytes:
        return orjson.dumps({"events": found})

    plain = events(count, {})
    bracketed = [{**event, "name": "a {name}"} if number % 100 == 0 else event for number, event in enumerate(plain)]
    return {
        "plain": compact(plain),
        "cost": compact(events(count, COST)),
        "cost and tokens": compact(events(count, COST | LLM)),
        "without ids": compact(events(count, COST, named=False)),
        "many lines": json.dumps({"events": plain}, indent=1).encode(),
        "a bracket in 1 of 100": compact(bracketed),
        "times as numbers": compact([{**event, "timestamp": 1772359200} for event in plain]),
    }


def usual(body: bytes, now: datetime) -> bytes:
    """orjson, pydantic, a loop, orjson."""
    found = BodyModel.model_validate(orjson.loads(body))
    for event in found.events:
        if event.timestamp is not None and event.timestamp > now:
            raise ValueError("a time to come")
        if event.external_id is None:
            event.external_id = str(uuid.uuid4())
    return b"\n".join([orjson.dumps(event.model_dump(exclude_none=True, mode="json")) for event in found.events])


def ours(body: bytes, now: datetime) -> bytes:
    """The gateway's way."""
    found = admit(body, TENANT, now)
    assert isinstance(found, Admitted)
    return found.value


def microseconds(way: Callable[[bytes, datetime], bytes], body: bytes, count: int, repeat: int) -> float:
    """Processor time per event, the best of some rounds."""
    now = datetime.now(UTC)
    best = float("inf")
    for _ in range(repeat):
        begun, times = time.process_time(), 0
        while (used := time.process_time() - begun) < ROUNDS_S:
            way(body, now)
            times += 1
        best = min(best, used / times / count * 1e6)
    return best


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100, help="events in a body")
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    report = Report("admission", "processor time to check an event and make it a line, in microseconds")
    for kind, body in bodies(arguments.events).items():
        here = microseconds(ours, body, arguments.events, arguments.repeat)
        there = microseconds(usual, body, arguments.events, arguments.repeat)
        report.add(
            body=kind, event_bytes=len(body) // arguments.events, us=round(here, 2), usual_us=round(there, 2),
            times_cheaper=round(there / here, 1),
        )  # fmt: skip
    report.finish()


if __name__ == "__main__":
    main()
