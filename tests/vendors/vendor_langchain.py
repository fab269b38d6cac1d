"""The real langchain-core: its callbacks around a model, which is given its answers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models import BaseChatModel, BaseLLM, FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, Generation, LLMResult

from ingest.client.prices import list_price
from ingest.client.strategies.langchain import LangChainStrategy
from ingest.client.testing import RecordingIngestion

MODEL = "claude-sonnet-4-5-20250929"
USAGE: Any = {
    "input_tokens": 2009, "output_tokens": 393, "total_tokens": 2402,
    "input_token_details": {"cache_read": 1800, "cache_creation": 188}, "output_token_details": {"reasoning": 250},
}  # fmt: skip
EXACT = {
    "vendor": "anthropic", "model": MODEL, "inputTokens": 2009, "cachedInputTokens": 1800, "outputTokens": 393,
    "totalTokens": 2402, "cacheWriteTokens": 188, "reasoningTokens": 250, "strategy": "LLM",
    "_llm": {"vendor": "anthropic", "model": MODEL, "input_tokens": 2009, "cached_input_tokens": 1800,
             "output_tokens": 393, "total_tokens": 2402},
}  # fmt: skip
ABOUT = {"model_name": MODEL, "model_provider": "anthropic"}


class Model(BaseChatModel):
    """A chat model as an integration package makes one; ``answers`` is how many it gives to a question."""

    answers: int = 1
    usage: Any = USAGE
    fails: bool = False

    @property
    def _llm_type(self) -> str:
        return "anthropic-chat"

    def _get_ls_params(self, stop: Any = None, **options: Any) -> Any:
        return {"ls_provider": "anthropic", "ls_model_name": "claude-sonnet-4-5", "ls_model_type": "chat"}

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        if self.fails:
            raise ValueError("no such model")
        message = AIMessage("Fine.", usage_metadata=self.usage, response_metadata=ABOUT)
        return ChatResult(generations=[ChatGeneration(message=message)] * self.answers)

    def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Iterator[Any]:
        yield ChatGenerationChunk(message=AIMessageChunk("I am fine, ", response_metadata=ABOUT))
        yield ChatGenerationChunk(message=AIMessageChunk("thanks."))
        if self.fails:
            raise ConnectionError("cut")
        yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=USAGE))

    async def _astream(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        for chunk in self._stream(*arguments):
            yield chunk


def test_a_run_is_one_event_however_often_the_handler_is_registered(ingestion: RecordingIngestion) -> None:
    """Invoked, and in a batch; an event's id is made of the run's, so that copies of it are one event."""
    llm = ingestion.strategy(LangChainStrategy, "llm").cost(list_price)
    handler, other = llm.handler("ada"), llm.handler("ada")
    assert Model().invoke("How are you today?", config={"callbacks": [handler]}).content == "Fine."
    Model().batch(["How are you?", "And you?"], config={"callbacks": [handler]})
    costs = [event["metadata"].pop("_cost")["amount"] for event in ingestion.events]
    assert [event["metadata"] for event in ingestion.events] == [EXACT] * 3
    assert costs == [costs[0]] * 3
    ingestion.clear()
    Model().invoke("How are you?", config={"callbacks": [handler, other]})
    first, second = ingestion.events
    assert first == second


def test_streams_to_their_end_and_abandoned(ingestion: RecordingIngestion) -> None:
    """The usage comes in the last chunk; left early, cut off, and without usage it is estimated."""
    handler = ingestion.strategy(LangChainStrategy, "llm").handler("ada")
    config: Any = {"callbacks": [handler]}
    assert len(list(Model().stream("How are you today?", config=config))) >= 3
    left = Model().stream("How are you today?", config=config)
    next(left), next(left)
    left.close()
    with pytest.raises(ConnectionError):
        list(Model(fails=True).stream("How are you today?", config=config))
    Model(usage=None).invoke("How are you today?", config=config)
    exact, *guessed = [event["metadata"] for event in ingestion.events]
    assert exact == EXACT
    assert [metadata["estimated"] for metadata in guessed] == [True] * 3
    assert [(metadata["inputTokens"], metadata["outputTokens"]) for metadata in guessed] == [(5, 5), (5, 5), (5, 2)]


def test_a_stream_that_tells_its_input_first_and_is_left_has_the_output_of_its_words(
    ingestion: RecordingIngestion,
) -> None:
    """langchain-anthropic begins with an output of 0, and tells what it was at the end."""

    class Eager(Model):
        def _stream(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Iterator[Any]:
            begun: Any = {"input_tokens": 900, "output_tokens": 0, "total_tokens": 900}
            yield ChatGenerationChunk(message=AIMessageChunk("", usage_metadata=begun))
            yield from super()._stream(messages)

    left = Eager().stream("hi", config={"callbacks": [ingestion.strategy(LangChainStrategy, "llm").handler("ada")]})
    next(left), next(left), next(left)
    left.close()
    metadata = ingestion.one()["metadata"]
    assert (metadata["estimated"], metadata["inputTokens"], metadata["outputTokens"]) == (True, 900, 5)


def test_the_list_price_knows_what_the_cache_costs(ingestion: RecordingIngestion) -> None:
    """Anthropic's package tells what was written by how long it stays, and then the sum as zero."""
    written = {"cache_creation": 0, "ephemeral_5m_input_tokens": 88, "ephemeral_1h_input_tokens": 100}
    usage = USAGE | {"input_token_details": {"cache_read": 1800, **written}}
    handler = ingestion.strategy(LangChainStrategy, "llm").cost(list_price).handler("ada")
    Model(usage=usage).invoke("How are you today?", config={"callbacks": [handler]})
    metadata = ingestion.one()["metadata"]
    cost = Decimal(str(metadata.pop("_cost")["amount"]))
    assert metadata == EXACT
    million = 21 * Decimal(3) + 1800 * Decimal("0.3") + 88 * Decimal("3.75") + 100 * Decimal(6) + 393 * Decimal(15)
    assert cost == million / 10_000


