"""An answer of the upstream as a value. Pure."""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A whole answer. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_success(self) -> bool:
        """A 2xx."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body with exact decimals. Raises ValueError."""
        return json.loads(self.body, parse_float=Decimal)

    def words(self) -> str:
        """What the body says, in one line, for a person: its detail, or its first characters."""
        try:
            said = self.json()
        except ValueError:
            return self.body[:200].decode("utf-8", "replace").strip() or f"status {self.status}"
        if isinstance(said, dict):
            said = said.get("detail") or said.get("error_description") or said.get("error") or said
        return said if isinstance(said, str) else json.dumps(said, default=str)[:2_000]


def is_passing(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 425, 429) or status >= 500
