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

_ORDINARY_GEOGRAPHIES = {"", "global", "not_available"}
"""As Anthropic says where a model answered; of any other place the list does not have the price."""

_PRICES = {
    "input_audio_tokens": "input_audio_mtok",
    "output_audio_tokens": "output_audio_mtok",
    "web_searches": "web_searches_kcount",
    "storage_searches": "storage_searches_kcount",
}
"""What is not in the price of a token: its price in the list by what was counted."""

_AUDIO_IS_TEXT = {"google"}
"""Who names one price for both where audio costs no more (Gemini Pro). Of others it is just not in the list."""

_unknown: set[tuple[str, str]] = set()


def list_price(call: ModelCall) -> Decimal | None:
    """What a call costs by today's list, in cents, exactly; None when the list does not know all of it.

    The vendor is found by the address that was called; by its name where the address is not known to the strategy.
    """
    try:
        return _listed(call)
    except (LookupError, ValueError) as problem:  # unknown, or known too little of: cached audio has its own price
        _say_once(call, problem)
        return None


def _listed(call: ModelCall) -> Decimal | None:
    if (geography := call.terms.get("inference_geo", "")) not in _ORDINARY_GEOGRAPHIES:
        raise LookupError(f"the list has no price for inference in {geography!r}")
    if call.unpriced:
        raise LookupError(f"what {call.unpriced} costs is not told")
    found = _found(call, call.terms)
    if not any(price is not None for price in vars(found.model_price).values()):
        return None  # listed, but without a price
    if call.terms.get("speed") == "fast":
        ordinary = _found(call, {name: value for name, value in call.terms.items() if name != "speed"})
        if ordinary.model_price == found.model_price:
            raise LookupError(f"the list has no price for {call.model!r} in fast mode")
    for counted, price in _PRICES.items():
        is_text = "audio" in counted and found.provider.id in _AUDIO_IS_TEXT
        if call.tokens.details.get(counted) and getattr(found.model_price, price, None) is None and not is_text:
            raise LookupError(f"the list has no price for {counted} of {call.model!r}")
    return cents(found.total_price)


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
    seller = {"provider_api_url": call.api_url} if call.api_url else {"provider_id": call.vendor}
    return genai_prices.calc_price(usage, call.model, price_context=terms or None, **seller)


def _say_once(call: ModelCall, problem: Exception) -> None:
    key = (call.api_url or call.vendor, call.model)
    if key not in _unknown:
        _unknown.add(key)
        logger.warning("calls go without a cost: %s", problem)
