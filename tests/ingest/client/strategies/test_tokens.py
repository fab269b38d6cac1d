"""What vendors report, in the shapes they report it, and what it is in Meterstream: the same thing for each of them."""

from datetime import datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.client.strategies import litellm, opentelemetry, pydantic_ai
from ingest.client.strategy import ModelCall, Tokens, cents, characters_in
from ingest.client.testing import RecordingIngestion
from ingest.client.tools import billed_tools, has_sound
from ingest.client.usage import kept_as_asked, parts_by_model, read_terms, read_tokens
from tests.vendors.truths import check

SAME = Tokens(input=1000, cached=600, cache_write=100, output=300, reasoning=200)
"""One call, as every vendor would report it."""


def spaced(shape: Any) -> Any:
    """The same shape made of objects instead of dictionaries."""
    if isinstance(shape, dict):
        return SimpleNamespace(**{key: spaced(value) for key, value in shape.items()})
    return [spaced(part) for part in shape] if isinstance(shape, list) else shape


OPENAI_CHAT = {
    "prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300,
    "prompt_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 100},
    "completion_tokens_details": {"reasoning_tokens": 200},
}  # fmt: skip
OPENAI_RESPONSE = {
    "input_tokens": 1000, "output_tokens": 300, "total_tokens": 1300,
    "input_tokens_details": {"cached_tokens": 600, "cache_write_tokens": 100},
    "output_tokens_details": {"reasoning_tokens": 200},
}  # fmt: skip
ANTHROPIC = {
    "input_tokens": 300, "cache_read_input_tokens": 600, "cache_creation_input_tokens": 100, "output_tokens": 300,
    "output_tokens_details": {"thinking_tokens": 200},
}  # fmt: skip
GOOGLE = {
    "prompt_token_count": 900, "tool_use_prompt_token_count": 100, "cached_content_token_count": 600,
    "candidates_token_count": 100, "thoughts_token_count": 200, "total_token_count": 1300,
}  # fmt: skip
LANGCHAIN = {
    "input_tokens": 1000, "output_tokens": 300, "total_tokens": 1300,
    "input_token_details": {"cache_read": 600, "cache_creation": 100}, "output_token_details": {"reasoning": 200},
}  # fmt: skip
LITELLM_OF_ANTHROPIC = {
    "prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300, "cache_read_input_tokens": 600,
    "cache_creation_input_tokens": 100, "prompt_tokens_details": {"cached_tokens": 600},
    "completion_tokens_details": {"reasoning_tokens": 200},
}  # fmt: skip
PYDANTIC = {"input_tokens": 1000, "cache_read_tokens": 600, "cache_write_tokens": 100, "output_tokens": 300,
            "details": {"reasoning_tokens": 200}}  # fmt: skip
SPAN = {
    "gen_ai.usage.input_tokens": 1000, "gen_ai.usage.cache_read.input_tokens": 600, "gen_ai.usage.output_tokens": 300,
    "gen_ai.usage.cache_creation.input_tokens": 100, "gen_ai.usage.reasoning.output_tokens": 200,
}  # fmt: skip
BEDROCK = {"inputTokens": 300, "outputTokens": 300, "totalTokens": 1300, "cacheReadInputTokens": 600,
           "cacheWriteInputTokens": 100}  # fmt: skip
DEEPSEEK = {"prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300, "prompt_cache_hit_tokens": 600,
            "prompt_cache_miss_tokens": 400, "completion_tokens_details": {"reasoning_tokens": 200}}  # fmt: skip
MOONSHOT = {"prompt_tokens": 1000, "completion_tokens": 300, "total_tokens": 1300, "cached_tokens": 600}
QWEN = OPENAI_CHAT | {"prompt_tokens_details": {"cached_tokens": 600, "cache_creation_input_tokens": 100}}
OPENINFERENCE = {
    "llm.token_count.prompt": 1000, "llm.token_count.completion": 300, "llm.token_count.total": 1300,
    "llm.token_count.prompt_details.cache_read": 600, "llm.token_count.prompt_details.cache_write": 100,
    "llm.token_count.completion_details.reasoning": 200,
}  # fmt: skip
SPANS = [SPAN, OPENINFERENCE, SPAN | {"gen_ai.usage.cache_creation.input_tokens": 0,
                                      "gen_ai.usage.cache_write.input_tokens": 100}]  # fmt: skip


