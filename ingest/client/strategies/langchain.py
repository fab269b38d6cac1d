"""LangChain: a callback handler, for every model that LangChain knows.

    llm = ingestion.strategy(LangChainStrategy, "llm").cost(list_price)
    model.invoke("...", config={"callbacks": [llm.handler("user-1")]})

Made without a customer, the handler takes the one in the run's metadata:
``config={"metadata": {"external_customer_id": "user-1"}}``. A run is an event, whose id is the run's: a handler that is
registered twice counts once. Answers from LangChain's cache used nothing and are no events.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from ingest.client.instrument import harmless
from ingest.client.strategy import (
    Customer,
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    as_text,
    count,
    customer_in,
    details,
    estimated_tokens,
    inclusive,
    items,
    read,
    text,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_RUNS_MAX = 10_000
"""Runs that were begun and whose end was not heard of; LangChain tells every end, so these are calls under way."""


def message_tokens(usage: Any) -> Tokens:
    """From an ``AIMessage.usage_metadata``.

    Who tells how long what was written to a cache stays there (langchain-anthropic) may give its sum as zero.
    """
    cached = count(usage, "input_token_details", "cache_read")
    five_minutes = count(usage, "input_token_details", "ephemeral_5m_input_tokens")
    hour = count(usage, "input_token_details", "ephemeral_1h_input_tokens")
    written = max(count(usage, "input_token_details", "cache_creation"), five_minutes + hour)
    return Tokens(
        input=inclusive(count(usage, "input_tokens"), cached, written),
        cached=cached,
        cache_write=written,
        output=count(usage, "output_tokens"),
        reasoning=count(usage, "output_token_details", "reasoning"),
        details=details(
            cache_write_5m_tokens=five_minutes,
            cache_write_1h_tokens=hour,
            input_audio_tokens=count(usage, "input_token_details", "audio"),
            output_audio_tokens=count(usage, "output_token_details", "audio"),
        ),
    )


def completion_tokens(usage: Any) -> Tokens:
    """From the ``token_usage`` of an ``LLMResult.llm_output``, which has OpenAI's names whoever the vendor is."""
    prompt = count(usage, "prompt_tokens")
    return Tokens(
        input=prompt,
        cached=count(usage, "prompt_tokens_details", "cached_tokens"),
        output=max(count(usage, "completion_tokens"), count(usage, "total_tokens") - prompt),
        reasoning=count(usage, "completion_tokens_details", "reasoning_tokens"),
    )


class LangChainStrategy(LanguageModelStrategy):
    """Meters the runs of LangChain's models. A cost function gets a ``ModelCall``."""

    def handler(self, customer: Who | None = None, *, keep_text: bool = False, **metadata: Any) -> Any:
        """A callback handler, for one call, for a chain, or for all."""
        from langchain_core.callbacks import BaseCallbackHandler

        runs = _Runs(self, customer, keep_text, metadata)

        class MeteringHandler(BaseCallbackHandler):  # type: ignore[misc]  # LangChain is not installed everywhere
            """Reports each run of a model."""

            run_inline = True  # in the caller's thread and context, so that it can be asked whose call it is

            def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **more: Any) -> None:
                harmless(lambda runs: runs.begin(run_id, messages, more), runs, None)

            on_llm_start = on_chat_model_start

            def on_llm_end(self, response: Any, *, run_id: Any, **more: Any) -> None:
                harmless(lambda runs: runs.end(run_id, response, None), runs, None)

            def on_llm_error(self, error: BaseException, *, run_id: Any, **more: Any) -> None:
                harmless(lambda runs: runs.end(run_id, more.get("response"), error), runs, None)

        return MeteringHandler()


class _Run(NamedTuple):
    customer: Customer | None
    vendor: str
    model: str
    prompts: Any
    siblings: int
    """Other prompts in the same call of a model of texts."""


class _Sums(threading.local):
    """LangChain tells what several prompts used with the first one's run; the others, whose ends follow at once, tell
    nothing then. They tell nothing either when nobody knows."""

    runs_left = 0


