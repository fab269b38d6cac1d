"""The real google-genai package: every request to a model is an event, also those that a call makes by itself."""

import asyncio
from typing import Any

import pytest
from google import genai
from google.genai import types

from ingest.client.prices import list_price
from ingest.client.strategies.google_genai import GoogleGenAIStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Replay, refusal, stream, whole

BASE = "/v1/models/gemini-2.5-flash:"
GENERATE, STREAM, EMBED = BASE + "generateContent", BASE + "streamGenerateContent", BASE + "batchEmbedContents"
MODEL = "gemini-2.5-flash"
USAGE = {
    "promptTokenCount": 900, "cachedContentTokenCount": 512, "candidatesTokenCount": 80, "thoughtsTokenCount": 120,
    "toolUsePromptTokenCount": 30, "totalTokenCount": 1130,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 850}, {"modality": "AUDIO", "tokenCount": 50}],
    "cacheTokensDetails": [{"modality": "TEXT", "tokenCount": 512}],
}  # fmt: skip
EXACT = {
    "vendor": "google", "model": MODEL, "inputTokens": 930, "cachedInputTokens": 512, "outputTokens": 200,
    "totalTokens": 1130, "reasoningTokens": 120, "strategy": "LLM",
    "_llm": {"vendor": "google", "model": MODEL, "input_tokens": 930, "cached_input_tokens": 512,
             "output_tokens": 200, "total_tokens": 1130},
}  # fmt: skip


def answer(*parts: dict[str, Any], usage: dict[str, Any] | None = USAGE, finish: str | None = "STOP") -> dict[str, Any]:
    """A response, or a chunk of one."""
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": list(parts)}}
    return {"candidates": [candidate | ({"finishReason": finish} if finish else {})], "modelVersion": MODEL,
            "responseId": "r-1"} | ({"usageMetadata": usage} if usage else {})  # fmt: skip


PARTIAL = {"promptTokenCount": 900, "candidatesTokenCount": 3, "totalTokenCount": 903}
CHUNKS = [
    answer({"text": "I am fine, "}, usage=PARTIAL, finish=None),
    answer({"text": "thanks."}, usage=PARTIAL | {"candidatesTokenCount": 4}, finish=None),
    answer({"text": ""}),
]


@pytest.fixture
def plain(vendor: Replay) -> genai.Client:
    """A client as the library makes it."""
    retries = types.HttpRetryOptions(attempts=3, initial_delay=0.01, jitter=0)
    options = types.HttpOptions(base_url=vendor.url, api_version="v1", retry_options=retries)
    return genai.Client(api_key="key", http_options=options)


@pytest.fixture
def client(plain: genai.Client, ingestion: RecordingIngestion) -> genai.Client:
    """A metered client."""
    return ingestion.strategy(GoogleGenAIStrategy, "llm").client(plain, "ada")


