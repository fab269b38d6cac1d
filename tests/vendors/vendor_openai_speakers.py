"""The real openai package and those who speak OpenAI's language, but not all of it."""

import asyncio
import itertools
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from ingest.client.strategies.openai import OpenAIStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Answer, Replay, whole
from tests.vendors.vendor_openai import CHAT, EMBEDDINGS, QUESTION, USAGE, WORDS, chat_stream, chunk

MISTRAL = {"object": "error", "message": {"detail": [
    {"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs not permitted"}]}}  # fmt: skip
DATABRICKS = {"error_code": "BAD_REQUEST", "message": 'Bad request: json: unknown field "stream_options"\n'}
TELLING = [*WORDS, chunk({}, "stop", USAGE)]
"""A stream that tells its usage unasked, in the chunk that ends the answer."""


def plain(vendor: Replay) -> OpenAI:
    """A client that is not metered."""
    return OpenAI(api_key="key", base_url=vendor.url + "/v1")


def asked(vendor: Replay) -> list[bool]:
    """Whether each request asked for the usage."""
    return ["stream_options" in body for _, body in vendor.requests]


@pytest.mark.parametrize("refused", [whole(MISTRAL, 422), whole(DATABRICKS, 400)])
def test_who_refuses_to_be_asked_is_called_again_and_not_asked_again(
    vendor: Replay, ingestion: RecordingIngestion, refused: Answer
) -> None:
    """The caller notices nothing; another model of the same client is asked; asynchronous clients do as well."""
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada")
    vendor.will(CHAT, refused, chat_stream(TELLING), chat_stream(TELLING), chat_stream())
    for _ in range(2):
        assert len(list(client.with_options(timeout=5).chat.completions.create(**QUESTION, stream=True))) == 4
    assert len(list(client.chat.completions.create(**QUESTION | {"model": "other"}, stream=True))) == 4
    assert asked(vendor) == [True, False, False, True]

    async def story() -> None:
        later = AsyncOpenAI(api_key="key", base_url=vendor.url + "/v1")
        client = ingestion.strategy(OpenAIStrategy, "llm").client(later, "ada")
        vendor.will(CHAT, refused, chat_stream(TELLING))
        assert len([item async for item in await client.chat.completions.create(**QUESTION, stream=True)]) == 4

    asyncio.run(story())
    assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1590] * 4
    assert not any("estimated" in event["metadata"] for event in ingestion.events)


def test_other_refusals_are_the_callers(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """What is refused for another reason, or for the caller's own question, is sent once."""
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada")
    own: dict[str, Any] = {"stream_options": {"include_usage": True}}
    vendor.will(CHAT, whole({"error": {"message": "no"}}, 400), whole(DATABRICKS, 400), whole(DATABRICKS, 400))
    for options in ({"stream": True}, {"stream": True} | own, own):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**QUESTION, **options)
    assert len(vendor.requests) == 3
    assert ingestion.events == []


def test_nobody_is_asked_where_that_is_switched_off(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """What is told is exact all the same; else it is estimated."""
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada", ask_usage=False)
    vendor.will(CHAT, chat_stream(TELLING), chat_stream([*WORDS, chunk({}, "stop")]))
    for _ in range(2):
        assert len(list(client.chat.completions.create(**QUESTION, stream=True))) == 4
    assert asked(vendor) == [False, False]
    assert [event["metadata"].get("estimated", False) for event in ingestion.events] == [False, True]


def test_who_leaves_when_all_of_several_answers_are_finished_is_metered_exactly(
    vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """The usage follows the last of them."""
    both = [chunk({"content": "Fine."}), chunk({}, "stop"), chunk({}, "stop"), chunk(None, usage=USAGE)]
    vendor.will(CHAT, chat_stream(both))
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada")
    opened = client.chat.completions.create(**QUESTION, n=2, stream=True)
    assert [next(opened).choices[0].finish_reason for _ in range(3)] == [None, "stop", "stop"]
    opened.close()
    metadata = ingestion.one()["metadata"]
    assert (metadata["totalTokens"], "estimated" in metadata) == (1590, False)


def test_embeddings_are_all_input(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Also where the total is all that is told."""
    entry = {"object": "embedding", "index": 0, "embedding": [0.1]}
    vendor.will(EMBEDDINGS, whole({"object": "list", "model": "v", "data": [entry], "usage": {"total_tokens": 17}}))
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada")
    client.embeddings.create(model="v", input="x", encoding_format="float")
    metadata = ingestion.one()["metadata"]
    assert (metadata["inputTokens"], metadata["outputTokens"]) == (17, 0)


@pytest.mark.parametrize(("chunks", "tokens"), [(3, (7, 5, True)), (4, (7, 2, False)), (9, (7, 2, False))])
def test_a_usage_that_is_told_with_every_chunk_is_exact_at_the_finish(
    vendor: Replay, ingestion: RecordingIngestion, chunks: int, tokens: tuple[int, int, bool]
) -> None:
    """Left before, what was told and what arrived are lower bounds."""
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain(vendor), "ada")
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    vendor.will(CHAT, chat_stream([{**each, "usage": usage} for each in TELLING]))
    with client.chat.completions.create(**QUESTION, stream=True) as opened:
        list(itertools.islice(opened, chunks))
    metadata = ingestion.one()["metadata"]
    assert (metadata["inputTokens"], metadata["outputTokens"], "estimated" in metadata) == tokens
