"""For operators: is the process alive, can it answer, what does it measure."""

from collections.abc import Callable

from fastapi import APIRouter, Response

from aggregator.api.desk import AtDesk, answer
from aggregator.api.schemas import gives, ref

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations(metrics_text: Callable[[], bytes]) -> APIRouter:
    """The routes; none needs a token, none tells anything about a tenant."""
    router = APIRouter(tags=["operations"])

    @router.get("/livez")
    async def is_alive() -> Response:
        """It answers, so it is."""
        return Response(b"ok\n", media_type="text/plain")

    @router.get("/readyz", responses=gives(ref("Readiness")))
    async def is_ready(desk: AtDesk) -> Response:
        """200 with the position of the view, or 503 while the store is being opened."""
        as_of = desk.view.as_of
        return answer({"status": "ready", "as_of": {str(partition): at for partition, at in as_of.items()}}, as_of)

    @router.get("/metrics")
    async def prometheus_metrics() -> Response:
        """Counters and gauges of this process."""
        return Response(metrics_text(), headers={"Content-Type": METRICS_TYPE})

    return router
