"""Bodies whose events all have the same keys, read as records of one shape: 1.4 us an event instead of 2.4.

A program writes its events alike. Where the keys are not known beforehand, each event becomes a dictionary, and each
key a text of its own; where they are, C code fills the fields of a record, and the body must have a certain number of
colons at least. If it has no more, then no key is given twice.

A shape is the tree of keys of a body's first event, made into types once it came three times. The types are those of
``ingest.plain``, every key is needed and no other allowed. A body that does not fit exactly (another key in one event,
null for a name or an id, an escape that could hide something) is for ``ingest.plain`` to read: this module is narrower
than that one in everything, and wider in nothing; a property test holds the two together.
"""

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from ingest.plain import HIDING, Cents, Currency, Integer, Name, Number, Text, Time

BODY_BYTES_MIN = 4_096
"""A smaller body has too few events to pay for looking at the first one."""

FIRST_BYTES_MAX = 8_192
"""Bytes of a first event that is looked at: a program's events are far smaller."""

KEYS_MAX = 32
"""Keys of an event with a shape: to find a field that comes in another order, C code compares it with all of them."""

SIGHTINGS_MIN = 3
"""How often a tree of keys comes before types are made of it, which takes a millisecond at most."""

SHAPES_MAX = 512
"""Trees that are remembered with their types, 14 kB each as a rule; as many again are counted at a time."""

MISSES_MAX = 16
"""How many bodies more may be decoded in vain than with success before a tree is given up: some are always odd."""

FORGET_BODIES = 100_000
"""Bodies after which everything is learned anew, because what came then may never come again."""

_EVENT = {
    "name": Name, "external_customer_id": str, "timestamp": Time, "external_id": str, "customer_id": str | None,
    "member_id": str | None, "external_member_id": str | None, "parent_id": str | None,
}  # fmt: skip
_EVENT_KNOWN = _EVENT.keys() | {"metadata"}
_EVENT_NEEDED = frozenset({"name", "external_customer_id"})
_SCALAR = Text | Integer | Number | bool
_NESTED: dict[str, dict[str, Any]] = {
    "_cost": {"amount": Cents, "currency": Currency},
    "_llm": {
        "vendor": str, "model": str, "input_tokens": Integer, "output_tokens": Integer, "total_tokens": Integer,
        "cached_input_tokens": Integer,
    },
}  # fmt: skip
_MAY_LACK = frozenset({"cached_input_tokens"})
_BETWEEN = re.compile(rb"\}\s*,\s*\{")  # two events, if no text looks like that; then the first one is not read
_TIME_COLONS = 2  # between hours, minutes and seconds

Keys = tuple[str, ...]


class Tree(NamedTuple):
    """The keys of an event, of its metadata, and of the objects in there that have a meaning."""

    event: Keys
    metadata: Keys
    nested: tuple[tuple[str, Keys], ...]

    @property
    def keys(self) -> int:
        """How many there are."""
        return len(self.event) + len(self.metadata) + sum(len(inner) for _, inner in self.nested)


class Shape(msgspec.Struct):
    """How to read a body of such events, what to count in it, and how often that was in vain."""

    decode: Callable[[bytes], Any]
    keys: int  # of an event, with all that is in it
    named: bool  # its events have external ids
    timed: bool  # and times
    misses: int = 0


class Shaped(NamedTuple):
    """The events of a body as records, with those attributes of ``Plain`` that were given; their ids and times."""

    events: Sequence[Any]
    external_ids: list[str | None]
    times: list[datetime]


