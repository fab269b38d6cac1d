"""List prices of language models, from the genai-prices package (optional extra ``meterstream[prices]``).

    llm = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price)

``list_price`` never guesses. If the model or its provider is not known for certain, or a part of the usage has no
price in the list, the event has no cost, and the log says so once. A list price is not an invoice: it has no
discounts and no minimum charges.
"""

import logging
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import genai_prices

from ingest.client.strategy import ModelCall, cents

logger = logging.getLogger(__name__)

_ORDINARY: Mapping[str, frozenset[str]] = {
    "service_tier": frozenset({"default", "standard", "auto", "on_demand", "standard_only", "unspecified"}),
    "speed": frozenset({"standard"}),
    "inference_geo": frozenset({"global", "not_available"}),
}
"""Terms that the ordinary price is for. Of any other the list must have a price, or the call has none."""

_CONTEXTS = {("service_tier", "batch"): ("processing", "batch")}
"""Terms that the list calls by another name."""

_MODALITIES = ("audio", "image", "video")
_PRICES = {
    **{f"{side}_{kind}_tokens": f"{side}_{kind}_mtok" for side in ("input", "output") for kind in _MODALITIES},
    "web_searches": "web_searches_kcount",
    "social_searches": "social_searches_kcount",
    "storage_searches": "storage_searches_kcount",
    "code_executions": "code_executions_kcount",
}
"""What is not in the price of a token of text: its price in the list by what was counted."""

_AS_TEXT = {
    "google": frozenset({"input_audio_tokens", "input_image_tokens", "input_video_tokens"}),
    "openai": frozenset({"input_image_tokens"}),
}
"""What a vendor lists one price for, together with text, where it costs no more. Of others it is just not listed."""

_SPEAKING = "tts"
"""In the name of a model that answers in sound alone, so that the price of its output is one of sound."""

_VENDORS = {
    "azure.ai.openai": "azure",
    "az.ai.openai": "azure",
    "azure.ai.inference": "azure",
    "azure_openai": "azure",
    "x_ai": "x-ai",
    "google_anthropic_vertex": "google",
    "vertex_ai": "google",
}
"""Whose prices the list keeps under another name than instrumentations have for them."""

_unknown: set[tuple[str, str]] = set()


def list_price(call: ModelCall) -> Decimal | None:
    """What a call costs by today's list, in cents, exactly; None when the list does not know all of it.

    The vendor is found by the address that was called; by its name where the address is not known to the strategy.
    """
    if call.parts:
        costs = [list_price(part) for part in call.parts]
        known = [cost for cost in costs if cost is not None]
        return sum(known, Decimal(0)) if len(known) == len(costs) else None
    try:
        return _listed(call)
    except (LookupError, ValueError) as problem:  # unknown, or known too little of: cached audio has its own price
        _say_once(call, problem)
        return None


def _listed(call: ModelCall) -> Decimal | None:
    if call.unpriced:
        raise LookupError(f"what {call.unpriced} costs is not told")
    terms = {name: term for name, term in call.terms.items() if term.lower() not in _ORDINARY.get(name, ())}
    found = _found(call, terms)
    if not any(price is not None for price in vars(found.model_price).values()):
        return None  # listed, but without a price
    for name in terms:
        others = {other: term for other, term in terms.items() if other != name}
        if _found(call, others).model_price == found.model_price:
            raise LookupError(f"the list has no price for {call.model!r} with {name} {terms[name]!r}")
    _check_parts(call, found)
    return cents(found.total_price)


def _check_parts(call: ModelCall, found: Any) -> None:
    """Raise LookupError where a part of the call has no price in the list, or is not told."""
    details, listed = call.tokens.details, found.model_price
    for counted, price in _PRICES.items():
        if details.get(counted) and not _price(listed, price) and not _is_text(counted, found):
            raise LookupError(f"the list has no price for {counted} of {call.model!r}")
    is_kept = "cache_write_5m_tokens" in details or "cache_write_1h_tokens" in details
    if call.tokens.cache_write and _price(listed, "cache_write_1h_mtok") and not is_kept:
        raise LookupError(f"how long {call.model!r} keeps what was written to its cache is not told")
    outputs = [kind for kind in _MODALITIES if _price(listed, f"output_{kind}_mtok")]
    if outputs and not call.is_split and not any(details.get(f"output_{kind}_tokens") for kind in outputs):
        raise LookupError(f"how much of the output of {call.model!r} is text is not told")


def _price(listed: Any, name: str) -> Any:
    return getattr(listed, name, None)


def _is_text(counted: str, found: Any) -> bool:
    if counted == "output_audio_tokens" and found.provider.id == "google":
        return _SPEAKING in found.model.id
    return counted in _AS_TEXT.get(found.provider.id, ())


def _found(call: ModelCall, terms: Mapping[str, str]) -> Any:
    tokens = call.tokens
    usage = genai_prices.Usage(
        input_tokens=tokens.input,
        cache_read_tokens=tokens.cached or None,
        cache_write_tokens=tokens.cache_write or None,
        output_tokens=tokens.output,
        output_reasoning_tokens=tokens.reasoning or None,
        **tokens.details,
    )
    context = dict(_CONTEXTS.get(term, term) for term in terms.items())
    vendor = _VENDORS.get(call.vendor, call.vendor)
    seller = {"provider_api_url": call.api_url} if call.api_url else {"provider_id": vendor}
    return genai_prices.calc_price(
        usage, call.model, genai_request_timestamp=call.called, price_context=context or None, **seller
    )


def _say_once(call: ModelCall, problem: Exception) -> None:
    key = (call.api_url or call.vendor, call.model)
    if key not in _unknown:
        _unknown.add(key)
        logger.warning("calls go without a cost: %s", problem)
