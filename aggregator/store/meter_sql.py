"""Compile meters to SQL: filters become conditions and aggregations become columns (sqlglot expressions).

``Stage`` collects the properties that the meters of a statement read and produces one SELECT that parses each
metadata text once. ``condition`` and ``value`` translate a filter and an aggregation over the columns of that stage.
``Parameters`` holds the statement's values, which are never written into the SQL text. ``Measured`` is the result of
an aggregation. ``meters.filters`` and ``meters.aggregation`` define the meaning, and
``tests/aggregator/store/test_meter_sql.py`` compares this translation with them.
"""

from collections.abc import Sequence
from decimal import Decimal
from functools import cache
from typing import NamedTuple, cast

import msgspec
from sqlglot import exp, parse_one

from aggregator.decode.columns import pointer
from meters.aggregation import Aggregation, exact_sum, mean
from meters.event_values import NAME, RESERVED, SOURCE, TIMESTAMP, is_built_in, steps
from meters.exact import DECIMALS, INTEGER_DIGITS_MAX
from meters.filters import COMPARE, Clause, Filter, Operator, Scalar, value_text

# Reading properties.
#
# A meter asks for *facets* of a property: its string, its number, its boolean, its text, or whether it is present. A
# facet is NULL (``present``: false) where the property has another type. A comparison with NULL is undecided, and a
# filter does not let an undecided event through, so the SQL needs no type checks. Meters that use the same facet
# share its column.
#
# A path is a JSON pointer passed as a parameter, so any key is possible; ``steps`` reads the keys of a property.
# Tokens come back as JSON text (``5``, ``"5"``, ``true``, ``{...}``). Numbers that DuckDB's JSON would round are read
# from the column ``awkward``, by their pointer (see ``aggregator.decode.columns``).

DIALECT = "duckdb"
AMOUNT = f"DECIMAL({INTEGER_DIGITS_MAX + DECIMALS}, {DECIMALS})"
"""What holds every amount exactly."""

# {t} is a column with a JSON token or NULL; {x} is a column with the exact text of an awkward number or NULL.
_NUMBER = f"COALESCE(TRY_CAST({{x}} AS {AMOUNT}), TRY_CAST({{t}} AS {AMOUNT}))"
_STRING = "CASE WHEN STARTS_WITH({t}, '\"') THEN json_extract_string({t}, '$') END"
_IS_NUMBER = "{t} >= '-' AND {t} < ':'"  # the characters a JSON number begins with, and no other token
_DECIMALS = f"REGEXP_REPLACE(CAST({_NUMBER} AS VARCHAR), '(\\.\\d+?)0+$', '\\1')"
_DIGITS = f"COALESCE({{x}}, CASE WHEN CONTAINS({{t}}, '.') OR CONTAINS({{t}}, 'e') THEN {_DECIMALS} ELSE {{t}} END)"
_FACETS = {
    "token": "{t}",
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
    "token": "CAST(NULL AS VARCHAR)",
    "string": "CAST(NULL AS VARCHAR)",
    "number": f"CAST(NULL AS {AMOUNT})",
    "boolean": "CAST(NULL AS BOOLEAN)",
    "present": "FALSE",
    "text": "CAST(NULL AS VARCHAR)",
    "identity": "CAST(NULL AS VARCHAR)",
}
# A number of ``_cost`` or ``_llm`` may have been sent as text: without its quotes, the text is read as a number.
_UNQUOTED = f"COALESCE({_STRING}, {{t}})"
# // rounds towards zero. Half a second is added first, so halves round away from zero, as in
# meters.event_values.epoch_seconds.
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
        return self._facet(steps(property), "string")

    def number(self, property: str) -> exp.Expr:
        """DECIMAL(38, 12): the value, where it is a number."""
        return self._facet(steps(property), "number")

    def boolean(self, property: str) -> exp.Expr:
        """BOOLEAN: the value, where it is one."""
        return self._facet(steps(property), "boolean")

    def present(self, property: str) -> exp.Expr:
        """BOOLEAN, never NULL: whether there is a value other than null."""
        return self._facet(steps(property), "present")

    def text(self, property: str) -> exp.Expr:
        """VARCHAR: the text of a string, number (``meters.exact.number_text``) or boolean."""
        return self._facet(steps(property), "text")

    def token(self, property: str) -> exp.Expr:
        """VARCHAR: the value as JSON; NULL where there is none."""
        return self._facet(steps(property), "token")

    def text_at(self, key: str) -> exp.Expr:
        """As ``text``, for a top-level key, whatever dots it has."""
        return self._facet([key], "text")

    def identity(self, property: str) -> exp.Expr:
        """VARCHAR: equal for two values exactly if ``unique`` takes them for one; NULL where there is none."""
        return self._facet(steps(property), "identity")

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

    def _facet(self, keys: Sequence[str], facet: str) -> exp.Expr:
        first, *rest = keys
        known, numbers = RESERVED.get(first, (frozenset(), frozenset())) if rest else (frozenset(), frozenset())
        if known and rest[0] not in known:
            return fixed(_NOTHING[facet])
        place = self._pointers.setdefault(pointer(keys), len(self._pointers) + 1)
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


