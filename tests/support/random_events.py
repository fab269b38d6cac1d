"""Random events and meters, biased to where engines disagree: numbers at the edges, keys that look like paths."""

import json
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from meters.aggregation import Aggregation
from meters.exact import amount_text, parse_amount
from meters.filters import ORDERING, Clause, Filter, Operator

KEYS = ["tokens", "plan", "", "a.b", "a/b", "a~1b", "~0", 'it\'s "quoted"', "\\", "é😀", "$", "0", "name", "timestamp"]
PATHS = [*KEYS, "_cost", "_cost.amount", "_cost.currency", "_cost.other", "_llm.input_tokens", "_llm.total_tokens"]
PATHS += ['"a.b"', '"name"', '"timestamp"', '"_cost".amount', '_llm."model"', '"', '""', '"a.b', '"it\'s ""quoted"""']
PATHS += ["_llm.model", "_llm.prompt", "_llm.prompt.x", "_llm.input_tokens.x", "tokens.x", "source", "absent"]
TEXTS = ["5", "5.0", "10", "free", "t", "f", "true", "50%", "é", "\uff5a", "😀", "a\nb", '"', "\\", "null", "-1", "0.1"]
NUMBERS = ["0", "-0", "-0.0", "1", "1.0", "5", "5.0", "5.10", "0.1", "-2.5", "1e0", "1E-12", "1.5e-7", "100000.0"]
NUMBERS += ["1.5E+2", "0.000000000001", "0.0000000000005", "0.0000000000015", "0.30000000000000004", "1e25", "5e-324"]
NUMBERS += ["9007199254740993", "12345678901234567890", "123456789012.3456789", "-99999999999999999999999999"]
NUMBERS += ["99999999999999999999999999.999999999999"]
NO_DECIMAL = "0E9999999999999999999"  # Python's takes an exponent of 18 digits at most


def escaped(token: str) -> str:
    """The number as text of which every character is written as a JSON escape."""
    return '"' + "".join(f"\\u{ord(character):04x}" for character in token) + '"'


def half_escaped(token: str) -> str:
    """The same of every other character, in capitals: .NET writes a plus sign so."""
    written = (f"\\u{ord(character):04X}" if place % 2 else character for place, character in enumerate(token))
    return '"' + "".join(written) + '"'


IN_TEXT = (json.dumps, escaped, half_escaped)
"""How a sender may write a number as text."""


def in_every_way(tokens: list[str]) -> list[str]:
    """The numbers, and each as text in every way of writing."""
    return [*tokens, *(write(token) for write in IN_TEXT for token in tokens)]


plain_decimals = st.decimals(min_value=-(10**6), max_value=10**6, places=6).map(lambda number: format(number, "f"))
integers = st.integers(-(10**20), 10**20).map(str)
number_tokens = st.one_of(st.sampled_from(NUMBERS), plain_decimals, integers)
texts = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5))
booleans = st.sampled_from(["true", "false"])
quoted = texts.filter(bool).map(json.dumps)
tokens = st.one_of(number_tokens, quoted, booleans)

small_amounts = st.sampled_from([token for token in NUMBERS if abs(Decimal(token)) < 10**5])
amounts = st.one_of(small_amounts, *map(small_amounts.map, IN_TEXT))
counts = st.sampled_from(["0", "-0", "7", "7.0", "1e2", "1E+2", "12345678901234567890"])
token_counts = st.one_of(counts, *map(counts.map, IN_TEXT))


def json_object(members: dict[str, str]) -> str:
    """The JSON text of an object whose values are JSON texts already."""
    return "{" + ",".join(f"{json.dumps(key)}:{value}" for key, value in members.items()) + "}"


costs = st.fixed_dictionaries({"amount": amounts, "currency": st.just('"usd"')}, optional={"other": tokens})
models = st.fixed_dictionaries(
    {"vendor": quoted, "model": quoted, "input_tokens": token_counts, "output_tokens": token_counts}
    | {"total_tokens": token_counts},
    optional={"prompt": st.one_of(st.just("null"), quoted), "other": tokens},
)


@st.composite
def metadata_texts(draw: st.DrawFn) -> str:
    """The JSON text of an event's metadata."""
    members = draw(st.dictionaries(st.sampled_from(KEYS), tokens, max_size=5))
    reserved = draw(st.fixed_dictionaries({}, optional={"_cost": costs, "_llm": models}))
    return json_object(members | {key: json_object(value) for key, value in reserved.items()})


def _as_parsed(number: Decimal) -> int | Decimal:
    """What ``parse_filter`` makes of a number."""
    return int(number) if number == number.to_integral_value() else Decimal(amount_text(number))


numbers = number_tokens.map(parse_amount).map(lambda amount: _as_parsed(amount or Decimal(0)))
scalars: st.SearchStrategy[Any] = st.one_of(
    texts, st.booleans(), st.integers(-10, 10), st.integers(-(10**40), 10**40), numbers
)


@st.composite
def clauses(draw: st.DrawFn) -> Clause:
    """A clause that could have been parsed: no ordering by booleans, lists only after ``in``."""
    operator = draw(st.sampled_from(Operator))
    value = scalars
    if operator in ORDERING:
        value = scalars.filter(lambda item: not isinstance(item, bool))
    elif operator is Operator.IN:
        value = st.lists(scalars, max_size=4)
    elif operator is Operator.EXISTS:
        value = st.booleans()
    return Clause(draw(st.sampled_from(PATHS)), operator, draw(value))


def _nested(parts: st.SearchStrategy[Clause | Filter]) -> st.SearchStrategy[Filter]:
    return st.builds(Filter, st.sampled_from(["and", "or"]), st.lists(parts, max_size=3))


filters = _nested(st.recursive(clauses(), _nested, max_leaves=6))
aggregations = st.one_of(
    st.just(Aggregation("count")),
    st.builds(Aggregation, st.sampled_from(["sum", "avg", "min", "max", "unique"]), st.sampled_from(PATHS)),
)


def edge_metadata() -> list[str]:
    """Every awkward token in every place where a meter can read one, an event each."""
    plain = [*NUMBERS, NO_DECIMAL, *map(json.dumps, [*TEXTS, *NUMBERS]), "true", "false"]
    amounts_sent = [token for token in NUMBERS if abs(Decimal(token)) < 10**5]
    counts_sent = [token for token in NUMBERS if Decimal(token) == Decimal(token).to_integral_value()]
    texts_found = [json_object({key: token}) for token in plain for key in ("tokens", "")]
    for token in in_every_way(amounts_sent):
        texts_found.append(json_object({"_cost": json_object({"amount": token, "currency": '"usd"', "other": "5"})}))
    for token in in_every_way(counts_sent):
        model = {"vendor": '"a"', "model": '"5"', "input_tokens": token, "total_tokens": token, "prompt": "null"}
        texts_found.append(json_object({"_llm": json_object(model)}))
    texts_found.append(r'{"\u005fcost":{"amo\u0075nt":"1\u0065-1","currency":"usd"}}')
    return [*texts_found, *(json_object({key: '"free"'}) for key in KEYS)]