class _Runs:
    """The runs under way."""

    def __init__(
        self, strategy: LanguageModelStrategy, customer: Who | None, keep_text: bool, metadata: Mapping[str, Any]
    ) -> None:
        self._strategy, self._customer, self._keep_text, self._metadata = strategy, customer, keep_text, metadata
        self._under_way: OrderedDict[Any, _Run] = OrderedDict()
        self._sums = _Sums()

    def begin(self, run_id: Any, prompts: Any, more: Mapping[str, Any]) -> None:
        """Remember what only the start tells."""
        told = more.get("metadata") or {}
        who = self._strategy.resolve(customer_in(told) if self._customer is None else self._customer)
        siblings = max(0, count(more, "batch_size") - 1) if all(isinstance(each, str) for each in prompts or ()) else 0
        self._under_way[run_id] = _Run(who, text(told, "ls_provider"), text(told, "ls_model_name"), prompts, siblings)
        while len(self._under_way) > _RUNS_MAX:
            self._under_way.popitem(last=False)

    def end(self, run_id: Any, response: Any, error: BaseException | None) -> None:
        """Report a run that ended, was given up, or broke off."""
        run = self._under_way.pop(run_id, None)
        if run is None:
            return
        beside = self._told_beside(run, response)
        if run.customer is None:
            return
        generations = [generation for prompt in items(response, "generations") for generation in prompt]
        told = [usage for prompt in items(response, "generations") if (usage := _usage(prompt)) is not None]
        if any(read(usage, "total_cost") == 0 for usage in told):
            return  # from the cache
        words = "".join(text(generation, "text") for generation in generations)
        is_told = bool(told) or beside is not None
        if isinstance(error, Exception) and not is_told and not words:
            return  # the call failed
        about = [read(generation, "message", "response_metadata") for generation in generations]
        about.append(read(response, "llm_output"))
        prompt_text = "".join(text(message, "text") or as_text(message) for message in _flat(run.prompts))
        guess = Tokens(input=estimated_tokens(len(prompt_text)), output=estimated_tokens(len(words)))
        tokens = sum((message_tokens(usage) for usage in told), Tokens()) if told else beside or guess
        if error is not None:  # told at the beginning of a stream, the output was not known yet
            tokens = msgspec.structs.replace(tokens, output=max(tokens.output, guess.output))
        call = ModelCall(
            vendor=run.vendor or _first(about, "model_provider"),
            model=_first(about, "model_name", "model") or run.model,
            tokens=tokens,
            is_estimated=error is not None or not is_told,
            terms={"service_tier": tier} if (tier := _first(about, "service_tier")) else {},
            prompt=prompt_text if self._keep_text else None,
            response=words if self._keep_text else None,
        )
        self._strategy.record(run.customer, call, self._metadata, external_id=str(run_id), timestamp=_begun(run_id))

    def _told_beside(self, run: _Run, response: Any) -> Tokens | None:
        """What was used as it is told beside the answers, None when it is not."""
        usage = read(response, "llm_output", "token_usage")
        tokens = completion_tokens(usage)
        if tokens.total:
            self._sums.runs_left = run.siblings
            return tokens
        if usage == {} and run.siblings and self._sums.runs_left:
            self._sums.runs_left -= 1
            return tokens
        return None


def _begun(run_id: Any) -> datetime | None:
    """When the run began, if its id tells (UUID version 7, in milliseconds): then copies of its event are equal."""
    is_timed = isinstance(run_id, UUID) and run_id.version == 7
    return _EPOCH + timedelta(milliseconds=run_id.int >> 80) if is_timed else None


def _usage(generations: Any) -> Any:
    """What was used for one prompt: several answers to it all tell the same sum."""
    return next((found for each in generations if (found := read(each, "message", "usage_metadata")) is not None), None)


def _first(sources: list[Any], *names: str) -> str:
    return next((found for source in sources for name in names if (found := text(source, name))), "")


def _flat(prompts: Any) -> list[Any]:
    """Prompts are texts, or lists of messages."""
    return [part for prompt in prompts or () for part in (prompt if isinstance(prompt, list) else [prompt])]
