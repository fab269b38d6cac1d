"""PydanticAI: a capability that reports each request to a model, or the result of a run handed over afterwards.

    llm = ingestion.strategy(PydanticAIStrategy, "llm").cost(list_price)
    agent = Agent("openai:gpt-5", capabilities=[llm.capability("user-1")])   # each request, also of failed runs
    llm.ingest("user-1", agent.run_sync("..."))                              # or: each run that gave a result

Use one of the two: with both, every token counts twice. The capability is the better one; it also sees answers that
were rejected, runs that failed, and streams that were abandoned. ``ingest`` is Polar's own call, with Polar's fields;
it counts what the run itself asked for, not what was used by other agents that it called with its ``usage``.
"""

from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from decimal import Decimal
from typing import Any

from ingest.client.instrument import harmless
from ingest.client.strategy import (
    CustomerLike,
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    as_text,
    cents,
    characters_in,
    estimated_tokens,
    items,
    read,
    text,
)
from ingest.client.usage import kept_as_asked, read_terms, read_tokens, read_unpriced


def request_tokens(usage: Any) -> Tokens:
    """From a ``RequestUsage`` or ``RunUsage``; they say how much of what was written to a cache is kept for an hour."""
    tokens = read_tokens(usage)
    return kept_as_asked(tokens) if read(usage, "cache_write_1h_tokens") is not None else tokens


def model_call(response: Any, asked: Any = None, *, settings: Any = None, keep_text: bool = False) -> ModelCall:
    """From a ``ModelResponse``; ``asked`` are the messages it answers. Incomplete ones are estimated.

    Before it told the speed of an answer, PydanticAI had it in the ``settings`` of the request alone.
    """
    words = "".join(text(part, "content") for part in items(response, "parts"))
    tokens = request_tokens(read(response, "usage"))
    is_estimated = tokens.total == 0 or read(response, "state") not in (None, "complete")
    if is_estimated:
        tokens += Tokens(
            input=0 if tokens.input else estimated_tokens(characters_in(_contents(asked))),
            output=max(0, estimated_tokens(len(words)) - tokens.output),
        )
    return ModelCall(
        vendor=text(response, "provider_name"),
        model=text(response, "model_name"),
        tokens=tokens,
        api_url=text(response, "provider_url") or None,
        is_estimated=is_estimated,
        terms=read_terms(read(response, "provider_details"), {"speed": text(settings, "anthropic_speed")}),
        unpriced=_unpriced(response),
        called=called if isinstance(called := read(response, "timestamp"), datetime) else None,
        reported_cost=cents(read(response, "usage", "cost")),
        prompt="\n".join(map(as_text, _contents(asked))) if keep_text else None,
        response=words if keep_text else None,
    )


def _unpriced(response: Any) -> str:
    """What is billed beside the tokens at a price that depends on the account, or that nobody lists."""
    searches = "web_searches" in read_tokens(read(response, "usage")).details
    is_google = text(response, "provider_name").startswith("google")
    return "grounding" if searches and is_google else read_unpriced(read(response, "usage"))


def attempt_calls(response: Any) -> list[tuple[Any, ModelCall]]:
    """What answers used that were rejected on the way to this ``ModelResponse``, or to an error that has attempts."""
    failed = items(response, "failed_attempts") or items(response, "attempts")
    calls = [(read(each, "usage"), _attempt_call(each, response)) for each in failed]
    return [(usage, call) for usage, call in calls if call.tokens.total]  # what failed otherwise used nothing


def _attempt_call(attempt: Any, response: Any) -> ModelCall:
    vendor = text(attempt, "provider_name")
    is_same_vendor = vendor == text(response, "provider_name")
    return ModelCall(
        vendor=vendor,
        model=text(attempt, "model_name"),
        tokens=request_tokens(read(attempt, "usage")),
        api_url=text(response, "provider_url") or None if is_same_vendor else None,
        reported_cost=cents(read(attempt, "usage", "cost")),
    )


def _contents(asked: Any) -> list[Any]:
    return [read(part, "content") for message in asked or () for part in items(message, "parts")]


