"""Routes of metrics that follow from usage (section 8 of Polar's contract): costs, and the number of customers.

``METRICS`` lists them with their formulas. Metrics that need revenue (margins, cash flow, lifetime value) are absent,
since no revenue is known here. Polar's totals of active users and of cost per user count subscriptions; these count the
customers of the whole range.
"""

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import accumulate
from typing import Annotated, NamedTuple
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Depends, Query, Response

from aggregator.api import route_answers
from aggregator.api.meters import check_range, known_zone, under_several_names
from aggregator.api.requests import (
    AtDesk,
    Ids,
    Since,
    Texts,
    Until,
    allow,
    answer,
    includes,
    texts,
)
from aggregator.api.schemas import gives
from aggregator.service.errors import Malformed, Refused
from aggregator.service.serializers import number
from aggregator.store.queries import usage
from aggregator.store.queries.scope import NOBODY, Bounds, Scope
from aggregator.store.queries.usage import Costs
from meters.aggregation import exact_sum, mean
from meters.catalogue.catalogue import Token
from meters.errors import detail
from meters.timestamps import END_MAX, RANGE_DAYS_MAX, START_MIN, Interval, day_start, units

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


async def metrics_range(
    interval: Interval,
    start_date: Annotated[date | None, Query(description="The first day")] = None,
    end_date: Annotated[date | None, Query(description="The last day, which is included")] = None,
    since: Since = None,
    until: Until = None,
    timezone: str = "UTC",
) -> Bounds:
    """The range of a question: Polar's two dates, both included, or a half-open one, or both at once.

    Raises Malformed and Refused.
    """
    known_zone(timezone)
    by_days = start_date or end_date or not (since or until)
    named = {"start_date": start_date, "end_date": end_date} if by_days else {"since": since, "until": until}
    missing = [detail("missing", ("query", name), "Field required") for name, given in named.items() if given is None]
    if missing:
        raise Malformed(missing)
    starts, ends = since or START_MIN, until or END_MAX
    if start_date and end_date:
        noon = datetime.min.time().replace(hour=12)
        first, last = (datetime.combine(day, noon, UTC) for day in (start_date, end_date))
        check_range(first, last, interval, ("start_date", "end_date"))
        midnights = days(start_date, end_date, timezone)
        starts, ends = max(since or midnights[0], midnights[0]), min(until or midnights[1], midnights[1])
    else:
        check_range(starts, ends, interval, ("since", "until"))
    if starts >= ends:
        raise Refused("value_error", ("query",), "The range is empty: give a later until, or an earlier since")
    return starts, ends


def days(first: date, last: date, timezone: str) -> Bounds:
    """From the beginning of the first day to the end of the last."""
    tz = ZoneInfo(timezone)
    return day_start(first, tz), day_start(last + timedelta(days=1), tz)


@router.get("/v1/metrics/", responses=gives(route_answers.Metrics))
async def get_metrics(
    desk: AtDesk, token: Reader, within: Annotated[Bounds, Depends(metrics_range)], interval: Interval,
    timezone: str = "UTC", organization_id: Ids = None, customer_id: Ids = None, metrics: Texts = None,
) -> Response:  # fmt: skip
    """Costs of the organization's events, period by period, in cents.

    The range is from `start_date` to `end_date`, both included, or from `since` until before `until`. It cuts the first
    and the last period, whose `timestamp` is the beginning of the calendar unit all the same.
    """
    wanted = _wanted(metrics)
    shown = units(*within, interval, timezone)
    whose, same = desk.whose(token, texts(customer_id), None), under_several_names(desk, token.organization_id)
    scope = Scope(
        organization=NOBODY, subjects=whose if includes(organization_id, token) else [], same=same, since=within[0],
        until=within[1],
    )  # fmt: skip
    costs, as_of = await desk.ask(token, lambda here: usage.costs(here.connection, here.within(scope), shown))
    values = {slug: metric.values(costs) for slug, metric in wanted.items()}
    body = route_answers.Metrics(
        periods=[
            {"timestamp": begins, **{slug: number(values[slug][place]) for slug in wanted}}
            for place, (begins, _) in enumerate(shown)
        ],
        totals={slug: number(metric.total(costs)) for slug, metric in wanted.items()},
        metrics={
            slug: route_answers.MetricInfo(slug, metric.display_name, metric.type) for slug, metric in wanted.items()
        },
    )
    return answer(body, as_of)


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
