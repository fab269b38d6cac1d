"""A FastAPI application that meters what it does for its customers: reports asked for, and bytes delivered.

    DOWNLOADS_URL=http://127.0.0.1:8000 DOWNLOADS_TOKEN=... DOWNLOADS_SPOOL=... uvicorn tests.examples.downloads:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import StreamingResponse

from ingest.client import AsyncIngestion
from ingest.client.strategies.stream import Stream

CHUNK = b"x" * 1000


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """At the end, what is on its way is sent; what cannot be sent stays in the spool."""
    yield
    await ingestion.close()


ingestion = AsyncIngestion(
    os.environ["DOWNLOADS_TOKEN"], base_url=os.environ["DOWNLOADS_URL"], spool=os.environ["DOWNLOADS_SPOOL"]
)
api = FastAPI(lifespan=lifespan)


async def signed_in(request: Request, x_user: Annotated[str, Header()]) -> str:
    """Who asks; stands for the application's own authentication, and tells the middleware outside."""
    request.scope["user"] = x_user
    return x_user


@api.get("/reports/{name}")
async def report(name: str, chunks: int, user: Annotated[str, Depends(signed_in)]) -> StreamingResponse:
    """A report, made while it is sent."""
    await ingestion.ingest({"name": "report", "external_customer_id": user, "metadata": {"report": name}})

    async def body() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield CHUNK

    return StreamingResponse(body())


def customer(scope: Any) -> str | None:
    """Whose response it is; what nobody signed in for is nobody's."""
    user: str | None = scope.get("user")
    return user


app = ingestion.strategy(Stream, "download").asgi(api, customer=customer)