def test_asynchronous_runs(ingestion: RecordingIngestion) -> None:
    """Invoked, streamed, left and cancelled."""
    handler = ingestion.strategy(LangChainStrategy, "llm").handler("ada")
    config: Any = {"callbacks": [handler]}

    async def story() -> None:
        await Model().ainvoke("How are you today?", config=config)
        async for _ in Model().astream("How are you today?", config=config):
            pass
        left = Model().astream("How are you today?", config=config)
        await anext(left), await anext(left)
        await left.aclose()

    asyncio.run(story())
    *exact, left = [event["metadata"] for event in ingestion.events]
    assert exact == [EXACT] * 2
    assert (left["estimated"], left["outputTokens"]) == (True, 5)


def test_several_answers_to_a_question_cost_what_they_cost(ingestion: RecordingIngestion) -> None:
    """Each of them tells the same sum; it counts once."""
    Model(answers=3).invoke("hi", config={"callbacks": [ingestion.strategy(LangChainStrategy, "llm").handler("ada")]})
    assert ingestion.one()["metadata"]["totalTokens"] == 2402


def test_the_customer_can_be_named_by_the_run(ingestion: RecordingIngestion, caplog: pytest.LogCaptureFixture) -> None:
    """One handler for all; a run that names nobody is not metered, and the log says so."""
    handler = ingestion.strategy(LangChainStrategy, "llm").handler()
    model = Model(callbacks=[handler])
    for metadata in ({"external_customer_id": "ada"}, {"externalCustomerId": "bob"}, {}):
        model.invoke("hi", config={"metadata": metadata})
    assert [event["external_customer_id"] for event in ingestion.events] == ["ada", "bob"]
    assert "nobody says whose it is" in caplog.text


def test_what_used_nothing_is_no_event(ingestion: RecordingIngestion) -> None:
    """A call that failed, and an answer from LangChain's cache."""
    handler = ingestion.strategy(LangChainStrategy, "llm").handler("ada")
    with pytest.raises(ValueError, match="no such model"):
        Model(fails=True).invoke("hi", config={"callbacks": [handler]})
    assert ingestion.events == []
    cached = Model(cache=InMemoryCache())
    for _ in range(3):
        cached.invoke("hi", config={"callbacks": [handler]})
    assert ingestion.one()["metadata"] == EXACT


BESIDE = {"prompt_tokens": 5000, "completion_tokens": 700, "total_tokens": 5700}


class Completions(BaseLLM):
    """A model of texts as langchain-openai makes one; ``usage`` is for all prompts together."""

    usage: Any = BESIDE

    @property
    def _llm_type(self) -> str:
        return "openai"

    def _generate(self, prompts: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> LLMResult:
        told = {"token_usage": self.usage, "model_name": "gpt-3.5-turbo-instruct"}
        return LLMResult(generations=[[Generation(text="Fine.")] for _ in prompts], llm_output=told)


class Elsewhere(Model):
    """A chat model that tells its usage beside its answer alone."""

    def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> ChatResult:
        answer = ChatGeneration(message=AIMessage("Fine."))
        return ChatResult(generations=[answer], llm_output={"token_usage": BESIDE})


def test_usage_that_is_told_beside_the_answers_counts_once(ingestion: RecordingIngestion) -> None:
    """For several prompts it is a sum, which the first run has; what nobody tells is estimated for each of them."""
    config: Any = {"callbacks": [ingestion.strategy(LangChainStrategy, "llm").handler("ada")]}
    Completions().invoke("hi", config=config)
    assert ingestion.events[-1]["metadata"]["model"] == "gpt-3.5-turbo-instruct"
    Elsewhere().invoke("hi", config=config)
    Completions().batch(["hi", "you", "there"], config=config)
    asyncio.run(Completions().abatch(["hi", "you", "there"], config=config))
    told = [event["metadata"] for event in ingestion.events]
    whole, none = (5000, 700), (0, 0)
    counts = [(metadata["inputTokens"], metadata["outputTokens"]) for metadata in told]
    assert counts == [whole, whole, *[whole, none, none] * 2]
    assert not any("estimated" in metadata for metadata in told)
    ingestion.clear()
    Completions(usage={}).batch(["hi", "you"], config=config)
    told = [event["metadata"] for event in ingestion.events]
    assert [(metadata["outputTokens"], metadata["estimated"]) for metadata in told] == [(2, True)] * 2


def test_models_of_texts(ingestion: RecordingIngestion) -> None:
    """Those that tell no usage: it is estimated from the texts, which go along on request."""
    handler = ingestion.strategy(LangChainStrategy, "llm").handler("ada", keep_text=True)
    FakeListLLM(responses=["I am fine, thanks."]).invoke("How are you today?", config={"callbacks": [handler]})
    metadata = ingestion.one()["metadata"]
    assert (metadata["estimated"], metadata["inputTokens"], metadata["outputTokens"]) == (True, 5, 5)
    assert (metadata["_llm"]["prompt"], metadata["_llm"]["response"]) == ("How are you today?", "I am fine, thanks.")
