"""Metrics that usage alone can tell (section 8 of Polar's contract): what it cost, and for how many customers.

What needs revenue (margins, cash flow, lifetime value) is absent, since no revenue is known here. Polar's totals of
active users and of cost per user take the number of subscriptions; here they take the customers of the whole range.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import accumulate
from typing import Annotated, NamedTuple
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Response

from aggregator.api import route_answers
from aggregator.api.requests import AtDesk, Ids, Texts, allow, answer, includes, texts
from aggregator.api.schemas import gives
from aggregator.api.usage import check_range, known_zone
from aggregator.service.errors import Refused
from aggregator.service.serializers import number
from aggregator.service.service import Here
from aggregator.store.queries import metrics
from aggregator.store.queries.buckets import Bounds
from aggregator.store.queries.metrics import Costs
from aggregator.store.queries.scope import NOBODY, Scope
from meters.aggregation import exact_sum, mean
from meters.catalogue import Token
from meters.window import RANGE_DAYS_MAX, START_MIN, Interval, bucket, day_start

router = APIRouter(tags=["metrics"])
Reader = Annotated[Token, Depends(allow(frozenset({"metrics:read"})))]
DAYS_MIN = {Interval.HOUR: 0, Interval.DAY: 0, Interval.WEEK: 14, Interval.MONTH: 60, Interval.YEAR: 366}
"""Ranges that make a chart worth looking at; advice, as with Polar."""

Values = list[Decimal]


class Metric(NamedTuple):
    """A metric: how it is shown, its value in each period, and over all of them."""

    display_name: str
    type: str
    values: Callable[[Costs], Values]
    total: Callable[[Costs], Decimal]


def _spent(costs: Costs) -> Values:
    return [period.costs for period in costs.periods]


def _cumulative(costs: Costs) -> Values:
    return list(accumulate(_spent(costs), lambda sum, more: exact_sum([sum, more]), initial=costs.before))[1:]


def _active(costs: Costs) -> Values:
    return [Decimal(period.customers) for period in costs.periods]


def _per_user(costs: Costs) -> Values:
    return [mean(period.costs, period.customers) for period in costs.periods]


METRICS = {
    "costs": Metric("Costs", "currency_sub_cent", _spent, lambda costs: exact_sum(_spent(costs))),
    "cumulative_costs": Metric(
        "Cumulative Costs", "currency_sub_cent", _cumulative, lambda costs: (_cumulative(costs) or [costs.before])[-1]
    ),
    "active_user_by_event": Metric(
        "Active User By Event", "scalar", _active, lambda costs: Decimal(costs.customers)
    ),
    "cost_per_user": Metric(
        "Cost Per User", "currency_sub_cent", _per_user,
        lambda costs: mean(exact_sum(_spent(costs)), costs.customers),
    ),
}  # fmt: skip
ABSENT = frozenset({
    "active_subscriptions", "annual_recurring_revenue", "average_order_value", "average_revenue_per_user",
    "average_seats_per_customer", "canceled_subscriptions", "canceled_subscriptions_customer_service",
    "canceled_subscriptions_low_quality", "canceled_subscriptions_missing_features", "canceled_subscriptions_other",
    "canceled_subscriptions_switched_service", "canceled_subscriptions_too_complex",
    "canceled_subscriptions_too_expensive", "canceled_subscriptions_unused", "cashflow", "checkouts",
    "checkouts_conversion", "churn_rate", "churned_seat_customers", "churned_subscriptions",
    "committed_annual_recurring_revenue", "committed_monthly_recurring_revenue", "committed_subscriptions",
    "cumulative_revenue", "gross_margin", "gross_margin_percentage", "ltv", "monthly_recurring_revenue",
    "net_average_order_value", "net_cumulative_revenue", "net_revenue", "new_seat_customers", "new_subscriptions",
    "new_subscriptions_net_revenue", "new_subscriptions_revenue", "one_time_products",
    "one_time_products_net_revenue", "one_time_products_revenue", "orders", "renewed_subscriptions",
    "renewed_subscriptions_net_revenue", "renewed_subscriptions_revenue", "revenue", "seat_customers",
    "seat_utilization_rate", "seats_claimed", "seats_pending", "seats_total", "succeeded_checkouts",
    "trial_committed_monthly_recurring_revenue", "trial_monthly_recurring_revenue",
})  # fmt: skip
"""Metrics that Polar has and nobody here can know: asking for one is no error, and gives nothing."""


def periods(first: date, last: date, interval: Interval, timezone: str) -> list[tuple[datetime, Bounds]]:
    """The calendar units from the first day to the end of the last: when each begins, and its part in the range."""
    tz = ZoneInfo(timezone)
    start, end = day_start(first, tz), day_start(last + timedelta(days=1), tz)
    found = []
    instant = start
    while instant < end:
        begins, ends = bucket(instant, interval, timezone)
        found.append((begins, (max(begins, start), min(ends, end))))
        instant = ends
    return found


@router.get("/v1/metrics/", responses=gives(route_answers.Metrics))
async def get_metrics(
    desk: AtDesk, token: Reader, start_date: date, end_date: date, interval: Interval, timezone: str = "UTC",
    organization_id: Ids = None, customer_id: Ids = None, metrics: Texts = None,
) -> Response:  # fmt: skip
    """Costs of the organization's events, period by period, in cents."""
    known_zone(timezone)
    noon = datetime.min.time().replace(hour=12)
    start, end = (datetime.combine(day, noon, UTC) for day in (start_date, end_date))
    check_range(start, end, interval, "date")
    wanted = _wanted(metrics)
    units = periods(start_date, end_date, interval, timezone)
    subjects = desk.subjects(token, texts(customer_id), None)
    if not includes(organization_id, token):
        subjects = []
    scope = Scope(organization=NOBODY, subjects=subjects)
    costs, as_of = await desk.ask(token, lambda here: _costs(here, scope, [bounds for _, bounds in units]))
    values = {slug: metric.values(costs) for slug, metric in wanted.items()}
    body = route_answers.Metrics(
        periods=[
            {"timestamp": begins, **{slug: number(values[slug][place]) for slug in wanted}}
            for place, (begins, _) in enumerate(units)
        ],
        totals={slug: number(metric.total(costs)) for slug, metric in wanted.items()},
        metrics={
            slug: route_answers.MetricInfo(slug, metric.display_name, metric.type) for slug, metric in wanted.items()
        },
    )
    return answer(body, as_of)


def _costs(here: Here, scope: Scope, bounds: list[Bounds]) -> Costs:
    return metrics.costs(here.connection, here.within(scope), bounds)


def _wanted(slugs: list[str] | None) -> dict[str, Metric]:
    unknown = [slug for slug in slugs or () if slug not in METRICS and slug not in ABSENT]
    if unknown:
        raise Refused("value_error", ("query", "metrics"), f"Unknown metric: {unknown[0]}", unknown[0])
    return {slug: metric for slug, metric in METRICS.items() if slugs is None or slug in slugs}


@router.get("/v1/metrics/limits", responses=gives(route_answers.MetricsLimits))
async def get_limits(desk: AtDesk, token: Reader) -> Response:
    """How long a range each interval takes."""
    intervals: dict[str, route_answers.IntervalLimits] = {
        interval: route_answers.IntervalLimits(DAYS_MIN[interval], RANGE_DAYS_MAX[interval]) for interval in Interval
    }
    return answer(route_answers.MetricsLimits(START_MIN.date(), intervals), desk.view.as_of)
