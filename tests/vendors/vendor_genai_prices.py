"""The real price list: what it knows is the cost, and what it knows only a part of has none."""

from decimal import Decimal
from typing import Any

import pytest
from google.genai.types import Candidate, Content, GenerateContentResponse, GroundingMetadata, Part
from openai import OpenAI

from ingest.client.prices import list_price
from ingest.client.strategies import google_genai
from ingest.client.strategies.openai import OpenAIStrategy
from ingest.client.strategy import LanguageModelStrategy, ModelCall, Tokens
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay, stream, whole
from tests.vendors.vendor_openai import CHAT, COMPLETION, MODEL, QUESTION, RESPONSES

AUDIO = {"input_audio_tokens": 800}


def price(vendor: str, model: str, terms: Any = None, **counted: int) -> Decimal | None:
    """What a thousand tokens in and five hundred out cost, of which some are something else."""
    tokens = Tokens(input=1000, output=500, details=counted)
    return list_price(ModelCall(vendor=vendor, model=model, tokens=tokens, terms=terms or {}))


def test_fast_mode_has_its_own_price_or_none() -> None:
    """Where the list has no variant for it, the ordinary price is not what it cost."""
    assert price("anthropic", "claude-opus-4-8", {"speed": "fast"}) == Decimal("3.5")
    assert price("anthropic", "claude-opus-4-8", {"speed": "standard"}) == Decimal("1.75")
    assert price("anthropic", "claude-opus-4-6", {"speed": "fast"}) is None
    assert price("anthropic", "claude-opus-4-6", {"speed": "standard"}) == Decimal("1.75")


def test_audio_costs_what_audio_costs() -> None:
    """Its own price; none where the list has forgotten it; the text's with Google, who names one price for both."""
    assert price("openai", "gpt-audio", **AUDIO) == (200 * Decimal("2.5") + 800 * 32 + 500 * 10) / 10_000
    assert price("openai", "gpt-4o-audio-preview", **AUDIO) is None
    assert price("openai", "gpt-4o-audio-preview", output_audio_tokens=400) is None
    assert price("openai", "gpt-4o-audio-preview") == Decimal("0.75")
    assert price("google", "gemini-2.5-pro", **AUDIO) == price("google", "gemini-2.5-pro")


def test_searches_cost_what_they_cost_or_nobody_knows() -> None:
    """The list has their price for some models; for others a call with searches has none."""
    assert price("anthropic", "claude-sonnet-4-5", web_searches=10) == Decimal("1.05") + 10
    assert price("x-ai", "grok-4", web_searches=10) is None
    assert price("x-ai", "grok-4") is not None


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_openais_tools_do_is_in_the_cost(
    vendor: Replay, ingestion: RecordingIngestion, is_streamed: bool
) -> None:
    """Searches by their number, but not the pages that were opened; with code or images nobody can say."""
    usage = {"input_tokens": 1000, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 500,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 1500}  # fmt: skip
    actions: list[dict[str, Any]] = [{"type": "search", "query": "a"}, {"type": "open_page", "url": "https://b.example"}]
    calls = [{"type": "web_search_call", "id": "w", "status": "completed", "action": action} for action in actions]
    file = {"type": "file_search_call", "id": "f", "status": "completed", "queries": ["a", "b"]}
    code = {"type": "code_interpreter_call", "id": "c", "status": "completed", "code": "", "container_id": "c"}

    def response(*output: Any) -> Any:
        made = {"id": "resp_1", "object": "response", "created_at": 1767000000, "status": "completed", "model": MODEL,
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage, "output": output}
        done = {"type": "response.completed", "sequence_number": 1, "response": made}
        return stream([done], is_named=True) if is_streamed else whole(made)

    vendor.will(RESPONSES, response(), response(*calls, file, file), response(*calls, code))
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1")
    client = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price).client(plain, "ada", vendor="openai")
    for _ in range(3):
        answer = client.responses.create(model="gpt-5-mini", input="hi", stream=is_streamed)
        list(answer) if is_streamed else None
    alone, searched, ran = (event["metadata"].get("_cost") for event in ingestion.events)
    amounts = [Decimal(str(cost["amount"])) for cost in (alone, searched)]
    assert amounts == [Decimal("0.125"), Decimal("0.125") + 1 + 2 * Decimal("0.25")]
    assert ran is None


def test_chats_that_search_have_no_cost(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The vendor does not say how often."""
    vendor.will(CHAT, whole(COMPLETION), whole(COMPLETION))
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1")
    client = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price).client(plain, "ada", vendor="openai")
    client.chat.completions.create(**QUESTION, web_search_options={})
    client.chat.completions.create(**QUESTION | {"model": "gpt-4o-search-preview"})
    assert not any("_cost" in event["metadata"] for event in ingestion.events)


def test_a_grounded_answer_of_gemini_has_no_cost(ingestion: RecordingIngestion) -> None:
    """What its searches cost depends on the account's allowance; an answer without them has a cost."""
    llm = ingestion.strategy(LanguageModelStrategy, "llm").cost(list_price)
    content = Content(parts=[Part(text="x")])
    for grounding in (None, GroundingMetadata(), GroundingMetadata(web_search_queries=["a", "b"])):
        answer = GenerateContentResponse.model_validate({
            "model_version": "gemini-2.5-flash",
            "usage_metadata": {"prompt_token_count": 100, "candidates_token_count": 100},
            "candidates": [Candidate(finish_reason="STOP", content=content, grounding_metadata=grounding)],
        })  # fmt: skip
        asked = {"model": "gemini-2.5-flash", "contents": "hi"}
        reader = google_genai._Reader(asked, "google", None, False, lambda call: llm.record("ada", call))
        reader.whole(answer, is_embedding=False)
    assert ["_cost" in event["metadata"] for event in ingestion.events] == [True, True, False]
