"""Reading properties out of stored events, each metadata text parsed once.

A meter asks for *facets* of a property: its string, its number, its boolean, its text, whether it is there at all.
Each is NULL (``present``: false) for an event that has nothing of the kind, so a comparison with it is undecided, and
undecided is never true: the table in ``meters.filter`` needs no type checks in SQL. The stage remembers what
was asked for while meters are compiled, then gives one SELECT with a column for each, however many meters share it.

Paths are JSON pointers, handed over as a parameter: any key works, and a dot in a property means nesting. Tokens come
back as JSON text (``5``, ``"5"``, ``true``, ``{...}``); numbers that DuckDB's JSON would bend stand in the column
``awkward``, where the pointer is the key (see ``aggregator.awkward``).
"""

from collections.abc import Sequence
from functools import cache
from typing import cast

from sqlglot import exp, parse_one

from aggregator.awkward import pointer
from meters.amount import DECIMALS, INTEGER_DIGITS_MAX
from meters.facts import RESERVED
from meters.property import NAME, SOURCE, TIMESTAMP

DIALECT = "duckdb"
AMOUNT = f"DECIMAL({INTEGER_DIGITS_MAX + DECIMALS}, {DECIMALS})"
"""What holds every amount exactly."""

# {t}: column with a JSON token or NULL; {x}: with the exact text of an awkward number or NULL.
_NUMBER = f"COALESCE(TRY_CAST({{x}} AS {AMOUNT}), TRY_CAST({{t}} AS {AMOUNT}))"
_STRING = "CASE WHEN STARTS_WITH({t}, '\"') THEN json_extract_string({t}, '$') END"
_IS_NUMBER = "{t} >= '-' AND {t} < ':'"  # the characters a JSON number begins with, and no other token
_DECIMALS = f"REGEXP_REPLACE(CAST({_NUMBER} AS VARCHAR), '(\\.\\d+?)0+$', '\\1')"
_DIGITS = f"COALESCE({{x}}, CASE WHEN CONTAINS({{t}}, '.') OR CONTAINS({{t}}, 'e') THEN {_DECIMALS} ELSE {{t}} END)"
_FACETS = {
    "string": _STRING,
    "number": _NUMBER,
    "boolean": "CASE WHEN {t} IN ('true', 'false') THEN {t} = 'true' END",
    "present": "COALESCE({t}, 'null') <> 'null'",
    "text": f"CASE WHEN {_IS_NUMBER} THEN {_DIGITS} WHEN {{t}} IN ('true', 'false') THEN {{t}} ELSE {_STRING} END",
    "identity": (
        f"CASE WHEN {_IS_NUMBER} THEN 'n' || CAST({_NUMBER} AS VARCHAR)"
        f" WHEN {{t}} IN ('true', 'false') THEN {{t}} ELSE 's' || {_STRING} END"
    ),
}
_NOTHING = {
    "string": "CAST(NULL AS VARCHAR)",
    "number": f"CAST(NULL AS {AMOUNT})",
    "boolean": "CAST(NULL AS BOOLEAN)",
    "present": "FALSE",
    "text": "CAST(NULL AS VARCHAR)",
    "identity": "CAST(NULL AS VARCHAR)",
}
# Numbers of ``_cost`` and ``_llm`` may have been sent as text: without its quotes it is read as the number it is.
_UNQUOTED = f"COALESCE({_STRING}, {{t}})"
# // cuts towards zero, so halves go away from it, as in meters.facts.epoch_seconds.
_SECONDS = "(EPOCH_US(timestamp) + CASE WHEN EPOCH_US(timestamp) < 0 THEN -500000 ELSE 500000 END) // 1000000"


@cache
def _parsed(sql: str) -> exp.Expr:
    return parse_one(sql, dialect=DIALECT)


def fixed(sql: str) -> exp.Expr:
    """SQL that is written in this program, as an expression. Parsing is slow, so it is done once."""
    return _parsed(sql).copy()