def tiered(tier: str) -> dict[str, Any]:
    """What langchain-openai tells of a call in a service tier."""
    inside = {f"{tier}_cache_read": 600, f"{tier}_cache_creation": 100, tier: 400}
    return LANGCHAIN | {"input_token_details": inside, "output_token_details": {f"{tier}_reasoning": 200, tier: 100}}


@pytest.mark.parametrize(
    ("usage", "untold"),
    [
        (OPENAI_CHAT, ()),
        (OPENAI_RESPONSE, ()),
        (GOOGLE, ("cache_write",)),
        (LANGCHAIN, ()),
        (tiered("flex"), ()),
        (tiered("priority"), ()),
        (LITELLM_OF_ANTHROPIC, ()),
        (PYDANTIC, ()),
        (DEEPSEEK, ("cache_write",)),
        (MOONSHOT, ("cache_write", "reasoning")),
        (QWEN, ()),
    ],
)
def test_the_same_call_is_the_same_whoever_reports_it(usage: Any, untold: tuple[str, ...]) -> None:
    """Input, cached, written, output, reasoning and total agree, from objects and from dictionaries."""
    expected = msgspec.structs.replace(SAME, **dict.fromkeys(untold, 0))
    assert read_tokens(usage) == expected
    assert read_tokens(spaced(usage)) == expected
    assert expected.total == 1300


@pytest.mark.parametrize(("usage", "reasoning"), [(ANTHROPIC, 200), (BEDROCK, 0)])
def test_a_cache_that_is_beside_the_input_is_put_inside(usage: Any, reasoning: int) -> None:
    """Anthropic and Bedrock count what was read from a cache, and written to one, for itself."""
    for shape in (usage, spaced(usage)):
        assert read_tokens(shape, is_cache_beside=True) == msgspec.structs.replace(SAME, reasoning=reasoning)


def test_a_span_of_the_same_call() -> None:
    """Its attributes have dots in their names."""
    assert [opentelemetry.span_tokens(span) for span in SPANS] == [SAME] * 3
    assert opentelemetry.span_tokens({"http.method": "POST"}) is None
    assert opentelemetry.span_tokens(SPAN | {"total_tokens": 9000, "cached_tokens": 5}) == SAME  # the application's own


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # The reasoning is in the total alone (Grok, Gemini by OpenAI's interface).
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 35}, (10, 25)),
        # The reasoning is beside the output, and there is no total.
        ({"prompt_tokens": 10, "completion_tokens": 5, "reasoning_tokens": 20}, (10, 25)),
        # Nothing told but the input.
        ({"prompt_tokens": 8, "total_tokens": 8}, (8, 0)),
        # The cache is beside the input where it should be inside.
        (LANGCHAIN | {"input_tokens": 300}, (1000, 300)),
        (LITELLM_OF_ANTHROPIC | {"prompt_tokens": 300, "total_tokens": 600}, (1000, 300)),
        # What is no number of tokens is none.
        ({"prompt_tokens": "many", "completion_tokens": True, "total_tokens": -5}, (0, 0)),
        ({"prompt_token_count": float("nan"), "candidates_token_count": 3.0}, (0, 3)),
        ({"input_tokens": 8, "output_tokens": 2, "cache_read_input_tokens": None}, (8, 2)),
    ],
)
def test_odd_reports(usage: Any, expected: tuple[int, int]) -> None:
    """What vendors really send, and what nobody should."""
    tokens = read_tokens(usage)
    assert (tokens.input, tokens.output) == expected


