"""The real anthropic package: what decides the price of a message, and messages of more than one model."""

from typing import Any

import pydantic
import pytest
from anthropic import Anthropic
from pydantic import BaseModel

from ingest.client.prices import list_price
from ingest.client.strategies.anthropic import AnthropicStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay, whole
from tests.vendors.truths import check
from tests.vendors.vendor_anthropic import EVENTS, MESSAGE, MESSAGES, QUESTION, START, USAGE, message_stream

OPUS = "claude-opus-4-8"
SMALL = {"input_tokens": 1000, "output_tokens": 500, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
UNSPLIT = {name: value for name, value in USAGE.items() if name != "cache_creation"}
has_parse = pytest.mark.skipif(not hasattr(Anthropic(api_key="key").messages, "parse"), reason="needs newer anthropic")


@pytest.fixture
def client(vendor: Replay, ingestion: RecordingIngestion) -> Anthropic:
    """A metered client whose events have the list price."""
    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    return llm.client(Anthropic(api_key="key", base_url=vendor.url), "ada", vendor="anthropic")


def test_an_ordinary_message(client: Anthropic, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Whole and streamed."""
    vendor.will(MESSAGES, whole(MESSAGE), message_stream())
    client.messages.create(**QUESTION)
    check("anthropic-ordinary", ingestion.events)
    ingestion.clear()
    list(client.messages.create(**QUESTION, stream=True))
    check("anthropic-ordinary", ingestion.events)


@has_parse
def test_an_answer_that_the_parser_refuses_was_billed(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """Cut off in the middle of its JSON."""

    class Mood(BaseModel):
        mood: str

    cut = MESSAGE | {"usage": SMALL, "stop_reason": "max_tokens", "content": [{"type": "text", "text": '{"mo'}]}
    vendor.will(MESSAGES, whole(cut))
    with pytest.raises(pydantic.ValidationError):
        client.messages.parse(**QUESTION, output_format=Mood)
    check("anthropic-refused-by-parser", ingestion.events)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("ttl", "truth"), [(None, "anthropic-unsplit"), ("5m", "anthropic-unsplit"),
                                            ("1h", "anthropic-hour")])  # fmt: skip
def test_writes_without_a_split(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion, ttl: str | None, truth: str, is_streamed: bool
) -> None:
    """A cloud or a proxy may leave it out; the request then says whether an hour was wanted at all."""
    begun = START["message"] | {"usage": UNSPLIT}
    vendor.will(MESSAGES, message_stream([START | {"message": begun}, *EVENTS[1:]]) if is_streamed
                else whole(MESSAGE | {"usage": UNSPLIT}))  # fmt: skip
    control = {"type": "ephemeral"} | ({"ttl": ttl} if ttl else {})
    system = [{"type": "text", "text": "Be kind.", "cache_control": control}]
    answer: Any = client.messages.create(**QUESTION, system=system, stream=is_streamed)
    list(answer) if is_streamed else None
    check(truth, ingestion.events)


def fallback_usage() -> dict[str, Any]:
    """The usage of a message that another model answered; its own numbers are those of that model."""
    none = {"cache_read_input_tokens": 0, "cache_creation_input_tokens": 0}
    declined = {"type": "message", "model": "claude-fable-5", "input_tokens": 250, "output_tokens": 100, **none}
    answered = {"type": "fallback_message", "model": OPUS, "input_tokens": 1232, "output_tokens": 100, **none}
    return {"input_tokens": 1232, "output_tokens": 100, **none, "iterations": [declined, answered]}


def fallback_events() -> list[dict[str, Any]]:
    """The same as a stream."""
    usage = fallback_usage()
    begun = MESSAGE | {"model": "claude-fable-5", "content": [], "stop_reason": None,
                       "usage": usage | {"output_tokens": 1, "iterations": None}}  # fmt: skip
    hop = {"type": "fallback", "from": {"model": "claude-fable-5"}, "to": {"model": OPUS}, "trigger": None}
    return [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": hop},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I am fine, thanks."}},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]


@pytest.mark.parametrize("way", ["whole", "streamed", "helper", "left"])
def test_each_model_of_a_fallback_has_its_part(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion, way: str
) -> None:
    """The model that was asked and declined was billed, too, at its own price."""
    made = MESSAGE | {"model": OPUS, "usage": fallback_usage()}
    events = fallback_events()
    vendor.will(MESSAGES, whole(made) if way == "whole" else message_stream(events[:5] if way == "left" else events,
                                                                            "hold" if way == "left" else "done"))
    asked: Any = QUESTION | {"model": "claude-fable-5"}
    if way == "whole":
        client.beta.messages.create(**asked)
    elif way == "helper":
        with client.beta.messages.stream(**asked) as helper:
            helper.until_done()
    else:
        opened = client.beta.messages.create(**asked, stream=True)
        for _ in range(5 if way == "left" else 8):
            next(opened, None)
        opened.close()
    check("anthropic-fallback-left" if way == "left" else "anthropic-fallback", ingestion.events)


@pytest.mark.parametrize(
    ("usage", "content", "truth"),
    [
        (SMALL | {"service_tier": "priority"}, [], "anthropic-priority"),
        (SMALL | {"fallback_credit": {"status": {"type": "redeemed"}}}, [], "anthropic-fallback-credit"),
        (SMALL, [{"type": "server_tool_use", "id": "s", "name": "bash_code_execution", "input": {}}], "anthropic-code"),
        (SMALL, [{"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}], "anthropic-code"),
    ],
)
def test_what_has_no_listed_price_has_no_cost(
    client: Anthropic, vendor: Replay, ingestion: RecordingIngestion, usage: Any, content: list[Any], truth: str
) -> None:
    """Paid for in advance, priced anew, billed by the hour, or of models that are not told apart."""
    vendor.will(MESSAGES, whole(MESSAGE | {"usage": usage, "content": content}))
    client.beta.messages.create(**QUESTION)
    check(truth, ingestion.events)


def test_fast_mode_and_searches(client: Anthropic, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Each has its price."""
    usage = SMALL | {"input_tokens": 1050, "output_tokens": 4000, "speed": "fast",
                     "server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 0}}  # fmt: skip
    vendor.will(MESSAGES, whole(MESSAGE | {"model": OPUS, "usage": usage}))
    client.beta.messages.create(**QUESTION)
    check("anthropic-fast", ingestion.events)
