"""Entries of the ``detail`` list in a 422: what is wrong, where, and with which input."""

from typing import TypedDict

COMPLAINTS_MAX = 100
"""Complaints about one thing that somebody made, and entries of one answer: what is wrong is refused in any case, and
nobody reads more. A body of a megabyte holds some hundred thousand mistakes."""


class Detail(TypedDict):
    """One complaint, in the shape that Polar's clients read."""

    type: str
    loc: list[str | int]
    msg: str
    input: object


def detail(type: str, loc: tuple[str | int, ...], msg: str, input: object = None) -> Detail:
    """One complaint at ``loc``."""
    return {"type": type, "loc": list(loc), "msg": msg, "input": input}