# Filters and aggregations.
#
# A sum of DECIMAL(38, 12) overflows when two values of 26 digits are added, and one overflow would fail the whole
# query. So DuckDB sums ordinary amounts, and enormous amounts (in practice there are none) are collected in the list
# ``enormous`` and added in Python: ``Measured.total`` is always exact.

ORDINARY = 10**16
"""Amounts up to here are added by DuckDB: 10^10 of them in one group stay below the 26 digits of a DECIMAL(38, 12)."""

UNREACHABLE = Decimal(10) ** INTEGER_DIGITS_MAX
"""The least number that no amount reaches."""

_EXPRESSIONS: dict[Operator, type[exp.Binary]] = {
    Operator.EQ: exp.EQ,
    Operator.NE: exp.NEQ,
    Operator.GT: exp.GT,
    Operator.GTE: exp.GTE,
    Operator.LT: exp.LT,
    Operator.LTE: exp.LTE,
}


class Statement(NamedTuple):
    """SQL with named placeholders, and their values."""

    sql: str
    parameters: dict[str, object]


def statement(expression: exp.Expr, parameters: Parameters) -> Statement:
    """What ``connection.execute`` takes."""
    return Statement(expression.sql(DIALECT), parameters.values)


def spelled_out(expression: exp.Expr, parameters: Parameters) -> Statement:
    """The same with its values in it, for PREPARE: a path in JSON has to be constant, or each EXECUTE plans anew.

    Texts are written as hexadecimal digits of their bytes, which can say nothing else.
    """

    def value(node: exp.Expr) -> exp.Expr:
        return _constant(parameters.values[node.name]) if isinstance(node, exp.Placeholder) else node

    return Statement(expression.transform(value).sql(DIALECT), {})


def _constant(value: object) -> exp.Expr:
    if isinstance(value, list):
        return exp.Array(expressions=[_constant(item) for item in value])
    text = value if isinstance(value, str) else f"{value:f}"  # a number stands in a cast
    return fixed(f"decode(from_hex('{text.encode().hex()}'))")


def condition(filter: Filter, stage: Stage, parameters: Parameters) -> exp.Expr:
    """Whether the filter lets an event through: true, or else false or NULL."""
    if not filter.clauses:
        return exp.true()
    parts = [
        condition(part, stage, parameters) if isinstance(part, Filter) else _clause(part, stage, parameters)
        for part in filter.clauses
    ]
    return exp.and_(*parts, copy=False) if filter.conjunction == "and" else exp.or_(*parts, copy=False)


def before_reading(filter: Filter, parameters: Parameters) -> list[exp.Expr]:
    """Conditions on the columns of ``events`` without which the filter cannot hold: what fails them is not parsed."""
    if filter.conjunction != "and":
        return []
    found: list[exp.Expr] = []
    for part in filter.clauses:
        if isinstance(part, Filter):
            found += before_reading(part, parameters)
        elif is_built_in(part.property):
            found.append(_built_in(part, built_in_column(part.property), parameters))
    return found


