"""Read what a call used from a report of any vendor or library: one table of names for each meaning.

Every strategy for language models reads this table. A name that a vendor invents is added here, once, and is then
understood wherever it appears: in the vendor's own answer, in LangChain's copy of it, and on a span.

A name is a path whose parts are separated by "/". ``[IMAGE]`` picks the entries of a list by their modality or by
their time to live, and `` + `` adds two paths. Of several names, the first that has a number counts.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from msgspec.structs import replace

from ingest.client.strategy import Tokens, count, inclusive, items, read, text

_SPAN = "gen_ai.usage."
_OPENINFERENCE = "llm.token_count."
_TIERS = ("flex_", "priority_")
"""langchain-openai puts the service tier before the names of details."""


def _tiered(name: str, detail: str) -> tuple[str, ...]:
    return f"{name}/{detail}", *(f"{name}/{tier}{detail}" for tier in _TIERS)


COUNTS: Mapping[str, tuple[str, ...]] = {
    "input": (
        "prompt_tokens", "input_tokens", "prompt_token_count + tool_use_prompt_token_count", "inputTokens",
        _SPAN + "input_tokens", _SPAN + "prompt_tokens", _OPENINFERENCE + "prompt",
    ),
    "cached": (
        "prompt_tokens_details/cached_tokens", "input_tokens_details/cached_tokens", "cache_read_input_tokens",
        "cached_content_token_count", *_tiered("input_token_details", "cache_read"), "cache_read_tokens",
        "cacheReadInputTokens", "prompt_cache_hit_tokens", "cached_tokens", _SPAN + "cache_read.input_tokens",
        _SPAN + "cache_read_input_tokens", _SPAN + "cached_tokens", _SPAN + "details.cache_read_tokens",
        _OPENINFERENCE + "prompt_details.cache_read", _OPENINFERENCE + "prompt_details.cache_input",
    ),
    "cache_write": (
        "prompt_tokens_details/cache_write_tokens", "input_tokens_details/cache_write_tokens",
        "cache_creation_input_tokens", *_tiered("input_token_details", "cache_creation"), "cache_write_tokens",
        "cacheWriteInputTokens", "prompt_tokens_details/cache_creation_tokens",
        "prompt_tokens_details/cache_creation_input_tokens", _SPAN + "cache_creation.input_tokens",
        _SPAN + "cache_write.input_tokens", _SPAN + "cache_creation_input_tokens",
        _SPAN + "cache_write_input_tokens", _SPAN + "details.cache_write_tokens",
        _OPENINFERENCE + "prompt_details.cache_write",
    ),
    "output": (
        "completion_tokens", "output_tokens", "candidates_token_count + thoughts_token_count", "outputTokens",
        _SPAN + "output_tokens", _SPAN + "completion_tokens", _OPENINFERENCE + "completion",
    ),
    "total": ("total_tokens", _OPENINFERENCE + "total"),
    "reasoning": (
        "completion_tokens_details/reasoning_tokens", "output_tokens_details/reasoning_tokens",
        "output_tokens_details/thinking_tokens", "thoughts_token_count",
        *_tiered("output_token_details", "reasoning"), "output_reasoning_tokens", "details/reasoning_tokens",
        "details/thinking_tokens", "details/thoughts_tokens", "reasoning_tokens",
        _SPAN + "reasoning.output_tokens", _SPAN + "reasoning_tokens", _SPAN + "details.reasoning_tokens",
        _SPAN + "details.thinking_tokens", _SPAN + "details.thoughts_tokens",
        _OPENINFERENCE + "completion_details.reasoning",
    ),
}  # fmt: skip
"""The counts of ``Tokens``, by the names that vendors and libraries have for them."""

DETAILS: Mapping[str, tuple[str, ...]] = {
    "cache_write_5m_tokens": (
        "cache_creation/ephemeral_5m_input_tokens", "input_token_details/ephemeral_5m_input_tokens",
        "prompt_tokens_details/cache_creation_token_details/ephemeral_5m_input_tokens",
        "prompt_tokens_details/cache_creation/ephemeral_5m_input_tokens", "cacheDetails[5m]",
    ),
    "cache_write_1h_tokens": (
        "cache_creation/ephemeral_1h_input_tokens", "input_token_details/ephemeral_1h_input_tokens",
        "prompt_tokens_details/cache_creation_token_details/ephemeral_1h_input_tokens", "cacheDetails[1h]",
        "cache_write_1h_tokens", "details/ephemeral_1h_input_tokens", _SPAN + "details.cache_write_1h_tokens",
        _SPAN + "details.ephemeral_1h_input_tokens",
    ),
    "input_audio_tokens": (
        "prompt_tokens_details/audio_tokens", "input_tokens_details/audio_tokens",
        "prompt_tokens_details[AUDIO] + tool_use_prompt_tokens_details[AUDIO]", "input_token_details/audio",
        "input_audio_tokens", _SPAN + "details.input_audio_tokens", _OPENINFERENCE + "prompt_details.audio",
    ),
    "input_image_tokens": (
        "prompt_tokens_details/image_tokens", "input_tokens_details/image_tokens",
        "prompt_tokens_details[IMAGE] + tool_use_prompt_tokens_details[IMAGE]", "input_image_tokens",
    ),
    "input_video_tokens": (
        "prompt_tokens_details/video_tokens", "prompt_tokens_details[VIDEO] + tool_use_prompt_tokens_details[VIDEO]",
        "input_video_tokens",
    ),
    "output_audio_tokens": (
        "completion_tokens_details/audio_tokens", "candidates_tokens_details[AUDIO]", "output_token_details/audio",
        "output_audio_tokens", "details/audio_candidates_tokens", _SPAN + "details.output_audio_tokens",
        _SPAN + "details.audio_candidates_tokens", _OPENINFERENCE + "completion_details.audio",
    ),
    "output_image_tokens": (
        "completion_tokens_details/image_tokens", "output_tokens_details/image_tokens",
        "candidates_tokens_details[IMAGE]", "output_image_tokens", "details/image_candidates_tokens",
        _SPAN + "details.image_candidates_tokens",
    ),
    "output_video_tokens": (
        "completion_tokens_details/video_tokens", "candidates_tokens_details[VIDEO]", "output_video_tokens",
        "details/video_candidates_tokens", _SPAN + "details.video_candidates_tokens",
    ),
    "web_searches": (
        "server_tool_use/web_search_requests", "prompt_tokens_details/web_search_requests", "web_searches",
        "details/web_search_requests", _SPAN + "details.web_search_requests",
    ),
    "social_searches": ("social_searches",),
    "storage_searches": ("storage_searches",),
    "code_executions": ("code_executions",),
}  # fmt: skip
"""What has a price of its own, named as genai-prices names it."""

CACHED_DETAILS: Mapping[str, str] = {
    "cache_audio_read_tokens": "cache_tokens_details[AUDIO]",
    "cache_image_read_tokens": "cache_tokens_details[IMAGE]",
    "cache_video_read_tokens": "cache_tokens_details[VIDEO]",
}
"""What was read from a cache, by modality. A zero is told, too: without it nobody knows that it was all text."""

UNPRICED: Mapping[str, str] = {
    "num_sources_used": "live search",
    "citation_tokens": "citing",
    "prompt_audio_seconds": "audio by the second",
    "input_tokens_details/cache_write_tokens_details/ttl_12h_tokens": "a write kept for twelve hours",
    "prompt_tokens_details/cache_write_tokens_details/ttl_12h_tokens": "a write kept for twelve hours",
    "prompt_tokens_details/google_maps_grounding_requests": "grounding with maps",
    "details/advisor_iterations": "an advisor",
}
"""Counts of what is billed beside the tokens at a price that no list has."""

TERMS: Mapping[str, tuple[str, ...]] = {
    "service_tier": (
        "service_tier", "traffic_type", "serviceTier/type", "openai.response.service_tier",
        "gen_ai.openai.response.service_tier", "gen_ai.response.service_tier",
    ),
    "speed": ("speed", "anthropic.response.speed", "gen_ai.response.speed"),
    "inference_geo": ("inference_geo", "anthropic.response.inference_geo", "gen_ai.response.inference_geo"),
}  # fmt: skip
"""What else decides the price."""

_TRAFFIC = {"ON_DEMAND": "standard", "ON_DEMAND_FLEX": "flex", "ON_DEMAND_PRIORITY": "priority"}
"""Google's types of traffic that are service tiers; a provisioned one is paid for in another way."""

