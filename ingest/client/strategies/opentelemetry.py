"""OpenTelemetry: a span processor that meters spans with GenAI attributes, whoever makes them.

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
from ingest.client.strategy import (
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    count,
    customer_in,
    inclusive,
    read,
    text,
)

_OPERATIONS = frozenset({"chat", "text_completion", "generate_content", "embeddings", ""})
"""What a model does itself. Older instrumentations name no operation."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_USAGE = "gen_ai.usage."


def span_tokens(attributes: Any) -> Tokens | None:
    """From a span's attributes, by today's names or the older ones; None when they tell no usage."""
    if not any(isinstance(name, str) and name.startswith(_USAGE) for name in attributes):
        return None
    cached = _count(attributes, "cache_read.input_tokens", "cache_read_input_tokens", "cached_tokens")
    written = _count(attributes, "cache_creation.input_tokens", "cache_creation_input_tokens")
    return Tokens(
        input=inclusive(_count(attributes, "input_tokens", "prompt_tokens"), cached, written),
        cached=cached,
        cache_write=written,
        output=_count(attributes, "output_tokens", "completion_tokens"),
        reasoning=_count(attributes, "reasoning.output_tokens", "reasoning_tokens", "details.reasoning_tokens"),
    )


def _count(attributes: Any, *names: str) -> int:
    return next((found for name in names if (found := count(attributes, _USAGE + name))), 0)


class OpenTelemetryStrategy(LanguageModelStrategy):
    """Meters spans. A cost function gets a ``ModelCall``."""

    def span_processor(self, customer: Who | None = None, **metadata: Any) -> "MeteringSpanProcessor":
        """An entry for ``TracerProvider.add_span_processor``."""
        return MeteringSpanProcessor(self, customer, metadata)

    def report(self, span: Any, customer: Who | None, metadata: dict[str, Any]) -> None:
        """Report a span that has ended, if it is one of a model's own operations."""
        attributes = read(span, "attributes") or {}
        tokens = span_tokens(attributes)
        if tokens is None or text(attributes, "gen_ai.operation.name") not in _OPERATIONS:
            return
        whose = self.resolve(customer_in(attributes) if customer is None else customer)
        if whose is None:
            return
        call = ModelCall(
            vendor=text(attributes, "gen_ai.provider.name") or text(attributes, "gen_ai.system"),
            model=text(attributes, "gen_ai.response.model") or text(attributes, "gen_ai.request.model"),
            tokens=tokens,
        )
        identity = f"{read(span, 'context', 'trace_id'):032x}:{read(span, 'context', 'span_id'):016x}"
        ended = _EPOCH + timedelta(microseconds=span.end_time // 1000) if read(span, "end_time") else None
        self.record(whose, call, metadata, external_id=identity, timestamp=ended)


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
