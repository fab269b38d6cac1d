"""Time in buckets: which calendar unit an event falls into.

Buckets are made in Python, where the calendar is exact, and are listed by their quarter hours: since 2023, where ranges
begin at the earliest, every time zone's hours begin on one (those of Antarctica/Casey last did not in October 2022). So
an event finds its bucket by a plain join, whatever the zone and however its clocks change.
"""

from collections.abc import Sequence
from datetime import datetime

from sqlglot import exp

from aggregator.store.queries.scope import naive
from aggregator.store.stage import Parameters, fixed

Bounds = tuple[datetime, datetime]
"""A half-open bucket, which begins and ends on quarter hours."""

QUARTER = "TIME_BUCKET(INTERVAL '15 minutes', timestamp) AS quarter"
"""The column of events that ``in_buckets`` needs."""

_QUARTERS = """
    SELECT starts, UNNEST(GENERATE_SERIES(starts, ends - INTERVAL '15 minutes', INTERVAL '15 minutes')) AS quarter
    FROM (SELECT UNNEST($starts) AS starts, UNNEST($ends) AS ends)
"""


def in_buckets(
    events: exp.Select, buckets: Sequence[Bounds], columns: Sequence[exp.Expr], parameters: Parameters
) -> exp.Select:
    """SELECT starts, ``columns`` of the events (with a ``quarter``) that fall into a bucket; ``starts`` names it."""
    parameters.named("starts", [naive(starts) for starts, _ in buckets])
    parameters.named("ends", [naive(ends) for _, ends in buckets])
    query = exp.select(exp.column("starts"), *columns, copy=False)
    query = query.from_(events.subquery("events", copy=False), copy=False)
    return query.join(fixed(_QUARTERS), using="quarter", join_alias="quarters", copy=False)
