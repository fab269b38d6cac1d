"""What a vendor did beside answering, and bills beside the tokens: searches, code, pictures, turns of other models.

The blocks of an answer tell it, in the vendor's own shapes and in the one that LangChain makes of them.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ingest.client.strategy import details, items, text

WEB, STORAGE = "web_searches", "storage_searches"
_SEARCHES = {"web_search_call": WEB, "web_search_tool_result": WEB, "file_search_call": STORAGE}
"""Blocks that are a search."""

_NAMED = {"web_search": WEB, "file_search": STORAGE}
"""Searches by the name of the tool, where the block is LangChain's own."""

_UNPRICED = {
    "code_interpreter_call": "code",
    "image_generation_call": "an image",
    "code_interpreter": "code",
    "image_generation": "an image",
    "compaction": "a compaction",
    "fallback": "another model's turn",
    "advisor_tool_result": "an advisor's turn",
}
"""Blocks and tools whose price is not one for each of them."""

_GROUNDS = ("web_search_queries", "image_search_queries", "retrieval_queries", "grounding_chunks")
_SOUNDS = ("audio", "input_audio", "video")
_DEPTH_MAX = 8  # levels of a request; a block of a message is at the fourth


class Billed(NamedTuple):
    """Searches by their kind, and what has no known price, '' where there is nothing."""

    searches: dict[str, int]
    unpriced: str


def billed_tools(blocks: Iterable[Any]) -> Billed:
    """Return what the blocks of an answer tell of tools that the vendor itself ran."""
    searches = {WEB: 0, STORAGE: 0}
    unpriced = ""
    for block in blocks:
        kind = text(block, "type")
        is_named = kind == "server_tool_call"
        name = text(block, "name") if is_named else kind
        counted = (_NAMED if is_named else _SEARCHES).get(name)
        if counted is not None:
            searches[counted] += _is_billed(block)
        unpriced = unpriced or _UNPRICED.get(name, "")
    return Billed(details(**searches), unpriced)


def _is_billed(block: Any) -> bool:
    """Opening a page that was found is free, and so is a search that failed."""
    action = text(block, "action", "type") or text(block, "args", "type")
    return action in ("", "search") and "error" not in text(block, "content", "type")


def searches_unseen(request: Mapping[str, Any], model: str) -> bool:
    """Return whether OpenAI's chats search in this call: they do not say how often."""
    return bool(request.get("web_search_options") is not None or "-search-" in model)


def is_grounded(grounding: Any) -> bool:
    """Return whether Google looked anything up: the price of it depends on the account's daily allowance."""
    return any(items(grounding, name) for name in _GROUNDS)


def has_sound(request: Any, depth: int = _DEPTH_MAX) -> bool:
    """Return whether a request has audio or video in it, whose tokens may cost more than those of text."""
    if depth == 0 or isinstance(request, str):
        return False
    if isinstance(request, list | tuple):
        return any(has_sound(part, depth - 1) for part in request)
    fields = request if isinstance(request, Mapping) else getattr(request, "__dict__", {})
    kinds = (text(fields, "type"), text(fields, "mime_type").partition("/")[0])
    return any(kind in _SOUNDS for kind in kinds) or any(has_sound(part, depth - 1) for part in fields.values())