def test_langchain_tells_how_long_a_cache_keeps_what_was_written() -> None:
    """langchain-anthropic then says that nothing was written, lest it count twice; others tell the sum as well."""
    parts = {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 70}
    expected = msgspec.structs.replace(SAME, details={"cache_write_5m_tokens": 30, "cache_write_1h_tokens": 70})
    for written in (0, 100):
        usage = LANGCHAIN | {"input_token_details": {"cache_read": 600, "cache_creation": written, **parts}}
        assert read_tokens(usage) == expected
    kept = [{"ttl": "5m", "inputTokens": 30}, {"ttl": "1h", "inputTokens": 70}]
    assert read_tokens(BEDROCK | {"cacheDetails": kept}, is_cache_beside=True).details == expected.details


@pytest.mark.parametrize(
    ("request_", "is_known"),
    [
        ([{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]}], True),
        ({"tools": [{"cache_control": {"type": "ephemeral", "ttl": "5m"}}]}, True),
        ({"tools": [{"cache_control": {"type": "ephemeral", "ttl": "1h"}}]}, False),
        ([SimpleNamespace(content=[{"cachePoint": {"type": "default", "ttl": "1h"}}])], False),
    ],
)
def test_writes_are_kept_for_five_minutes_unless_an_hour_was_asked_for(request_: Any, is_known: bool) -> None:
    """Where an hour was asked for and the report has one sum, nobody knows how much of it costs the double."""
    details = {"cache_write_5m_tokens": 100} if is_known else {}
    assert kept_as_asked(SAME, request_).details == details


def turns(*kinds: str, **more: Any) -> list[Any]:
    """Iterations of an Anthropic message, each half of the call."""
    half = {name: count // 2 for name, count in ANTHROPIC.items() if isinstance(count, int)}
    return [half | {"type": kind} | more for kind in kinds]


def test_a_compaction_is_part_of_the_call() -> None:
    """Anthropic's own numbers leave it out; those of the other turns are in them already."""
    expected = Tokens(input=1500, cached=900, cache_write=150, output=450, reasoning=200)
    told = ANTHROPIC | {"iterations": turns("compaction", "message")}
    for usage in (told, spaced(told)):
        assert [part.tokens for part in parts_by_model(usage, "m", "m")] == [expected]
    odd = ANTHROPIC | {"iterations": [None, 5, "compaction", {"type": 1}]}
    assert [part.tokens for part in parts_by_model(odd, "m", "m")] == [SAME]


def test_each_model_of_a_message_has_its_part() -> None:
    """The one that was asked and declined, the one that answered instead, and an advisor."""
    told = ANTHROPIC | {"iterations": [*turns("compaction", "message"), *turns("fallback_message", model="other"),
                                       *turns("advisor_message", model="wise")]}  # fmt: skip
    half = Tokens(input=500, cached=300, cache_write=50, output=150)
    for usage in (told, spaced(told)):
        advice, declined, answer = parts_by_model(usage, "other", "asked")
        assert (advice.kind, advice.model, advice.tokens) == ("advice", "wise", half)
        assert (declined.kind, declined.model, declined.tokens) == ("declined", "asked", half + half)
        assert (answer.kind, answer.model) == ("answer", "other")
        assert answer.tokens == msgspec.structs.replace(half, reasoning=150)  # the message's, as far as it goes


@pytest.mark.parametrize(
    ("source", "terms"),
    [
        ({"service_tier": "flex"}, {"service_tier": "flex"}),
        ({"traffic_type": "ON_DEMAND_FLEX"}, {"service_tier": "flex"}),
        ({"traffic_type": "PROVISIONED_THROUGHPUT"}, {"service_tier": "PROVISIONED_THROUGHPUT"}),
        ({"serviceTier": {"type": "priority"}}, {"service_tier": "priority"}),
        ({"openai.response.service_tier": "flex"}, {"service_tier": "flex"}),
        ({"gen_ai.openai.response.service_tier": "flex"}, {"service_tier": "flex"}),
        ({"speed": "fast", "inference_geo": "us"}, {"speed": "fast", "inference_geo": "us"}),
        ({"service_tier": None, "speed": 3}, {}),
    ],
)
def test_what_else_decides_the_price(source: Any, terms: dict[str, str]) -> None:
    """Every name for a service tier is one."""
    assert read_terms(None, source) == terms


def test_what_a_vendors_own_tools_did() -> None:
    """In OpenAI's words, in Anthropic's and in LangChain's; opening a page is free, and so is a search that failed."""
    found: dict[str, Any] = {"type": "web_search_tool_result", "content": [{"type": "web_search_result"}]}
    failed = {"type": "web_search_tool_result", "content": {"type": "web_search_tool_result_error"}}
    opened = {"type": "web_search_call", "action": {"type": "open_page"}}
    own = {"type": "server_tool_call", "name": "web_search", "args": {"query": "a"}}
    searched = [found, failed, opened, {"type": "web_search_call", "action": {"type": "search"}}, own]
    files = [{"type": "file_search_call"}, {"type": "server_tool_call", "name": "file_search"}]
    assert billed_tools([*searched, *files, "odd", None]) == ({"web_searches": 3, "storage_searches": 2}, "")
    assert billed_tools([{"type": "server_tool_call", "name": "code_interpreter"}]).unpriced == "code"
    assert billed_tools([{"type": "advisor_tool_result"}]).unpriced == "an advisor's turn"


@pytest.mark.parametrize(
    ("block", "is_sound"),
    [
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, True),
        ({"type": "media", "mime_type": "audio/wav", "data": "AAAA"}, True),
        ({"type": "file", "mime_type": "video/mp4"}, True),
        ({"type": "image_url", "image_url": {"url": "https://a.example"}}, False),
        ({"type": "text", "text": "audio"}, False),
    ],
)
def test_sound_in_a_request(block: dict[str, Any], is_sound: bool) -> None:
    """Its tokens may cost more than those of text, also the sound of a video."""
    assert has_sound([[SimpleNamespace(content=[block])]]) == is_sound


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
shapes = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([
        "prompt_tokens", "input_tokens", "output_tokens", "prompt_tokens_details", "input_tokens_details",
        "cached_tokens", "cache_read_input_tokens", "output_token_details", "reasoning", "prompt_tokens_details",
        "total_tokens", "thoughts_token_count", "details", "cache_tokens_details", "token_count", "modality",
        "iterations", "ephemeral_1h_input_tokens", "type", "fallback_message", "cacheDetails", "ttl",
    ]), inner, max_size=4)))  # fmt: skip