_ITERATIONS = ("message", "compaction", "advisor_message", "fallback_message")
_DEPTH_MAX = 8  # levels of a request that are looked at; a block of a message is at the fifth


def read_tokens(usage: Any, *, is_cache_beside: bool = False) -> Tokens:
    """Return what a report of usage says, whoever made it.

    Args:
        usage: An object or a dictionary, as the vendor or the library reports it.
        is_cache_beside: Whether the input does not include what was read from a cache and written to one. Reports
            that cannot be true otherwise are understood in this way without being asked to.
    """
    cached = _number(usage, COUNTS["cached"])
    details = read_details(usage)
    kept = details.get("cache_write_5m_tokens", 0) + details.get("cache_write_1h_tokens", 0)
    written = max(_number(usage, COUNTS["cache_write"]), kept)
    told = _number(usage, COUNTS["input"])
    whole = told + cached + written if is_cache_beside else inclusive(told, cached, written)
    reasoning = _number(usage, COUNTS["reasoning"])
    return Tokens(
        input=whole,
        cached=cached,
        cache_write=written,
        output=inclusive(max(_number(usage, COUNTS["output"]), _number(usage, COUNTS["total"]) - whole), reasoning),
        reasoning=reasoning,
        details=details,
    )


class Part(NamedTuple):
    """What one model used of an Anthropic message.

    ``kind`` is ``answer`` for the model that answered, ``declined`` for one before it that gave way to it, and
    ``advice`` for an advisor that it asked.
    """

    kind: str
    model: str
    tokens: Tokens

    @property
    def is_advice(self) -> bool:
        """Whether it is an advisor's turn."""
        return self.kind == "advice"


