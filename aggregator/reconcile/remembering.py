"""What an upstream answered, kept in a file: a run that was interrupted goes on without asking again.

Memory holds no more than where each answer stands there. Decimals are kept as numbers with all their digits: read as
texts, they would be another content.

An answer that is not of the shape that was asked for is not kept: it would be as wrong for every try of the next hours.

The range that a run compares lies in the past, so its answers stay good for as long as the run is tried again. The file
goes when a run is complete, and is not used when it is older than a few hours or is of another range or organization.
"""

import json
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from aggregator.forward.answer import pages
from aggregator.forward.upstream import NoAnswer
from aggregator.reconcile.upstream_scope import Reader
from meters import exact_json

GOOD_FOR = timedelta(hours=6)


def interrupted(path: Path, key: str, now: datetime) -> datetime | None:
    """When the run with this key began that left the file, or None where there is nothing to go on with."""
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
            began = datetime.fromisoformat(head["began"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return began if head["key"] == key and now - began < GOOD_FOR else None


class Remembering:
    """A reader that asks each question once. Close it with ``complete`` when the run is, else just let go of it."""

    def __init__(self, reader: Reader, path: Path, key: str, began: datetime, *, go_on: bool) -> None:
        self._reader, self._path = reader, path
        self._places: dict[str, int] = _places(path) if go_on else {}  # of an answer's line in the file
        self.asked = 0
        if not go_on:
            head = json.dumps({"key": key, "began": began.isoformat()})
            path.write_text(head + "\n", encoding="utf-8")

    def get(self, path: str, **params: Any) -> Any:
        """The answer, from the file where it has one. Raises NoAnswer where it is neither a list nor quantities."""
        question = json.dumps([path, params], sort_keys=True, default=str)
        if question in self._places:
            with self._path.open("rb") as file:
                file.seek(self._places[question])
                return exact_json.decode(file.readline())[1]
        found = self._reader.get(path, **params)
        self.asked += 1
        if not _is_expected(found):
            raise NoAnswer(f"{path} answered something else than was asked for")
        with self._path.open("ab") as file:
            self._places[question] = file.tell()
            file.write(exact_json.encode([question, found]) + b"\n")
        return found

    def pages(self, path: str, **params: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        return pages(self.get, path, **params)

    def complete(self) -> None:
        """Forget everything: the next run asks anew."""
        self._path.unlink(missing_ok=True)


def _is_expected(answer: Any) -> bool:
    """Whether it is what all questions here are after: items of a list and how many pages there are, or quantities."""
    match answer:
        case {"items": list(), "pagination": {"max_page": int()}} | {"quantities": list(), "total": _}:
            return True
    return False


def _places(path: Path) -> dict[str, int]:
    """Where each question's line is; one that a kill cut short is taken away, and those behind it."""
    places: dict[str, int] = {}
    with path.open("r+b") as file:
        file.readline()
        place = file.tell()
        while (line := file.readline()).endswith(b"\n"):
            try:
                question, _ = exact_json.decode(line)
            except ValueError:
                break
            places[question] = place
            place = file.tell()
        file.truncate(place)
    return places
