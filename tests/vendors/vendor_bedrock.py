"""The real boto3 and Bedrock's Converse: whole, streamed, left, refused."""

import asyncio
import json
import struct
import zlib
from typing import Any
from urllib.parse import quote

import boto3
import pytest
from aiobotocore.session import get_session
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError

from ingest.client.prices import list_price
from ingest.client.strategies.bedrock import BedrockStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Answer, Replay, whole
from tests.vendors.truths import check

ACCESS: dict[str, Any] = {"aws_access_key_id": "a", "aws_secret_access_key": "s", "region_name": "eu-central-1"}
CONFIG = Config(retries={"total_max_attempts": 3, "mode": "standard"})
NOVA, SONNET = "amazon.nova-pro-v1:0", "anthropic.claude-sonnet-4-5-20250929-v1:0"
QUESTION: dict[str, Any] = {"modelId": NOVA, "messages": [
    {"role": "user", "content": [{"text": "How are you today?"}]}]}  # fmt: skip
USAGE = {"inputTokens": 1000, "outputTokens": 500, "totalTokens": 1500}
CACHED = {"inputTokens": 21, "outputTokens": 393, "totalTokens": 2402, "cacheReadInputTokens": 1800,
          "cacheWriteInputTokens": 188}  # fmt: skip


def answer(usage: Any = USAGE, **more: Any) -> dict[str, Any]:
    """A whole answer."""
    message = {"role": "assistant", "content": [{"text": "Fine."}]}
    return {"output": {"message": message}, "stopReason": "end_turn", "usage": usage,
            "metrics": {"latencyMs": 10}} | more  # fmt: skip


def frame(kind: str, body: Any, message: str = "event") -> bytes:
    """A message of Amazon's event streams."""
    names = {f":{'exception' if message == 'exception' else 'event'}-type": kind,
             ":content-type": "application/json", ":message-type": message}  # fmt: skip
    heads = b"".join(
        struct.pack("!B", len(name)) + name.encode() + struct.pack("!BH", 7, len(value)) + value.encode()
        for name, value in names.items()
    )
    payload = json.dumps(body).encode()
    prelude = struct.pack("!II", len(heads) + len(payload) + 16, len(heads))
    whole = prelude + struct.pack("!I", zlib.crc32(prelude)) + heads + payload
    return whole + struct.pack("!I", zlib.crc32(whole))


def events(usage: Any = USAGE, **more: Any) -> list[bytes]:
    """The events of a stream."""
    return [
        frame("messageStart", {"role": "assistant"}),
        frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "I am fine, "}}),
        frame("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "thanks."}}),
        frame("contentBlockStop", {"contentBlockIndex": 0}),
        frame("messageStop", {"stopReason": "end_turn"}),
        frame("metadata", {"usage": usage, "metrics": {"latencyMs": 10}} | more),
    ]


def event_stream(chunks: list[bytes], end: str = "done") -> Answer:
    """A streamed answer."""
    return Answer(chunks, 200, {"Content-Type": "application/vnd.amazon.eventstream"}, end, True)


def path(model: str, operation: str = "converse") -> str:
    """Where a model is asked."""
    return f"/model/{quote(model, safe='')}/{operation}"


@pytest.fixture
def client(vendor: Replay, ingestion: RecordingIngestion) -> Any:
    """A metered client whose events have the list price."""
    plain = boto3.client("bedrock-runtime", endpoint_url=vendor.url, config=CONFIG, **ACCESS)
    return ingestion.strategy(BedrockStrategy, "llm").cost(list_price).client(plain, "ada", vendor="aws")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("model", "usage", "truth"), [(NOVA, USAGE, "bedrock-nova"), (SONNET, CACHED, "bedrock")])
