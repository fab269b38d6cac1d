"""Anthropic: messages, whole or streamed, also through its helpers; sync or async, directly or through a cloud.

    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    client = llm.client(Anthropic(), "user-1")
    client.messages.create(model="claude-sonnet-4-5", max_tokens=1024, messages=[...])

Anthropic counts what was read from a cache and written to one beside ``input_tokens``, not inside. In a stream the
first event has the input, and each ``message_delta`` what was used until then: numbers that replace each other.

What a call made the service do beside the answer is told in ``usage.iterations`` alone. A compaction of the context is
part of the call; an advisor is another model with prices of its own, so each of its turns is an event of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ingest.client.instrument import Reader, metered
from ingest.client.strategy import (
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    as_text,
    characters_in,
    count,
    details,
    estimated_tokens,
    items,
    read,
    text,
)

C = TypeVar("C")

VENDOR = "anthropic"
_MESSAGES = "/v1/messages"
_COUNTS = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation",
    "server_tool_use", "output_tokens_details", "iterations", "service_tier", "speed", "inference_geo",
)  # fmt: skip


def message_tokens(usage: Any) -> Tokens:
    """From a message's ``usage``, with the compactions that it does not have in its own numbers."""
    return sum((_tokens(each) for each in _iterations(usage, "compaction")), _tokens(usage))


def _iterations(usage: Any, kind: str) -> list[Any]:
    return [each for each in items(usage, "iterations") if text(each, "type") == kind]


def _tokens(usage: Any) -> Tokens:
    cached, written = count(usage, "cache_read_input_tokens"), count(usage, "cache_creation_input_tokens")
    return Tokens(
        input=count(usage, "input_tokens") + cached + written,
        cached=cached,
        cache_write=written,
        output=count(usage, "output_tokens"),
        reasoning=count(usage, "output_tokens_details", "thinking_tokens"),
        details=details(
            cache_write_5m_tokens=count(usage, "cache_creation", "ephemeral_5m_input_tokens"),
            cache_write_1h_tokens=count(usage, "cache_creation", "ephemeral_1h_input_tokens"),
            web_searches=count(usage, "server_tool_use", "web_search_requests"),
        ),
    )


class AnthropicStrategy(LanguageModelStrategy):
    """Meters the calls of an ``Anthropic`` or ``AsyncAnthropic`` client. A cost function gets a ``ModelCall``."""

    def client(
        self, client: C, customer: Who, *, vendor: str | None = None, keep_text: bool = False, **metadata: Any
    ) -> C:
        """A copy of the client that shares its connections and meters what goes through it.

        Name the ``vendor`` where a proxy answers under the client's address: prices are looked up by the address
        otherwise. ``keep_text`` sends prompts and responses along.
        """
        url = None if vendor else str(read(client, "base_url") or "")

        def opened(path: str, body: Any, is_streamed: bool) -> _Reader | None:
            if path.partition("?")[0] != _MESSAGES or not isinstance(body, Mapping):
                return None
            who = self.resolve(customer)
            if who is None:
                return None
            return _Reader(body, vendor or VENDOR, url, keep_text, lambda call: self.record(who, call, metadata))

        return metered(client, opened)


class _Reader(Reader):
    """Reads one message."""

    def __init__(
        self,
        body: Mapping[str, Any],
        vendor: str,
        url: str | None,
        keep_text: bool,
        report: Callable[[ModelCall], object],
    ) -> None:
        self.body = body
        self._vendor, self._url, self._keep_text, self._report = vendor, url, keep_text, report
        self._model = text(body, "model")
        self._usage: dict[str, Any] = {}
        self._is_final = self._has_begun = False
        self._words: list[str] = []

    def whole(self, answer: Any) -> None:
        """Read a message that came at once."""
        self._begin(answer)
        self._words = [text(block, "text") for block in items(answer, "content")]
        self._is_final = True
        self._finish()

    def item(self, item: Any) -> bool:
        """Read an event of a stream."""
        match text(item, "type"):
            case "message_start":
                self._begin(read(item, "message"))
            case "content_block_delta":
                names = ("text", "thinking", "partial_json")
                self._words.extend(text(item, "delta", name) for name in names)
            case "message_delta":
                self._see(read(item, "usage"))
                self._is_final = read(item, "delta", "stop_reason") is not None
        return True

    def end(self, is_complete: bool) -> None:
        """Report what was seen."""
        self._finish()

    def fail(self) -> None:
        """Report what was seen: nothing of a message that failed before it began, which is not billed."""
        if self._has_begun:
            self._finish()

    def _begin(self, message: Any) -> None:
        self._has_begun = True
        self._model = text(message, "model") or self._model
        self._see(read(message, "usage"))

    def _see(self, usage: Any) -> None:
        """Later numbers replace earlier ones; what a later report leaves out stays."""
        seen = {name: read(usage, name) for name in _COUNTS}
        self._usage |= {name: value for name, value in seen.items() if value is not None}

    def _finish(self) -> None:
        words = "".join(self._words)
        for advice in _iterations(self._usage, "advisor_message"):
            self._report(self._advice(advice))
        self._report(
            ModelCall(
                vendor=self._vendor,
                model=self._model,
                tokens=message_tokens(self._usage if self._is_final else self._estimate(len(words))),
                api_url=self._url,
                is_estimated=not self._is_final,
                terms=self._terms("service_tier", "speed", "inference_geo"),
                prompt=as_text(read(self.body, "messages") or "") if self._keep_text else None,
                response=words if self._keep_text else None,
            )
        )

    def _advice(self, advice: Any) -> ModelCall:
        """The advisor's turn; the speed is the answer's alone."""
        return ModelCall(
            vendor=self._vendor,
            model=text(advice, "model"),
            tokens=message_tokens(advice),
            api_url=self._url,
            terms=self._terms("service_tier", "inference_geo"),
        )

    def _terms(self, *names: str) -> dict[str, str]:
        return {name: found for name in names if (found := text(self._usage, name))}

    def _estimate(self, characters: int) -> dict[str, Any]:
        """The input is known once the stream has begun; of the output, what arrived is a lower bound."""
        asked = [part for name in ("system", "messages", "tools") if (part := read(self.body, name))]  # if not omitted
        known = {"input_tokens": estimated_tokens(characters_in(asked)), **self._usage}
        return known | {"output_tokens": max(count(known, "output_tokens"), estimated_tokens(characters))}
