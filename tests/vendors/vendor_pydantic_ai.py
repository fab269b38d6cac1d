"""The real pydantic-ai around the real openai package: per request, or per run; never both."""

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic_ai import Agent, ModelRetry, UnexpectedModelBehavior, exceptions
from pydantic_ai import capabilities as offered
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import FallbackExceptionGroup
from pydantic_ai.messages import ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import RequestUsage

from ingest.client.prices import list_price
from ingest.client.strategies.pydantic_ai import PydanticAIStrategy
from ingest.client.strategy import ModelCall
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import PATIENCE_S, Replay, whole
from tests.vendors.truths import check
from tests.vendors.vendor_anthropic import MESSAGE, MESSAGES
from tests.vendors.vendor_openai import CHAT, COMPLETION, EXACT, WORDS, chat_stream

has_fallbacks = pytest.mark.skipif(
    not hasattr(offered, "ModelFallback") or not hasattr(exceptions, "RetryModelRequest"),
    reason="needs a newer pydantic-ai: this one tells nothing of rejected answers",
)
TOOL_CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CALLS_TOOL = COMPLETION | {"choices": [{"index": 0, "finish_reason": "tool_calls", "logprobs": None, "message": {
    "role": "assistant", "content": None, "refusal": None, "tool_calls": [TOOL_CALL]}}]}  # fmt: skip


def agent(vendor: Replay, **options: Any) -> Agent[Any, str]:
    """An agent whose model answers from the endpoint."""
    provider = OpenAIProvider(api_key="key", base_url=vendor.url + "/v1")
    made = Agent(OpenAIChatModel("gpt-5-mini", provider=provider), **options)

    @made.tool_plain
    def weather() -> str:
        """The weather."""
        return "sunny"

    return made


