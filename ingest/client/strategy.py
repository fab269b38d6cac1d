"""The base of strategies, readers of other libraries' answers, and the usage of language models.

A strategy turns something that happened (a call, a stream, elapsed time) into the metadata of one event.
``Strategy.emit`` merges what the strategy measured with the metadata of the strategy and of the call, adds the cost,
and captures the event; ``emit`` never raises, because metering must not make a call fail. ``LanguageModelStrategy``
is the base for model calls, with ``Tokens`` and ``ModelCall``. ``read``, ``count``, ``items`` and ``text`` read
answers of unknown shape without raising.
"""

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Protocol, Self, TypeVar

import msgspec

from ingest.client.event import COST, Event, clean, clipped, sendable

# Readers. Answers come as objects, as dictionaries, and as objects that hold dictionaries.

def read(source: Any, *path: str) -> Any:
    """What lies at a path of attributes or keys, None when there is no such thing."""
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


def items(source: Any, *path: str) -> Sequence[Any]:
    """The list at a path, or an empty one."""
    found = read(source, *path)
    return found if isinstance(found, list | tuple) else ()


def text(source: Any, *path: str) -> str:
    """The text at a path, or ''."""
    found = read(source, *path)
    return found if isinstance(found, str) else ""


# The base class. A strategy of your own:
#
#     class Words(Strategy):
#         def count(self, customer: CustomerLike, text: str, **metadata: Value) -> None:
#             self.emit(customer, {"words": len(text.split()), "strategy": "Words"}, metadata)
#
#     ingestion.strategy(Words, "words", plan="pro").count("user-1", "so it goes")

logger = logging.getLogger(__name__)

Value = str | int | float | bool | Decimal | datetime | None
"""What ordinary metadata may hold."""

Cost = int | float | str | Decimal | Mapping[str, Any] | None
"""Cents (US), or ``{"amount": cents, "currency": "usd"}``; None when it is not known."""


class Customer(msgspec.Struct, frozen=True, kw_only=True):
    """Whose usage it is, by your id (``external_customer_id``) or the server's; and which of its members'."""

    external_customer_id: str | None = None
    customer_id: str | None = None
    external_member_id: str | None = None
    member_id: str | None = None


CustomerLike = str | Customer
"""A string is an external customer id."""

Who = CustomerLike | Callable[[], CustomerLike | None]
"""Whose call it is, or a function that says so when the call begins; None means that this call is not metered."""


class Capturing(Protocol):
    """Whatever takes events: an Ingestion, an AsyncIngestion, or the recording one of ``ingest.client.testing``."""

    def capture(self, event: Event | Mapping[str, Any]) -> str | None:
        """Take an event without waiting for the server; its id, or None when it was refused."""


class Strategy:
    """The base of every strategy, made by ``ingestion.strategy(Class, "event name", **metadata)``.

    ``metadata`` goes with every event. Keyword arguments of a subclass are declared by overriding ``__init__`` with
    the same first three parameters.
    """

    def __init__(self, event_name: str, ingestion: Capturing, metadata: Mapping[str, Any] | None = None) -> None:
        self.event_name = event_name
        self._ingestion = ingestion
        self._metadata = dict(metadata or {})
        self._cost: Callable[[Any], Cost] | None = None

    def cost(self, calculate: Callable[[Any], Cost]) -> Self:
        """The same strategy whose events carry ``_cost``.

        ``calculate`` gets what the strategy documents as its context (by default the measured metadata) and returns
        cents. Decimals stay exact; more than 12 decimals are rounded half to even; None leaves the cost out.
        """
        priced = copy.copy(self)
        priced._cost = calculate
        return priced

    def resolve(self, who: Who | None) -> Customer | None:
        """Whose usage begins now. None, with a warning, when nobody can say. Never raises."""
        try:
            found = who() if callable(who) else who
        except Exception:
            logger.exception("asking for the customer failed", extra={"event_name": self.event_name})
            return None
        if found is None:
            logger.warning("a call is not metered: nobody says whose it is", extra={"event_name": self.event_name})
            return None
        return Customer(external_customer_id=found) if isinstance(found, str) else found

    def emit(
        self,
        customer: CustomerLike,
        measured: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        *,
        context: Any = None,
        name: str | None = None,
        external_id: str | None = None,
        parent_id: str | None = None,
        timestamp: datetime | None = None,
    ) -> str | None:
        """Capture one event; its id, or None when it was refused. Never raises.

        ``measured`` is the strategy's own, overridden by the strategy's static metadata, and that by ``metadata`` of
        this event. ``context`` is what a cost function gets; the measured metadata when it is None.
        """
        try:
            together = {**measured, **self._metadata, **(metadata or {})}
            if self._cost is not None:
                _add_cost(together, self._cost, measured if context is None else context)
            who = Customer(external_customer_id=customer) if isinstance(customer, str) else customer
            return self._ingestion.capture(
                Event(
                    name=name or self.event_name, metadata=together, external_id=external_id, parent_id=parent_id,
                    timestamp=timestamp, external_customer_id=who.external_customer_id, customer_id=who.customer_id,
                    external_member_id=who.external_member_id, member_id=who.member_id,
                )
            )  # fmt: skip
        except Exception:
            logger.exception("an event could not be captured", extra={"event_name": self.event_name})
            return None


def customer_in(*sources: Any) -> Customer | None:
    """The customer that somebody wrote down: ``external_customer_id`` or ``customer_id``, also in Polar's spelling."""
    for source in sources:
        for field, other in (("external_customer_id", "externalCustomerId"), ("customer_id", "customerId")):
            if found := text(source, field) or text(source, other):
                return Customer(**{field: found})
    return None


def _add_cost(metadata: dict[str, Any], calculate: Callable[[Any], Cost], context: Any) -> None:
    """A cost function that fails costs the event its cost, not its existence."""
    try:
        amount = calculate(context)
        if amount is not None:
            cost = amount if isinstance(amount, Mapping) else {"amount": amount, "currency": "usd"}
            metadata.update(clean({COST: cost}))
    except Exception:
        logger.exception("a cost function failed; the event goes without cost")


S = TypeVar("S", bound=Strategy)


# Language models. Vendors report usage differently: for one, the input includes cached tokens, for another it does
# not; one leaves reasoning out of the output. Each strategy reads its vendor's fields into ``Tokens``, where every
# part is *inside* its whole and the total is the sum of the two wholes:
#
#     total = input  (of which: cached, cache_write)
#           + output (of which: reasoning)
#
# The event's metadata is what Polar's LLM strategy sends, so meters made for that strategy count these events.

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
    ``is_split`` says that tokens of pictures, sound and video in the output would have been told apart from those of
    text. ``called`` is when the call was made, where that is known and was not just now: prices change.
    ``parts`` are the calls that this one is the sum of, if it is one: each is billed for itself, by its own terms.
    ``reported_cost`` is in cents, where a library between here and the vendor has an opinion.
    """

    vendor: str
    model: str
    tokens: Tokens
    api_url: str | None = None
    is_estimated: bool = False
    terms: dict[str, str] = {}
    unpriced: str = ""
    is_split: bool = True
    called: datetime | None = None
    parts: tuple["ModelCall", ...] = ()
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
