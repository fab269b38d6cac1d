"""Google GenAI: ``generate_content``, its streams, chats and embeddings; sync and ``aio``; Gemini API and Vertex.

    llm = ingestion.strategy(GoogleGenAIStrategy, "llm").cost(list_price)
    client = llm.client(genai.Client(), "user-1")
    client.models.generate_content(model="gemini-2.5-flash", contents="...")

One call of ``generate_content`` may ask the model several times (automatic function calling, continuations) and gives
back the last answer only. So the requests themselves are read, one level below: each is an event. Every chunk of a
stream has the counts until then; the last one has the totals.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, TypeVar

from ingest.client.instrument import WatchedAsyncStream, WatchedStream, Watcher, harmless
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
from ingest.client.tools import is_grounded
from ingest.client.usage import read_terms, read_tokens

C = TypeVar("C")

VENDOR = "google"
_REQUESTS = ("_generate_content", "_generate_content_stream")
_EMBEDDINGS = ("_embed_content", "embed_content")
"""Where every request of ``models`` passes; held to the library by the tests. Older libraries have no inner way for
embeddings, whose outer way then is a request."""

_TIER_HEADER = "x-gemini-service-tier"


def embedding_tokens(answer: Any) -> Tokens | None:
    """From an embedding's answer; None where the service does not tell (the Gemini API's older models)."""
    if (usage := read(answer, "usage_metadata")) is not None:
        return read_tokens(usage)
    told = [count(entry, "statistics", "token_count") for entry in items(answer, "embeddings")]
    return Tokens(input=sum(told)) if any(told) else None


class GoogleGenAIStrategy(LanguageModelStrategy):
    """Meters the calls of a ``genai.Client``. A cost function gets a ``ModelCall``."""

    def client(
        self, client: C, customer: Who, *, vendor: str | None = None, keep_text: bool = False, **metadata: Any
    ) -> C:
        """A copy of the client that shares its connections and whose ``models``, ``aio.models`` and chats are metered.

        ``keep_text`` sends prompts and responses along. Raises TypeError for a client of an unknown make.
        """
        url = None if vendor else text(client, "_api_client", "_http_options", "base_url") or None

        def opened(asked: Mapping[str, Any]) -> _Reader | None:
            who = self.resolve(customer)
            if who is None:
                return None
            return _Reader(asked, vendor or VENDOR, url, keep_text, lambda call: self.record(who, call, metadata))

        return _metered(client, opened)


def _metered(client: C, opened: Callable[[Mapping[str, Any]], "_Reader | None"]) -> C:
    made: Any = copy.copy(client)
    made.__class__ = _guest_class(made.__class__)
    made._host = client  # whoever owns the connections closes them
    made._models = _metered_models(made.models, opened)
    made._aio = copy.copy(made.aio)
    made._aio.__class__ = _guest_class(made._aio.__class__)
    made._aio._models = _metered_models(made._aio.models, opened)
    return made  # type: ignore[no-any-return]


def _metered_models(models: Any, opened: Callable[[Mapping[str, Any]], "_Reader | None"]) -> Any:
    made = copy.copy(models)
    made.__class__ = _models_class(models.__class__)
    made._opened_by_meter = opened
    return made


@cache
def _guest_class(base: Any) -> type:
    """The client's class without its habit of closing the connections when it is forgotten."""
    return type(base.__name__, (base,), {"__module__": base.__module__, "__del__": lambda self: None})


@cache
def _models_class(base: Any) -> type:
    """A subclass of ``Models`` or ``AsyncModels`` whose requests are read."""
    if hasattr(base, "_opened_by_meter"):
        return base  # type: ignore[no-any-return]
    embeddings = [name for name in _EMBEDDINGS if callable(getattr(base, name, None))][:1]
    requests = (*_REQUESTS, *(embeddings or _EMBEDDINGS))
    if missing := [name for name in requests if not callable(getattr(base, name, None))]:
        raise TypeError(f"{base.__module__}.{base.__name__} has no {', '.join(missing)}: an unknown google-genai")
    wrap = _async_request if inspect.iscoroutinefunction(base._generate_content) else _request
    members: dict[str, Any] = {name: wrap(getattr(base, name), name) for name in requests}
    return type(base.__name__, (base,), members | {"__module__": base.__module__, "_opened_by_meter": None})