def _clause(clause: Clause, stage: Stage, parameters: Parameters) -> exp.Expr:
    values = _values(clause)
    operator = clause.operator
    if is_built_in(clause.property):
        return _built_in(clause, stage.built_in(clause.property), parameters)
    if operator is Operator.EXISTS:
        present = stage.present(clause.property)
        return present if clause.value else exp.not_(present, copy=False)
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        return _like(stage.text(clause.property), operator, value_text(values[0]), parameters)
    if operator is Operator.IN:
        return _any_of(clause.property, values, stage, parameters)
    return _compare(clause.property, operator, values[0], stage, parameters)


def _compare(property: str, operator: Operator, value: Scalar, stage: Stage, parameters: Parameters) -> exp.Expr:
    """Each facet is NULL for events of another type, so at most one of the comparisons is decided."""
    binary = _EXPRESSIONS[operator]
    parts: list[exp.Expr] = [binary(this=stage.string(property), expression=parameters.add(value_text(value)))]
    if not isinstance(value, str):
        parts.append(_compare_number(stage.number(property), operator, value, parameters))
    if isinstance(value, bool):
        parts.append(binary(this=stage.boolean(property), expression=exp.convert(value)))
    return exp.or_(*parts, copy=False)


def _compare_number(number: exp.Expr, operator: Operator, value: int | Decimal, parameters: Parameters) -> exp.Expr:
    """A value that no amount reaches is compared once, here, with any amount at all."""
    if not _is_reachable(value):
        holds = COMPARE[operator](0, value)
        return exp.and_(exp.convert(holds), exp.not_(number.is_(exp.null()), copy=False), copy=False)
    return _EXPRESSIONS[operator](this=number, expression=parameters.amount(Decimal(value)))


def _is_reachable(value: int | Decimal) -> bool:
    """Whether an amount can be that large. Not ``abs``, which rounds decimals to the ambient context."""
    return -UNREACHABLE < value < UNREACHABLE


def _any_of(property: str, values: Sequence[Scalar], stage: Stage, parameters: Parameters) -> exp.Expr:
    texts = [parameters.add(value_text(value)) for value in values]
    numbers = [
        parameters.amount(Decimal(value)) for value in values if not isinstance(value, str) and _is_reachable(value)
    ]
    booleans = [exp.convert(value) for value in values if isinstance(value, bool)]
    facets = (stage.string, texts), (stage.number, numbers), (stage.boolean, booleans)
    parts = [exp.In(this=facet(property), expressions=list(found)) for facet, found in facets if found]
    return exp.or_(*parts, copy=False) if parts else exp.false()


def _built_in(clause: Clause, column: exp.Expr, parameters: Parameters) -> exp.Expr:
    """``name`` and ``source`` against strings, ``timestamp`` against integers; anything else is false."""
    operator = clause.operator
    if operator is Operator.EXISTS:
        return exp.convert(bool(clause.value))
    legal = str if clause.property in (NAME, SOURCE) else int
    fitting = [value for value in _values(clause) if isinstance(value, legal) and not isinstance(value, bool)]
    if not fitting:
        return exp.false()
    if operator in (Operator.LIKE, Operator.NOT_LIKE):
        return _like(exp.cast(column, "VARCHAR"), operator, str(fitting[0]), parameters)
    if clause.property == TIMESTAMP:
        seconds = exp.Cast(this=column, to=amount_type())
        parts = [_compare_number(seconds, _single(operator), int(value), parameters) for value in fitting]
        return exp.or_(*parts, copy=False)
    texts = [parameters.add(value) for value in fitting]
    if operator is Operator.IN:
        return exp.In(this=column, expressions=texts)
    return _EXPRESSIONS[operator](this=column, expression=texts[0])


def _values(clause: Clause) -> Sequence[Scalar]:
    return clause.value if isinstance(clause.value, list) else [clause.value]


def _single(operator: Operator) -> Operator:
    return Operator.EQ if operator is Operator.IN else operator


def _like(text: exp.Expr, operator: Operator, needle: str, parameters: Parameters) -> exp.Expr:
    found = exp.Contains(this=text, expression=parameters.add(needle))
    return found if operator is Operator.LIKE else exp.not_(found, copy=False)


def considered(aggregation: Aggregation, stage: Stage) -> exp.Expr:
    """Whether the aggregation takes an event that the filter let through; never NULL."""
    if aggregation.func in ("count", "unique"):
        return exp.true()
    return exp.not_(_amount(aggregation, stage).is_(exp.null()), copy=False)


