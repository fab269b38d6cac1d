"""The real anthropic package: messages, streams, helpers; what is beside the input is put inside."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import pytest
from anthropic import Anthropic, AnthropicBedrock, APIStatusError, AsyncAnthropic

from ingest.client.prices import list_price
from ingest.client.strategies.anthropic import AnthropicStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Answer, Replay, refusal, stream, whole

MESSAGES = "/v1/messages"
MODEL = "claude-sonnet-4-5-20250929"
QUESTION: dict[str, Any] = {
    "model": "claude-sonnet-4-5", "max_tokens": 100, "messages": [{"role": "user", "content": "How are you today?"}],
}  # fmt: skip
USAGE = {
    "input_tokens": 21, "cache_creation_input_tokens": 188, "cache_read_input_tokens": 1800, "output_tokens": 393,
    "cache_creation": {"ephemeral_5m_input_tokens": 88, "ephemeral_1h_input_tokens": 100},
    "server_tool_use": None, "service_tier": "standard", "output_tokens_details": {"thinking_tokens": 250},
}  # fmt: skip
MESSAGE = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": MODEL, "stop_reason": "end_turn",
    "stop_sequence": None, "content": [{"type": "text", "text": "Fine."}], "usage": USAGE,
}  # fmt: skip
EXACT = {
    "vendor": "anthropic", "model": MODEL, "inputTokens": 2009, "cachedInputTokens": 1800, "outputTokens": 393,
    "totalTokens": 2402, "cacheWriteTokens": 188, "reasoningTokens": 250, "strategy": "LLM",
    "_llm": {"vendor": "anthropic", "model": MODEL, "input_tokens": 2009, "cached_input_tokens": 1800,
             "output_tokens": 393, "total_tokens": 2402},
}  # fmt: skip
BEGUN = USAGE | {"output_tokens": 1, "output_tokens_details": None}
START = {"type": "message_start", "message": MESSAGE | {"content": [], "stop_reason": None, "usage": BEGUN}}
EVENTS = [
    START,
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "ping"},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "I am fine, "}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "thanks."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": None, "stop_sequence": None}, "usage": {"output_tokens": 200}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
     "usage": {"output_tokens": 393, "output_tokens_details": {"thinking_tokens": 250}}},
    {"type": "message_stop"},
]  # fmt: skip


def message_stream(events: list[dict[str, Any]] = EVENTS, end: str = "done") -> Answer:
    """A streamed message."""
    return stream(events, is_named=True, end=end)


@pytest.fixture
def client(vendor: Replay, ingestion: RecordingIngestion) -> Anthropic:
    """A metered client."""
    return ingestion.strategy(AnthropicStrategy, "llm").client(Anthropic(api_key="key", base_url=vendor.url), "ada")


def test_a_message_is_one_event(client: Anthropic, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """After a refusal; the input is all three kinds of it; counting tokens costs nothing and is no event."""
    vendor.will(MESSAGES, refusal(529), whole(MESSAGE))
    vendor.will("/v1/messages/count_tokens", whole({"input_tokens": 21}))
    assert client.messages.create(**QUESTION).content[0].text == "Fine."
    client.messages.count_tokens(model="claude-sonnet-4-5", messages=QUESTION["messages"])
    assert ingestion.one()["metadata"] == EXACT


def test_a_streams_counts_replace_each_other(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """As events, and with the helper: the last delta has the sum, which is not added to those before."""
    vendor.will(MESSAGES, message_stream(), message_stream(), message_stream(EVENTS[:-1], "hold"))
    assert len(list(client.messages.create(**QUESTION, stream=True))) == len(EVENTS) - 1  # without the ping
    with client.messages.stream(**QUESTION) as helper:
        assert "".join(helper.text_stream) == "I am fine, thanks."
        assert helper.get_final_message().usage.output_tokens == 393
    with client.messages.create(**QUESTION, stream=True) as left:
        for event in left:
            if event.type == "message_delta" and event.delta.stop_reason:
                break  # nothing is missing but the goodbye
    assert [event["metadata"] for event in ingestion.events] == [EXACT] * 3


@pytest.mark.parametrize(("seen", "output"), [(1, 1), (4, 5), (6, 200)])
def test_an_abandoned_stream_has_its_input_and_what_arrived(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion, seen: int, output: int
) -> None:
    """The input is exact from the first event on; the output is what was told or what arrived, whichever is more."""
    vendor.will(MESSAGES, message_stream(EVENTS[: seen + 1], "hold"))
    with client.messages.stream(**QUESTION) as helper:
        for event in helper:
            told = helper.current_message_snapshot.usage.output_tokens
            last_word = event.type == "text" and "thanks" in event.text
            if {1: event.type == "message_start", 4: last_word, 6: told == 200}[seen]:
                break
    metadata = ingestion.one()["metadata"]
    assert metadata["estimated"] is True
    assert (metadata["inputTokens"], metadata["cachedInputTokens"]) == (2009, 1800)
    assert metadata["outputTokens"] == output


def test_a_stream_that_breaks_off(client: Anthropic, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The caller gets the error, the event what was seen."""
    vendor.will(MESSAGES, message_stream(EVENTS[:5], "cut"))
    with pytest.raises(Exception):  # noqa: B017, PT011 (the library's, of several kinds)
        list(client.messages.create(**QUESTION, stream=True))
    assert ingestion.one()["metadata"]["estimated"] is True
    assert ingestion.one()["metadata"]["outputTokens"] == 5


