"""The page of results: tables in ``README.md`` from the JSON beside it, and the plots. Each run brings its tables up to
date, and the goals; the plots are drawn here.

A table stands between two comments, of which the first names the result and the columns that the page wants; rows that
lack one of them are left out. Where it names none there is a table for each kind of row. Everything else on the page is
written by hand and stays as it is.

    <!-- table accept: events a body, events/s, CPU us/event -->
    <!-- end -->

    python -m benchmarks.page
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import goals

PAGE = Path("benchmarks/README.md")
RESULTS = Path("benchmarks/results")
_TABLE = re.compile(r"(<!-- table (\w+)(?:: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
_MACHINE = re.compile(r"(<!-- machine (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_GOALS = re.compile(r"(<!-- goals -->\n).*?(<!-- end -->)", re.DOTALL)
_LOW = 0.5  # of the load average: below it nothing else ran
_STOLEN_LOW = 2  # percent of the processors' time: below it a host had no neighbors to speak of

Result = Mapping[str, Any]


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """Every result by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def filled(text: str, found: Mapping[str, Result]) -> str:
    """The page's text with every table made anew. Raises KeyError for a result or column that is not there."""
    named = _MACHINE.search(text)
    machine = found[named[2]]["environment"] if named else {}
    text = _TABLE.sub(lambda match: match[1] + _tables(found[match[2]], match[3], machine) + match[4], text)
    text = _GOALS.sub(lambda match: match[1] + _goals(found) + match[2], text)
    return _MACHINE.sub(lambda match: match[1] + _machine(found[match[2]]["environment"]) + match[3], text)


def refresh() -> None:
    """Make the tables anew, if a page is below the directory of work."""
    if PAGE.exists():
        PAGE.write_text(filled(PAGE.read_text(), results()))


def tables(text: str) -> set[str]:
    """The names of the results that a page shows."""
    return {match[2] for match in _TABLE.finditer(text)}


def _tables(result: Result, wanted: str | None, machine: Mapping[str, Any]) -> str:
    kinds = [wanted.split(", ")] if wanted else list(dict.fromkeys(map(tuple, result["rows"])))
    made = ""
    for kind in kinds:
        rows = [row for row in result["rows"] if (set(kind) <= set(row) if wanted else kind == tuple(row))]
        if not rows:
            raise KeyError(f"{result['benchmark']} has no row with {wanted}")
        made += f"{_table(kind, rows)}\n"
    return made + f"{_origin(result['environment'], machine)}\n"


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    numbers = [any(isinstance(row[column], int | float) for row in rows) for column in columns]
    lines = [_line(columns), _line("---:" if number else "---" for number in numbers)]
    lines += dict.fromkeys(_line(shown(row[column]) for column in columns) for row in rows)  # what is alike stands once
    return "\n".join(lines) + "\n"


def _goals(found: Mapping[str, Result]) -> str:
    rows = list(goals.rows(found))
    return _table(list(rows[0]), rows) if rows else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(where: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """How a table was made, with processor and day where they are not those of the page's machine."""
    other = [f"; {where[key][:end]}" for key, end in (("cpu", None), ("at", len("2026-01-01")))
             if key in machine and where[key][:end] != machine[key][:end]]
    load = where.get("load", 0)
    beside = "" if load < _LOW else f"; other work kept {load} processes busy"
    stolen = where.get("stolen %", 0)
    withheld = "" if stolen < _STOLEN_LOW else f"; the host kept {stolen} % of the processors' time"
    return f"`{where['command']}`, commit {where['commit']}{''.join(other)}{beside}{withheld}"


def _machine(where: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in where["libraries"].items())
    return (
        f"{where['cpus']} cores ({where['cpu']}), {where['memory GiB']} GiB, Linux {where['kernel']}, "
        f"Python {where['python']}, {libraries}; {where['at']}\n"
    )


def shown(value: Any) -> str:
    """A value as a table shows it: three digits, or all of them before the point."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


if __name__ == "__main__":
    from benchmarks.plots import draw  # loads a library that the tables do without

    draw(results(), RESULTS)
    refresh()
