"""List prices of language models, from the genai-prices package, an optional extra: ``meterstream[prices]``.

    llm = ingestion.strategy(OpenAIStrategy, "llm").cost(list_price)

Nothing is guessed: where the model, or who serves it, is not known for certain, the event goes without a cost and the
log says so once. A price list is still no invoice: discounts and minimum charges are not in it.
"""

import logging
from decimal import Decimal

import genai_prices

from ingest.client.llm import ModelCall, cents

logger = logging.getLogger(__name__)

_ORDINARY_GEOGRAPHIES = {"", "global", "not_available"}
"""As Anthropic says where a model answered; of any other place the list does not have the price."""

_unknown: set[tuple[str, str]] = set()


def list_price(call: ModelCall) -> Decimal | None:
    """What a call costs by today's list, in cents, exactly; None when the list does not know it.

    The vendor is found by the address that was called; by its name where the address is not known to the strategy.
    """
    if (geography := call.terms.get("inference_geo", "")) not in _ORDINARY_GEOGRAPHIES:
        _say_once(call, LookupError(f"the list has no price for inference in {geography!r}"))
        return None
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
    try:
        found = genai_prices.calc_price(usage, call.model, price_context=call.terms or None, **seller)
    except (LookupError, ValueError) as problem:  # unknown, or known too little of: cached audio has its own price
        _say_once(call, problem)
        return None
    if not any(price is not None for price in vars(found.model_price).values()):
        return None  # listed, but without a price
    return cents(found.total_price)


def _say_once(call: ModelCall, problem: Exception) -> None:
    key = (call.api_url or call.vendor, call.model)
    if key not in _unknown:
        _unknown.add(key)
        logger.warning("calls go without a cost: %s", problem)
