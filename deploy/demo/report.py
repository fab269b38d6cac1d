"""What the demonstration asks the API, and how it shows the answers."""

from collections import Counter
from decimal import Decimal
from typing import Any

from deploy.client import Api
from deploy.demo import trace
from deploy.demo.recount import Figures
from deploy.output import show_table
from deploy.sending import Line
from meters import exact_json

TOP = 10


def measure(api: Api, meter_ids: dict[str, str], lines: list[Line]) -> Figures:
    """Everything that is printed, as the API answers it."""
    events = [exact_json.decode(line.event) for line in lines]
    names = sorted({event["external_customer_id"] for event in events})
    moments = [event["timestamp"] for event in events]
    window = {"start_timestamp": f"{min(moments)[:13]}:00:00Z", "end_timestamp": max(moments), "interval": "hour"}
    hours = {name: _quantities(api, meter, window) for name, meter in meter_ids.items()}
    by_customer = {
        name: {customer: _total(api, meter_ids[name], customer) for customer in names}
        for name in ("tokens", "requests")
    }
    return Figures(
        requests=Decimal(hours["requests"]["total"]),
        tokens=Decimal(hours["tokens"]["total"]),
        active_customers=Decimal(hours["customers"]["total"]),
        cost_cents=_cost(api, min(moments)[:10], max(moments)[:10]),
        tokens_by_customer=by_customer["tokens"],
        requests_by_customer=by_customer["requests"],
        tokens_by_hour=_by_hour(hours["tokens"]),
        requests_by_hour=_by_hour(hours["requests"]),
        customers_by_hour=_by_hour(hours["customers"]),
    )


def _quantities(api: Api, meter_id: str, window: dict[str, str]) -> dict[str, Any]:
    answer: dict[str, Any] = api.get(f"/v1/meters/{meter_id}/quantities", **window)
    return answer


def _total(api: Api, meter_id: str, customer: str) -> Decimal:
    """From the running totals, where the hours come from the store: both ways to count are compared."""
    return Decimal(api.get(f"/v1/meters/{meter_id}/usage", external_customer_id=customer)["value"])


def _by_hour(answer: dict[str, Any]) -> dict[str, Decimal]:
    return {point["timestamp"][:13]: Decimal(point["quantity"]) for point in answer["quantities"]}


def _cost(api: Api, first_day: str, last_day: str) -> Decimal:
    answer = api.get("/v1/metrics/", start_date=first_day, end_date=last_day, interval="day", metrics="costs")
    return Decimal(answer["totals"]["costs"])


def print_report(figures: Figures, events: int, elapsed_s: float, fresh_after_s: float) -> None:
    """Usage by customer and by hour, what it cost, and how fast it went."""
    requests, tokens = figures.requests_by_customer, figures.tokens_by_customer
    top = [name for name, _ in Counter(tokens).most_common(TOP)]
    rows: list[dict[str, Any]] = [{"customer": n, "requests": requests[n], "tokens": tokens[n]} for n in top]
    show_table(rows, ("customer", "requests", "tokens"), title=f"Usage by customer, the first {TOP}", chart="tokens")
    by_hour = [
        {"hour": hour, "requests": figures.requests_by_hour[hour], "tokens": count,
         "customers": figures.customers_by_hour[hour]}
        for hour, count in sorted(figures.tokens_by_hour.items())
    ]
    show_table(by_hour, ("hour", "requests", "customers", "tokens"), title="Usage by hour (UTC)", chart="tokens")
    total = {
        "requests": figures.requests,
        "customers": figures.active_customers,
        "tokens": figures.tokens,
        "cost (cents)": figures.cost_cents,
        "cents per 1,000 tokens": _rounded(figures.cost_cents * 1000, figures.tokens),
    }
    show_table([total], tuple(total), title=f"In all, as the API says ({trace.EVENT_NAME})")
    print(f"{events / elapsed_s:,.0f} events/s over HTTP, each durable before its answer ({elapsed_s:.2f} s).")
    print(f"Queryable {fresh_after_s * 1000:,.0f} ms after the last answer.")


def _rounded(numerator: Decimal, denominator: Decimal) -> Decimal:
    return (numerator / denominator).quantize(Decimal("0.0001")) if denominator else Decimal(0)