class Shapes:
    """The shapes that came lately. Any thread may ask; what two of them meet at a time is counted as it comes."""

    def __init__(self, body_bytes_min: int = BODY_BYTES_MIN) -> None:
        self._body_bytes_min = body_bytes_min
        self._sightings: dict[Tree, int] = {}
        self._shapes: dict[Tree, Shape] = {}
        self._bodies = 0

    def read(self, body: bytes) -> Shaped | None:
        """The events of ``{"events": [...]}``, in UTF-8, if they have one shape that is known; None otherwise."""
        end = _BETWEEN.search(body, 0, FIRST_BYTES_MAX) if len(body) >= self._body_bytes_min else None
        if end is None or (b"\\" in body and HIDING.search(body)):
            return None
        shape = self._shape(body[body.find(b"[") + 1 : end.start() + 1])
        if shape is None or shape.misses > MISSES_MAX:
            return None
        found = _read(body, shape)
        shape.misses = shape.misses + 1 if found is None else max(shape.misses - 1, 0)
        return found

    def _shape(self, first: bytes) -> Shape | None:
        self._bodies += 1
        if self._bodies > FORGET_BODIES:
            self._bodies, self._sightings, self._shapes = 0, {}, {}
        tree = _tree(first)
        if tree is None:
            return None
        shape = self._shapes.get(tree)
        if shape is None and len(self._shapes) < SHAPES_MAX:
            self._meet(tree)
        return shape

    def _meet(self, tree: Tree) -> None:
        """Count a tree that has no shape yet, and make it one when it came often enough."""
        sightings = self._sightings.pop(tree, 0) + 1
        if sightings >= SIGHTINGS_MIN:
            self._shapes[tree] = _made(tree)
            return
        if len(self._sightings) >= SHAPES_MAX:
            self._sightings = {}
        self._sightings[tree] = sightings


def _tree(event: bytes) -> Tree | None:
    """The keys of an event, if it could have a shape."""
    try:
        found = msgspec.json.decode(event)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not isinstance(found, dict) or not _EVENT_NEEDED <= found.keys() <= _EVENT_KNOWN:
        return None
    metadata = found.get("metadata", {})
    if not isinstance(metadata, dict) or not all(map(_spelled_out, metadata)):
        return None
    nested = [(name, metadata[name]) for name in _NESTED if name in metadata]
    if not all(isinstance(inner, dict) and _is_plain(name, inner) for name, inner in nested):
        return None
    tree = Tree(tuple(found), tuple(metadata), tuple((name, tuple(inner)) for name, inner in nested))
    return tree if tree.keys <= KEYS_MAX else None


def _spelled_out(key: str) -> bool:
    """Whether JSON writes the key as it is, as the names of a record's fields have to be."""
    return key.isprintable() and '"' not in key and "\\" not in key


def _is_plain(name: str, inner: dict[str, Any]) -> bool:
    return _NESTED[name].keys() - _MAY_LACK <= inner.keys() <= _NESTED[name].keys()


def _made(tree: Tree) -> Shape:
    """The tree as types."""
    inside = {name: _record({key: _NESTED[name][key] for key in inner}) for name, inner in tree.nested}
    metadata = _record({key: inside.get(key, _SCALAR) for key in tree.metadata})
    fields = [(key, _EVENT.get(key, metadata)) for key in tree.event]
    event = msgspec.defstruct("Event", fields, gc=False, forbid_unknown_fields=True)
    body = msgspec.defstruct("Body", [("events", list[event])], gc=False)  # type: ignore[valid-type]
    decode = msgspec.json.Decoder(body).decode
    return Shape(decode, tree.keys, named="external_id" in tree.event, timed="timestamp" in tree.event)


def _record(types: dict[str, Any]) -> type[msgspec.Struct]:
    """A record of these keys, every one of them needed. A key need not be a name in Python, so fields have numbers."""
    names = {f"field_{number}": key for number, key in enumerate(types)}
    fields = list(zip(names, types.values(), strict=True))
    return msgspec.defstruct("Record", fields, rename=names, gc=False, forbid_unknown_fields=True)


def _read(body: bytes, shape: Shape) -> Shaped | None:
    try:
        events = shape.decode(body).events
    except (msgspec.MsgspecError, RecursionError):
        return None
    if not _no_key_twice(body, len(events), shape):
        return None
    external_ids = [event.external_id for event in events] if shape.named else [None] * len(events)
    return Shaped(events, external_ids, [event.timestamp for event in events] if shape.timed else [])


def _no_key_twice(body: bytes, events: int, shape: Shape) -> bool:
    keys = 1 + shape.keys * events
    if body.count(b":") == keys + shape.timed * _TIME_COLONS * events:
        return True
    # Some texts have colons. If no blank stands before any, each key ends in a quote and a colon; a text that has both
    # is only one too many.
    apart = any(blank in body and blank + b":" in body for blank in (b" ", b"\n", b"\t", b"\r"))
    return not apart and body.count(b'":') == keys