def test_a_conversation(
    client: Any, vendor: Replay, ingestion: RecordingIngestion, model: str, usage: Any, truth: str, is_streamed: bool
) -> None:
    """After a refusal; the cache is beside the input."""
    refused = whole({"message": "slow down"}, 429, **{"x-amzn-ErrorType": "ThrottlingException"})
    if is_streamed:
        vendor.will(path(model, "converse-stream"), refused, event_stream(events(usage)))
        seen = list(client.converse_stream(**QUESTION | {"modelId": model})["stream"])
        assert len(seen) == 6
    else:
        vendor.will(path(model), refused, whole(answer(usage)))
        told = client.converse(**QUESTION | {"modelId": model})
        assert told["output"]["message"]["content"][0]["text"] == "Fine."
    check(truth, ingestion.events)
    assert ingestion.one()["external_customer_id"] == "ada"


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ({"serviceTier": {"type": "flex"}}, {}),
        ({"performanceConfig": {"latency": "optimized"}}, {}),
        ({}, {"guardrailConfig": {"guardrailIdentifier": "abcd", "guardrailVersion": "1"}}),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_has_no_listed_price_has_no_cost(
    client: Any, vendor: Replay, ingestion: RecordingIngestion, more: Any, asked: Any, is_streamed: bool
) -> None:
    """A service tier, a latency, a guardrail."""
    vendor.will(path(NOVA), whole(answer(**more)))
    vendor.will(path(NOVA, "converse-stream"), event_stream(events(**more)))
    if is_streamed:
        list(client.converse_stream(**QUESTION, **asked)["stream"])
    else:
        client.converse(**QUESTION, **asked)
    check("bedrock-flex", ingestion.events)


def test_who_leaves_at_the_end_of_the_message_is_metered_exactly(
    client: Any, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """The usage, which follows, was fetched by then."""
    vendor.will(path(NOVA, "converse-stream"), event_stream(events()))
    opened = client.converse_stream(**QUESTION)["stream"]
    for event in opened:
        if "messageStop" in event:
            break
    opened.close()
    check("bedrock-nova", ingestion.events)


@pytest.mark.parametrize("way", ["close", "forget", "error"])
def test_a_stream_that_is_left_is_estimated(
    client: Any, vendor: Replay, ingestion: RecordingIngestion, way: str
) -> None:
    """Closed, dropped or broken off."""
    broken = frame("modelStreamErrorException", {"message": "sorry"}, "exception")
    chunks = [*events()[:3], broken] if way == "error" else events()[:3]
    vendor.will(path(NOVA, "converse-stream"), event_stream(chunks, "done" if way == "error" else "hold"))
    opened = client.converse_stream(**QUESTION)["stream"]
    if way == "error":
        with pytest.raises(EventStreamError):
            list(opened)
    else:
        for _ in range(3):
            next(iter(opened))
        opened.close() if way == "close" else None
    del opened
    check("bedrock-left", ingestion.events)


def test_what_failed_is_no_event(client: Any, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """A call that was refused, and a stream that failed before it began."""
    refused = whole({"message": "no such model"}, 400, **{"x-amzn-ErrorType": "ValidationException"})
    broken = frame("throttlingException", {"message": "slow down"}, "exception")
    vendor.will(path(NOVA), refused)
    vendor.will(path(NOVA, "converse-stream"), event_stream([broken]))
    with pytest.raises(ClientError):
        client.converse(**QUESTION)
    opened = client.converse_stream(**QUESTION)["stream"]
    with pytest.raises(EventStreamError):
        list(opened)
    assert ingestion.events == []


def test_text_on_request_and_the_customer_of_the_moment(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """A function is asked at each call; nobody is no event; the model of an ARN is its last part."""
    current: list[str | None] = ["eve"]
    profile = "arn:aws:bedrock:eu-central-1:123456789012:inference-profile/eu.amazon.nova-pro-v1:0"
    plain = boto3.client("bedrock-runtime", endpoint_url=vendor.url, config=CONFIG, **ACCESS)
    llm = ingestion.strategy(BedrockStrategy, "llm")
    client: Any = llm.client(plain, lambda: current[0], keep_text=True)
    vendor.will(path(profile), whole(answer()), whole(answer()))
    client.converse(**QUESTION | {"modelId": profile})
    current[0] = None
    client.converse(**QUESTION | {"modelId": profile})
    event = ingestion.one()
    assert (event["external_customer_id"], event["metadata"]["model"]) == ("eve", "eu.amazon.nova-pro-v1:0")
    assert event["metadata"]["_llm"]["prompt"] == json.dumps(QUESTION["messages"])
    assert event["metadata"]["_llm"]["response"] == "Fine."


def test_a_client_of_aiobotocore_is_refused(ingestion: RecordingIngestion) -> None:
    """Its streams are other ones."""
    async def story() -> None:
        async with get_session().create_client("bedrock-runtime", **ACCESS) as client:
            with pytest.raises(TypeError, match="aiobotocore"):
                ingestion.strategy(BedrockStrategy, "llm").client(client, "ada")

    asyncio.run(story())