def test_each_request_of_a_run_is_an_event(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """A run that calls a tool asks the model twice; what PydanticAI thinks it cost is there for a cost function."""
    vendor.will(CHAT, whole(CALLS_TOOL), whole(COMPLETION))
    llm = ingestion.strategy(PydanticAIStrategy, "llm").cost(lambda call: call.reported_cost)
    assert agent(vendor, capabilities=[llm.capability("ada")]).run_sync("How are you?").output == "Fine."
    assert [event["metadata"].pop("_cost")["amount"] for event in ingestion.events] == [0.07621] * 2
    assert [event["metadata"] for event in ingestion.events] == [EXACT] * 2


def test_a_run_handed_over_is_one_event_with_polars_fields(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Polar's own call; what its helper sends for this library, and what its strategy for models sends."""
    vendor.will(CHAT, whole(CALLS_TOOL), whole(COMPLETION))
    llm = ingestion.strategy(PydanticAIStrategy, "run", plan="pro")
    llm.ingest("ada", agent(vendor).run_sync("How are you?"), feature="chat")
    metadata = ingestion.one("run")["metadata"]
    polar = {"request_tokens": 2500, "response_tokens": 680, "total_tokens": 3180, "requests": 2}
    assert metadata == metadata | polar | {"plan": "pro", "feature": "chat"}
    assert metadata["_llm"]["total_tokens"] == metadata["totalTokens"] == 3180


def test_streams_to_their_end_and_abandoned(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Left early or given up, by whatever is the matter, it is what arrived, and all that was asked."""
    vendor.will(CHAT, chat_stream(), *[chat_stream(WORDS, "hold")] * 4)
    capability = ingestion.strategy(PydanticAIStrategy, "llm").capability("ada")

    async def story() -> None:
        streaming, begun = agent(vendor, capabilities=[capability]), asyncio.Event()

        async def read_until(error: Exception | None = None) -> None:
            async with streaming.run_stream("How are you today?") as run:
                async for words in run.stream_text(debounce_by=None):
                    if words == "I am fine, thanks." and error is not None:
                        raise error
                    begun.set() if words == "I am fine, thanks." else None

        async with streaming.run_stream("How are you today?") as run:
            assert await run.get_output() == "I am fine, thanks."
        async with streaming.run_stream("How are you today?") as run:
            async for _ in run.stream_text(delta=True, debounce_by=None):
                break
        with pytest.raises(KeyError, match="the application's"):
            await read_until(KeyError("the application's"))
        words = ""
        async with streaming.run_stream_events("How are you today?") as events:
            async for event in events:
                words += getattr(getattr(event, "delta", None), "content_delta", "")
                if words.endswith("thanks."):
                    break
        task = asyncio.create_task(read_until())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    exact, left, *given_up = [event["metadata"] for event in ingestion.events]
    assert exact == EXACT
    assert (left["estimated"], left["inputTokens"], left["outputTokens"]) == (True, 5, 3)
    for metadata in given_up:
        assert (metadata["estimated"], metadata["inputTokens"], metadata["outputTokens"]) == (True, 5, 5)
    assert len(given_up) == 3


def test_a_request_given_up_before_it_is_answered_is_its_prompt(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """It was sent, so the vendor may have begun; nobody knows what came of it."""
    vendor.will(CHAT, chat_stream([], "hold"))
    capability = ingestion.strategy(PydanticAIStrategy, "llm").capability("ada")

    async def story() -> None:
        task = asyncio.create_task(agent(vendor, capabilities=[capability]).run("How are you today?"))
        await asyncio.to_thread(vendor.asked.wait, PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(story())
    metadata = ingestion.one()["metadata"]
    assert (metadata["estimated"], metadata["inputTokens"], metadata["outputTokens"]) == (True, 5, 0)
    assert (metadata["vendor"], metadata["model"]) == ("openai", "gpt-5-mini")


def test_rejected_answers_and_failed_runs_count(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The model was asked, whatever became of its answers; a call that failed used nothing."""
    vendor.will(CHAT, whole(COMPLETION), whole(COMPLETION), whole({"error": {"message": "no such model"}}, 404))
    capability = ingestion.strategy(PydanticAIStrategy, "llm").capability("ada")
    picky = agent(vendor, capabilities=[capability], retries=1)

    @picky.output_validator
    def reject(output: str) -> str:
        raise ModelRetry("not that")

    with pytest.raises(UnexpectedModelBehavior):
        picky.run_sync("How are you?")
    with pytest.raises(Exception, match="no such model"):
        picky.run_sync("How are you?")
    assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1590, 1590]


def fixed(name: str, words: str, asked: int, answered: int) -> FunctionModel:
    """A model that always gives the same answer."""
    def answer(messages: Any, info: Any) -> ModelResponse:
        usage = RequestUsage(input_tokens=asked, output_tokens=answered)
        return ModelResponse(parts=[TextPart(words)], usage=usage, model_name=name)

    return FunctionModel(answer, model_name=name)


def is_bad(response: ModelResponse) -> bool:
    """Whether a fallback is wanted."""
    return response.text == "bad"


class Impatient(AbstractCapability[Any]):
    """A capability that wants another answer than the first."""

    async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:
        """Ask once more."""
        if request_context.attempt == 1:
            raise exceptions.RetryModelRequest
        return response


class Strict(AbstractCapability[Any]):
    """A capability that ends the run after its first answer."""

    async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:
        """No."""
        raise ValueError("not allowed")


@has_fallbacks
def test_answers_that_end_a_run_count_once(ingestion: RecordingIngestion) -> None:
    """Whether the capability that ended it saw the answer before us or after, with those that were rejected before."""
    dear, cheap = fixed("dear", "bad", 1000, 500), fixed("cheap", "good", 100, 10)
    ours = ingestion.strategy(PydanticAIStrategy, "llm").capability("ada")
    for capabilities in ([ours, Strict()], [Strict(), ours]):
        with pytest.raises(ValueError, match="not allowed"):
            Agent(FallbackModel(dear, cheap, fallback_on=is_bad), capabilities=capabilities).run_sync("hi")
        assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [110, 1500]
        ingestion.clear()


@has_fallbacks
def test_answers_that_a_fallback_rejected_count_once(ingestion: RecordingIngestion) -> None:
    """By the model or by a capability, before our hook or after it, to a good end or to none: as the run's own sum."""
    dear, cheap = fixed("dear", "bad", 1000, 500), fixed("cheap", "good", 100, 10)
    llm = ingestion.strategy(PydanticAIStrategy, "llm")
    ours, instead = llm.capability("ada"), offered.ModelFallback(cheap, fallback_on=is_bad)
    agents: list[Agent[Any, str]] = [
        Agent(FallbackModel(dear, cheap, fallback_on=is_bad), capabilities=[ours]),
        Agent(dear, capabilities=[ours, instead]),
        Agent(dear, capabilities=[instead, ours]),
    ]
    for each in agents:
        usage = each.run_sync("hi").usage
        told = sorted((event["metadata"]["model"], event["metadata"]["totalTokens"]) for event in ingestion.events)
        assert told == [("cheap", 110), ("dear", 1500)]
        assert ingestion.total("totalTokens") == usage.input_tokens + usage.output_tokens
        assert not any("estimated" in event["metadata"] for event in ingestion.events)
        ingestion.clear()
    for capabilities in ([ours, Impatient()], [Impatient(), ours]):
        Agent(dear, capabilities=capabilities).run_sync("hi")
        assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1500, 1500]
        ingestion.clear()
    with pytest.raises(FallbackExceptionGroup):
        Agent(FallbackModel(dear, dear, fallback_on=is_bad), capabilities=[ours]).run_sync("hi")
    assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1500, 1500]
    ingestion.clear()
    llm.ingest("ada", Agent(FallbackModel(dear, cheap, fallback_on=is_bad)).run_sync("hi"))
    assert [event["metadata"]["total_tokens"] for event in ingestion.events] == [1500, 110]


