"""The store of a server that runs, asked over its socket or its address: both parts of what a reconciliation needs.

Answers to ``ask`` are Arrow tables, all else is JSON with decimals as text.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pyarrow as pa

from aggregator.reconcile.ledger_check import Balance
from aggregator.reconcile.store_check import Both, both_of, customers_of
from aggregator.store.queries.recount import BLOCK, Part, Which
from aggregator.store.sql import Measured
from aggregator.view import Total
from deploy.client import Api
from deploy.giving_up import GiveUp
from meters.meter import Meter

_PATH = "/v1/audit"


class _Blocks(msgspec.Struct):
    blocks: list[Total]
    hours: list[Total] | None
    parts: list[Part]


class RunningStore:
    """See the module. Raises GiveUp when the server refuses, or goes away."""

    def __init__(self, api: Api) -> None:
        self._api = api

    def ask(self, question: str, asked: pa.Table | None = None, **parameters: int) -> pa.Table:
        """The answer to one of the closed list of questions."""
        body = b""
        if asked is not None:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, asked.schema) as writer:
                writer.write_table(asked)
            body = sink.getvalue().to_pybytes()
        answer = self._api.answer("POST", f"{_PATH}/ask/{question}", params=parameters, content=body)
        return pa.ipc.open_stream(answer.content).read_all()

    def total(self, meter: Meter, subjects: list[int]) -> Total | None:
        """The running total of some customers together; None while it is being counted."""
        found: Total | None = self._put("total", Total | None, meter, subjects=subjects)
        return found

    def both(self, meters: Sequence[Meter]) -> Iterator[Both]:
        """What is kept of each meter, and the raw events up to the position that it is true for. Raises GiveUp."""
        blocks = -(-customers_of(self) // BLOCK)
        hours = [row["hour"].replace(tzinfo=UTC) for row in self.ask("hours").to_pylist()]
        for meter in meters:
            found: _Blocks | None = self._put("blocks", _Blocks | None, meter, blocks=blocks, hours=hours)
            if found is None:
                raise GiveUp("events flow too fast to read totals between two rounds; try again when it is quieter")
            yield both_of(found.parts, 0, found.blocks, dict(zip(hours, found.hours or [], strict=False)))

    def by_customer(self, meter: Meter, block: int) -> list[tuple[int, Measured]]:
        """The customers of a block."""
        found: list[tuple[int, Measured]] = self._put("by-customer", list[tuple[int, Measured]], meter, block=block)
        return found

    def by_hour(self, meter: Meter, subject: int) -> list[tuple[datetime, Measured]]:
        """The hours of a customer."""
        kind = list[tuple[datetime, Measured]]
        found: list[tuple[datetime, Measured]] = self._put("by-hour", kind, meter, subjects=[subject])
        return found

    def same_moment(self, meter: Meter, which: Which) -> tuple[Total, Measured] | None:
        """Total and recount of one customer or hour, true for one position; None while events flow too fast."""
        kind = tuple[Total, Measured] | None
        found: tuple[Total, Measured] | None = self._put("moment", kind, meter, which=which)
        return found

    def balances(self, meter: Meter) -> list[Balance]:
        """What is shown for every account of the meter."""
        found: list[Balance] = self._put("balances", list[Balance], meter)
        return found

    def _put(self, path: str, kind: Any, meter: Meter, **asked: object) -> Any:
        body = msgspec.json.encode({"meter_id": meter.id, **asked})
        return msgspec.json.decode(self._api.answer("POST", f"{_PATH}/{path}", content=body).content, type=kind)
