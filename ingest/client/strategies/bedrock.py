"""Amazon Bedrock: ``converse`` and ``converse_stream``, through the events that boto3 has for its operations.

    llm = ingestion.strategy(BedrockStrategy, "llm").cost(list_price)
    bedrock = llm.client(boto3.client("bedrock-runtime"), "user-1")
    bedrock.converse(modelId="amazon.nova-pro-v1:0", messages=[...])

Bedrock counts what was read from a cache and written to one beside ``inputTokens``, not inside. A stream tells its
usage in the last event, behind the one that ends the message. ``invoke_model`` has an answer of its own for every
model and is not metered.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from msgspec.structs import replace

from ingest.client.instrument import WatchedStream, Watcher, harmless
from ingest.client.strategy import (
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    as_text,
    characters_in,
    estimated_tokens,
    items,
    read,
    text,
)
from ingest.client.usage import kept_as_asked, read_terms, read_tokens

C = TypeVar("C")

VENDOR = "aws"
OPERATIONS = ("Converse", "ConverseStream")


class BedrockStrategy(LanguageModelStrategy):
    """Meters a ``bedrock-runtime`` client of boto3. A cost function gets a ``ModelCall``."""

    def client(
        self, client: C, customer: Who, *, vendor: str | None = None, keep_text: bool = False, **metadata: Any
    ) -> C:
        """Return the same client, metered from now on, for this customer or for whom a function names at each call.

        A client has one meter for each event name; the latest holds. Name the ``vendor`` where a proxy answers under
        the client's address. ``keep_text`` sends prompts and responses along. Raises TypeError for a client of
        aiobotocore.
        """
        if hasattr(client, "__aenter__"):
            raise TypeError("a client of aiobotocore is not metered for Bedrock: use boto3")
        meta: Any = client.meta  # type: ignore[attr-defined]  # botocore's; it is not installed everywhere
        url = None if vendor else text(meta, "endpoint_url") or None
        mark = f"meterstream {self.event_name}"

        def begin(params: Any, context: Any, **more: Any) -> None:
            who = self.resolve(customer)
            context.pop(mark, None)
            if who is not None:
                context[mark] = _Reader(
                    params, vendor or VENDOR, url, keep_text, lambda call: self.record(who, call, metadata)
                )

        for operation in OPERATIONS:
            for moment, handler in (("before-parameter-build", begin), ("after-call", partial(_end, mark))):
                name, unique = f"{moment}.bedrock-runtime.{operation}", f"{mark} {moment} {operation}"
                meta.events.unregister(name, unique_id=unique)
                meta.events.register(name, handler, unique_id=unique)
        return client


def _end(mark: str, http_response: Any, parsed: Any, context: Any, **more: Any) -> None:
    """After the last attempt: read the answer, or have the stream watched. What failed is no event."""
    reader: _Reader | None = context.pop(mark, None)
    if reader is None or http_response.status_code >= 300 or read(parsed, "Error"):
        return
    if "stream" in parsed:
        parsed["stream"] = WatchedStream(_Events(parsed["stream"]), reader)
    else:
        harmless(reader.whole, parsed, None)


class _Events:
    """A stream of botocore's, which can be iterated, as an iterator."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._events: Iterator[Any] = iter(stream)

    def __next__(self) -> Any:
        return next(self._events)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_stream", "_events"):
            raise AttributeError(name)
        return getattr(self._stream, name)


class _Reader(Watcher):
    """Reads one call."""

    def __init__(
        self,
        asked: Mapping[str, Any],
        vendor: str,
        url: str | None,
        keep_text: bool,
        report: Callable[[ModelCall], object],
    ) -> None:
        self._asked, self._vendor, self._url, self._keep_text, self._report = asked, vendor, url, keep_text, report
        self._model = text(asked, "modelId")
        self._tokens: Tokens | None = None
        self._terms: dict[str, str] = {}
        self._latency = ""
        self._words: list[str] = []
        self._has_begun = False

    def whole(self, answer: Any) -> None:
        """Read an answer that came at once."""
        blocks = items(answer, "output", "message", "content")
        self._words = [text(block, "text") for block in blocks]
        self._see(answer)
        self._finish()

    def item(self, item: Any) -> bool:
        """Read an event of a stream."""
        self._has_begun = True
        delta = read(item, "contentBlockDelta", "delta")
        self._words += [text(delta, "text"), text(delta, "toolUse", "input"), text(delta, "reasoningContent", "text")]
        if (metadata := read(item, "metadata")) is not None:
            self._see(metadata)
        return True

    def is_last(self, item: Any) -> bool:
        """Behind the end of the message comes the usage, for which most callers do not wait."""
        return read(item, "messageStop") is not None

    def end(self, is_complete: bool) -> None:
        """Report what was seen."""
        self._finish()

    def fail(self) -> None:
        """Report what was seen: nothing of a stream that failed before it began, which is not billed."""
        if self._has_begun:
            self._finish()

    def _see(self, told: Any) -> None:
        self._model = text(told, "trace", "promptRouter", "invokedModelId") or self._model
        if (usage := read(told, "usage")) is not None:
            self._tokens = kept_as_asked(read_tokens(usage, is_cache_beside=True), self._asked)
        self._terms = read_terms(told)
        self._latency = text(told, "performanceConfig", "latency")

    def _finish(self) -> None:
        words = "".join(self._words)
        call = ModelCall(
            vendor=self._vendor,
            model=self._model.rpartition("/")[2],  # of an ARN
            tokens=self._tokens or self._estimate(len(words)),
            api_url=self._url,
            is_estimated=self._tokens is None,
            terms=self._terms,
            unpriced=self._unpriced(),
        )
        if self._keep_text:
            call = replace(call, prompt=as_text(read(self._asked, "messages") or ""), response=words)
        self._report(call)

    def _unpriced(self) -> str:
        """What is billed beside the tokens, or changes their price, without a price in any list."""
        if read(self._asked, "guardrailConfig") is not None:
            return "a guardrail"
        return f"{self._latency} latency" if self._latency not in ("", "standard") else ""

    def _estimate(self, characters: int) -> Tokens:
        prompt = [part for name in ("system", "messages") if (part := read(self._asked, name))]
        return Tokens(input=estimated_tokens(characters_in(prompt)), output=estimated_tokens(characters))