class PydanticAIStrategy(LanguageModelStrategy):
    """Meters PydanticAI's agents. A cost function gets a ``ModelCall`` with PydanticAI's own ``reported_cost``."""

    def ingest(self, external_customer_id: CustomerLike, result: Any, **metadata: Any) -> None:
        """Report a run: an event for each model that answered in it, with Polar's fields for PydanticAI besides."""
        harmless(lambda result: self._ingest(external_customer_id, result, metadata), result, None)

    def _ingest(self, customer: CustomerLike, result: Any, metadata: dict[str, Any]) -> None:
        answers = [message for message in result.new_messages() if text(message, "kind") == "response"]
        by_model = defaultdict(list)
        for answer in answers:
            for call in (*(call for _, call in attempt_calls(answer)), model_call(answer)):
                by_model[call.vendor, call.model, call.api_url].append(call)
        for calls in by_model.values():
            whole = _together(calls)
            tokens = whole.tokens
            polar = {
                "request_tokens": tokens.input, "response_tokens": tokens.output, "total_tokens": tokens.total,
                "requests": len(calls),
            }  # fmt: skip
            self.record(customer, whole, polar | metadata)

    def capability(self, customer: Who, *, keep_text: bool = False, **metadata: Any) -> Any:
        """An entry for an agent's, or a run's, ``capabilities``."""
        from pydantic_ai.capabilities import AbstractCapability

        def report(whose: CustomerLike, call: ModelCall) -> None:
            self.record(whose, call, metadata)

        def begun() -> _Request:
            return _Request(self.resolve(customer), keep_text, report)

        under_way: ContextVar[_Request | None] = ContextVar("the request under way", default=None)

        class Metering(AbstractCapability[Any]):  # type: ignore[misc]  # PydanticAI is not installed everywhere
            """Reports each request to a model."""

            async def wrap_model_request(self, ctx: Any, *, request_context: Any, handler: Any) -> Any:
                request = begun()
                token = under_way.set(request)
                try:
                    response = await handler(request_context)
                    harmless(lambda request: request.attempts(response), request, None)
                    return response
                except BaseException as error:
                    harmless(lambda error: request.fail(error, ctx, request_context), error, None)
                    raise
                finally:
                    harmless(under_way.reset, token, None)

            async def after_model_request(self, ctx: Any, *, request_context: Any, response: Any) -> Any:
                request = under_way.get() or begun()
                harmless(lambda request: request.answer(response, request_context), request, None)
                return response

        return Metering()


class _Request:
    """A request to a model under way, and what of it was reported."""

    def __init__(self, whose: CustomerLike | None, keep_text: bool, report: Callable[[CustomerLike, ModelCall], None]):
        self._whose, self._keep_text, self._report = whose, keep_text, report
        self._usages: list[Any] = []  # a response is known by its usage, which it keeps when a hook changes it

    def answer(self, response: Any, request: Any) -> None:
        """Report an answer, or what arrived of one."""
        self._usages.append(read(response, "usage"))
        if self._whose is not None:
            settings = read(request, "model_settings")
            call = model_call(response, request.messages, settings=settings, keep_text=self._keep_text)
            self._report(self._whose, call)

    def fail(self, error: BaseException, context: Any, request_context: Any) -> None:
        """Report what nobody saw until an error came, or until whoever waited gave up.

        PydanticAI writes down what it got, also of a stream in the middle, for its own count of the run. It has no
        public place for that, so this may find nothing there; then the prompt of what was given up is all there is.
        """
        for response in items(request_context, "_usage_response_ledger", "responses"):
            if not self._is_known(read(response, "usage")):
                self.answer(response, request_context)
            self.attempts(response)
        self.attempts(error)
        if not self._usages and not isinstance(error, Exception):
            unknown = {"model_name": text(context, "model", "model_name"), "provider_name": _vendor(context)}
            self.answer(unknown, request_context)

    def attempts(self, source: Any) -> None:
        """Report the answers that were rejected before this one, or before this error, but for those that were seen."""
        for usage, call in attempt_calls(source):
            if not self._is_known(usage):
                self._usages.append(usage)
                if self._whose is not None:
                    self._report(self._whose, call)

    def _is_known(self, usage: Any) -> bool:
        return any(usage is known for known in self._usages)


def _vendor(context: Any) -> str:
    return text(context, "model", "system")


def _together(calls: list[ModelCall]) -> ModelCall:
    """Several calls of one model as one."""
    first = calls[0]
    costs = [call.reported_cost for call in calls if call.reported_cost is not None]
    return ModelCall(
        vendor=first.vendor,
        model=first.model,
        tokens=sum((call.tokens for call in calls), Tokens()),
        api_url=first.api_url,
        is_estimated=any(call.is_estimated for call in calls),
        parts=tuple(calls),
        reported_cost=sum(costs, Decimal(0)) if len(costs) == len(calls) else None,
    )