def _reader(self: Any, options: dict[str, Any]) -> "_Reader | None":
    reader: _Reader | None = harmless(lambda self: self._opened_by_meter(options), self, None)
    return reader


def _request(request: Any, name: str) -> Any:
    def call(self: Any, **options: Any) -> Any:
        reader = _reader(self, options)
        if reader is None:
            return request(self, **options)
        if name == "_generate_content_stream":
            return iter(WatchedStream(request(self, **options), reader))
        answer = request(self, **options)
        harmless(partial(reader.whole, is_embedding=name in _EMBEDDINGS), answer, None)
        return answer

    return call


def _async_request(request: Any, name: str) -> Any:
    async def call(self: Any, **options: Any) -> Any:
        reader = _reader(self, options)
        answer = await request(self, **options)
        if reader is None:
            return answer
        if name == "_generate_content_stream":
            return WatchedAsyncStream(answer, reader)
        harmless(partial(reader.whole, is_embedding=name in _EMBEDDINGS), answer, None)
        return answer

    return call


class _Reader(Watcher):
    """Reads one request."""

    def __init__(
        self,
        asked: Mapping[str, Any],
        vendor: str,
        url: str | None,
        keep_text: bool,
        report: Callable[[ModelCall], object],
    ) -> None:
        self._model = text(asked, "model").rpartition("/")[2]
        self._contents = next(
            (asked[name] for name in ("contents", "content", "batch_contents") if asked.get(name)), None
        )
        self._terms = {"service_tier": tier.lower()} if (tier := text(asked, "config", "service_tier")) else {}
        self._vendor, self._url, self._keep_text, self._report = vendor, url, keep_text, report
        self._tokens: Tokens | None = None
        self._is_final = self._has_begun = False
        self._words: list[str] = []
        self._unpriced = ""

    def whole(self, answer: Any, *, is_embedding: bool) -> None:
        """Read an answer that came at once."""
        if is_embedding:
            self._tokens = embedding_tokens(answer)
        else:
            self.item(answer)
        self._is_final = self._tokens is not None
        self._finish()

    def item(self, item: Any) -> bool:
        """Read a chunk; its counts are those until now."""
        self._has_begun = True
        self._model = text(item, "model_version") or self._model
        headers = read(item, "sdk_http_response", "headers")
        if (usage := read(item, "usage_metadata")) is not None:
            self._tokens = read_tokens(usage)
        self._terms |= read_terms(usage, {"service_tier": text(headers, _TIER_HEADER).lower()})
        for candidate in items(item, "candidates"):
            self._is_final = self._is_final or (usage is not None and read(candidate, "finish_reason") is not None)
            self._words.extend(text(part, "text") for part in items(candidate, "content", "parts"))
            if is_grounded(read(candidate, "grounding_metadata")):
                self._unpriced = "grounding"
        return True

    def end(self, is_complete: bool) -> None:
        """Report what was seen: nothing of a stream that failed before it began, which is not billed."""
        if not (is_complete or self._has_begun):
            return
        self._is_final = self._is_final or (is_complete and self._tokens is not None)
        self._finish()

    def _finish(self) -> None:
        words = "".join(self._words)
        self._report(
            ModelCall(
                vendor=self._vendor,
                model=self._model,
                tokens=self._tokens if self._is_final and self._tokens else self._estimate(len(words)),
                api_url=self._url,
                is_estimated=not self._is_final,
                terms=self._terms,
                unpriced=self._unpriced,
                prompt=as_text(self._contents or "") if self._keep_text else None,
                response=words if self._keep_text else None,
            )
        )

    def _estimate(self, characters: int) -> Tokens:
        known = self._tokens or Tokens(input=estimated_tokens(characters_in(self._contents)))
        return known + Tokens(output=max(0, estimated_tokens(characters) - known.output))
