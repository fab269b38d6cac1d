"""The Kafka endpoint that most teams write: FastAPI, a pydantic model per event, ``aiokafka`` and a send per event.

A baseline for ``benchmarks.kafka``, as careful as it should be: ``acks="all"``, the customer as the key, and the
answer leaves when every event of the request is acknowledged. The sends of a request wait together, so the client
batches them as well as it can. ``consume`` is the other end: a model per record, and an upsert for each of its meters.

    python -m benchmarks.usual_stack_kafka BOOTSTRAP TOPIC PORT
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from fastapi import FastAPI

from benchmarks.usual_stack import COMMIT_EVENTS, Events, Store, UsageEvent

LINGER_MS = 5  # gives a batch time to fill; without it the baseline is slower
SILENCE_MS = 10_000  # then nothing more comes


def application(bootstrap: str, topic: str) -> FastAPI:
    """The endpoint over one topic."""
    producers: list[AIOKafkaProducer] = []

    @asynccontextmanager
    async def connected(_: FastAPI) -> AsyncIterator[None]:
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", linger_ms=LINGER_MS)
        await producer.start()
        producers.append(producer)
        try:
            yield
        finally:
            await producer.stop()

    app = FastAPI(lifespan=connected)

    @app.post("/v1/events/ingest")
    async def ingest(body: Events) -> dict[str, int]:
        (producer,) = producers
        acknowledgments = [
            await producer.send(topic, sent.model_dump_json().encode(), key=sent.external_customer_id.encode())
            for sent in body.events
        ]
        await asyncio.gather(*acknowledgments)
        return {"inserted": len(body.events), "duplicates": 0}

    return app


async def consume(bootstrap: str, topic: str, store: Store, events: int) -> None:
    """Count the topic from its beginning until so many events are stored, or none come; a commit for each batch."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        while events > 0:
            found = await consumer.getmany(timeout_ms=SILENCE_MS, max_records=COMMIT_EVENTS)
            records = [record for records in found.values() for record in records]
            if not records:
                return
            events -= store.add(UsageEvent.model_validate_json(record.value) for record in records)
    finally:
        await consumer.stop()


if __name__ == "__main__":
    app = application(sys.argv[1], sys.argv[2])
    uvicorn.run(app, port=int(sys.argv[3]), log_level="warning", access_log=False)
