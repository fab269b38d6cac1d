"""The examples with FastAPI and OpenAI, and with S3: started as a person would, and the meters read what was used."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.environments import environment
from tests.support.ports import take_port
from tests.support.servers.installation import Installation, started
from tests.support.servers.small_s3 import SmallS3
from tests.support.servers.vendor_endpoint import Replay, stream, whole
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).parent.parent.parent
TIME_LIMIT = pytest.mark.timeout(1200)  # the first test may have to install everything
MEGABYTE = 1 << 20

USAGE = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
WORDS = ("I am fine, ", "thanks.")


def chunk(words: str | None, usage: Any = None) -> dict[str, Any]:
    """A chunk of an answer of OpenAI's."""
    choices = [] if words is None else [{"index": 0, "delta": {"content": words}, "finish_reason": None}]
    return {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "gpt-5-mini", "choices": choices,
            "usage": usage}  # fmt: skip


COMPLETION = {"id": "c", "object": "chat.completion", "created": 0, "model": "gpt-5-mini", "usage": USAGE, "choices": [
    {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Fine."}}]}  # fmt: skip


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A server."""
    with started(tmp_path_factory.mktemp("examples")) as place:
        yield place


def python() -> Path:
    """An interpreter with the vendors' libraries."""
    return environment("strategies-newest", REPOSITORY / "tests" / "vendors" / "requirements.txt")


def events(installation: Installation, name: str, expected: int) -> list[dict[str, Any]]:
    """The metadata of the events of a name, oldest first, once so many are there."""

    def found() -> list[dict[str, Any]]:
        answer = installation.get("/v1/events/", name=name, limit="100", sorting="timestamp")
        items = answer.json()["items"] if answer.status_code == 200 else []
        return [item["metadata"] for item in items] if len(items) >= expected else []

    arrived: list[dict[str, Any]] = eventually(found)
    assert len(arrived) == expected
    return arrived


@TIME_LIMIT
def test_a_chat_application_meters_its_customers(installation: Installation, tmp_path: Path) -> None:
    """A whole answer, a streamed one, and one whose reader leaves: each is an event, with its cost."""
    port = take_port()
    with Replay() as openai:
        openai.will("/v1/chat/completions", whole(COMPLETION),
                    stream([*map(chunk, WORDS), chunk(None, USAGE)], last="[DONE]"),
                    stream(map(chunk, WORDS), end="hold"))  # fmt: skip
        surroundings = {
            **os.environ, "PYTHONPATH": str(REPOSITORY), "OPENAI_API_KEY": "key", "OPENAI_BASE_URL": openai.url + "/v1",
            "CHAT_URL": installation.url, "CHAT_TOKEN": installation.token, "CHAT_SPOOL": str(tmp_path / "spool"),
        }  # fmt: skip
        command = [python(), "-m", "uvicorn", "tests.examples.chat_app:app", "--port", str(port)]
        log = (tmp_path / "app.log").open("wb")
        application = subprocess.Popen(command, env=surroundings, cwd=tmp_path, stdout=log, stderr=log)
        try:
            eventually(lambda: application.poll() is not None or listens(port))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"customer": "ada"}, timeout=30) as browser:
                question = {"question": "How are you today?"}
                assert browser.post("/chat", params=question).json() == {"answer": "Fine."}
                assert browser.post("/chat/stream", params=question).text == "".join(WORDS)
                with browser.stream("POST", "/chat/stream", params=question) as left:
                    assert next(left.iter_text()) == WORDS[0]
            told = events(installation, "chat", 3)
            application.send_signal(signal.SIGINT)
            assert application.wait(30) == 0
        finally:
            application.kill()
            application.wait()
            log.close()
    assert [metadata["totalTokens"] for metadata in told[:2]] == [1100, 1100]
    assert (told[2]["estimated"], told[2]["inputTokens"]) == (True, 5)
    assert {metadata["service"] for metadata in told} == {"support"}
    assert Decimal(told[0]["_cost"]["amount"]) == Decimal("0.045")  # 1,000 x $0.25 + 100 x $2, a million, in cents


def listens(port: int) -> bool:
    """Whether somebody answers there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@TIME_LIMIT
def test_uploads_are_metered_by_their_bytes(installation: Installation, tmp_path: Path) -> None:
    """A small file at once, a large one in parts, a refusal in between: the bytes of the files, once."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "large").write_bytes(b"x" * (9 * MEGABYTE))
    (folder / "small").write_bytes(b"x" * 1000)
    with SmallS3() as service:
        service.refusals = [503]
        surroundings = {
            **os.environ, "PYTHONPATH": str(REPOSITORY), "UPLOAD_URL": installation.url, "UPLOAD_S3": service.url,
            "UPLOAD_TOKEN": installation.token, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s",
            "AWS_DEFAULT_REGION": "eu-central-1",
        }  # fmt: skip
        command = [python(), "-m", "tests.examples.uploads", folder, "files", "ada"]
        subprocess.run(command, env=surroundings, cwd=tmp_path, check=True, timeout=60)
        assert len(service.objects["/files/large"][0]) == 9 * MEGABYTE
    told = events(installation, "storage", 3)
    assert sum(metadata["bytes"] for metadata in told) == 9 * MEGABYTE + 1000
    assert sorted(metadata["operation"] for metadata in told) == ["PutObject", "UploadPart", "UploadPart"]
