"""UUIDs in text: the forms that are taken, and the one that is kept."""

import re

from meters.refusal import Reason

_HYPHENATED = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_FORMS = re.compile(rf"({_HYPHENATED})|([0-9a-f]{{32}})|\{{({_HYPHENATED})\}}|urn:uuid:({_HYPHENATED})")
_VERSION = 12  # the hex digit that says the version
_VARIANT = 16  # the hex digit that says the variant


def parse_uuid4(value: object) -> str | Reason:
    """The UUID in lower case with hyphens, or the reason why it is none of version 4."""
    if not isinstance(value, str):
        return Reason.UUID_TYPE
    found = _FORMS.fullmatch(value.lower())
    if not found:
        return Reason.UUID_PARSING
    digits = next(form for form in found.groups() if form).replace("-", "")
    if digits[_VERSION] != "4" or digits[_VARIANT] not in "89ab":
        return Reason.UUID_VERSION
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