def test_a_stream_that_fails_before_it_begins_is_no_event(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """Refused after all, it used nothing; later it did, and so it did if the caller left before it began."""
    error = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    vendor.will(MESSAGES, message_stream([error]), message_stream([error]), message_stream([*EVENTS[:5], error]),
                message_stream([], "hold"))  # fmt: skip
    with pytest.raises(APIStatusError):
        list(client.messages.create(**QUESTION, stream=True))
    with pytest.raises(APIStatusError), client.messages.stream(**QUESTION) as helper:
        helper.until_done()
    assert ingestion.events == []
    with pytest.raises(APIStatusError):
        list(client.messages.create(**QUESTION, stream=True))
    client.messages.create(**QUESTION, stream=True).close()
    told = [event["metadata"] for event in ingestion.events]
    assert [metadata["estimated"] for metadata in told] == [True, True]
    assert [(metadata["inputTokens"], metadata["outputTokens"]) for metadata in told] == [(2009, 5), (5, 0)]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_compactions_and_advisors_count(vendor: Replay, ingestion: RecordingIngestion, is_streamed: bool) -> None:
    """A compaction is part of the call. An advisor is another model, with another price: each of its turns is told."""
    turn = {"input_tokens": 1000, "output_tokens": 100, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    iterations = [
        {"type": "compaction", **turn},
        {"type": "message", **turn},
        {"type": "advisor_message", "model": "claude-opus-4-5", **turn},
    ]
    last = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 393, "iterations": iterations}}  # fmt: skip
    message = MESSAGE | {"usage": USAGE | {"iterations": iterations}}
    vendor.will(MESSAGES, message_stream([START, last, EVENTS[-1]]) if is_streamed else whole(message))
    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    client = llm.client(Anthropic(api_key="key", base_url=vendor.url), "ada", vendor="anthropic")
    if is_streamed:
        with client.beta.messages.stream(**QUESTION) as helper:
            helper.until_done()
    else:
        client.beta.messages.create(**QUESTION)
    advice, answer = [event["metadata"] for event in ingestion.events]
    names = ("model", "inputTokens", "outputTokens", "estimated")
    assert [advice.get(name) for name in names] == ["claude-opus-4-5", 1000, 100, None]
    assert [answer.get(name) for name in names] == [MODEL, 2009 + 1000, 393 + 100, None]
    assert Decimal(str(advice["_cost"]["amount"])) == (1000 * Decimal(5) + 100 * Decimal(25)) / 10_000


