"""What a call of a language model used, meaning the same whoever the vendor is, and the event that says so.

Vendors count alike and report differently: one's input has the cached tokens inside, another's does not; one's output
leaves the reasoning out. Each strategy reads its vendor's fields into ``Tokens``, where every part is *inside* its
whole and the total is the sum of the two wholes:

    total = input  (of which: cached, cache_write)
          + output (of which: reasoning)

The event's metadata is what Polar's LLM strategy sends, so meters made for that one count these.
"""

import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ingest.client.strategy import Customer, CustomerLike, Strategy

logger = logging.getLogger(__name__)

TEXT_LENGTH_MAX = 100_000
"""Characters of a prompt or a response that are kept: the numbers must fit into the event beside them."""

CHARACTERS_PER_TOKEN = 4
"""The vendors' own rule of thumb, used only where nothing was reported, and then the event says ``estimated``."""

Who = CustomerLike | Callable[[], CustomerLike | None]
"""Whose call it is, or a function that says so when the call begins; None means that this call is not metered."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of tokens. ``cached`` and ``cache_write`` are parts of ``input``; ``reasoning`` is a part of ``output``.

    ``details`` has what else was counted and priced (tokens of audio, searches), named as genai-prices names it.
    """

    input: int = 0
    cached: int = 0
    cache_write: int = 0
    output: int = 0
    reasoning: int = 0
    details: dict[str, int] = {}

    @property
    def total(self) -> int:
        """All tokens."""
        return self.input + self.output

    def __add__(self, other: "Tokens") -> "Tokens":
        names = {*self.details, *other.details}
        return Tokens(
            input=self.input + other.input,
            cached=self.cached + other.cached,
            cache_write=self.cache_write + other.cache_write,
            output=self.output + other.output,
            reasoning=self.reasoning + other.reasoning,
            details={name: self.details.get(name, 0) + other.details.get(name, 0) for name in sorted(names)},
        )


class ModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a model: what a cost function gets.

    ``vendor`` is whose interface was called; ``api_url`` where, as far as that is known and may decide the price.
    ``is_estimated`` says that the vendor's count did not arrive, so that some numbers are lower bounds or guesses.
    ``terms`` are what else decides the price, as the vendor says it: ``service_tier``, ``speed``.
    """

    vendor: str
    model: str
    tokens: Tokens
    api_url: str | None = None
    is_estimated: bool = False
    terms: dict[str, str] = {}
    prompt: str | None = None
    response: str | None = None

    def metadata(self) -> dict[str, Any]:
        """What the event says: Polar's fields, and beside them what Polar's strategy does not tell, if there is any."""
        tokens = self.tokens
        names = {"vendor": self.vendor or "unknown", "model": self.model or "unknown"}
        counts = {"input": tokens.input, "cached_input": tokens.cached, "output": tokens.output, "total": tokens.total}
        llm: dict[str, Any] = names | {f"{name}_tokens": count for name, count in counts.items()}
        llm |= {"prompt": clipped(self.prompt)} if self.prompt is not None else {}
        llm |= {"response": clipped(self.response)} if self.response is not None else {}
        return {
            **names,
            "inputTokens": tokens.input,
            "cachedInputTokens": tokens.cached,
            "outputTokens": tokens.output,
            "totalTokens": tokens.total,
            **({"cacheWriteTokens": tokens.cache_write} if tokens.cache_write else {}),
            **({"reasoningTokens": tokens.reasoning} if tokens.reasoning else {}),
            **({"estimated": True} if self.is_estimated else {}),
            "strategy": "LLM",
            "_llm": llm,
        }


class LanguageModelStrategy(Strategy):
    """What the strategies for language models share: ``record`` and whose call it is."""

    def record(
        self,
        customer: CustomerLike,
        call: ModelCall,
        metadata: Mapping[str, Any] | None = None,
        *,
        external_id: str | None = None,
    ) -> str | None:
        """Capture one call; the event's id. A cost function gets the call itself. Never raises."""
        return self.emit(customer, call.metadata(), metadata, context=call, external_id=external_id)

    def resolve(self, who: Who | None) -> Customer | None:
        """Whose call begins now. None, with a warning, when nobody can say. Never raises."""
        try:
            found = who() if callable(who) else who
        except Exception:
            logger.exception("asking for the customer failed", extra={"event_name": self.event_name})
            return None
        if found is None:
            logger.warning("a call is not metered: nobody says whose it is", extra={"event_name": self.event_name})
            return None
        return Customer(external_customer_id=found) if isinstance(found, str) else found


def read(source: Any, *path: str) -> Any:
    """What lies at a path of attributes or keys, None when there is no such thing.

    Responses come as objects, as dictionaries, and as objects that hold dictionaries.
    """
    for name in path:
        source = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if source is None:
            return None
    return source


def count(source: Any, *path: str) -> int:
    """The whole number at a path; 0 when there is none or it is not a number of things."""
    found = read(source, *path)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found < 1 << 53:
        return 0
    return int(found)


def text(source: Any, *path: str) -> str:
    """The text at a path, or ''."""
    found = read(source, *path)
    return found if isinstance(found, str) else ""


def details(**counts: int) -> dict[str, int]:
    """Those that were counted at all."""
    return {name: number for name, number in counts.items() if number}


def clipped(words: str) -> str:
    """As much of a text as is kept."""
    return words if len(words) <= TEXT_LENGTH_MAX else words[: TEXT_LENGTH_MAX - 1] + "…"


def estimated_tokens(characters: int) -> int:
    """How many tokens that many characters are, roughly."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def characters_in(request: Any) -> int:
    """How many characters of text a request has, wherever in it they stand. Files and pictures are not text."""
    if isinstance(request, str):
        return 0 if request.startswith("data:") else len(request)
    if isinstance(request, Mapping):
        return sum(characters_in(part) for name, part in request.items() if name not in _NOT_TEXT)
    if isinstance(request, list | tuple):
        return sum(characters_in(part) for part in request)
    return characters_in(vars(request)) if hasattr(request, "__dict__") else 0


_NOT_TEXT = frozenset({
    "type", "role", "id", "data", "file_data", "image_url", "cache_control", "signature", "media_type",
})  # fmt: skip


def as_text(request: Any) -> str:
    """A request in words: a text as it is, anything else as JSON."""
    return request if isinstance(request, str) else json.dumps(request, default=str, ensure_ascii=False)
