"""Anthropic: messages, whole or streamed, also through its helpers; sync or async, directly or through a cloud.

    llm = ingestion.strategy(AnthropicStrategy, "llm").cost(list_price)
    client = llm.client(Anthropic(), "user-1")
    client.messages.create(model="claude-sonnet-4-5", max_tokens=1024, messages=[...])

Anthropic counts what was read from a cache and written to one beside ``input_tokens``, not inside. In a stream the
first event has the input, and each ``message_delta`` what was used until then: numbers that replace each other.

What a call made the service do beside the answer is told in ``usage.iterations`` alone. A compaction of the context is
part of the call; an advisor is another model with prices of its own, so each of its turns is an event of its own. Where
a model declines and another one answers instead, each of the two is an event with its own tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ingest.client.instrument import Reader, metered
from ingest.client.strategy import (
    LanguageModelStrategy,
    ModelCall,
    Who,
    as_text,
    characters_in,
    count,
    estimated_tokens,
    items,
    read,
    text,
)
from ingest.client.usage import kept_as_asked, parts_by_model, read_terms

C = TypeVar("C")

VENDOR = "anthropic"
_MESSAGES = "/v1/messages"
_COUNTS = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation",
    "server_tool_use", "output_tokens_details", "iterations", "service_tier", "speed", "inference_geo",
    "fallback_credit",
)  # fmt: skip


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
            if path != _MESSAGES or not isinstance(body, Mapping):
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
        self._blocks: list[Any] = []

    def whole(self, answer: Any) -> None:
        """Read a message that came at once."""
        self._begin(answer)
        self._blocks = list(items(answer, "content"))
        self._words = [text(block, "text") for block in self._blocks]
        self._is_final = True
        self._finish()

    def item(self, item: Any) -> bool:
        """Read an event of a stream."""
        match text(item, "type"):
            case "message_start":
                self._begin(read(item, "message"))
            case "content_block_start":
                self._blocks.append(read(item, "content_block"))
                self._model = text(self._blocks[-1], "to", "model") or self._model
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
        usage = self._usage if self._is_final else self._estimate(len(words))
        parts = parts_by_model(usage, self._model, text(self.body, "model"))
        unpriced = self._unpriced(is_told_by_model=any(part.kind == "declined" for part in parts))
        for part in parts:
            is_answer = part.kind == "answer"
            terms = read_terms(self._usage)
            self._report(
                ModelCall(
                    vendor=self._vendor,
                    model=part.model,
                    tokens=kept_as_asked(part.tokens, self.body),
                    api_url=self._url,
                    is_estimated=not self._is_final and is_answer,
                    terms={name: term for name, term in terms.items() if name != "speed"} if part.is_advice else terms,
                    unpriced="" if part.is_advice else unpriced,
                    prompt=as_text(read(self.body, "messages") or "") if self._keep_text and is_answer else None,
                    response=words if self._keep_text and is_answer else None,
                )
            )

    def _unpriced(self, is_told_by_model: bool) -> str:
        """What is billed beside the tokens, or for tokens of which nobody says which model's they are."""
        if text(self._usage, "fallback_credit", "status", "type") == "redeemed":
            return "a call with a fallback credit"
        if any(text(block, "type") == "fallback" for block in self._blocks) and not is_told_by_model:
            return "a call that two models answered"
        ran = any("code_execution" in text(block, "name") for block in self._blocks)
        names = ("web_search_requests", "web_fetch_requests")
        is_free = any(count(self._usage, "server_tool_use", name) for name in names)  # it then serves these
        return "code execution" if ran and not is_free else ""

    def _estimate(self, characters: int) -> dict[str, Any]:
        """The input is known once the stream has begun; of the output, what arrived is a lower bound."""
        asked = [part for name in ("system", "messages", "tools") if (part := read(self.body, name))]  # if not omitted
        known = {"input_tokens": estimated_tokens(characters_in(asked)), **self._usage}
        return known | {"output_tokens": max(count(known, "output_tokens"), estimated_tokens(characters))}
