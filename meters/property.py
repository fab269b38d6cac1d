"""How a meter names what it reads of an event.

A property is a dotted path into the metadata, save for three built-in names. One leading ``metadata.`` is taken off
when a property is parsed and not shown again, unless the path itself begins with a key of that name: then it is shown,
or reading what was written would take off another. So metadata keys that are called like a built-in, or contain a dot,
cannot be reached.
"""

from meters.detail import Detail, detail

PREFIX = "metadata."
NAME = "name"
SOURCE = "source"
TIMESTAMP = "timestamp"
BUILT_INS = frozenset({NAME, SOURCE, TIMESTAMP})

PROPERTY_LENGTH_MAX = 1000
"""Characters of a property: as long as a filter's text value may be; no key that anyone sends comes near."""


def parse_property(name: object, loc: tuple[str | int, ...]) -> str | Detail:
    """A property from decoded JSON, without one leading ``metadata.``, or why it is none."""
    if not isinstance(name, str):
        return detail("string_type", loc, "Input should be a valid string", name)
    if len(name) > PROPERTY_LENGTH_MAX:
        message = f"String should have at most {PROPERTY_LENGTH_MAX} characters"
        return detail("string_too_long", loc, message, name)
    return name.removeprefix(PREFIX)


def written(property: str) -> str:
    """The inverse of ``parse_property``."""
    return PREFIX + property if property.startswith(PREFIX) else property


def is_built_in(name: str) -> bool:
    """Whether the property is a column of the event and not in its metadata."""
    return name in BUILT_INS
