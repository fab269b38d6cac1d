"""What a call of a language model used, meaning the same whoever the vendor is, and the event that says so.

Vendors count alike and report differently: one's input has the cached tokens inside, another's does not; one's output
leaves the reasoning out. Each strategy reads its vendor's fields into ``Tokens``, where every part is *inside* its
whole and the total is the sum of the two wholes:

    total = input  (of which: cached, cache_write)
          + output (of which: reasoning)

The event's metadata is what Polar's LLM strategy sends, so meters made for that one count these.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

import msgspec

from ingest.client.strategy import CustomerLike, Strategy
from ingest.client.values import clipped, sendable

TEXT_LENGTH_MAX = 100_000
"""Characters of a prompt or a response that are kept: the numbers must fit into the event beside them."""

NAME_LENGTH_MAX = 200
"""Characters of a vendor's or a model's name; real ones have less than half of that."""

CHARACTERS_PER_TOKEN = 4
"""The vendors' own rule of thumb, used only where nothing was reported, and then the event says ``estimated``."""

_DEPTH_MAX = 8  # levels of a request that are looked at for text; a tool's result in a message is at the sixth
_NOT_TEXT = frozenset({
    "type", "role", "kind", "part_kind", "id", "data", "file_data", "image_url", "cache_control", "signature",
    "media_type", "mime_type", "run_id", "conversation_id",
})  # fmt: skip


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
    ``terms`` are what else decides the price, as the vendor says it: ``service_tier``, ``speed``,
    ``inference_geo``.
    ``unpriced`` names what the vendor bills beside the call and tells no number of, if there is such a thing.
    ``reported_cost`` is in cents, where a library between here and the vendor has an opinion.
    """

    vendor: str
    model: str
    tokens: Tokens
    api_url: str | None = None
    is_estimated: bool = False
    terms: dict[str, str] = {}
    unpriced: str = ""
    reported_cost: Decimal | None = None
    prompt: str | None = None
    response: str | None = None

    @property
    def _names(self) -> dict[str, str]:
        return {"vendor": self.vendor, "model": self.model}

    def metadata(self) -> dict[str, Any]:
        """What the event says: Polar's fields, and beside them what Polar's strategy does not tell, if there is any."""
        tokens = self.tokens
        names = {name: clipped(value or "unknown", NAME_LENGTH_MAX) for name, value in self._names.items()}
        counts = {"input": tokens.input, "cached_input": tokens.cached, "output": tokens.output, "total": tokens.total}
        llm: dict[str, Any] = names | {f"{name}_tokens": count for name, count in counts.items()}
        llm |= {"prompt": clipped(sendable(self.prompt), TEXT_LENGTH_MAX)} if self.prompt is not None else {}
        llm |= {"response": clipped(sendable(self.response), TEXT_LENGTH_MAX)} if self.response is not None else {}
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
    """What the strategies for language models share: ``record``."""

    def record(
        self,
        customer: CustomerLike,
        call: ModelCall,
        metadata: Mapping[str, Any] | None = None,
        *,
        external_id: str | None = None,
        timestamp: datetime | None = None,
    ) -> str | None:
        """Capture one call; the event's id. A cost function gets the call itself. Never raises.

        ``external_id`` is something that exists once for each call in the world; the event's name is put before it,
        so that two strategies may report the same call for two purposes.
        """
        identity = f"{self.event_name}:{external_id}" if external_id else None
        return self.emit(
            customer, call.metadata(), metadata, context=call, external_id=identity, timestamp=timestamp
        )


def inclusive(whole: int, *parts: int) -> int:
    """The whole, with its parts inside. Some put them beside it, which shows when the parts exceed it."""
    return whole if whole >= sum(parts) else whole + sum(parts)


def cents(dollars: Any) -> Decimal | None:
    """An amount of dollars in cents: a number's own digits, not a double's. None for what is none."""
    if isinstance(dollars, bool) or not isinstance(dollars, int | float | Decimal):
        return None
    amount = Decimal(str(dollars)) * 100
    return amount if amount.is_finite() else None


def details(**counts: int) -> dict[str, int]:
    """Those that were counted at all."""
    return {name: number for name, number in counts.items() if number}


def estimated_tokens(characters: int) -> int:
    """How many tokens that many characters are, roughly."""
    return -(-characters // CHARACTERS_PER_TOKEN)


def characters_in(request: Any, depth: int = _DEPTH_MAX) -> int:
    """How many characters of text a request has, wherever in it they stand. Files and pictures are not text."""
    if isinstance(request, str):
        return 0 if request.startswith("data:") else len(request)
    if depth == 0:
        return 0
    if isinstance(request, list | tuple):
        return sum(characters_in(part, depth - 1) for part in request)
    fields = request if isinstance(request, Mapping) else getattr(request, "__dict__", {})
    return sum(characters_in(part, depth - 1) for name, part in fields.items() if name not in _NOT_TEXT)


def as_text(request: Any) -> str:
    """A request in words: a text as it is, anything else as JSON."""
    return request if isinstance(request, str) else json.dumps(request, default=str, ensure_ascii=False)
