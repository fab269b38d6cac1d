"""What does the hop through the gateway add to a read, and what would a general client add instead?

A query API that answers 1,000 bytes at once, on a unix socket, in a process of its own. One request after another,
each over a kept connection: asked directly, through the gateway's own client, and through httpx.

    python -m benchmarks.passthrough [--requests 2000]
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from benchmarks.report import Report
from ingest.gateway.proxy import Upstream

BODY = b"x" * 1000
SCOPE = {"method": "GET", "query_string": b"page=1", "headers": [(b"host", b"x"), (b"accept", b"*/*")]}
WARM_UP = 100


async def api(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """A query API that knows the answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
    await send({"type": "http.response.body", "body": BODY})


def serve(path: str) -> None:
    """The query API's process."""
    uvicorn.run(api, uds=path, log_level="error", access_log=False, lifespan="off")


async def drop(message: dict[str, Any]) -> None:
    """Where a client would be."""


async def through_sockets(path: str, requests: int) -> list[float]:
    """The bare minimum: write the bytes, read so many."""
    reader, writer = await asyncio.open_unix_connection(path)

    async def ask() -> None:
        writer.write(b"GET /v1/x?page=1 HTTP/1.1\r\nhost: x\r\naccept: */*\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(len(BODY))

    found = await timed(ask, requests)
    writer.close()
    return found


async def through_upstream(path: str, requests: int) -> list[float]:
    """The gateway's own client."""
    upstream = Upstream(f"unix:{path}")
    found = await timed(lambda: upstream.pass_on(SCOPE, b"/v1/x", b"", drop), requests)
    upstream.close()
    return found


async def through_httpx(path: str, requests: int) -> list[float]:
    """A general client, streaming."""
    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path)) as client:
        async def ask() -> None:
            async with client.stream("GET", "http://x/v1/x?page=1", headers={"accept": "*/*"}) as answer:
                async for chunk in answer.aiter_raw():
                    await drop({"body": chunk})

        return await timed(ask, requests)


async def timed(ask: Callable[[], Awaitable[Any]], requests: int) -> list[float]:
    """Seconds of each request, sorted, after some that do not count."""
    found: list[float] = []
    for _ in range(WARM_UP + requests):
        begun = time.perf_counter()
        await ask()
        found.append(time.perf_counter() - begun)
    return sorted(found[WARM_UP:])


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    arguments = parser.parse_args()
    report = Report("passthrough", "what one hop to the query API takes, in milliseconds")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "api.sock"
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(str(path),), daemon=True)
        process.start()
        while not path.exists():
            time.sleep(0.01)
        for way in (through_sockets, through_upstream, through_httpx):
            with asyncio.Runner(loop_factory=uvicorn.Config(api).get_loop_factory()) as runner:
                cpu = time.process_time()
                found = runner.run(way(str(path), arguments.requests))
                cpu = (time.process_time() - cpu) / (arguments.requests + WARM_UP)
            report.add(
                way=way.__name__.replace("_", " "), p50_ms=round(found[len(found) // 2] * 1e3, 3),
                p99_ms=round(found[len(found) * 99 // 100] * 1e3, 3), cpu_ms=round(cpu * 1e3, 3),
            )  # fmt: skip
        process.terminate()
        process.join()
    report.finish()


if __name__ == "__main__":
    main()
