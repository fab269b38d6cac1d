"""The real google-genai package: tiers, pictures and searches, and what they cost."""

from typing import Any

import pytest
from google import genai
from google.genai import types

from ingest.client.prices import list_price
from ingest.client.strategies.google_genai import GoogleGenAIStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Answer, Replay, stream, whole
from tests.vendors.truths import check
from tests.vendors.vendor_google_genai import USAGE, answer

TTS, FLASH, IMAGE = "gemini-3.8-flash-tts", "gemini-2.5-flash", "gemini-2.5-flash-image"
SOUND = [{"modality": "AUDIO", "tokenCount": 1000}]
EVEN = {"promptTokenCount": 1000, "candidatesTokenCount": 1000, "totalTokenCount": 2000}


@pytest.fixture
def client(vendor: Replay, ingestion: RecordingIngestion) -> genai.Client:
    """A metered client whose events have the list price."""
    options = types.HttpOptions(base_url=vendor.url, api_version="v1")
    llm = ingestion.strategy(GoogleGenAIStrategy, "llm").cost(list_price)
    return llm.client(genai.Client(api_key="key", http_options=options), "ada", vendor="google")


def generate(
    client: genai.Client, vendor: Replay, model: str, usage: dict[str, Any], *, is_streamed: bool = False, **more: Any
) -> None:
    """Ask a model that reports this usage."""
    told = answer({"text": "Fine."}, usage=usage) | {"modelVersion": model}
    headers = more.pop("headers", {})
    made: Answer = stream([told]) if is_streamed else whole(told)
    made.headers |= headers
    vendor.will(f"/v1/models/{model}:{'streamGenerateContent' if is_streamed else 'generateContent'}", made)
    if is_streamed:
        list(client.models.generate_content_stream(model=model, contents="hi", **more))
    else:
        client.models.generate_content(model=model, contents="hi", **more)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_ordinary_answer(
    client: genai.Client, vendor: Replay, ingestion: RecordingIngestion, is_streamed: bool
) -> None:
    """Sound in the prompt has its own price, and what was read from the cache was all text."""
    generate(client, vendor, FLASH, USAGE, is_streamed=is_streamed)
    check("google-ordinary", ingestion.events)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("model", "truth"), [(IMAGE, "google-image"), (FLASH, "google-image-unlisted")])
def test_a_picture(
    client: genai.Client, vendor: Replay, ingestion: RecordingIngestion, model: str, truth: str, is_streamed: bool
) -> None:
    """Where the list prices pictures it is their price, and none where it does not."""
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 1290, "totalTokenCount": 1300,
             "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 1290}]}  # fmt: skip
    generate(client, vendor, model, usage, is_streamed=is_streamed)
    check(truth, ingestion.events)


@pytest.mark.parametrize(
    ("model", "traffic", "header", "truth"),
    [
        (TTS, "ON_DEMAND_FLEX", None, "google-flex"),
        (TTS, None, "FLEX", "google-flex"),
        (FLASH, "ON_DEMAND_FLEX", None, "google-flex-unlisted"),
        (FLASH, "ON_DEMAND_OFFPEAK", None, "google-flex-unlisted"),
        (FLASH, "PROVISIONED_THROUGHPUT", None, "google-provisioned"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_service_tiers(
    client: genai.Client,
    vendor: Replay,
    ingestion: RecordingIngestion,
    day: None,
    model: str,
    traffic: str | None,
    header: str | None,
    truth: str,
    is_streamed: bool,
) -> None:
    """Told by the type of traffic (Vertex) or by a header (Gemini API)."""
    usage = EVEN | ({"trafficType": traffic} if traffic else {})
    usage |= {"candidatesTokensDetails": SOUND} if model == TTS else {}
    headers = {"x-gemini-service-tier": header} if header else {}
    generate(client, vendor, model, usage, is_streamed=is_streamed, headers=headers)
    check(truth, ingestion.events)


def test_grounding_has_no_cost(client: genai.Client, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """It costs by an allowance of the account's."""
    told = answer({"text": "Fine."}, usage=EVEN)
    told["candidates"][0]["groundingMetadata"] = {"webSearchQueries": ["a"]}
    vendor.will(f"/v1/models/{FLASH}:generateContent", whole(told))
    client.models.generate_content(model=FLASH, contents="hi")
    check("google-grounding", ingestion.events)
