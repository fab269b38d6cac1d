"""Anybody may send to ``/webhooks/polar``: what that costs whoever has no secret, and everybody else."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from aggregator.api.requests import BODY_BYTES_MAX, POLAR_BODY_BYTES_MAX
from aggregator.service.errors import VERIFICATIONS_WAITING_MAX
from meters.webhooks import SIGNATURES_MAX, keys
from tests.support.polar.organization import Polar, signed
from tests.support.servers.query_api import Server, Tenant
from tests.support.waiting import until

PATH = "/webhooks/polar"


class Threads(ThreadPoolExecutor):
    """Those of the server's loop, and how often one of them was asked for."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.asked = 0

    def submit(self, work: Callable[..., Any], /, *args: Any, **more: Any) -> "Future[Any]":
        """Note it, and have it done."""
        self.asked += 1
        return super().submit(work, *args, **more)


@pytest.fixture
def threads(server: Server) -> Threads:
    """The threads that the server's loop has from now on."""
    made = Threads()

    async def use() -> None:
        asyncio.get_running_loop().set_default_executor(made)

    server.run(use())
    return made


@pytest.fixture
def polar(tenant: Tenant) -> Polar:
    """A Polar organization whose news the tenant takes."""
    return Polar(tenant)


def padded(bytes_: int) -> bytes:
    """A webhook of this length."""
    made = {"type": "order.created", "data": {"id": "x", "note": ""}}
    made["data"] = {"id": "x", "note": "x" * (bytes_ - len(json.dumps(made)))}
    return json.dumps(made).encode()


def test_what_is_wrong_in_the_headers_is_refused_unread(server: Server, polar: Polar, threads: Threads) -> None:
    """Without headers, of another time, or with a crowd of signatures: that its body is too long, nobody finds out."""
    now_s, body = int(server.now.timestamp()), padded(BODY_BYTES_MAX + 1)
    good = signed(body, "one", now_s, keys(polar.secret)[0])
    bad = (
        {}, good | {"webhook-timestamp": str(now_s - 301)}, good | {"webhook-timestamp": str(now_s + 301)},
        good | {"webhook-signature": "v1,x " * (SIGNATURES_MAX + 1)}, good | {"webhook-id": ""},
    )  # fmt: skip
    assert [server.ask("POST", PATH, headers=headers, content=body).status_code for headers in bad] == [401] * len(bad)
    assert threads.asked == 0


def test_signatures_are_looked_at_in_a_thread(server: Server, polar: Polar, threads: Threads) -> None:
    """The loop that everybody shares goes on meanwhile; one thread looks at all secrets of all organizations."""
    Polar(server.tenant())
    body = padded(1000)
    headers = signed(body, "one", int(server.now.timestamp()), b"nobody's")
    assert server.ask("POST", PATH, headers=headers, content=body).status_code == 401
    assert threads.asked == 1


@pytest.mark.parametrize(("bytes_", "status"), [(POLAR_BODY_BYTES_MAX, 202), (POLAR_BODY_BYTES_MAX + 1, 413)])
def test_a_webhook_is_of_a_length_that_polars_have(server: Server, polar: Polar, bytes_: int, status: int) -> None:
    """Longer than any of them it is refused, whoever signed it."""
    body = padded(bytes_)
    headers = signed(body, f"of {bytes_}", int(server.now.timestamp()), keys(polar.secret)[0])
    assert len(body) == bytes_
    assert server.ask("POST", PATH, headers=headers, content=body).status_code == status


def test_a_crowd_without_a_secret_is_turned_away(server: Server, polar: Polar) -> None:
    """So many wait to be looked at, and who comes then is told to come again; who waits is answered."""
    body = padded(1000)
    headers = signed(body, "one", int(server.now.timestamp()), b"nobody's")
    line = server.app.state.desk.verifying

    async def crowd() -> list[int]:
        async with line.turn():
            first = [asyncio.create_task(post()) for _ in range(VERIFICATIONS_WAITING_MAX)]
            await until(lambda: line.waits.now == VERIFICATIONS_WAITING_MAX)
            one_more = await post()
        return [one_more, *await asyncio.gather(*first)]

    async def post() -> int:
        return (await server.http.post(PATH, headers=headers, content=body)).status_code

    assert server.run(crowd()) == [503] + [401] * VERIFICATIONS_WAITING_MAX
