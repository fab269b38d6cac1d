"""The real openai package: what it is told by its endpoint, and what the event says of it."""

import asyncio
from decimal import Decimal
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, AzureOpenAI, OpenAI
from pydantic import BaseModel

from ingest.client.prices import list_price
from ingest.client.strategies.openai import OpenAIStrategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.vendor_endpoint import Answer, Replay, refusal, stream, whole

CHAT, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/embeddings"
MODEL = "gpt-5-mini-2025-08-07"
QUESTION: dict[str, Any] = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": "How are you today?"}]}

USAGE = {
    "prompt_tokens": 1250, "completion_tokens": 340, "total_tokens": 1590,
    "prompt_tokens_details": {"cached_tokens": 1024, "audio_tokens": 0, "cache_write_tokens": 128},
    "completion_tokens_details": {"reasoning_tokens": 256, "audio_tokens": 0, "accepted_prediction_tokens": 0,
                                  "rejected_prediction_tokens": 0},
}  # fmt: skip
COMPLETION = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1767000000, "model": MODEL, "service_tier": "default",
    "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                 "message": {"role": "assistant", "content": "Fine.", "refusal": None}}],
    "usage": USAGE,
}  # fmt: skip
EXACT = {
    "vendor": "openai", "model": MODEL, "inputTokens": 1250, "cachedInputTokens": 1024, "outputTokens": 340,
    "totalTokens": 1590, "cacheWriteTokens": 128, "reasoningTokens": 256, "strategy": "LLM",
    "_llm": {"vendor": "openai", "model": MODEL, "input_tokens": 1250, "cached_input_tokens": 1024,
             "output_tokens": 340, "total_tokens": 1590},
}  # fmt: skip


def chunk(delta: dict[str, Any] | None, finish: str | None = None, usage: Any = None) -> dict[str, Any]:
    """A chunk of a streamed chat; the last one has no choices."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1767000000, "model": MODEL,
            "service_tier": "default", "choices": choices, "usage": usage}  # fmt: skip


WORDS = [chunk({"role": "assistant", "content": ""}), chunk({"content": "I am fine, "}), chunk({"content": "thanks."})]
CHUNKS = [*WORDS, chunk({}, "stop"), chunk(None, usage=USAGE)]


def chat_stream(chunks: list[dict[str, Any]] = CHUNKS, end: str = "done") -> Answer:
    """A streamed chat."""
    return stream(chunks, last="[DONE]" if end == "done" else "", end=end)


@pytest.fixture
def client(vendor: Replay, ingestion: RecordingIngestion) -> OpenAI:
    """A metered client."""
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1", max_retries=2)
    return ingestion.strategy(OpenAIStrategy, "llm", plan="pro").client(plain, "ada", feature="search")


def metered_async(vendor: Replay, ingestion: RecordingIngestion) -> AsyncOpenAI:
    """A metered asynchronous client."""
    plain = AsyncOpenAI(api_key="key", base_url=vendor.url + "/v1")
    return ingestion.strategy(OpenAIStrategy, "llm").client(plain, "ada")


def test_a_chat_is_one_event_as_polar_sends_it(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The caller gets the answer; the event has Polar's fields, the static metadata and the customer, and no text."""
    vendor.will(CHAT, whole(COMPLETION))
    assert client.chat.completions.create(**QUESTION).choices[0].message.content == "Fine."
    event = ingestion.one("llm")
    assert event["external_customer_id"] == "ada"
    assert event["metadata"] == EXACT | {"plan": "pro", "feature": "search"}


def test_retries_are_one_event(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Refused twice and answered then is one call."""
    vendor.will(CHAT, refusal(503), refusal(429), whole(COMPLETION))
    client.chat.completions.create(**QUESTION)
    assert len(vendor.requests) == 3
    assert ingestion.one()["metadata"]["totalTokens"] == 1590


def test_a_failed_call_is_no_event(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The caller gets the library's own error."""
    vendor.will(CHAT, whole({"error": {"message": "no such model"}}, 404))
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**QUESTION)
    assert ingestion.events == []


