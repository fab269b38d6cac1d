"""The real openai package: whatever was billed is metered, also what the package itself refuses or asks elsewhere."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from ingest.client.prices import list_price
from ingest.client.strategies.openai import OpenAIStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay, stream, whole
from tests.vendors.truths import check
from tests.vendors.vendor_openai import CHAT, COMPLETION, MODEL, QUESTION, RESPONSES, chat_stream, chunk

CACHED = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500,
          "prompt_tokens_details": {"cached_tokens": 400}}  # fmt: skip
FLEX = {"prompt_tokens": 21_000, "completion_tokens": 100, "total_tokens": 21_100,
        "prompt_tokens_details": {"cached_tokens": 20_000}, "completion_tokens_details": {"reasoning_tokens": 50}}
has_beta = pytest.mark.skipif(not hasattr(OpenAI(api_key="key").beta, "responses"), reason="needs a newer openai")


class Mood(BaseModel):
    """What an answer is to be parsed into."""

    mood: str


def client(vendor: Replay, ingestion: RecordingIngestion, seller: str = "openai", **options: Any) -> OpenAI:
    """A metered client whose events have the list price of a vendor."""
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1", **options)
    return ingestion.strategy(OpenAIStrategy, "llm").cost(list_price).client(plain, "ada", vendor=seller)


def completion(usage: Any, content: str = "Fine.", finish: str = "stop", **more: Any) -> Any:
    """A whole chat."""
    message = {"role": "assistant", "content": content, "refusal": None}
    choices = [{"index": 0, "finish_reason": finish, "logprobs": None, "message": message}]
    return COMPLETION | {"model": "gpt-5", "choices": choices, "usage": usage} | more


def response(usage: Any, *output: Any, **more: Any) -> Any:
    """A whole response."""
    return {"id": "resp_1", "object": "response", "created_at": 1767000000, "status": "completed", "model": MODEL,
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage, "output": list(output),
            } | more  # fmt: skip


RESPONSE_USAGE = {
    "input_tokens": 1250, "input_tokens_details": {"cached_tokens": 1024}, "output_tokens": 340,
    "output_tokens_details": {"reasoning_tokens": 256}, "total_tokens": 1590,
}  # fmt: skip
PLAIN_USAGE = {"prompt_tokens": 1250, "completion_tokens": 340, "total_tokens": 1590,
               "prompt_tokens_details": {"cached_tokens": 1024},
               "completion_tokens_details": {"reasoning_tokens": 256}}  # fmt: skip


def test_an_ordinary_chat(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Whole and streamed it is the same event."""
    told = completion(PLAIN_USAGE, model=MODEL)
    vendor.will(CHAT, whole(told), chat_stream([chunk({"content": "Fine."}, "stop"), chunk(None, usage=PLAIN_USAGE)]))
    metered = client(vendor, ingestion)
    metered.chat.completions.create(**QUESTION)
    check("openai-ordinary", ingestion.events)
    ingestion.clear()
    list(metered.chat.completions.create(**QUESTION, stream=True))
    check("openai-ordinary", ingestion.events)


@pytest.mark.parametrize(("tier", "truth"), [("flex", "openai-flex"), ("scale", "openai-scale")])
def test_service_tiers(vendor: Replay, ingestion: RecordingIngestion, tier: str, truth: str) -> None:
    """A tier has its own price; where the list has none for it there is no cost."""
    vendor.will(CHAT, whole(completion(FLEX, service_tier=tier)))
    client(vendor, ingestion).chat.completions.create(**QUESTION, service_tier=tier)
    check(truth, ingestion.events)


@pytest.mark.parametrize("way", ["length", "filter", "invalid", "raw", "streaming", "later", "helper"])
def test_an_answer_that_the_parser_refuses_was_billed(
    vendor: Replay, ingestion: RecordingIngestion, way: str
) -> None:
    """Cut off, filtered or no JSON: the caller gets the library's error, and the event is there, once."""
    finish = {"filter": "content_filter", "invalid": "stop"}.get(way, "length")
    refused = completion(CACHED, '{"mo', finish)
    pieces = [chunk({"content": '{"mo'}), chunk({}, finish), chunk(None, usage=CACHED)]
    for piece in pieces:
        piece["model"] = "gpt-5"
    vendor.will(CHAT, chat_stream(pieces) if way == "helper" else whole(refused))
    errors = (openai.LengthFinishReasonError, openai.ContentFilterFinishReasonError, pydantic.ValidationError)
    with pytest.raises(errors):
        parse(client(vendor, ingestion), way, lambda: asyncio.run(parsed_later(vendor, ingestion)))
    check("openai-refused-by-parser", ingestion.events)


def parse(metered: OpenAI, way: str, later: Callable[[], None]) -> None:
    """Ask for an answer to be parsed, in one of the ways there are."""
    chats = metered.chat.completions
    if way == "raw":
        chats.with_raw_response.parse(**QUESTION, response_format=Mood).parse()
    elif way == "streaming":
        with chats.with_streaming_response.parse(**QUESTION, response_format=Mood) as opened:
            opened.parse()
    elif way == "later":
        later()
    elif way == "helper":
        with chats.stream(**QUESTION, response_format=Mood) as helper:
            helper.until_done()
    else:
        chats.parse(**QUESTION, response_format=Mood)


