"""OpenAI, and whoever speaks its language: chat completions, responses, embeddings; whole or streamed; sync or async.

    llm = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price)
    client = llm.client(OpenAI(), "user-1")
    client.chat.completions.create(model="gpt-5", messages=[...])

A stream of a chat tells its usage only when asked. It is asked for, and the chunk that tells it, which has no choices,
is kept from a caller who did not ask for it himself. Some who speak OpenAI's language refuse the question: the call is
then made once more without it, and they are not asked again.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from msgspec.structs import replace

from ingest.client.instrument import Reader, metered
from ingest.client.strategy import (
    LanguageModelStrategy,
    ModelCall,
    Tokens,
    Who,
    as_text,
    characters_in,
    count,
    estimated_tokens,
    items,
    read,
    text,
)
from ingest.client.tools import billed_tools, searches_unseen
from ingest.client.usage import kept_as_asked, read_terms, read_tokens, read_unpriced

logger = logging.getLogger(__name__)

C = TypeVar("C")

VENDOR = "openai"

_LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "response.failed"})


def embedding_tokens(usage: Any) -> Tokens:
    """From the ``usage`` of embeddings, of which some tell the total alone: nothing comes out."""
    return Tokens(input=max(count(usage, "prompt_tokens"), count(usage, "total_tokens")))


class OpenAIStrategy(LanguageModelStrategy):
    """Meters the calls of an ``OpenAI``, ``AsyncOpenAI`` or Azure client. A cost function gets a ``ModelCall``."""

    def client(
        self,
        client: C,
        customer: Who,
        *,
        vendor: str | None = None,
        keep_text: bool = False,
        ask_usage: bool = True,
        **metadata: Any,
    ) -> C:
        """A copy of the client that shares its connections and meters what goes through it.

        Name the ``vendor`` where another one, or a proxy of one, answers under the client's address: prices are looked
        up by the address otherwise. ``keep_text`` sends prompts and responses along. Without ``ask_usage`` streams of
        chats are not asked for their usage; where they do not tell it by themselves it is estimated.
        """
        url = None if vendor else str(read(client, "base_url") or "")
        refusing: set[str] = set()

        def opened(path: str, body: Any, is_streamed: bool) -> _Reader | None:
            reader = _READERS.get(path) if isinstance(body, Mapping) else None
            if body is None and path.startswith("/responses/"):
                reader = _StoredReader
            if reader is None or (who := self.resolve(customer)) is None:
                return None

            def report(call: ModelCall, **identity: Any) -> None:
                self.record(who, call, metadata, **identity)

            made = reader(body or {}, is_streamed, vendor or VENDOR, url, keep_text, report)
            if ask_usage:
                made.ask(refusing)
            return made

        return metered(client, opened)


class _Reader(Reader):
    """Reads one call. What is known of it so far is known to ``_call``."""

    tokens: Callable[[Any], Tokens] = staticmethod(read_tokens)

    def __init__(
        self,
        body: Mapping[str, Any],
        is_streamed: bool,
        vendor: str,
        url: str | None,
        keep_text: bool,
        report: Callable[..., object],
    ) -> None:
        self.body: Mapping[str, Any] = body
        self._is_streamed = is_streamed
        self._vendor, self._url, self._report, self._keep_text = vendor, url, report, keep_text
        self._request = {name: body[name] for name in ("messages", "input", "prompt", "instructions") if name in body}
        self._model = text(body, "model")
        self._terms: dict[str, str] = {}
        self._usage: Any = None
        self._arguments = 0  # characters of what the model asks its tools
        self._words: list[str] = []
        self._identity: dict[str, Any] = {}
        self._has_begun = False
        self._is_cut = False  # what the usage tells may be of a part only
        self._searches = Tokens()
        self._unpriced = "a search" if searches_unseen(body, self._model) else ""

    def ask(self, refusing: set[str]) -> None:
        """Ask for the usage where it is told to who asks, but for the models that refuse to be asked."""

    def whole(self, answer: Any) -> None:
        """Read an answer that came at once."""
        self._see(answer)
        self._words = [self.text_of(answer)]
        self._finish()

    def item(self, item: Any) -> bool:
        """Read a chunk of a stream."""
        self._has_begun = True
        self._see(item)
        if delta := self.text_of(item):
            self._words.append(delta)
        return True

    def end(self, is_complete: bool) -> None:
        """Report what was seen."""
        self._finish()

    def fail(self) -> None:
        """Report what was seen: nothing of a stream that failed before it began, which is not billed."""
        if self._has_begun:
            self.end(False)

    def text_of(self, answer: Any) -> str:
        """The words of an answer or a chunk."""
        return "".join(
            text(choice, part, name)
            for choice in items(answer, "choices")
            for part in ("message", "delta")
            for name in ("reasoning_content", "content", "refusal")
        ) + "".join(text(choice, "text") for choice in items(answer, "choices"))  # of the older completions

    def _see(self, answer: Any) -> None:
        self._model = text(answer, "model") or self._model
        self._usage = _usage(answer) or self._usage
        self._terms |= read_terms(answer, self._usage)
        self._arguments += sum(
            len(text(call, "function", "arguments"))
            for choice in items(answer, "choices")
            for part in ("message", "delta")
            for call in items(choice, part, "tool_calls")
        )

    def _finish(self) -> None:
        words = "".join(self._words)
        self._report(
            ModelCall(
                vendor=self._vendor,
                model=self._model,
                tokens=self._tokens(words),
                api_url=self._url,
                is_estimated=self._usage is None or self._is_cut,
                unpriced=self._unpriced or read_unpriced(self._usage),
                terms=self._terms,
                prompt=as_text(next(iter(self._request.values()), "")) if self._keep_text else None,
                response=words if self._keep_text else None,
            ),
            **self._identity,
        )

    def _tokens(self, words: str) -> Tokens:
        if self._usage is None:
            return self._estimate(words)
        told = kept_as_asked(self.tokens(self._usage) + self._searches, self.body)
        least = self._estimate(words) if self._is_cut else Tokens()
        return replace(told, input=max(told.input, least.input), output=max(told.output, least.output))

    def _estimate(self, words: str) -> Tokens:
        prompt = estimated_tokens(characters_in(self._request))
        return Tokens(input=prompt, output=estimated_tokens(len(words) + self._arguments))


def _usage(answer: Any) -> Any:
    """Return the usage that an answer or a chunk tells: at its top, or where Groq and Moonshot put it in a stream."""
    places = [answer, read(answer, "x_groq"), *items(answer, "choices")]
    return next((found for place in places if (found := read(place, "usage")) is not None), None)


class _ChatReader(_Reader):
    """Asks a stream for its usage. Some tell it with every chunk: it is whole at the finish, or behind it."""

    _hides_usage = _is_finished = False

    def ask(self, refusing: set[str]) -> None:
        """Ask for the usage, unless the caller does."""
        asked = self.body.get("stream_options") or {}
        if self._is_streamed and not asked.get("include_usage") and self._model not in refusing:
            self._hides_usage, self._refusing, self._plain = True, refusing, self.body
            self.body = {**self.body, "stream_options": {**asked, "include_usage": True}}

    def withdraw(self, error: Exception) -> bool:
        """Whether the question was refused. It is then not asked again."""
        words = f"{error} {read(error, 'body')} {read(error, 'response', 'text')}"
        if not self._hides_usage or read(error, "status_code") not in (400, 422) or "stream_options" not in words:
            return False
        logger.warning("streams of %r are not asked for their usage, which is refused", self._model)
        self._refusing.add(self._model)
        self._hides_usage, self.body = False, self._plain
        return True

    def item(self, item: Any) -> bool:
        """Read a chunk; the one with nothing but the usage is for us if we asked for it."""
        super().item(item)
        is_usage = not read(item, "choices") and read(item, "usage") is not None
        self._is_finished = self._is_finished or is_usage or _has_finish(item)
        return not (self._hides_usage and is_usage)

    def is_last(self, item: Any) -> bool:
        """After the reason why an answer is finished comes the usage."""
        return self._hides_usage and _has_finish(item)

    def end(self, is_complete: bool) -> None:
        """Report what was seen."""
        self._is_cut = not (is_complete or self._is_finished)
        super().end(is_complete)


def _has_finish(item: Any) -> bool:
    return any(text(choice, "finish_reason") for choice in items(item, "choices"))


class _ResponseReader(_Reader):
    """Responses: events instead of chunks; the last one holds the response with its usage.

    One that runs in the background is reported by whoever fetches it when it is done. It may be fetched often, so its
    event has its id and its time.
    """

    _has_failed = False

    def whole(self, answer: Any) -> None:
        """Read a response. One that runs in the background, or failed before it used anything, tells no usage; one that
        is complete was used, also where a server of another make does not say how much."""
        is_complete = text(answer, "status") == "completed" and read(answer, "background") is not True
        if read(answer, "usage") is not None or is_complete:
            super().whole(answer)

    def end(self, is_complete: bool) -> None:
        """Report what was seen, unless the rest can still be fetched, or it failed and says nothing of its use."""
        if self._usage is not None or not (self._identity or self._has_failed):
            super().end(is_complete)

    def _see(self, answer: Any) -> None:
        super()._see(answer)
        searches, self._unpriced = billed_tools(items(answer, "output"))
        self._searches = Tokens(details=searches)
        if read(answer, "background") is True:
            created = datetime.fromtimestamp(count(answer, "created_at"), UTC)
            self._identity = {"external_id": text(answer, "id"), "timestamp": created}

    def item(self, item: Any) -> bool:
        """Read an event."""
        kind = text(item, "type")
        self._has_begun = True
        self._has_failed = self._has_failed or kind in ("response.failed", "error")
        if kind in _LAST_EVENTS or kind == "response.created":
            self._see(read(item, "response"))
        elif kind.endswith(".delta"):
            self._words.append(text(item, "delta"))
        return True

    def text_of(self, answer: Any) -> str:
        """The words of a response."""
        return "".join(
            text(part, "text") for entry in items(answer, "output") for part in items(entry, "content")
        )


class _StoredReader(_ResponseReader):
    """A response that is fetched; if it did not run in the background it was reported when it was made."""

    def whole(self, answer: Any) -> None:
        """Read a response."""
        if read(answer, "background") is True:
            super().whole(answer)

    def end(self, is_complete: bool) -> None:
        """Report what was seen."""
        if self._identity:
            super().end(is_complete)


class _EmbeddingReader(_Reader):
    """Embeddings: no words come out."""

    tokens = staticmethod(embedding_tokens)

    def text_of(self, answer: Any) -> str:
        """Nothing."""
        return ""


_READERS: dict[str, type[_Reader]] = {
    "/chat/completions": _ChatReader,
    "/completions": _ChatReader,
    "/responses": _ResponseReader,
    "/responses/compact": _ResponseReader,
    "/embeddings": _EmbeddingReader,
}
