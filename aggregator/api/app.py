"""The API put together: one desk, a router per resource, errors in Polar's shapes."""

from collections.abc import Callable
from datetime import datetime

from fastapi import FastAPI

from aggregator.api import (
    audit,
    benefits,
    charges,
    credits,
    customer_meters,
    customers,
    cuts,
    dead_letters,
    errors,
    events,
    feed,
    meters,
    metrics,
    polar_webhooks,
    portal,
    sessions,
    states,
    usage,
    webhook_deliveries,
    webhook_endpoints,
    webhook_rules,
)
from aggregator.api.desk import Desk, Rules, View
from aggregator.api.document import describe, install_pages
from aggregator.api.operations import operations
from aggregator.api.paths import Segments
from aggregator.api.redirects import RelativeRedirects

__all__ = ["Rules", "create_app"]


def create_app(
    view: View,
    now: Callable[[], datetime],
    new_id: Callable[[], str],
    metrics_text: Callable[[], bytes] = bytes,
    rules: Rules = Rules(),  # noqa: B008 - an immutable value
    *,
    private_targets: bool = False,
) -> FastAPI:
    """The ASGI application. It reads through ``view``, and takes time and ids from ``now`` and ``new_id``.

    ``metrics_text`` is what ``/metrics`` shows; ``rules`` are what billing has to say about meters; with
    ``private_targets`` webhooks may go to addresses that are not public.
    """
    app = FastAPI(title="Meterstream", description=describe(), docs_url=None, redoc_url=None, version="1")
    app.state.desk = Desk(view, now, new_id, rules)
    app.state.private_targets = private_targets
    app.add_middleware(Segments)
    app.add_middleware(RelativeRedirects)
    errors.install(app)
    for router in (events.router, usage.router, meters.router, metrics.router, customers.router, dead_letters.router):
        app.include_router(router)
    for router in (customer_meters.router, credits.router, cuts.router, charges.router):
        app.include_router(router)
    for router in (benefits.router, states.router, sessions.router, portal.router):
        app.include_router(router)
    for router in (webhook_endpoints.router, webhook_deliveries.router, webhook_rules.router, polar_webhooks.router):
        app.include_router(router)
    app.include_router(feed.router)
    app.include_router(audit.router)
    app.include_router(operations(metrics_text))
    install_pages(app)
    return app