async def parsed_later(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The same with the asynchronous client."""
    plain = AsyncOpenAI(api_key="key", base_url=vendor.url + "/v1")
    metered = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price).client(plain, "ada", vendor="openai")
    await metered.chat.completions.parse(**QUESTION, response_format=Mood)


def test_a_response_that_the_parser_refuses_was_billed(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The Responses API as well."""
    part = {"type": "output_text", "text": '{"mo', "annotations": []}
    message = {"type": "message", "id": "m", "status": "incomplete", "role": "assistant", "content": [part]}
    vendor.will(RESPONSES, whole(response(RESPONSE_USAGE, message)))
    with pytest.raises(pydantic.ValidationError):
        client(vendor, ingestion).responses.parse(model="gpt-5-mini", input="hi", text_format=Mood)
    check("openai-ordinary", ingestion.events)


def test_a_parsed_answer_counts_once(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """It is read before the parser has it, and not again afterwards."""
    vendor.will(CHAT, whole(completion(PLAIN_USAGE, '{"mood": "fine"}', model=MODEL)))
    parsed = client(vendor, ingestion).chat.completions.parse(**QUESTION, response_format=Mood)
    assert parsed.choices[0].message.parsed == Mood(mood="fine")
    check("openai-ordinary", ingestion.events)


@has_beta
@pytest.mark.parametrize("way", ["whole", "streamed", "fetched"])
def test_betas_of_a_resource_are_metered(vendor: Replay, ingestion: RecordingIngestion, way: str) -> None:
    """They ask at the same path, with a query."""
    made = response(RESPONSE_USAGE, background=way == "fetched")
    queued = made | {"status": "queued", "usage": None}
    done = {"type": "response.completed", "sequence_number": 1, "response": made}
    vendor.will(RESPONSES, stream([done], is_named=True) if way == "streamed" else whole(made))
    vendor.will(f"{RESPONSES}/resp_1", whole(queued), whole(made))
    beta = client(vendor, ingestion).beta.responses
    if way == "fetched":
        beta.retrieve("resp_1"), beta.retrieve("resp_1")
    else:
        answer = beta.create(model="gpt-5-mini", input="hi", stream=way == "streamed")
        list(answer) if way == "streamed" else None
    check("openai-beta", ingestion.events)


def test_chats_that_search_have_no_cost(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The vendor does not say how often."""
    vendor.will(CHAT, whole(completion(PLAIN_USAGE, model=MODEL)))
    client(vendor, ingestion).chat.completions.create(**QUESTION, web_search_options={})
    check("openai-search", ingestion.events)


def test_what_the_vendors_tools_do_is_in_the_cost(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Searches by their number; where code ran nobody can say."""
    action = {"type": "search", "query": "a"}
    web = {"type": "web_search_call", "id": "w", "status": "completed", "action": action}
    file = {"type": "file_search_call", "id": "f", "status": "completed", "queries": ["a"]}
    code = {"type": "code_interpreter_call", "id": "c", "status": "completed", "code": "", "container_id": "c"}
    metered = client(vendor, ingestion)
    vendor.will(RESPONSES, whole(response(RESPONSE_USAGE, web, web, file)), whole(response(RESPONSE_USAGE, code)))
    metered.responses.create(model="gpt-5-mini", input="hi")
    check("openai-tools", ingestion.events)
    ingestion.clear()
    metered.responses.create(model="gpt-5-mini", input="hi")
    check("openai-code", ingestion.events)


def test_a_write_that_is_kept_for_long_has_no_cost(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The list has the price of half an hour alone."""
    written = {"cached_tokens": 0, "cache_write_tokens": 800, "cache_write_tokens_details": {"ttl_12h_tokens": 800}}
    usage = {"input_tokens": 1000, "input_tokens_details": written, "output_tokens": 500, "total_tokens": 1500,
             "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
    vendor.will(RESPONSES, whole(response(usage, model="gpt-5.6-sol")))
    client(vendor, ingestion).responses.create(model="gpt-5.6-sol", input="hi")
    check("openai-kept-long", ingestion.events)


def test_deepseeks_cache(vendor: Replay, ingestion: RecordingIngestion, day: None) -> None:
    """It has a name of its own for what was read from its cache."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500, "prompt_cache_hit_tokens": 400,
             "prompt_cache_miss_tokens": 600}  # fmt: skip
    vendor.will(CHAT, whole(completion(usage, model="deepseek-chat")))
    client(vendor, ingestion, "deepseek").chat.completions.create(**QUESTION)
    check("deepseek", ingestion.events)


@pytest.mark.parametrize(
    ("seller", "model", "truth"),
    [("moonshotai", "kimi-k2.5", "moonshot-stream"), ("groq", "llama-3.3-70b-versatile", "groq-stream")],
)
def test_a_stream_tells_its_usage_elsewhere(
    vendor: Replay, ingestion: RecordingIngestion, seller: str, model: str, truth: str
) -> None:
    """Moonshot inside the last choice, Groq beside the choices."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
    last = chunk({}, "stop")
    if seller == "moonshotai":
        last["choices"][0]["usage"] = usage
    else:
        last["x_groq"] = {"id": "r", "usage": usage}
    pieces = [chunk({"content": "Fine."}), last]
    for piece in pieces:
        piece["model"] = model
    vendor.will(CHAT, chat_stream(pieces))
    assert len(list(client(vendor, ingestion, seller).chat.completions.create(**QUESTION, stream=True))) == 2
    check(truth, ingestion.events)


def test_live_search_has_no_cost(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """xAI bills each source that it used."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500, "num_sources_used": 4}
    vendor.will(CHAT, whole(completion(usage, model="grok-4")))
    client(vendor, ingestion, "x-ai").chat.completions.create(**QUESTION)
    check("xai-sources", ingestion.events)
