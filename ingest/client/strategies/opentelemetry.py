"""OpenTelemetry: a span processor that meters spans with GenAI or OpenInference attributes, whoever makes them.

    llm = ingestion.strategy(OpenTelemetryStrategy, "llm").cost(list_price)
    tracer_provider.add_span_processor(llm.span_processor("user-1"))

Without a customer it is the one in the span's attributes: ``external_customer_id`` or ``customer_id``. Spans of agents
and of tools sum up, or cause, what the spans of the model's own operations tell; only these count. An event's id is
made of the trace's and the span's. Spans that are not sampled do not get here: where money is at stake, wrap the
client itself.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from ingest.client.instrument import harmless
from ingest.client.strategy import LanguageModelStrategy, ModelCall, Tokens, Who, cents, customer_in, read, text
from ingest.client.usage import read_terms, read_tokens

_OPERATIONS = frozenset({"chat", "text_completion", "generate_content", "embeddings", ""})
"""What a model does itself. Older instrumentations name no operation."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_USAGES = ("gen_ai.usage.", "llm.token_count.")
_KINDS = frozenset({"LLM", "EMBEDDING", ""})
"""What a model does itself, where OpenInference says it."""

_VENDORS = ("gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system")
_MODELS = (
    "gen_ai.response.model", "gen_ai.request.model", "llm.model_name", "llm.request.model_name", "embedding.model_name",
)  # fmt: skip
_COSTS = ("gen_ai.usage.cost", "operation.cost", "llm.cost.total")
"""What an instrumentation thinks a call cost, in dollars."""

_OUTPUTS = {"image": "an image", "speech": "speech"}
"""Kinds of output whose tokens are not told apart from those of text."""



def span_tokens(attributes: Any) -> Tokens | None:
    """From a span's attributes; None when they tell no usage."""
    told = {name: attributes[name] for name in attributes if isinstance(name, str) and name.startswith(_USAGES)}
    return read_tokens(told) if told else None


class OpenTelemetryStrategy(LanguageModelStrategy):
    """Meters spans. A cost function gets a ``ModelCall``."""

    def span_processor(self, customer: Who | None = None, **metadata: Any) -> "MeteringSpanProcessor":
        """An entry for ``TracerProvider.add_span_processor``."""
        return MeteringSpanProcessor(self, customer, metadata)

    def report(self, span: Any, customer: Who | None, metadata: dict[str, Any]) -> None:
        """Report a span that has ended, if it is one of a model's own operations."""
        attributes = read(span, "attributes") or {}
        tokens = span_tokens(attributes)
        if tokens is None or not _is_own_operation(attributes):
            return
        whose = self.resolve(customer_in(attributes) if customer is None else customer)
        if whose is None:
            return
        ended = _EPOCH + timedelta(microseconds=span.end_time // 1000) if read(span, "end_time") else None
        call = ModelCall(
            vendor=_first(attributes, _VENDORS),
            model=_first(attributes, _MODELS),
            tokens=tokens,
            terms=read_terms({name: attributes[name] for name in attributes if "." in name}),
            unpriced=_OUTPUTS.get(text(attributes, "gen_ai.output.type"), ""),
            is_split=False,
            called=ended,
            reported_cost=next((cost for name in _COSTS if (cost := cents(read(attributes, name))) is not None), None),
        )
        identity = f"{read(span, 'context', 'trace_id'):032x}:{read(span, 'context', 'span_id'):016x}"
        self.record(whose, call, metadata, external_id=identity, timestamp=ended)


def _is_own_operation(attributes: Any) -> bool:
    """Whether a model did it itself. Spans of agents and chains sum up what such spans below them tell."""
    kind = text(attributes, "openinference.span.kind")
    return text(attributes, "gen_ai.operation.name") in _OPERATIONS and kind in _KINDS


def _first(attributes: Any, names: tuple[str, ...]) -> str:
    return next((found for name in names if (found := text(attributes, name))), "")


class MeteringSpanProcessor:
    """What a tracer provider needs of a span processor."""

    def __init__(self, strategy: OpenTelemetryStrategy, customer: Who | None, metadata: dict[str, Any]) -> None:
        self._strategy, self._customer, self._metadata = strategy, customer, metadata

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing is known yet."""

    def _on_ending(self, span: Any) -> None:
        """Nothing to add to the span."""

    def on_end(self, span: Any) -> None:
        """Report the span."""
        harmless(lambda span: self._strategy.report(span, self._customer, self._metadata), span, None)

    def shutdown(self) -> None:
        """The ingestion has its own end."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is held back here."""
        return True
