"""The ASGI application: one ``Desk``, a router for each resource, health and metrics routes, and error answers.

``create_app`` puts them together. Time and new ids come in as functions, so tests control both.
"""

from collections.abc import Callable
from datetime import datetime

from fastapi import APIRouter, Depends, FastAPI, Response

from aggregator.api import (
    audit,
    benefits,
    credits,
    customer_meters,
    customers,
    events,
    feed,
    meters,
    metrics,
    polar,
    portal,
    route_answers,
    usage,
    webhooks,
)
from aggregator.api.openapi import describe, install_pages
from aggregator.api.requests import AtDesk, RelativeRedirects, Segments, answer, install_error_answers, known_only
from aggregator.api.schemas import gives
from aggregator.api.strictness import passed_over_text
from aggregator.service.errors import SETTLED_S
from aggregator.service.meter_check import Looks
from aggregator.service.service import Desk
from aggregator.view import Unavailable, View

__all__ = ["create_app"]
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(
    view: View,
    now: Callable[[], datetime],
    new_id: Callable[[], str],
    metrics_text: Callable[[], bytes] = bytes,
    *,
    settled_s: float = SETTLED_S,
    private_targets: bool = False,
) -> FastAPI:
    """The ASGI application. It reads through ``view``, and takes time and ids from ``now`` and ``new_id``.

    ``metrics_text`` is what ``/metrics`` shows; ``settled_s`` after a moment all usage before it is in the log; with
    ``private_targets`` webhooks may go to addresses that are not public.
    """
    app = FastAPI(title="Meterstream", description=describe(), docs_url=None, redoc_url=None, version="1")
    app.state.desk = Desk(view, now, new_id, settled_s)
    app.state.private_targets, app.state.looks = private_targets, Looks()
    app.add_middleware(Segments)
    app.add_middleware(RelativeRedirects)
    install_error_answers(app)
    for router in (
        events.router, usage.router, meters.usage_router, meters.router, metrics.router, customers.router,
        events.dead_letters_router, customer_meters.router, credits.router, meters.charges_router, benefits.router,
        customers.sessions_router, portal.router, webhooks.router, polar.router, feed.router, audit.router,
    ):  # fmt: skip
        app.include_router(router)
    app.include_router(_operations(metrics_text))
    install_pages(app)
    return app


def _operations(metrics_text: Callable[[], bytes]) -> APIRouter:
    """Alive, able to answer, measured: what operators ask. None needs a token, none tells anything about a tenant."""
    router = APIRouter(tags=["operations"], dependencies=[Depends(known_only)])

    @router.get("/livez")
    async def is_alive() -> Response:
        """It answers, so it is."""
        return Response(b"ok\n", media_type="text/plain")

    @router.get("/readyz", responses=gives(route_answers.Readiness))
    async def is_ready(desk: AtDesk) -> Response:
        """200 with the position of the view, or 503 while the store is being opened. A gateway answers for itself.

        What a gateway says is `{"ready": true, "checks": {"catalogue": true, "log": true}}`: it takes events while the
        aggregator is away. Whether these are counted is told by `meterstream_lag_records`, its alert, and reads. A
        gateway adds `log_clock_ahead_s` only where the newest decision has a time that is still to come.
        """
        as_of = desk.view.as_of
        positions = {str(part): at for part, at in as_of.items()}
        return answer(route_answers.Readiness("ready", positions, desk.clock_ahead_us / 1_000_000), as_of)

    @router.get("/metrics")
    async def prometheus_metrics(desk: AtDesk) -> Response:
        """Counters and gauges of this process."""
        try:
            catalogue = desk.catalogue
        except Unavailable:  # metrics are there while the store is being opened, too
            catalogue = None
        text = metrics_text() + passed_over_text() + desk.inbox.metrics(catalogue)
        return Response(text, headers={"Content-Type": METRICS_TYPE})

    return router