def test_a_stream_is_exact_and_looks_as_if_nobody_asked(
    client: OpenAI, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """The usage is asked for; the chunk without choices is kept from a caller who did not ask."""
    vendor.will(CHAT, chat_stream())
    opened = client.chat.completions.create(**QUESTION, stream=True)
    assert isinstance(opened, openai.Stream)
    seen = list(opened)
    assert vendor.requests[0][1]["stream_options"] == {"include_usage": True}
    assert [item.choices[0].delta.content for item in seen] == ["", "I am fine, ", "thanks.", None]
    assert ingestion.one()["metadata"] == EXACT | {"plan": "pro", "feature": "search"}


def test_who_leaves_at_the_finish_is_metered_exactly(
    client: OpenAI, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """Most callers stop where the answer does; the usage, which follows, was fetched by then."""
    vendor.will(CHAT, chat_stream(), chat_stream(CHUNKS[:-1]), chat_stream(CHUNKS[:-1], "cut"))
    for item in (opened := client.chat.completions.create(**QUESTION, stream=True)):
        if item.choices[0].finish_reason:
            break
    opened.close()
    assert len(list(client.chat.completions.create(**QUESTION, stream=True))) == 4
    cut = client.chat.completions.create(**QUESTION, stream=True)
    assert [next(cut).choices[0].finish_reason for _ in range(4)] == [None, None, None, "stop"]
    with pytest.raises(Exception):  # noqa: B017, PT011 (the library's, of several kinds)
        next(cut)
    assert ["estimated" in event["metadata"] for event in ingestion.events] == [False, True, True]


def test_who_asks_for_usage_gets_it(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """The caller's own options stay as they are."""
    vendor.will(CHAT, chat_stream(), chat_stream())
    asked = {"stream_options": {"include_usage": True}}
    for option in (asked, {"extra_body": asked}):
        seen = list(client.chat.completions.create(**QUESTION, stream=True, **option))
        assert seen[-1].usage is not None
    assert ingestion.total("totalTokens") == 2 * 1590


@pytest.mark.parametrize("way", ["close", "with", "forget", "error"])
def test_an_abandoned_stream_is_estimated(
    client: OpenAI, vendor: Replay, ingestion: RecordingIngestion, way: str
) -> None:
    """Closed, left, dropped or cut off: one event with what is known, marked as estimated."""
    vendor.will(CHAT, chat_stream(WORDS, "cut" if way == "error" else "hold"))
    opened = client.chat.completions.create(**QUESTION, stream=True)
    if way == "error":
        with pytest.raises(Exception):  # noqa: B017, PT011 (the library's, of several kinds)
            list(opened)
    elif way == "with":
        with opened as left:
            for _ in zip(range(3), left, strict=False):
                pass
    else:
        for _ in range(3):
            next(opened)
        opened.close() if way == "close" else None
    del opened
    metadata = ingestion.one()["metadata"]
    assert metadata["estimated"] is True
    assert (metadata["inputTokens"], metadata["outputTokens"]) == (5, 5)  # 18 characters, 18 characters


def test_the_streaming_helper_is_metered(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """``chat.completions.stream``, to its end and left early."""
    vendor.will(CHAT, chat_stream(), chat_stream(WORDS, "hold"))
    with client.chat.completions.stream(**QUESTION) as helper:
        assert helper.get_final_completion().choices[0].message.content == "I am fine, thanks."
    assert ingestion.one()["metadata"]["totalTokens"] == 1590
    with client.chat.completions.stream(**QUESTION) as helper:
        for _ in zip(range(3), helper, strict=False):
            pass
    del helper
    assert ingestion.events[1]["metadata"]["estimated"] is True


def test_parsing_and_raw_responses_are_metered(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """However the answer is taken: parsed, raw, raw and streamed, streamed and parsed."""

    class Mood(BaseModel):
        mood: str

    message = {"role": "assistant", "content": '{"mood":"fine"}', "refusal": None}
    told = COMPLETION | {"choices": [COMPLETION["choices"][0] | {"message": message}]}  # type: ignore[index]
    vendor.will(CHAT, whole(told), whole(COMPLETION), chat_stream(), whole(COMPLETION))
    parsed = client.chat.completions.parse(**QUESTION, response_format=Mood)
    assert parsed.choices[0].message.parsed == Mood(mood="fine")
    raw = client.chat.completions.with_raw_response.create(**QUESTION)
    assert raw.parse().choices[0].message.content == "Fine."
    raw_stream = client.chat.completions.with_raw_response.create(**QUESTION, stream=True)
    assert len(list(raw_stream.parse())) == 4
    with client.chat.completions.with_streaming_response.create(**QUESTION) as response:
        assert response.parse().choices[0].message.content == "Fine."
    assert [event["metadata"]["totalTokens"] for event in ingestion.events] == [1590] * 4
    assert not any("estimated" in event["metadata"] for event in ingestion.events)


def test_azures_client(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """It asks at other addresses, below the meter."""
    vendor.will("/openai/deployments/gpt-5-mini/chat/completions", whole(COMPLETION), chat_stream())
    plain = AzureOpenAI(api_key="key", api_version="2025-04-01-preview", azure_endpoint=vendor.url)
    client = ingestion.strategy(OpenAIStrategy, "llm").client(plain, "ada", vendor="azure")
    client.chat.completions.create(**QUESTION)
    assert len(list(client.with_options(timeout=5).chat.completions.create(**QUESTION, stream=True))) == 4
    assert [event["metadata"]["vendor"] for event in ingestion.events] == ["azure"] * 2
    assert ingestion.total("totalTokens") == 2 * 1590


def test_copies_of_a_metered_client_are_metered(
    client: OpenAI, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """``with_options`` keeps the meter, ``isinstance`` holds, and the client it came from is as it was."""
    vendor.will(CHAT, whole(COMPLETION), whole(COMPLETION))
    assert isinstance(client, OpenAI)
    client.with_options(timeout=5).chat.completions.create(**QUESTION)
    assert ingestion.total("totalTokens") == 1590
    OpenAI(api_key="key", base_url=vendor.url + "/v1").chat.completions.create(**QUESTION)
    assert len(ingestion.events) == 1


def test_responses_whole_and_streamed(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Other names, the same numbers; a stream's last event has them."""
    usage = {
        "input_tokens": 1250, "input_tokens_details": {"cached_tokens": 1024, "cache_write_tokens": 128},
        "output_tokens": 340, "output_tokens_details": {"reasoning_tokens": 256}, "total_tokens": 1590,
    }  # fmt: skip
    text = {"type": "output_text", "text": "Fine.", "annotations": []}
    response = {
        "id": "resp_1", "object": "response", "created_at": 1767000000, "status": "completed", "model": MODEL,
        "service_tier": "default", "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage,
        "output": [{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [text]}],
    }  # fmt: skip
    begun = {"type": "response.created", "sequence_number": 0,
             "response": response | {"status": "in_progress", "usage": None, "output": []}}  # fmt: skip
    delta = {"type": "response.output_text.delta", "sequence_number": 1, "item_id": "msg_1", "output_index": 0,
             "content_index": 0, "delta": "Fine.", "logprobs": []}  # fmt: skip
    done = {"type": "response.completed", "sequence_number": 2, "response": response}
    cut = {"type": "response.incomplete", "sequence_number": 2, "response": response | {"status": "incomplete"}}
    vendor.will(RESPONSES, whole(response), stream([begun, delta, done], is_named=True),
                stream([begun, delta, cut], is_named=True), stream([begun, delta], is_named=True, end="hold"),
                whole(response | {"status": "queued", "usage": None}))  # fmt: skip
    asked: dict[str, Any] = {"model": "gpt-5-mini", "input": "How are you today?"}
    assert client.responses.create(**asked).output_text == "Fine."
    for _ in range(2):
        assert len(list(client.responses.create(**asked, stream=True))) == 3
    with client.responses.create(**asked, stream=True) as left:
        next(left), next(left)
    client.responses.create(**asked, background=True)
    *exact, estimated = [event["metadata"] for event in ingestion.events]
    assert exact == [EXACT | {"plan": "pro", "feature": "search"}] * 3
    assert (estimated["estimated"], estimated["inputTokens"], estimated["outputTokens"]) == (True, 5, 2)


def test_a_stream_that_fails_is_no_event(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Said by the stream or by its first word; not if it tells what was used, and not if the caller leaves."""
    response = {"id": "resp_1", "object": "response", "created_at": 1767000000, "model": MODEL, "output": []}
    problem = {"code": "server_error", "message": "sorry"}
    begun = {"type": "response.created", "sequence_number": 0, "response": response | {"status": "in_progress"}}
    failed = {"type": "response.failed", "sequence_number": 1, "response": response | {"status": "failed"}}
    error = {"type": "error", "sequence_number": 1, "param": None, **problem}
    used = failed | {"response": response | {"usage": {"input_tokens": 1250, "output_tokens": 340}}}
    asked: dict[str, Any] = {"model": "gpt-5-mini", "input": "How are you today?", "stream": True}
    vendor.will(RESPONSES, *(stream(events, is_named=True) for events in ([begun, failed], [begun, error], [error])))
    assert [len(list(client.responses.create(**asked))) for _ in range(3)] == [2, 2, 1]
    vendor.will(CHAT, stream([{"error": problem}]), stream([], end="hold"))
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**QUESTION, stream=True))
    assert ingestion.events == []
    client.chat.completions.create(**QUESTION, stream=True).close()
    vendor.will(RESPONSES, stream([begun, used], is_named=True))
    assert len(list(client.responses.create(**asked))) == 2
    told = [event["metadata"] for event in ingestion.events]
    assert [(metadata["totalTokens"], metadata.get("estimated")) for metadata in told] == [(5, True), (1590, None)]


def test_responses_in_the_background_count_once_when_they_are_fetched(
    client: OpenAI, vendor: Replay, ingestion: RecordingIngestion
) -> None:
    """Fetched before it is done, when it is, and again: one event; what did not run there was counted when it was."""
    usage = {"input_tokens": 1250, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 340,
             "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 1590}  # fmt: skip
    done = {"id": "resp_1", "object": "response", "created_at": 1767000000, "status": "completed", "model": MODEL,
            "background": True, "output": [], "usage": usage}  # fmt: skip
    queued = done | {"status": "queued", "usage": None}
    begun = {"type": "response.created", "sequence_number": 0, "response": queued}
    ended = {"type": "response.completed", "sequence_number": 1, "response": done}
    vendor.will(RESPONSES, whole(queued), stream([begun], is_named=True))
    vendor.will(f"{RESPONSES}/resp_1", whole(queued), whole(done), whole(done), stream([begun, ended], is_named=True),
                whole(done | {"background": False}))  # fmt: skip
    asked: dict[str, Any] = {"model": "gpt-5-mini", "input": "How are you today?", "background": True}
    client.responses.create(**asked)
    assert len(list(client.responses.create(**asked, stream=True))) == 1
    for _ in range(3):
        client.responses.retrieve("resp_1")
    assert len(list(client.responses.retrieve("resp_1", stream=True))) == 2
    client.responses.retrieve("resp_1")
    assert [event["external_id"] for event in ingestion.events] == ["llm:resp_1"] * 3
    assert ingestion.events[0] == ingestion.events[1] == ingestion.events[2]
    assert ingestion.events[0]["metadata"]["totalTokens"] == 1590


def test_embeddings_have_no_output(client: OpenAI, vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Input is all there is."""
    vendor.will(EMBEDDINGS, whole({
        "object": "list", "model": "text-embedding-3-small", "usage": {"prompt_tokens": 8, "total_tokens": 8},
        "data": [{"object": "embedding", "index": 0, "embedding": [0.1, -0.2]}],
    }))  # fmt: skip
    client.embeddings.create(model="text-embedding-3-small", input="The food was delicious", encoding_format="float")
    metadata = ingestion.one()["metadata"]
    assert (metadata["inputTokens"], metadata["outputTokens"], metadata["totalTokens"]) == (8, 0, 8)


def test_the_asynchronous_client(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """Whole, streamed, raw, with the helper, and abandoned in the three ways there are."""
    vendor.will(CHAT, whole(COMPLETION), chat_stream(), chat_stream(), chat_stream(),
                *(chat_stream(WORDS, "hold") for _ in range(3)))  # fmt: skip

    async def story() -> None:
        client = metered_async(vendor, ingestion)
        await client.chat.completions.create(**QUESTION)
        assert len([item async for item in await client.chat.completions.create(**QUESTION, stream=True)]) == 4
        raw = await client.chat.completions.with_raw_response.create(**QUESTION, stream=True)
        assert len([item async for item in raw.parse()]) == 4
        async with client.chat.completions.stream(**QUESTION) as helper:
            await helper.get_final_completion()
        for way in ("close", "with", "cancel"):
            opened = await client.chat.completions.create(**QUESTION, stream=True)
            await anext(opened), await anext(opened), await anext(opened)
            if way == "close":
                await opened.close()
            elif way == "with":
                async with opened:
                    pass
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(opened), 0.05)
        await client.close()

    asyncio.run(story())
    told = [event["metadata"] for event in ingestion.events]
    assert [metadata["totalTokens"] for metadata in told] == [1590] * 4 + [10] * 3
    assert [metadata.get("estimated", False) for metadata in told] == [False] * 4 + [True] * 3


def test_text_goes_along_on_request_only(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """``keep_text`` puts prompt and response beside the counts."""
    vendor.will(CHAT, whole(COMPLETION))
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1")
    ingestion.strategy(OpenAIStrategy, "llm").client(plain, "ada", keep_text=True).chat.completions.create(**QUESTION)
    llm = ingestion.one()["metadata"]["_llm"]
    assert llm["prompt"] == '[{"role": "user", "content": "How are you today?"}]'
    assert llm["response"] == "Fine."


def test_costs_are_exact_and_only_where_the_price_is_known(vendor: Replay, ingestion: RecordingIngestion) -> None:
    """A function's decimals arrive as they are; the list prices whom it knows, and nobody at an unknown address."""
    vendor.will(CHAT, *[whole(COMPLETION)] * 4)
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1")
    llm = ingestion.strategy(OpenAIStrategy, "llm")
    for client in (
        llm.cost(lambda call: Decimal("0.01") * call.tokens.total / 7).client(plain, "ada"),
        llm.cost(list_price).client(plain, "ada", vendor="openai"),
        llm.cost(list_price).client(plain, "ada"),
        llm.cost(lambda call: 1 / 0).client(plain, "ada"),
    ):
        client.chat.completions.create(**QUESTION)
    costs = [event["metadata"].get("_cost") for event in ingestion.events]
    assert [cost and Decimal(str(cost["amount"])) for cost in costs] == [
        Decimal("2.271428571429"),
        Decimal("0.0762100"),  # (1250-1024) x $0.25 + 1024 x $0.025 + 340 x $2, a million
        None,
        None,
    ]


def test_metering_is_not_why_a_call_may_fail(vendor: Replay, caplog: pytest.LogCaptureFixture) -> None:
    """An ingestion that raises, a customer nobody knows, an answer of a strange shape: the caller notices nothing."""

    class Broken(RecordingIngestion):
        def capture(self, event: Any) -> str | None:
            raise OSError("the disk is full")

    vendor.will(CHAT, whole(COMPLETION), chat_stream(), whole(COMPLETION), whole({"choices": 3, "usage": "much"}))
    plain = OpenAI(api_key="key", base_url=vendor.url + "/v1")
    broken = Broken().strategy(OpenAIStrategy, "llm")
    client = broken.client(plain, "ada")
    assert client.chat.completions.create(**QUESTION).usage is not None
    assert len(list(client.chat.completions.create(**QUESTION, stream=True))) == 4
    recording = RecordingIngestion()
    anonymous = recording.strategy(OpenAIStrategy, "llm").client(plain, lambda: None)
    assert anonymous.chat.completions.create(**QUESTION).usage is not None
    assert client.chat.completions.create(**QUESTION) is not None
    assert recording.events == []
    assert "nobody says whose it is" in caplog.text
