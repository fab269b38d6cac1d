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

from msgspec.structs import replace

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
    estimated_tokens,
    items,
    read,
    text,
)
from ingest.client.tools import billed_tools, has_sound, is_grounded, searches_unseen
from ingest.client.usage import (
    kept_as_asked,
    parts_by_model,
    read_details,
    read_terms,
    read_tokens,
    read_unpriced,
    tier_in_names,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_RUNS_MAX = 10_000
"""Runs that were begun and whose end was not heard of; LangChain tells every end, so these are calls under way."""


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
    asked: Any
    """The parameters of the call, where LangChain tells them."""
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
        vendor, model = text(told, "ls_provider"), text(told, "ls_model_name")
        self._under_way[run_id] = _Run(who, vendor, model, prompts, more.get("invocation_params"), siblings)
        while len(self._under_way) > _RUNS_MAX:
            self._under_way.popitem(last=False)

    def end(self, run_id: Any, response: Any, error: BaseException | None) -> None:
        """Report a run that ended, was given up, or broke off."""
        run = self._under_way.pop(run_id, None)
        if run is None:
            return
        beside = self._told_beside(run, response, error)
        if run.customer is None:
            return
        answer = _Answer(response, error)
        if any(read(usage, "total_cost") == 0 for usage in answer.told):
            return  # from the cache
        is_told = bool(answer.told) or beside is not None
        if isinstance(error, Exception) and not is_told and not answer.words:
            return  # the call failed
        prompt_text = "".join(text(message, "text") or as_text(message) for message in _flat(run.prompts))
        guess = Tokens(input=estimated_tokens(len(prompt_text)), output=estimated_tokens(len(answer.words)))
        tokens = sum(map(read_tokens, answer.told), Tokens()) if answer.told else beside or guess
        is_cut = error is not None and not answer.is_billed_whole
        if is_cut:  # told at the beginning of a stream, the output was not known yet
            tokens = replace(tokens, output=max(tokens.output, guess.output))
        call = ModelCall(
            vendor=run.vendor or answer.first("model_provider"),
            model=answer.first("model_name", "model") or run.model,
            tokens=kept_as_asked(answer.with_searches(tokens), run.prompts, run.asked),
            is_estimated=is_cut or not is_told,
            terms=answer.terms(run.asked),
            unpriced=answer.unpriced(run),
            is_split=False,
            called=_begun(run_id),
            prompt=prompt_text if self._keep_text else None,
            response=answer.words if self._keep_text else None,
        )
        for number, part in enumerate(reversed(answer.parts(call, run))):
            identity = f"{run_id}:{number}" if number else str(run_id)
            self._strategy.record(run.customer, part, self._metadata, external_id=identity, timestamp=_begun(run_id))

    def _told_beside(self, run: _Run, response: Any, error: BaseException | None) -> Tokens | None:
        """What was used as it is told beside the answers, None when it is not."""
        usage = read(error, "completion", "usage") if error else read(response, "llm_output", "token_usage")
        tokens = read_tokens(usage)
        if tokens.total:
            self._sums.runs_left = run.siblings
            return tokens
        if usage == {} and run.siblings and self._sums.runs_left:
            self._sums.runs_left -= 1
            return tokens
        return None


class _Answer:
    """What LangChain tells of the end of a run.

    An error may hold the completion that openai's own parser refused: it was billed as any other.
    """

    def __init__(self, response: Any, error: BaseException | None) -> None:
        prompts = items(response, "generations")
        generations = [generation for prompt in prompts for generation in prompt]
        messages = [read(generation, "message") for generation in generations]
        completion = read(error, "completion")
        self.told = [usage for prompt in prompts if (usage := _usage(prompt)) is not None]
        self.words = "".join(text(generation, "text") for generation in generations)
        self.is_billed_whole = completion is not None
        self._about = [read(message, "response_metadata") for message in messages]
        self._about += [read(response, "llm_output"), completion]
        self._about += [read(generation, "generation_info") for generation in generations]
        self._usage = read(response, "llm_output", "usage")  # Anthropic's own, of what was not streamed
        self._blocks = [block for message in messages for block in items(message, "content")]
        self._blocks += [block for message in messages for block in items(message, "additional_kwargs", "tool_outputs")]

    def first(self, *names: str) -> str:
        """The first text by one of these names in what LangChain tells about the answer."""
        return next((found for source in self._about for name in names if (found := text(source, name))), "")

    def with_searches(self, tokens: Tokens) -> Tokens:
        """The tokens and the searches beside them, which LangChain leaves out of its own usage."""
        searches = {name: number for name, number in read_details(self._usage).items() if name == "web_searches"}
        return tokens + Tokens(details=searches or billed_tools(self._blocks).searches)

    def terms(self, asked: Any) -> dict[str, str]:
        """What decides the price beside the tokens, as the answer says it; else as it was asked for."""
        tiers = ({"service_tier": tier} for usage in self.told if (tier := tier_in_names(usage)))
        asked_for = {name: term for name, term in read_terms(asked).items() if name != "service_tier"}
        return asked_for | read_terms(self._usage, *self._about, *tiers)

    def unpriced(self, run: _Run) -> str:
        """What is billed beside the tokens, and LangChain or the vendor does not say how much of it."""
        is_named = any(text(each, "type") not in ("", "message") for each in items(self._usage, "iterations"))
        if words := billed_tools(self._blocks).unpriced if not is_named else "":
            return words
        if any(is_grounded(read(about, "grounding_metadata")) for about in self._about):
            return "grounding"
        if isinstance(run.asked, Mapping) and searches_unseen(run.asked, run.model):
            return "a search"
        if self._usage is None and read(run.asked, "fallbacks"):
            return "a call that two models may have answered"
        edits = items(run.asked, "context_management", "edits")
        if self._usage is None and any(text(edit, "type").startswith("compact") for edit in edits):
            return "a compaction"
        if has_sound(run.prompts) and not any("input_audio_tokens" in read_details(usage) for usage in self.told):
            return "sound"
        return next((words for usage in self.told if (words := read_unpriced(usage))), "")

    def parts(self, call: ModelCall, run: _Run) -> list[ModelCall]:
        """The call, and before it those of other models in it, which Anthropic's own usage tells apart."""
        if not items(self._usage, "iterations"):
            return [call]
        advice = {name: term for name, term in call.terms.items() if name != "speed"}
        parts = [
            replace(
                call,
                model=part.model,
                tokens=kept_as_asked(part.tokens, run.prompts, run.asked),
                terms=advice if part.is_advice else call.terms,
            )
            for part in parts_by_model(self._usage, call.model, run.model)
        ]
        return [*(replace(part, prompt=None, response=None) for part in parts[:-1]), parts[-1]]


def _begun(run_id: Any) -> datetime | None:
    """When the run began, if its id tells (UUID version 7, in milliseconds): then copies of its event are equal."""
    is_timed = isinstance(run_id, UUID) and run_id.version == 7
    return _EPOCH + timedelta(milliseconds=run_id.int >> 80) if is_timed else None


def _usage(generations: Any) -> Any:
    """What was used for one prompt: several answers to it all tell the same sum."""
    return next((found for each in generations if (found := read(each, "message", "usage_metadata")) is not None), None)


def _flat(prompts: Any) -> list[Any]:
    """Prompts are texts, or lists of messages."""
    return [part for prompt in prompts or () for part in (prompt if isinstance(prompt, list) else [prompt])]
