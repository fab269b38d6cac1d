"""An answer of the upstream as a value, and lists that it gives in pages. Connects to nobody by itself."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from meters import exact_json

PAGE_ROWS = 100  # the most that Polar gives at once, and this API like it


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
        return exact_json.decode(self.body)

    def words(self) -> str:
        """What the body says, in one line, for a person: its detail, or its first characters."""
        try:
            said = self.json()
        except ValueError:
            return self.body[:200].decode("utf-8", "replace").strip() or f"status {self.status}"
        if isinstance(said, dict):
            said = said.get("detail") or said.get("error_description") or said.get("error") or said
        return said if isinstance(said, str) else json.dumps(said, default=str)[:2_000]


def pages(get: Callable[..., Any], path: str, **params: Any) -> Iterator[dict[str, Any]]:
    """Every item of a list, page by page. ``get`` takes a path and parameters and gives the JSON of the answer."""
    page = 1
    while True:
        answer = get(path, **params, page=page, limit=PAGE_ROWS)
        yield from answer["items"]
        if page >= answer["pagination"]["max_page"]:
            return
        page += 1


def is_passing(status: int) -> bool:
    """Whether the same request may succeed later."""
    return status in (408, 425, 429) or status >= 500
