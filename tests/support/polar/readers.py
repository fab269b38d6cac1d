"""Readers of real servers, through which a test sees what happens at Polar and not on a quiet machine."""

from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Any

from aggregator.forward.polar_client import pages
from aggregator.reconcile.polar_reader import Reader

Answer = Any


class _Through:
    """Passes every question on."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def get(self, path: str, **params: Any) -> Answer:
        """One question."""
        return self._reader.get(path, **params)

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, a question each page."""
        return pages(self.get, path, **params)


class Interrupted(_Through):
    """Something happens once, behind the first answer to a question of this kind."""

    def __init__(self, reader: Reader, path: str, then: Callable[[], object], **params: Any) -> None:
        super().__init__(reader)
        self._path, self._params, self._then = path, params, then
        self.has_happened = False

    def get(self, path: str, **params: Any) -> Answer:
        """One question."""
        answer = super().get(path, **params)
        if not self.has_happened and path.endswith(self._path) and params.items() >= self._params.items():
            self.has_happened = True
            self._then()
        return answer


class Overlapping(_Through):
    """As where many events have one time and nothing else orders them: a second page begins with the first one's end
    and leaves out what would have stood there."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._last: list[dict[str, Any]] = []

    def get(self, path: str, **params: Any) -> Answer:
        """One question."""
        answer = super().get(path, **params)
        if params.get("sorting") == "timestamp" and path == "/v1/events/":
            items = answer["items"]
            answer = {**answer, "items": [*self._last, *items[len(self._last):]]}
            self._last = items[-1:] if params.get("page") == 1 else []
        return answer


class AddedAsDoubles(_Through):
    """The usage of one meter, on one day and by one customer alone, is told as this total."""

    def __init__(self, reader: Reader, meter_id: str, day: datetime, total: Decimal) -> None:
        super().__init__(reader)
        self._meter_id, self._day, self._total = meter_id, f"{day:%Y-%m-%d}", total

    def get(self, path: str, **params: Any) -> Answer:
        """One question."""
        answer = super().get(path, **params)
        if path == f"/v1/meters/{self._meter_id}/quantities":
            for point in answer["quantities"]:
                is_of_day = point["timestamp"].startswith(self._day)
                point["quantity"] = self._total if is_of_day else point["quantity"]
        if path == "/v1/customer-meters/":
            for row in answer["items"]:
                is_of_meter = row["meter_id"] == self._meter_id
                row["consumed_units"] = self._total if is_of_meter else row["consumed_units"]
        return answer


class WithItsOwn(_Through):
    """Events of one name are told as those that the server wrote itself."""

    def __init__(self, reader: Reader, name: str) -> None:
        super().__init__(reader)
        self._name = name

    def get(self, path: str, **params: Any) -> Answer:
        """One question."""
        if path == "/v1/events/":
            is_own = params.pop("source") == "system"
            operator = "eq" if is_own else "ne"
            clause = f'{{"property":"name","operator":"{operator}","value":"{self._name}"}}'
            params["filter"] = f'{{"conjunction":"and","clauses":[{clause}]}}'
        return super().get(path, **params)