def test_anthropics_fast_mode_and_searches(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The speed is in the details of the response, or in the settings of the request; the searches are in the usage."""
    usage = {"input_tokens": 1050, "output_tokens": 4000, "cache_read_input_tokens": 0, "speed": "fast",
             "cache_creation_input_tokens": 0,
             "server_tool_use": {"web_search_requests": 3, "web_fetch_requests": 0}}  # fmt: skip
    vendor.will(MESSAGES, whole(MESSAGE | {"model": "claude-opus-4-8", "usage": usage}))
    provider = AnthropicProvider(api_key="key", base_url=vendor.url)
    costs: list[Any] = []

    def cost(call: ModelCall) -> Any:
        costs.append(call.reported_cost)
        return list_price(replace(call, api_url=None))

    capability = ingestion.strategy(PydanticAIStrategy, "llm").cost(cost).capability("ada")
    model = AnthropicModel("claude-opus-4-8", provider=provider)
    settings: Any = {"max_tokens": 100, "anthropic_speed": "fast"}
    Agent(model, capabilities=[capability]).run_sync("hi", model_settings=settings)
    check("pydantic-ai-fast", ingestion.events)
    assert costs in ([Decimal("24.05")], [Decimal("13.525")])  # before it knew of fast mode it was wrong


def test_each_request_of_a_run_is_priced_by_its_own_size(ingestion: RecordingIngestion) -> None:
    """Two requests of 150,000 tokens are not one of 300,000, which would cost more for each token."""
    def answer(messages: Any, info: Any) -> ModelResponse:
        usage = RequestUsage(input_tokens=150_000, output_tokens=100)
        told = {"usage": usage, "model_name": "gemini-2.5-pro", "provider_name": "google"}
        if len(messages) == 1:
            return ModelResponse(parts=[ToolCallPart("weather", {})], **told)
        return ModelResponse(parts=[TextPart("Fine.")], **told)

    made: Agent[Any, str] = Agent(FunctionModel(answer, model_name="gemini-2.5-pro"))
    made.tool_plain(lambda: "sunny", name="weather")
    llm = ingestion.strategy(PydanticAIStrategy, "llm").cost(list_price)
    llm.ingest("ada", made.run_sync("hi"))
    check("pydantic-ai-tiers", ingestion.events)
