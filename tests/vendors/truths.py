"""The truth table: what a strategy must say of a call, and what the call costs by the price list; and the versions.

The tests with the real libraries check these rows by replayed answers (``check``). The page of the documentation,
ingest/client/strategies/README.md, is made from them:

    python -m tests.vendors.truths
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
PAGE = REPOSITORY / "ingest" / "client" / "strategies" / "README.md"
TOKENS = REPOSITORY / "tests" / "ingest" / "client" / "strategies" / "test_tokens.py"  # proves what is not in a library
LIBRARIES = (
    "openai", "anthropic", "google-genai", "langchain-core", "langchain-openai", "langchain-anthropic",
    "pydantic-ai-slim", "opentelemetry-sdk", "boto3", "aiobotocore", "genai-prices",
)  # fmt: skip


class Part(NamedTuple):
    """One event: its model, its tokens, and its cost in cents; None is an event without ``_cost``."""

    model: str
    input: int
    output: int
    cost: str | None
    cached: int = 0
    written: int = 0
    reasoning: int = 0
    is_estimated: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Part":
        """Return what an event says."""
        cost = metadata.get("_cost")
        return cls(
            model=metadata["model"],
            input=metadata["inputTokens"],
            output=metadata["outputTokens"],
            cost=None if cost is None else _plain(Decimal(str(cost["amount"]))),
            cached=metadata["cachedInputTokens"],
            written=metadata.get("cacheWriteTokens", 0),
            reasoning=metadata.get("reasoningTokens", 0),
            is_estimated=metadata.get("estimated", False),
        )


class Truth(NamedTuple):
    """A call and its events."""

    vendor: str
    case: str
    parts: tuple[Part, ...]


FLEX, MINI = "gpt-5", "gpt-5-mini-2025-08-07"
SONNET, OPUS = "claude-sonnet-4-5-20250929", "claude-opus-4-8"
ORDINARY = Part(MINI, 1250, 340, "0.07621", cached=1024, reasoning=256)
ONE_HOUR = Part(SONNET, 2009, 393, None, cached=1800, written=188, reasoning=250)
FIVE_MINUTES = ONE_HOUR._replace(cost="0.7203")

TRUTHS: dict[str, Truth] = {
    "openai-ordinary": Truth("OpenAI", "a chat, whole or streamed", (ORDINARY,)),
    "openai-flex": Truth("OpenAI", "service tier `flex`", (Part(FLEX, 21_000, 100, "0.2375", 20_000, 0, 50),)),
    "openai-scale": Truth("OpenAI", "a service tier without a listed price (`scale`)",
                          (Part(FLEX, 21_000, 100, None, 20_000, 0, 50),)),
    "openai-refused-by-parser": Truth("OpenAI", "an answer that the library's own parser refuses: `parse` raises",
                                      (Part(FLEX, 1000, 500, "0.58", 400),)),
    "openai-beta": Truth("OpenAI", "`client.beta.responses`, whole, streamed or in the background", (ORDINARY,)),
    "openai-search": Truth("OpenAI", "a chat with `web_search_options`", (ORDINARY._replace(cost=None),)),
    "openai-tools": Truth("OpenAI", "a response with 2 web searches and 1 search in files",
                          (ORDINARY._replace(cost="2.32621"),)),
    "openai-code": Truth("OpenAI", "a response that ran code or made an image", (ORDINARY._replace(cost=None),)),
    "openai-kept-long": Truth("OpenAI", "a write that the cache keeps for twelve hours",
                              (Part("gpt-5.6-sol", 1000, 500, None, written=800),)),
    "deepseek": Truth("DeepSeek", "`prompt_cache_hit_tokens`", (Part("deepseek-chat", 1000, 500, "0.074", 400),)),
    "moonshot-stream": Truth("Moonshot (Kimi)", "a stream with the usage inside `choices[0]`",
                             (Part("kimi-k2.5", 1000, 500, "0.21"),)),
    "groq-stream": Truth("Groq", "a stream with the usage inside `x_groq`",
                         (Part("llama-3.3-70b-versatile", 1000, 500, "0.0985"),)),
    "xai-sources": Truth("xAI", "an answer with live search", (Part("grok-4", 1000, 500, None),)),
    "anthropic-ordinary": Truth("Anthropic", "a message; of the writes 88 for five minutes and 100 for an hour",
                                (FIVE_MINUTES._replace(cost="0.7428"),)),
    "anthropic-refused-by-parser": Truth("Anthropic", "an answer that the library's own parser refuses",
                                         (Part(SONNET, 1000, 500, "1.05"),)),
    "anthropic-unsplit": Truth("Anthropic", "writes without a split, where the request wants none kept for an hour",
                               (FIVE_MINUTES,)),
    "anthropic-hour": Truth("Anthropic", "writes without a split, where the request wants some kept for an hour",
                            (ONE_HOUR,)),
    "anthropic-fallback": Truth("Anthropic", "another model answers after the one that was asked declined", (
        Part("claude-fable-5", 250, 100, "0.75"), Part(OPUS, 1232, 100, "0.866"))),
    "anthropic-fallback-left": Truth("Anthropic", "the same, left before the end", (
        Part(OPUS, 1232, 5, None, is_estimated=True),)),
    "anthropic-fallback-credit": Truth("Anthropic", "a call with a fallback credit", (Part(SONNET, 1000, 500, None),)),
    "anthropic-fast": Truth("Anthropic", "fast mode with 3 web searches", (Part(OPUS, 1050, 4000, "24.05"),)),
    "anthropic-priority": Truth("Anthropic", "service tier `priority`, which is paid for in advance",
                                (Part(SONNET, 1000, 500, None),)),
    "anthropic-code": Truth("Anthropic", "code that ran without a search", (Part(SONNET, 1000, 500, None),)),
    "google-ordinary": Truth("Google", "`generate_content`, with 50 tokens of sound in the prompt",
                             (Part("gemini-2.5-flash", 930, 200, "0.067576", cached=512, reasoning=120),)),
    "google-image": Truth("Google", "a picture: its tokens have a price of their own",
                          (Part("gemini-2.5-flash-image", 10, 1290, "3.8703"),)),
    "google-image-unlisted": Truth("Google", "a picture of a model without a listed price for it",
                                   (Part("gemini-2.5-flash", 10, 1290, None),)),
    "google-flex": Truth("Google", "`trafficType` `ON_DEMAND_FLEX`, or the header `x-gemini-service-tier: flex`",
                         (Part("gemini-3.8-flash-tts", 1000, 1000, "0.475"),)),
    "google-flex-unlisted": Truth("Google", "the same on a model without a listed price for that tier",
                                  (Part("gemini-2.5-flash", 1000, 1000, None),)),
    "google-provisioned": Truth("Google", "`PROVISIONED_THROUGHPUT`, which is paid for in advance",
                                (Part("gemini-2.5-flash", 1000, 1000, None),)),
    "google-grounding": Truth("Google", "an answer that is grounded in searches",
                              (Part("gemini-2.5-flash", 1000, 1000, None),)),
    "bedrock": Truth("Bedrock", "`converse` and `converse_stream`", (
        Part("anthropic.claude-sonnet-4-5-20250929-v1:0", 2009, 393, "0.79233", cached=1800, written=188),)),
    "bedrock-nova": Truth("Bedrock", "a model of Amazon's", (Part("amazon.nova-pro-v1:0", 1000, 500, "0.24"),)),
    "bedrock-flex": Truth("Bedrock", "a service tier, or latency, without a listed price",
                          (Part("amazon.nova-pro-v1:0", 1000, 500, None),)),
    "bedrock-left": Truth("Bedrock", "a stream that is left", (
        Part("amazon.nova-pro-v1:0", 5, 5, "0.002", is_estimated=True),)),
    "langchain-openai-flex": Truth("LangChain, ChatOpenAI", "service tier `flex`, invoked or streamed",
                                   (Part(FLEX, 21_000, 100, "0.2375", 20_000, 0, 50),)),
    "langchain-openai-refused": Truth("LangChain, ChatOpenAI", "an answer that the parser refuses",
                                      (Part(FLEX, 1000, 500, "0.58", 400),)),
    "langchain-anthropic-searches": Truth("LangChain, ChatAnthropic", "3 web searches, invoked or streamed",
                                          (Part(OPUS, 1050, 4000, "13.525"),)),
    "langchain-anthropic-unsplit": Truth("LangChain, ChatAnthropic", "a stream, whose writes are not split, where the "
                                         "request wants none kept for an hour", (FIVE_MINUTES._replace(reasoning=0),)),
    "langchain-anthropic-hour": Truth("LangChain, ChatAnthropic", "a stream, where the request wants some kept for an "
                                      "hour", (ONE_HOUR._replace(reasoning=0),)),
    "langchain-anthropic-fallback": Truth("LangChain, ChatAnthropic", "another model answers, invoked", (
        Part(OPUS, 1232, 100, "0.866"), Part("claude-fable-5", 250, 100, "0.75"))),
    "langchain-image": Truth("LangChain", "a model whose pictures have a price of their own: they are not told apart",
                             (Part("gemini-2.5-flash-image", 10, 1290, None),)),
    "pydantic-ai-fast": Truth("PydanticAI", "Anthropic in fast mode with 3 web searches",
                              (Part(OPUS, 1050, 4000, "24.05"),)),
    "pydantic-ai-tiers": Truth("PydanticAI", "a run of two requests (`ingest`): each by its own size",
                               (Part("gemini-2.5-pro", 300_000, 200, "37.7"),)),
    "litellm": Truth("LiteLLM", "`cost(lambda call: call.reported_cost)`: LiteLLM's own",
                     (Part(SONNET, 1000, 300, "0.66", 600, 100, 200),)),
    "otel-flex": Truth("OpenTelemetry", "`cache_write.input_tokens` and `openai.response.service_tier` `flex`",
                       (Part("gpt-5.6-sol", 10_000, 320, "2.72", 0, 8000),)),
    "otel-anthropic-write": Truth("OpenTelemetry", "Anthropic's cache writes: a span does not say how long they stay",
                                  (Part("claude-sonnet-4-5", 1000, 500, None, 0, 800),)),
    "openinference": Truth("OpenTelemetry", "OpenInference's names (`llm.token_count.*`)",
                           (Part(MINI, 1250, 340, "0.07621", cached=1024, reasoning=256),)),
}  # fmt: skip
"""By the price list of genai-prices 0.2.3, in November 2026."""


def check(key: str, events: Sequence[Mapping[str, Any]]) -> None:
    """Assert that events say what the table says."""
    assert [Part.of(event["metadata"]) for event in events] == list(TRUTHS[key].parts)


def table() -> str:
    """Return the truth table as Markdown."""
    head = ["| vendor or library | case | model | input: all, cached, written | output: all, reasoning | cost, cents |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    return "\n".join([*head, *(line for truth in TRUTHS.values() for line in _lines(truth))])


def versions() -> str:
    """Return the versions of the libraries that the tests run with, as Markdown."""
    lowest = _pins("requirements-lowest-pydantic-ai.txt") | _pins("requirements-lowest.txt")
    newest = _pins("requirements.txt")
    rows = [f"| `{name}` | {lowest[name]} | {newest[name]} |" for name in LIBRARIES]
    return "\n".join(["| library | lowest | newest |", "|---|---|---|", *rows])


def _pins(name: str) -> dict[str, str]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split()[0].partition("==") for line in lines if "==" in line and not line.startswith(" "))
    return {library: version for library, _, version in pins}


def filled(page: str) -> str:
    """Return the page with both tables in their places."""
    for name, made in (("truths", table()), ("versions", versions())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    return page


def _lines(truth: Truth) -> list[str]:
    rows = [
        f"| `{part.model}` | {part.input}, {part.cached}, {part.written} | {part.output}, {part.reasoning} | "
        f"{'no `_cost`' if part.cost is None else part.cost}{', estimated' if part.is_estimated else ''} |"
        for part in truth.parts
    ]
    rows = rows or ["| no event | | | |"]
    return [f"| {truth.vendor} | {truth.case} {rows[0]}", *(f"| | and {row}" for row in rows[1:])]


def _plain(amount: Decimal) -> str:
    words = f"{amount:f}"
    return words.rstrip("0").rstrip(".") if "." in words else words


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