def test_an_answer_is_one_event(
    client: genai.Client, plain: genai.Client, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """After a refusal; thoughts are output; the client it was made from is not metered."""
    vendor.will(GENERATE, refusal(503), whole(answer({"text": "Fine."})), whole(answer({"text": "Fine."})))
    assert isinstance(client, genai.Client)
    assert client.models.generate_content(model=MODEL, contents="How are you today?").text == "Fine."
    plain.models.generate_content(model=MODEL, contents="How are you today?")
    assert ingestion.one()["metadata"] == EXACT


def test_vertex_and_text_on_request(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The same service at another address; prompt and response go along when asked for."""
    vendor.will("/v1beta1/publishers/google/models/gemini-2.5-flash:generateContent", whole(answer({"text": "Fine."})))
    plain = genai.Client(vertexai=True, api_key="key", http_options=types.HttpOptions(base_url=vendor.url))
    client = ingestion.strategy(GoogleGenAIStrategy, "llm").client(plain, "ada", keep_text=True)
    assert client.models.generate_content(model=MODEL, contents="How are you?").text == "Fine."
    llm = ingestion.one()["metadata"]["_llm"]
    assert (llm["prompt"], llm["response"], llm["total_tokens"]) == ("How are you?", "Fine.", 1130)


def test_a_streams_last_chunk_has_the_totals(
    client: genai.Client, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """Whole, and as a chat."""
    vendor.will(STREAM, stream(CHUNKS), stream(CHUNKS))
    assert len(list(client.models.generate_content_stream(model=MODEL, contents="How are you today?"))) == 3
    for _ in client.chats.create(model=MODEL).send_message_stream("How are you today?"):
        pass
    assert [event["metadata"] for event in ingestion.events] == [EXACT] * 2


@pytest.mark.parametrize("end", ["hold", "cut"])
def test_an_abandoned_stream_is_estimated(
    client: genai.Client, vendor: Replay, ingestion: RecordingIngestion, end: str
) -> None:
    """Left or cut off: the last counts there were, or the words if they are more."""
    vendor.will(STREAM, stream(CHUNKS[:2], end=end))
    chunks = client.models.generate_content_stream(model=MODEL, contents="How are you today?")
    if end == "hold":
        next(chunks), next(chunks)
        chunks.close()
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 (the transport's, of several kinds)
            list(chunks)
    metadata = ingestion.one()["metadata"]
    assert (metadata["estimated"], metadata["inputTokens"], metadata["outputTokens"]) == (True, 900, 5)


def test_every_request_of_automatic_function_calling_counts(
    client: genai.Client, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """The call gives the last answer back; the model was asked twice."""

    def weather(city: str) -> str:
        """The weather in a city."""
        return "sunny"

    call = {"functionCall": {"name": "weather", "args": {"city": "Berlin"}}}
    vendor.will(GENERATE, whole(answer(call)), whole(answer({"text": "Sunny."})))
    config = types.GenerateContentConfig(tools=[weather])
    assert client.models.generate_content(model=MODEL, contents="Weather?", config=config).text == "Sunny."
    assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1130, 1130]


def test_embeddings(client: genai.Client, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Told where the service tells, estimated where it does not."""
    vectors = {"embeddings": [{"values": [0.1, 0.2]}]}
    vendor.will(EMBED, whole(vectors | {"usageMetadata": {"promptTokenCount": 7}}), whole(vectors))
    for _ in range(2):
        client.models.embed_content(model=MODEL, contents="How are you today?")
    told, guessed = [event["metadata"] for event in ingestion.events]
    does_tell = "usage_metadata" in types.EmbedContentResponse.model_fields  # older libraries drop it
    assert (told["inputTokens"], told.get("estimated")) == ((7, None) if does_tell else (5, True))
    assert told["outputTokens"] == 0
    assert (guessed["inputTokens"], guessed["outputTokens"], guessed["estimated"]) == (5, 0, True)


def test_the_asynchronous_side(client: genai.Client, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Whole, streamed, and left early."""
    vendor.will(GENERATE, whole(answer({"text": "Fine."})))
    vendor.will(STREAM, stream(CHUNKS), stream(CHUNKS[:2], end="hold"))

    async def story() -> None:
        asked: dict[str, Any] = {"model": MODEL, "contents": "How are you today?"}
        await client.aio.models.generate_content(**asked)
        async for _ in await client.aio.models.generate_content_stream(**asked):
            pass
        left = await client.aio.models.generate_content_stream(**asked)
        await anext(left), await anext(left)
        await left.aclose()

    asyncio.run(story())
    *exact, left = [event["metadata"] for event in ingestion.events]
    assert exact == [EXACT] * 2
    assert (left["estimated"], left["outputTokens"]) == (True, 5)


def test_the_client_outlives_its_copies(plain: genai.Client, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """A metered copy for each request: forgetting one does not close the connections of the others."""
    vendor.will(GENERATE, *[whole(answer({"text": "Fine."}))] * 3)
    llm = ingestion.strategy(GoogleGenAIStrategy, "llm").cost(list_price)
    for name in ("ada", "bob", "eve"):
        llm.client(plain, name, vendor="google").models.generate_content(model=MODEL, contents="hi")
    assert [event["external_customer_id"] for event in ingestion.events] == ["ada", "bob", "eve"]
    assert all(event["metadata"]["_cost"]["amount"] > 0 for event in ingestion.events)
