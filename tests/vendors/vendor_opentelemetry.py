"""The real OpenTelemetry SDK: spans with GenAI attributes, of today's names and the older ones."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind, Tracer

from ingest.client.prices import list_price
from ingest.client.strategies.opentelemetry import OpenTelemetryStrategy
from ingest.client.testing import RecordingIngestion
from tests.vendors.truths import check

CHAT = {
    "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-5-mini",
    "gen_ai.response.model": "gpt-5-mini-2025-08-07", "gen_ai.response.id": "chatcmpl-1",
    "gen_ai.usage.input_tokens": 1250, "gen_ai.usage.output_tokens": 340,
    "gen_ai.usage.cache_read.input_tokens": 1024, "gen_ai.usage.reasoning.output_tokens": 256,
}  # fmt: skip
OLDER = {"gen_ai.system": "anthropic", "gen_ai.request.model": "claude-sonnet-4-5", "gen_ai.usage.prompt_tokens": 21,
         "gen_ai.usage.completion_tokens": 393, "gen_ai.usage.cache_read_input_tokens": 1800}  # fmt: skip


@pytest.fixture
def provider() -> Iterator[TracerProvider]:
    """A tracer provider."""
    made = TracerProvider()
    yield made
    made.shutdown()


def span(tracer: Tracer, attributes: dict[str, Any]) -> None:
    """A span as an instrumentation makes one."""
    with tracer.start_as_current_span("chat", kind=SpanKind.CLIENT) as current:
        current.set_attributes(attributes)


def test_spans_of_a_models_own_operations_are_events(provider: TracerProvider, ingestion: RecordingIngestion) -> None:
    """An agent's span, which tells the sum of its calls, and a tool's are not; nor is one without usage."""
    llm = ingestion.strategy(OpenTelemetryStrategy, "llm").cost(list_price)
    provider.add_span_processor(llm.span_processor("ada"))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("invoke_agent") as agent:
        agent.set_attributes(CHAT | {"gen_ai.operation.name": "invoke_agent"})
        span(tracer, CHAT)
        span(tracer, {"gen_ai.operation.name": "execute_tool"})
        context = agent.get_span_context()
    event = ingestion.one()
    assert event["metadata"].pop("_cost")["amount"] == 0.07621
    assert event["metadata"] == {
        "vendor": "openai", "model": "gpt-5-mini-2025-08-07", "inputTokens": 1250, "cachedInputTokens": 1024,
        "outputTokens": 340, "totalTokens": 1590, "reasoningTokens": 256, "strategy": "LLM",
        "_llm": {"vendor": "openai", "model": "gpt-5-mini-2025-08-07", "input_tokens": 1250,
                 "cached_input_tokens": 1024, "output_tokens": 340, "total_tokens": 1590},
    }  # fmt: skip
    assert event["external_id"].startswith(f"llm:{context.trace_id:032x}:")


def test_older_names_and_customers_in_attributes(provider: TracerProvider, ingestion: RecordingIngestion) -> None:
    """What is beside the input is put inside; a span of nobody's is not metered."""
    provider.add_span_processor(ingestion.strategy(OpenTelemetryStrategy, "llm").span_processor())
    tracer = provider.get_tracer("test")
    span(tracer, OLDER | {"external_customer_id": "ada"})
    span(tracer, OLDER)
    event = ingestion.one()
    assert event["external_customer_id"] == "ada"
    assert (event["metadata"]["inputTokens"], event["metadata"]["cachedInputTokens"]) == (1821, 1800)
    assert (event["metadata"]["vendor"], event["metadata"]["totalTokens"]) == ("anthropic", 2214)


def test_a_span_counts_once_however_many_processors_see_it(
    provider: TracerProvider, ingestion: RecordingIngestion
) -> None:
    """Copies have the same id and the same content, time included."""
    llm = ingestion.strategy(OpenTelemetryStrategy, "llm")
    provider.add_span_processor(llm.span_processor("ada"))
    provider.add_span_processor(llm.span_processor("ada"))
    span(provider.get_tracer("test"), CHAT)
    first, second = ingestion.events
    assert first == second
    assert provider.force_flush()


FLEX = {
    "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.response.model": "gpt-5.6-sol",
    "gen_ai.usage.input_tokens": 10_000, "gen_ai.usage.output_tokens": 320,
    "gen_ai.usage.cache_write.input_tokens": 8000, "openai.response.service_tier": "flex",
}  # fmt: skip
WRITTEN = {
    "gen_ai.operation.name": "chat", "gen_ai.provider.name": "anthropic", "gen_ai.response.model": "claude-sonnet-4-5",
    "gen_ai.usage.input_tokens": 1000, "gen_ai.usage.output_tokens": 500,
    "gen_ai.usage.cache_creation.input_tokens": 800,
}  # fmt: skip
OPENINFERENCE = {
    "openinference.span.kind": "LLM", "llm.provider": "openai", "llm.model_name": "gpt-5-mini-2025-08-07",
    "llm.token_count.prompt": 1250, "llm.token_count.completion": 340, "llm.token_count.total": 1590,
    "llm.token_count.prompt_details.cache_read": 1024, "llm.token_count.completion_details.reasoning": 256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("attributes", "truth"),
    [(FLEX, "otel-flex"), (WRITTEN, "otel-anthropic-write"), (OPENINFERENCE, "openinference")],
)
def test_what_spans_tell(
    provider: TracerProvider, ingestion: RecordingIngestion, attributes: dict[str, Any], truth: str
) -> None:
    """Names of today, names of OpenInference, and what no name says."""
    llm = ingestion.strategy(OpenTelemetryStrategy, "llm").cost(list_price)
    provider.add_span_processor(llm.span_processor("ada"))
    span(provider.get_tracer("test"), attributes)
    check(truth, ingestion.events)


def test_only_a_models_own_spans_of_openinference_count(
    provider: TracerProvider, ingestion: RecordingIngestion
) -> None:
    """Chains and agents tell the sums of what is below them. What an instrumentation says of the cost is there."""
    llm = ingestion.strategy(OpenTelemetryStrategy, "llm").cost(lambda call: call.reported_cost)
    provider.add_span_processor(llm.span_processor("ada"))
    for kind in ("CHAIN", "AGENT", "TOOL", "LLM"):
        span(provider.get_tracer("test"), OPENINFERENCE | {"openinference.span.kind": kind, "llm.cost.total": 0.0007})
    assert ingestion.one()["metadata"]["_cost"]["amount"] == 0.07
