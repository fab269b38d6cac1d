"""A FastAPI application that passes questions on to OpenAI and meters each of its customers.

One client for OpenAI, one for Meterstream, both as long as the application lives; a request's own metered client is a
cheap copy that shares the connections. A reader who leaves in the middle of a stream is metered for what arrived.

    CHAT_URL=http://127.0.0.1:8000 CHAT_TOKEN=... CHAT_SPOOL=... OPENAI_API_KEY=... \
        uvicorn tests.examples.chat_app:app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI

from ingest.client import AsyncIngestion
from ingest.client.prices import list_price
from ingest.client.strategies.openai import OpenAIStrategy

MODEL = "gpt-5-mini"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Opens both clients and closes them; what was not sent by then is in the spool."""
    async with (
        AsyncIngestion(
            os.environ["CHAT_TOKEN"], base_url=os.environ["CHAT_URL"], spool=os.environ["CHAT_SPOOL"],
            handle_sigterm=False,  # uvicorn does
        ) as ingestion,
        AsyncOpenAI() as openai,
    ):  # fmt: skip
        # The vendor is named because OPENAI_BASE_URL may be a proxy: the prices are OpenAI's all the same.
        llm = ingestion.strategy(OpenAIStrategy, "chat", service="support").cost(list_price)
        app.state.openai_of = lambda customer: llm.client(openai, customer, vendor="openai")
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/chat")
async def chat(request: Request, question: str, customer: Annotated[str, Header()]) -> dict[str, str]:
    """The whole answer."""
    openai: AsyncOpenAI = request.app.state.openai_of(customer)
    answer = await openai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": question}])
    return {"answer": answer.choices[0].message.content or ""}


@app.post("/chat/stream")
async def stream(request: Request, question: str, customer: Annotated[str, Header()]) -> StreamingResponse:
    """The answer as it comes."""
    openai: AsyncOpenAI = request.app.state.openai_of(customer)

    async def words() -> AsyncIterator[str]:
        messages = [{"role": "user", "content": question}]
        async with await openai.chat.completions.create(model=MODEL, messages=messages, stream=True) as chunks:
            async for chunk in chunks:
                yield chunk.choices[0].delta.content or ""

    return StreamingResponse(words(), media_type="text/plain")
