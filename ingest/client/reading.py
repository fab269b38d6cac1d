"""What lies in the answers of other libraries, read so that nothing unexpected in them hurts.

Responses come as objects, as dictionaries, and as objects that hold dictionaries.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def read(source: Any, *path: str) -> Any:
    """What lies at a path of attributes or keys, None when there is no such thing."""
    for name in path:
        source = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if source is None:
            return None
    return source


def count(source: Any, *path: str) -> int:
    """The whole number at a path; 0 when there is none or it is not a number of things."""
    found = read(source, *path)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1 << 53:
        return 0
    return int(found)


def items(source: Any, *path: str) -> Sequence[Any]:
    """The list at a path, or an empty one."""
    found = read(source, *path)
    return found if isinstance(found, list | tuple) else ()


def text(source: Any, *path: str) -> str:
    """The text at a path, or ''."""
    found = read(source, *path)
    return found if isinstance(found, str) else ""