def test_beta_and_raw_messages(client: Anthropic, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Every way to ask for a message passes the meter."""
    vendor.will(MESSAGES, whole(MESSAGE), whole(MESSAGE), message_stream(), whole(MESSAGE))
    client.beta.messages.create(**QUESTION)
    assert client.messages.with_raw_response.create(**QUESTION).parse().usage.output_tokens == 393
    with client.beta.messages.stream(**QUESTION) as helper:
        helper.until_done()
    client.with_options(max_retries=0).messages.create(**QUESTION)
    assert [event["metadata"] for event in ingestion.events] == [EXACT] * 4


def test_bedrock_and_text_on_request(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The client changes the address below the meter; prompt and response go along when asked for."""
    vendor.will("/model/claude-sonnet-4-5/invoke", whole(MESSAGE))
    plain = AnthropicBedrock(aws_access_key="a", aws_secret_key="s", aws_region="eu-central-1", base_url=vendor.url)
    llm = ingestion.strategy(AnthropicStrategy, "llm")
    llm.client(plain, "ada", vendor="aws", keep_text=True).messages.create(**QUESTION)
    metadata = ingestion.one()["metadata"]
    assert (metadata["vendor"], metadata["totalTokens"]) == ("aws", 2402)
    assert (metadata["_llm"]["prompt"], metadata["_llm"]["response"]) == (json.dumps(QUESTION["messages"]), "Fine.")


def test_the_asynchronous_client(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Whole, streamed, with the helper, and left early."""
    vendor.will(MESSAGES, whole(MESSAGE), message_stream(), message_stream(), message_stream(EVENTS[:5], "hold"))

    async def story() -> None:
        plain = AsyncAnthropic(api_key="key", base_url=vendor.url)
        client = ingestion.strategy(AnthropicStrategy, "llm").client(plain, "ada")
        await client.messages.create(**QUESTION)
        async for _ in await client.messages.create(**QUESTION, stream=True):
            pass
        async with client.messages.stream(**QUESTION) as helper:
            await helper.get_final_message()
        async with client.messages.stream(**QUESTION) as helper:
            async for words in helper.text_stream:
                if words == "thanks.":
                    break
        await client.close()

    asyncio.run(story())
    *exact, left = [event["metadata"] for event in ingestion.events]
    assert exact == [EXACT] * 3
    assert (left["estimated"], left["inputTokens"], left["outputTokens"]) == (True, 2009, 5)


def test_the_list_price_knows_what_the_cache_costs(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Read, written for five minutes and written for an hour have prices of their own."""
    vendor.will(MESSAGES, whole(MESSAGE))
    plain = Anthropic(api_key="key", base_url=vendor.url)
    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    llm.client(plain, "ada", vendor="anthropic").messages.create(**QUESTION)
    million = 21 * Decimal(3) + 1800 * Decimal("0.3") + 88 * Decimal("3.75") + 100 * Decimal(6) + 393 * Decimal(15)
    assert Decimal(str(ingestion.one()["metadata"]["_cost"]["amount"])) == million / 10_000


@pytest.mark.parametrize(("geography", "has_price"), [("global", True), ("not_available", True), ("us", False)])
def test_the_list_price_is_that_of_ordinary_places(
    vendor: Replay, ingestion: RecordingIngestion, geography: str, has_price: bool
) -> None:
    """Inference that has to stay in one place costs more than the list says, and then the event says nothing."""
    vendor.will(MESSAGES, whole(MESSAGE | {"usage": USAGE | {"inference_geo": geography}}))
    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    client = llm.client(Anthropic(api_key="key", base_url=vendor.url), "ada", vendor="anthropic")
    client.messages.create(**QUESTION)
    metadata = ingestion.one()["metadata"]
    assert ("_cost" in metadata, metadata["totalTokens"]) == (has_price, 2402)
