"""The real langchain-openai and langchain-anthropic: what they leave out of their usage is found elsewhere."""

from typing import Any

import openai
import pydantic
import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from ingest.client.prices import list_price
from ingest.client.strategies.langchain import LangChainStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay, whole
from tests.vendors.truths import check
from tests.vendors.vendor_anthropic import EVENTS, MESSAGE, MESSAGES, START, USAGE, message_stream
from tests.vendors.vendor_anthropic_billed import OPUS, SMALL, fallback_usage
from tests.vendors.vendor_openai import CHAT, chat_stream, chunk
from tests.vendors.vendor_openai_billed import CACHED, FLEX, completion

SEARCHED = SMALL | {"input_tokens": 1050, "output_tokens": 4000,
                    "server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 0}}  # fmt: skip
PAGE = {"type": "web_search_result", "url": "https://a.example", "title": "A", "encrypted_content": "x"}
FOUND = [block for number in range(3) for block in (
    {"type": "server_tool_use", "id": f"s{number}", "name": "web_search", "input": {"query": "a"}},
    {"type": "web_search_tool_result", "tool_use_id": f"s{number}", "content": [PAGE]},
)]  # fmt: skip
FAILED = {"type": "web_search_tool_result", "tool_use_id": "s9",
          "content": {"type": "web_search_tool_result_error", "error_code": "unavailable"}}  # fmt: skip


@pytest.fixture
def handler(ingestion: RecordingIngestion) -> Any:
    """A handler whose events have the list price."""
    return ingestion.strategy(LangChainStrategy, "llm").cost(list_price).handler("ada")


def chat_openai(vendor: Replay, **options: Any) -> ChatOpenAI:
    """OpenAI's chats, as LangChain calls them."""
    return ChatOpenAI(model="gpt-5", api_key="key", base_url=vendor.url + "/v1", max_retries=0, **options)


def chat_anthropic(vendor: Replay, **options: Any) -> ChatAnthropic:
    """Anthropic's messages, as LangChain calls them."""
    return ChatAnthropic(model="claude-sonnet-4-5", api_key="key", base_url=vendor.url, max_retries=0, **options)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_openais_service_tier(
    vendor: Replay, ingestion: RecordingIngestion, handler: Any, is_streamed: bool
) -> None:
    """The details of its usage have the tier before their names."""
    model = chat_openai(vendor, service_tier="flex", stream_usage=True)
    if is_streamed:
        pieces = [chunk({"content": "Fine."}), chunk({}, "stop"), chunk(None, usage=FLEX)]
        vendor.will(CHAT, chat_stream([piece | {"model": "gpt-5", "service_tier": "flex"} for piece in pieces]))
        list(model.stream("hi", config={"callbacks": [handler]}))
    else:
        vendor.will(CHAT, whole(completion(FLEX, service_tier="flex")))
        model.invoke("hi", config={"callbacks": [handler]})
    check("langchain-openai-flex", ingestion.events)


def test_an_answer_that_openais_parser_refuses_was_billed(
    vendor: Replay, ingestion: RecordingIngestion, handler: Any
) -> None:
    """The error has the completion."""

    class Mood(BaseModel):
        mood: str

    vendor.will(CHAT, whole(completion(CACHED, '{"mo', "length")))
    model = chat_openai(vendor).with_structured_output(Mood, method="json_schema")
    with pytest.raises((openai.LengthFinishReasonError, pydantic.ValidationError)):
        model.invoke("hi", config={"callbacks": [handler]})
    check("langchain-openai-refused", ingestion.events)


def block_events(blocks: list[Any], usage: Any, model: str) -> list[Any]:
    """A stream of these blocks."""
    begun = START["message"] | {"model": model, "usage": usage | {"output_tokens": 1}}
    middle: list[Any] = []
    for index, block in enumerate(blocks):
        middle.append({"type": "content_block_start", "index": index, "content_block": block})
        middle.append({"type": "content_block_stop", "index": index})
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage}
    return [START | {"message": begun}, *middle, end, EVENTS[-1]]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_anthropics_searches(
    vendor: Replay, ingestion: RecordingIngestion, handler: Any, is_streamed: bool
) -> None:
    """Told whole they are in Anthropic's own usage; of a stream they are counted. One that failed is free."""
    config: Any = {"callbacks": [handler]}
    if is_streamed:
        told = {name: value for name, value in SEARCHED.items() if name != "server_tool_use"}
        vendor.will(MESSAGES, message_stream(block_events([*FOUND, FAILED], told, OPUS)))
        list(chat_anthropic(vendor).stream("hi", config=config))
    else:
        vendor.will(MESSAGES, whole(MESSAGE | {"model": OPUS, "content": FOUND, "usage": SEARCHED}))
        chat_anthropic(vendor).invoke("hi", config=config)
    check("langchain-anthropic-searches", ingestion.events)


@pytest.mark.parametrize(
    ("ttl", "truth"), [("5m", "langchain-anthropic-unsplit"), ("1h", "langchain-anthropic-hour")]
)
def test_a_stream_does_not_tell_how_long_writes_are_kept(
    vendor: Replay, ingestion: RecordingIngestion, handler: Any, ttl: str, truth: str
) -> None:
    """The request says whether any were to be kept for an hour."""
    usage = {name: value for name, value in USAGE.items() if name not in ("cache_creation", "output_tokens_details")}
    vendor.will(MESSAGES, message_stream(block_events([], usage, MESSAGE["model"])))
    block = {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral", "ttl": ttl}}
    messages: Any = [("system", [block]), ("user", "hi")]
    list(chat_anthropic(vendor).stream(messages, config={"callbacks": [handler]}))
    check(truth, ingestion.events)


def test_each_model_of_a_fallback_has_its_part(vendor: Replay, ingestion: RecordingIngestion, handler: Any) -> None:
    """Their events have ids of their own, made of the run's."""
    vendor.will(MESSAGES, whole(MESSAGE | {"model": OPUS, "usage": fallback_usage()}))
    chat_anthropic(vendor).invoke("hi", config={"callbacks": [handler]})
    check("langchain-anthropic-fallback", ingestion.events)
    first, second = (event["external_id"] for event in ingestion.events)
    assert second == f"{first}:1"


def test_a_picture_is_not_told_apart(ingestion: RecordingIngestion, handler: Any) -> None:
    """The usage of LangChain has no pictures."""

    class Painter(BaseChatModel):
        @property
        def _llm_type(self) -> str:
            return "painter"

        def _get_ls_params(self, stop: Any = None, **options: Any) -> Any:
            return {"ls_provider": "google_genai", "ls_model_name": "gemini-2.5-flash-image", "ls_model_type": "chat"}

        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
            usage: Any = {"input_tokens": 10, "output_tokens": 1290, "total_tokens": 1300}
            return ChatResult(generations=[ChatGeneration(message=AIMessage("", usage_metadata=usage))])

    Painter().invoke("hi", config={"callbacks": [handler]})
    check("langchain-image", ingestion.events)
