"""LiteLLM: a callback, for every vendor that LiteLLM knows.

    llm = ingestion.strategy(LiteLLMStrategy, "llm").cost(lambda call: call.reported_cost)
    litellm.callbacks = [llm.callback()]
    litellm.completion(..., metadata={"external_customer_id": "user-1"})

LiteLLM is never imported. It listens to subclasses of its own ``CustomLogger`` alone, so the callback is one when
LiteLLM is loaded already, and an object with the same methods otherwise. LiteLLM reports a stream when it is complete;
one that the caller abandons is not reported to callbacks, so it is not metered.
"""

import sys
from typing import Any

from ingest.client.instrument import harmless
from ingest.client.strategy import LanguageModelStrategy, ModelCall, Who, as_text, cents, customer_in, items, read, text
from ingest.client.usage import kept_as_asked, read_terms, read_tokens, read_unpriced

_LOGGER = "litellm.integrations.custom_logger"


class LiteLLMStrategy(LanguageModelStrategy):
    """Meters LiteLLM's calls. A cost function gets a ``ModelCall`` with LiteLLM's own ``reported_cost``."""

    def callback(self, customer: Who | None = None, *, keep_text: bool = False, **metadata: Any) -> Any:
        """An entry for ``litellm.callbacks``.

        Without a ``customer`` it is the one in the call's metadata, else the call's ``user``.
        """
        strategy = self

        def report(told: Any, response: Any) -> None:
            if told.get("cache_hit") or (usage := read(response, "usage")) is None:
                return  # answered by LiteLLM itself, or a chunk
            parameters = told.get("litellm_params") or {}
            who: Who | None = customer
            if who is None:
                who = customer_in(read(parameters, "metadata"), told.get("metadata")) or text(told, "user") or None
            whose = strategy.resolve(who)
            if whose is None:
                return
            call = ModelCall(
                vendor=text(told, "custom_llm_provider") or text(parameters, "custom_llm_provider"),
                model=text(response, "model") or text(told, "model"),
                tokens=kept_as_asked(read_tokens(usage), told.get("messages"), told.get("optional_params")),
                api_url=text(parameters, "api_base") or None,
                terms=read_terms(response, usage),
                unpriced=read_unpriced(usage),
                reported_cost=cents(told.get("response_cost")),
                prompt=as_text(told.get("messages") or told.get("input") or "") if keep_text else None,
                response=_words(response) if keep_text else None,
            )
            strategy.record(whose, call, metadata, external_id=text(told, "litellm_call_id") or None)

        return _callback_class()(report)


def _words(response: Any) -> str:
    return "".join(text(choice, "message", "content") for choice in items(response, "choices"))


def _callback_class() -> Any:
    base: Any = getattr(sys.modules.get(_LOGGER), "CustomLogger", object)

    class MeteringCallback(base):  # type: ignore[misc]  # the base is LiteLLM's, if there is one
        """Reports each call, once: LiteLLM may tell an asynchronous one twice, under the same id."""

        def __init__(self, report: Any) -> None:
            super().__init__()
            self._report = report

        def log_success_event(self, *told: Any, **named: Any) -> None:
            harmless(lambda report: report(*_told(told, named)), self._report, None)

        async def async_log_success_event(self, *told: Any, **named: Any) -> None:
            harmless(lambda report: report(*_told(told, named)), self._report, None)

    return MeteringCallback


def _told(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """The call and its answer: LiteLLM names its arguments or does not, depending on who asks."""
    call, answer = (*positional[:2], None, None)[:2]
    return named.get("kwargs", call), named.get("response_obj", answer)