def _amount(aggregation: Aggregation, stage: Stage) -> exp.Expr:
    """The number that a numeric function reads."""
    property = aggregation.property or ""
    if property == TIMESTAMP:
        return exp.Cast(this=stage.built_in(property), to=amount_type())
    if is_built_in(property):
        return fixed(f"CAST(NULL AS {AMOUNT})")
    return stage.number(property)


def value(aggregation: Aggregation, stage: Stage) -> exp.Expr:
    """What an event contributes: DECIMAL(38, 12) to a numeric function, a VARCHAR identity to ``unique``, 1 to count.

    ``unique`` looks up built-in names in the metadata, as Polar does.
    """
    if aggregation.func == "count":
        return fixed(f"CAST(1 AS {AMOUNT})")
    if aggregation.func == "unique":
        return stage.identity(aggregation.property or "")
    return _amount(aggregation, stage)


def passed_over(aggregation: Aggregation, stage: Stage) -> exp.Expr:
    """Whether an event that the filter let through adds nothing to the aggregation's value; never NULL."""
    if aggregation.func == "unique":
        return stage.identity(aggregation.property or "").is_(exp.null())
    return exp.not_(considered(aggregation, stage), copy=False)


def stated(aggregation: Aggregation, stage: Stage) -> exp.Expr:
    """VARCHAR: what the event states for the aggregation's property, as JSON; NULL for nothing or null."""
    property = aggregation.property or ""
    if aggregation.func != "unique" and is_built_in(property):
        return _call("to_json", exp.cast(stage.built_in(property), "VARCHAR"))
    return exp.Nullif(this=stage.token(property), expression=exp.convert("null"))


MEASURES = ("count", "sum", "enormous", "min", "max")


def measures(aggregation: Aggregation, contribution: exp.Expr) -> list[exp.Expr]:
    """The columns of a group, under the names of ``MEASURES``; ``contribution`` is a ``value`` in scope.

    A contribution that is NULL adds nothing: such an event is not counted. ``count`` BIGINT: events considered, or
    distinct values. The rest is NULL for ``count`` and ``unique``; elsewhere ``sum`` DECIMAL(38, 12) of ordinary
    amounts, ``enormous`` DECIMAL(38, 12)[] or NULL, ``min`` and ``max``.
    """
    if aggregation.func in ("count", "unique"):
        counted = "COUNT(x)" if aggregation.func == "count" else "COUNT(DISTINCT x)"
        sources = [counted, *(f"CAST(NULL AS {kind})" for kind in (AMOUNT, f"{AMOUNT}[]", AMOUNT, AMOUNT))]
    else:
        ordinary = f"x BETWEEN -{ORDINARY} AND {ORDINARY}"
        enormous = f"LIST(x) FILTER (WHERE NOT ({ordinary}))"
        sources = ["COUNT(x)", f"SUM(x) FILTER (WHERE {ordinary})", enormous, "MIN(x)", "MAX(x)"]
    return [
        exp.alias_(_with(source, contribution), name, quoted=True, copy=False)
        for source, name in zip(sources, MEASURES, strict=True)
    ]


def _with(source: str, contribution: exp.Expr) -> exp.Expr:
    """The fragment of SQL, with the contribution in the place of ``x``."""
    return fixed(source).transform(
        lambda node: contribution.copy() if isinstance(node, exp.Column) and node.name == "x" else node, copy=False
    )


class Measured(msgspec.Struct, frozen=True):
    """The measures of one group, as they come out of DuckDB."""

    count: int
    sum: Decimal | None = None
    enormous: Sequence[Decimal] | None = None
    min: Decimal | None = None
    max: Decimal | None = None

    @property
    def total(self) -> Decimal:
        """The sum of all amounts, exact, of as many digits as it takes."""
        return exact_sum([self.sum or Decimal(0), *(self.enormous or ())])

    def value(self, aggregation: Aggregation) -> Decimal:
        """The aggregation's value over the group; 0 where nothing was considered."""
        match aggregation.func:
            case "count" | "unique":
                return Decimal(self.count)
            case "sum":
                return self.total
            case "avg":
                return mean(self.total, self.count)
            case "min":
                return self.min or Decimal(0)
            case "max":
                return self.max or Decimal(0)