def parts_by_model(usage: Any, model: str, requested: str) -> list[Part]:
    """Return what each model used of an Anthropic message, by its ``usage``; the answer's part is the last.

    ``model`` is the one that answered, as far as the message says, and ``requested`` the one that was asked.

    The message's own numbers leave compactions and advisors out. Where a model declined and another one answered,
    only ``iterations`` tell the two apart; what is told for the message alone (searches, thinking) is the answer's.
    """
    kinds = {kind: [each for each in items(usage, "iterations") if text(each, "type") == kind] for kind in _ITERATIONS}
    advice = [Part("advice", text(each, "model"), _beside(each)) for each in kinds["advisor_message"]]
    if not kinds["fallback_message"]:
        return [*advice, Part("answer", model, sum(map(_beside, kinds["compaction"]), _beside(usage)))]
    spent: dict[str, Tokens] = {}
    for each in (*kinds["compaction"], *kinds["message"], *kinds["fallback_message"]):
        name = text(each, "model") or requested
        spent[name] = spent.get(name, Tokens()) + _beside(each)
    answering = text(kinds["fallback_message"][-1], "model") or model
    answer, whole = spent.pop(answering), _beside(usage)
    searches = {name: number for name, number in whole.details.items() if name == "web_searches"}
    answer = replace(answer + Tokens(details=searches), reasoning=min(whole.reasoning, answer.output))
    declined = [Part("declined", name, tokens) for name, tokens in spent.items()]
    return [*advice, *declined, Part("answer", answering, answer)]


def _beside(usage: Any) -> Tokens:
    return read_tokens(usage, is_cache_beside=True)


def read_details(usage: Any) -> dict[str, int]:
    """Return what has a price of its own and was used at all."""
    found = {meaning: number for meaning, names in DETAILS.items() if (number := _number(usage, names))}
    if read(usage, "cache_tokens_details") is not None:
        told = {meaning: _added(usage, name) for meaning, name in CACHED_DETAILS.items()}
        found |= {name: number for name, number in told.items() if number or _uncached(name) in found}
    return found


def _uncached(name: str) -> str:
    return name.replace("cache_", "input_").replace("_read", "")


def read_terms(*sources: Any) -> dict[str, str]:
    """Return what decides the price beside the tokens, as the first source that tells it says it."""
    found = {meaning: _words(sources, names) for meaning, names in TERMS.items()}
    return {meaning: words for meaning, words in found.items() if words}


def tier_in_names(usage: Any) -> str:
    """Return the service tier that langchain-openai puts before the names of details; '' where there is none."""
    names = read(usage, "input_token_details")
    tiers = (tier.rstrip("_") for tier in _TIERS)
    return next((tier for tier in tiers if isinstance(names, Mapping) and tier in names), "")


def read_unpriced(usage: Any) -> str:
    """Return what is billed beside the tokens at a price that nobody lists; '' where there is nothing."""
    return next((words for name, words in UNPRICED.items() if _added(usage, name)), "")


def kept_as_asked(tokens: Tokens, *requests: Any) -> Tokens:
    """Return tokens that say how long what was written to a cache is kept, where the requests leave no doubt.

    A write is kept for five minutes unless an hour was asked for, which costs more. Where one was, and the report
    does not say of how many tokens, nobody knows.
    """
    is_told = "cache_write_5m_tokens" in tokens.details or "cache_write_1h_tokens" in tokens.details
    if is_told or not tokens.cache_write or asks_for_an_hour(requests):
        return tokens
    return replace(tokens, details={**tokens.details, "cache_write_5m_tokens": tokens.cache_write})


def asks_for_an_hour(request: Any, depth: int = _DEPTH_MAX) -> bool:
    """Return whether a request wants anything kept in a cache for an hour, wherever in it that is said."""
    if depth == 0 or isinstance(request, str):
        return False
    if isinstance(request, list | tuple):
        return any(asks_for_an_hour(part, depth - 1) for part in request)
    fields = request if isinstance(request, Mapping) else getattr(request, "__dict__", {})
    return fields.get("ttl") == "1h" or any(asks_for_an_hour(part, depth - 1) for part in fields.values())


def _words(sources: Iterable[Any], names: Iterable[str]) -> str:
    found = next((each for source in sources for name in names if (each := text(source, *name.split("/")))), "")
    plain = str.__str__(found)  # an enumeration's member is its name
    return _TRAFFIC.get(plain, plain)


def _number(usage: Any, names: Iterable[str]) -> int:
    return next((found for name in names if (found := _added(usage, name))), 0)


def _added(usage: Any, name: str) -> int:
    return sum(_counted(usage, parts, picked) for parts, picked in _paths(name))


@cache
def _paths(name: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    paths = (path.partition("[") for path in name.split(" + "))
    return tuple((tuple(path.split("/")), picked.rstrip("]")) for path, _, picked in paths)


def _counted(usage: Any, parts: tuple[str, ...], picked: str) -> int:
    if not picked:
        return count(usage, *parts)
    entries = (each for each in items(usage, *parts) if picked in (text(each, "modality"), text(each, "ttl")))
    return sum(count(each, "token_count") or count(each, "inputTokens") for each in entries)
