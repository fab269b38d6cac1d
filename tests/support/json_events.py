"""Events written out as JSON: mostly plain ones, with whatever could be taken for plain and is not."""

import json

from hypothesis import strategies as st

from tests.support.admission import CUSTOMER, OTHERS_CUSTOMER, UNKNOWN

Text = st.SearchStrategy[str]  # a JSON value, written out


def mostly(good: list[str], odd: list[str]) -> Text:
    """A good value fifteen times out of sixteen, so that some whole events are plain."""
    return st.integers(0, 15).flatmap(lambda number: st.sampled_from(good if number else odd))


_WILD = [*map(json.dumps, ["", "é", "a:b", "{", "[", '"', "\\", "\0", "\U0001f600", "x" * 129, "x" * 501]),
         "0", "1.5", "1e26", "null", "true", "{}", "[]", '{"a":{}}', "[[1]]", '"\\ud800"', '"\\u0026\\u003e"',
         '"\\u003a\\u0022:"', '"\\u0001\\u0000"', '"\\u001f\\u0030"']  # fmt: skip
_SPACES = mostly([""], [" ", "\n", "\r\n\t"])
NAMES = mostly(['"n"', '""'], [*_WILD, json.dumps("n" * 129)])
_TIMES = mostly(
    ['"2026-01-01T00:00:00Z"', '"2026-01-01 00:00:00+01:00"', '"2026-11-21T12:00:30Z"'],
    ['"2026-11-21T12:02:00Z"', '"2026-01-01T00:00:00"', '"2026-01-01"', '"2026-02-30T00:00:00Z"', "5", "null",
     '"2026-01-01t00:00:00.123456789z"', '"2026-01-01T24:00:00Z"', '"2026-01-01T00:00:60Z"', '"20260101T000000Z"',
     '"2026-01-01T00\\u003a00:00Z"', '"2026\\u002d01-01T00:00:00Z"', '"2026-01-01T00:00:00-23:59"',
     '"9999-12-31T23:59:59Z"', '"2026-01-01T00:00:00+24:00"', '"1767225600"'],
)  # fmt: skip
_IDS = mostly([json.dumps(CUSTOMER)], [json.dumps(text) for text in (CUSTOMER.upper(), UNKNOWN, OTHERS_CUSTOMER, "c")])
_VALUES = mostly(["5", "1.5", '"text"', "true", '"a:b"', "-0", "1e5", '"a\\u0026b"'], [*_WILD, "9" * 27])
_COUNTS = mostly(["1", "0", "12"], [*_WILD, "1.0", '"5"', "9" * 27, "-1"])
_WORDS = mostly(['"v"', '"a:b"', '""'], _WILD)


@st.composite
def objects(draw: st.DrawFn, known: dict[str, Text]) -> str:
    """A JSON object in text: nearly always the known keys; sometimes one twice, disguised, missing or unknown."""
    pairs = [(json.dumps(key), draw(values)) for key, values in known.items() if draw(st.integers(0, 15))]
    if not draw(st.integers(0, 9)):
        key = draw(st.sampled_from(["k", *known]))
        disguised = "".join(f"\\u{ord(letter):04x}" for letter in key)
        name = draw(st.sampled_from([key, key, disguised]))
        value = draw(known[key] if key in known and draw(st.booleans()) else st.sampled_from(_WILD))
        pairs.insert(draw(st.integers(0, len(pairs))), (f'"{name}"', value))
    space = draw(_SPACES)
    return "{" + ",".join(f"{space}{key}{space}:{space}{value}" for key, value in pairs) + space + "}"


_COST = objects({
    "amount": mostly(["0", "-5", "0.0425", "99999", "99999.99"], [*_WILD, "100000", "99999.9999999999999", '"5"']),
    "currency": mostly(['"usd"'], ['"USD"', '"xusd:"', *_WILD]),
})  # fmt: skip
_LLM = objects({
    "vendor": _WORDS, "model": _WORDS, "input_tokens": _COUNTS, "output_tokens": _COUNTS, "total_tokens": _COUNTS,
    "cached_input_tokens": _COUNTS,
})  # fmt: skip
_PLAIN_METADATA = objects({"a": _VALUES, "b": _VALUES})
_ODD_KEYS = objects({'a"b': _VALUES, "a\\b": _VALUES, "a\nb": _VALUES, "": _VALUES, "é": _VALUES, "field_0": _VALUES})
_MARKED_KEYS = objects({"&": _VALUES, '<">:': _VALUES, "\x1f": _VALUES})
_RICH_METADATA = objects({"a": _VALUES, "_cost": _COST, "_llm": _LLM})
METADATA = st.one_of(_PLAIN_METADATA, _ODD_KEYS, _MARKED_KEYS, objects({"_cost": _COST}), _RICH_METADATA)
EVENTS = objects({
    "name": NAMES, "external_customer_id": mostly(['"u"'], _WILD), "timestamp": _TIMES, "metadata": METADATA,
    "external_id": mostly(['"x"', '""', "null"], _WILD), "parent_id": mostly(['"p"', "null"], _WILD),
})  # fmt: skip
BY_ID = objects({
    "name": NAMES, "customer_id": _IDS, "metadata": METADATA, "organization_id": mostly(["null"], _WILD),
})  # fmt: skip


class Pairs(list[tuple[str, object]]):
    """A JSON object with all its keys."""


def repeats_a_key(value: object) -> bool:
    """Whether an object, or one in it, gives a key twice."""
    if not isinstance(value, Pairs):
        return False
    return len({key for key, _ in value}) < len(value) or any(repeats_a_key(inner) for _, inner in value)
