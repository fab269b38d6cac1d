"""The conformance cases: what Polar does, case by case, restated independently of its code.

``polar-cases.json`` explains its own form. Numbers are decoded exactly, because 5 and 5.0 are different tokens and the
difference shows. A case in ``differences.py`` states what Polar does and this product, on purpose, does not.
"""

from decimal import Decimal
from pathlib import Path
from typing import Any

from meters import exact_json

TOLERANCE = Decimal("1e-9")  # relative; the file's own, since Polar's numbers are doubles


def cases(*groups: str) -> list[dict[str, Any]]:
    """The cases of some groups (of all groups when none is named), in the order of the file."""
    document = exact_json.decode((Path(__file__).parent / "polar-cases.json").read_bytes())
    return [case for case in document["cases"] if not groups or case["group"] in groups]


def same_number(ours: Decimal, theirs: Decimal | int) -> bool:
    """Whether a number of ours is the double that Polar answers."""
    expected = Decimal(theirs)
    return abs(ours - expected) <= TOLERANCE * max(abs(expected), abs(ours))