class Parameters:
    """Values of a statement, each under a name of its own; text from outside gets into SQL in no other way."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def add(self, value: object) -> exp.Expr:
        """A placeholder for the value."""
        name = f"v{len(self.values)}"
        return self.named(name, value)

    def named(self, name: str, value: object) -> exp.Expr:
        """A placeholder with a name that fixed SQL may mention; ``v`` and a number are taken."""
        self.values[name] = value
        return exp.Placeholder(this=name)

    def amount(self, value: object) -> exp.Expr:
        """A placeholder for a number that an amount is compared with."""
        return exp.Cast(this=self.add(value), to=amount_type())


class Stage:
    """Collects the facets that meters ask for, then states the SELECT that provides them."""

    def __init__(self) -> None:
        self._pointers: dict[str, int] = {}
        self._unquoted: set[int] = set()
        self._columns: dict[str, exp.Expr] = {}

    def string(self, property: str) -> exp.Expr:
        """VARCHAR: the value, where it is a string."""
        return self._facet(property.split("."), "string")

    def number(self, property: str) -> exp.Expr:
        """DECIMAL(38, 12): the value, where it is a number."""
        return self._facet(property.split("."), "number")

    def boolean(self, property: str) -> exp.Expr:
        """BOOLEAN: the value, where it is one."""
        return self._facet(property.split("."), "boolean")

    def present(self, property: str) -> exp.Expr:
        """BOOLEAN, never NULL: whether there is a value other than null."""
        return self._facet(property.split("."), "present")

    def text(self, property: str) -> exp.Expr:
        """VARCHAR: the text of a string, number (``meters.amount.number_text``) or boolean."""
        return self._facet(property.split("."), "text")

    def text_at(self, key: str) -> exp.Expr:
        """As ``text``, for a top-level key, whatever dots it has."""
        return self._facet([key], "text")

    def identity(self, property: str) -> exp.Expr:
        """VARCHAR: equal for two values exactly if ``unique`` takes them for one; NULL where there is none."""
        return self._facet(property.split("."), "identity")

    def built_in(self, property: str) -> exp.Expr:
        """``name`` and ``source`` VARCHAR; ``timestamp`` BIGINT, whole seconds since 1970."""
        return self._column(f"event_{property}", built_in_column(property))

    @property
    def parses(self) -> bool:
        """Whether anything asked for so far stands in the metadata."""
        return bool(self._pointers)

    def select(self, source: exp.Expr, keep: Sequence[str], parameters: Parameters) -> exp.Select:
        """The columns ``keep`` of ``source`` (a table, or a SELECT in parentheses) and every facet asked for."""
        facets = [exp.alias_(column, name, copy=False) for name, column in self._columns.items()]
        if self._pointers:
            source = self._tokens(source, keep, parameters).subquery("tokens", copy=False)
        return exp.select(*map(exp.column, keep), *facets, copy=False).from_(source, copy=False)

    def _tokens(self, source: exp.Expr, keep: Sequence[str], parameters: Parameters) -> exp.Select:
        """The token and the exact text of each pointer, as columns."""
        kept = [exp.column(name) for name in dict.fromkeys((*keep, NAME, SOURCE, TIMESTAMP))]
        pointers = parameters.add(list(self._pointers))
        tokens = _call("json_extract", exp.column("metadata"), pointers)
        tokens = exp.Cast(this=tokens, to=fixed("CAST(NULL AS VARCHAR[])").args["to"])
        awkward = parameters.add([pointer([path]) for path in self._pointers])  # there a pointer is a key
        exact = _call("json_extract_string", exp.column("awkward"), awkward)
        read = exp.alias_(tokens, "t", copy=False), exp.alias_(exact, "x", copy=False)
        parsed = exp.select(*kept, *read, copy=False).from_(source, copy=False)
        picked = [column for place in self._pointers.values() for column in self._pick(place)]
        kept = [column.copy() for column in kept]
        return exp.select(*kept, *picked, copy=False).from_(parsed.subquery("parsed", copy=False), copy=False)

    def _pick(self, place: int) -> list[exp.Expr]:
        token = _UNQUOTED if place in self._unquoted else "{t}"
        sources = (f"t{place}", token.format(t=f"t[{place}]")), (f"x{place}", f"x[{place}]")
        return [exp.alias_(fixed(source), name, copy=False) for name, source in sources]

    def _facet(self, steps: Sequence[str], facet: str) -> exp.Expr:
        first, *rest = steps
        known, numbers = RESERVED.get(first, (frozenset(), frozenset())) if rest else (frozenset(), frozenset())
        if known and rest[0] not in known:
            return fixed(_NOTHING[facet])
        place = self._pointers.setdefault(pointer(steps), len(self._pointers) + 1)
        if len(rest) == 1 and rest[0] in numbers:
            self._unquoted.add(place)
        source = _FACETS[facet].format(t=f"t{place}", x=f"x{place}")
        return self._column(f"p{place}_{facet}", fixed(source))

    def _column(self, name: str, expression: exp.Expr) -> exp.Expr:
        self._columns.setdefault(name, expression)
        return exp.column(name)


def built_in_column(property: str) -> exp.Expr:
    """A built-in property in terms of the columns of ``events``."""
    return fixed(property if property in (NAME, SOURCE) else _SECONDS)


def amount_type() -> exp.Expr:
    """The type of an amount, for a cast."""
    return cast(exp.Expr, fixed(f"CAST(NULL AS {AMOUNT})").args["to"])


def _call(name: str, *arguments: exp.Expr) -> exp.Expr:
    return exp.Anonymous(this=name, expressions=list(arguments))