@settings(deadline=None)  # nothing asserts a duration
@given(shapes)
def test_no_shape_breaks_a_reader(shape: Any) -> None:
    """Whatever is reported, parts are never larger than what a number of tokens can be, and nothing is raised."""
    usage = shape if isinstance(shape, dict) else {"input_tokens": shape}
    whole = [read_tokens(usage), pydantic_ai.request_tokens(usage)]
    for tokens in (*whole, *(part.tokens for part in parts_by_model(usage, "m", "m"))):
        assert min(tokens.input, tokens.cached, tokens.cache_write, tokens.output, tokens.reasoning) >= 0


def test_metadata_is_polars_and_nothing_else_unless_there_is_more_to_say() -> None:
    """Cache writes, reasoning and estimates appear where there are any; names that are missing are unknown."""
    plain = ModelCall(vendor="", model="m" * 300, tokens=Tokens(input=3, output=4)).metadata()
    assert set(plain) == {"vendor", "model", "inputTokens", "cachedInputTokens", "outputTokens", "totalTokens",
                          "strategy", "_llm"}  # fmt: skip
    assert plain["vendor"] == "unknown"
    assert len(plain["model"]) == 200
    more = ModelCall(vendor="v", model="m", tokens=SAME, is_estimated=True).metadata()
    assert (more["cacheWriteTokens"], more["reasoningTokens"], more["estimated"]) == (100, 200, True)


def test_dollars_are_cents_by_their_digits() -> None:
    """A double's digits are what it prints, not what it is."""
    assert cents(0.0007621) == Decimal("0.07621")
    assert cents(Decimal("1.5")) == 150
    assert [cents(odd) for odd in (None, True, "1", float("nan"))] == [None] * 4


def test_pictures_and_files_are_not_text() -> None:
    """An estimate counts words, not the letters that a file is sent in."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    assert characters_in([{"role": "user", "content": [{"type": "text", "text": "word"}, image, source]}]) == 4
    circle: list[Any] = ["word"]
    circle.append(circle)
    assert characters_in(circle) > 0


def litellm_call(**changes: Any) -> dict[str, Any]:
    """What LiteLLM tells a callback of a call."""
    return {
        "model": "claude-sonnet-4-5", "litellm_call_id": "c-1", "custom_llm_provider": "anthropic", "cache_hit": False,
        "response_cost": 0.0066, "messages": [{"role": "user", "content": "hi"}],
        "litellm_params": {"metadata": {"external_customer_id": "ada"}, "api_base": "https://api.anthropic.com"},
    } | changes  # fmt: skip


LITELLM_RESPONSE = spaced({"model": "claude-sonnet-4-5-20250929", "usage": LITELLM_OF_ANTHROPIC, "choices": [
    {"message": {"content": "Fine."}}]})  # fmt: skip
NOW = datetime(2026, 1, 1)  # noqa: DTZ001 (LiteLLM's are without a zone)


def test_a_call_of_litellm_is_one_event() -> None:
    """Told twice it has one id; its cost is there for a cost function; chunks and cached answers are none."""
    recording = RecordingIngestion()
    callback = recording.strategy(litellm.LiteLLMStrategy, "llm").cost(lambda call: call.reported_cost).callback()
    callback.log_success_event(litellm_call(), LITELLM_RESPONSE, NOW, NOW)
    named = {"kwargs": litellm_call(), "response_obj": LITELLM_RESPONSE, "start_time": NOW, "end_time": NOW}
    with pytest.raises(StopIteration):
        callback.async_log_success_event(**named).send(None)
    callback.log_success_event(litellm_call(cache_hit=True), LITELLM_RESPONSE, NOW, NOW)
    callback.log_success_event(litellm_call(), spaced({"choices": []}), NOW, NOW)
    callback.log_success_event(None, None, None, None)
    assert [event["external_id"] for event in recording.events] == ["llm:c-1"] * 2
    event = recording.events[0]
    assert (event["external_customer_id"], event["metadata"]["_cost"]["amount"]) == ("ada", 0.66)
    check("litellm", [event])
    assert event["metadata"]["_llm"] == {
        "vendor": "anthropic", "model": "claude-sonnet-4-5-20250929", "input_tokens": 1000,
        "cached_input_tokens": 600, "output_tokens": 300, "total_tokens": 1300,
    }  # fmt: skip


def test_litellms_user_is_the_customer_unless_somebody_else_is_named() -> None:
    """Named when the callback is made, in the call's metadata, or as its user, in this order; else not metered."""
    recording = RecordingIngestion()
    strategy = recording.strategy(litellm.LiteLLMStrategy, "llm")
    nobody = {"litellm_params": {"metadata": None}}
    for callback, told in (
        (strategy.callback("eve"), litellm_call(user="bob")),
        (strategy.callback(), litellm_call(user="bob")),
        (strategy.callback(), litellm_call(user="bob") | nobody),
        (strategy.callback(), litellm_call() | nobody),
    ):
        callback.log_success_event(told, LITELLM_RESPONSE, NOW, NOW)
    assert [event["external_customer_id"] for event in recording.events] == ["eve", "ada", "bob"]


def test_litellm_listens_to_its_own_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LiteLLM is loaded the callback is one of its loggers; it is never loaded from here."""

    class CustomLogger:
        pass

    recording = RecordingIngestion()
    assert not isinstance(recording.strategy(litellm.LiteLLMStrategy, "llm").callback(), CustomLogger)
    loaded = SimpleNamespace(CustomLogger=CustomLogger)
    monkeypatch.setitem(__import__("sys").modules, "litellm.integrations.custom_logger", loaded)
    assert isinstance(recording.strategy(litellm.LiteLLMStrategy, "llm").callback(), CustomLogger)
