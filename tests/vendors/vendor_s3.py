"""The real boto3 and aiobotocore against a small S3: an event for each operation, with the bytes that moved."""

import asyncio
import gc
import inspect
import io
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import boto3
import pytest
from aiobotocore.session import get_session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import ClientError

from ingest.client.strategies.s3 import S3Strategy
from ingest.client.testing import RecordingIngestion
from tests.support.servers.small_s3 import SmallS3

ACCESS: dict[str, Any] = {"aws_access_key_id": "a", "aws_secret_access_key": "s", "region_name": "eu-central-1"}
CONFIG = Config(retries={"total_max_attempts": 3, "mode": "standard"}, s3={"addressing_style": "path"})
PDF = {"Bucket": "files", "Key": "a.pdf"}
MEGABYTE = 1 << 20


@pytest.fixture
def s3() -> Iterator[SmallS3]:
    """The service."""
    with SmallS3() as service:
        yield service


@pytest.fixture
def client(s3: SmallS3, ingestion: RecordingIngestion) -> Iterator[Any]:
    """A metered client."""
    plain = boto3.client("s3", endpoint_url=s3.url, config=CONFIG, **ACCESS)
    yield ingestion.strategy(S3Strategy, "storage", plan="pro").client(plain, "ada")
    plain.close()


def told(ingestion: RecordingIngestion) -> list[tuple[str, int]]:
    """Operation and bytes of each event."""
    return [(event["metadata"]["operation"], event["metadata"]["bytes"]) for event in ingestion.events]


def test_a_put_is_one_event_as_polar_sends_it(client: Any, s3: SmallS3, ingestion: RecordingIngestion) -> None:
    """Bytes, bucket, key, type and strategy; retries are not events."""
    s3.refusals = [503, 503]
    client.put_object(**PDF, Body=b"x" * 1000, ContentType="application/pdf")
    assert len(s3.requests) == 3
    event = ingestion.one("storage")
    assert event["external_customer_id"] == "ada"
    assert event["metadata"] == {"bytes": 1000, "bucket": "files", "key": "a.pdf", "contentType": "application/pdf",
                                 "operation": "PutObject", "strategy": "S3", "plan": "pro"}  # fmt: skip


def test_bodies_of_every_kind(client: Any, ingestion: RecordingIngestion, tmp_path: Path) -> None:
    """Bytes, text, a file from where it stands, a buffer, nothing; the body arrives as it was."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        file.seek(4)
        for body in (b"abc", bytearray(b"abcd"), file, io.BytesIO(b"12345"), b""):
            client.put_object(**PDF, Body=body)
    client.put_object(**PDF)
    assert told(ingestion) == [("PutObject", size) for size in (3, 4, 6, 5, 0, 0)]


def test_gets_count_what_was_really_read(client: Any, ingestion: RecordingIngestion) -> None:
    """All, a part and then closed, a part and forgotten, nothing at all, a range, by lines; each is one event."""
    client.put_object(**PDF, Body=b"0123456789\n" * 100, ContentType="text/plain")
    ingestion.clear()
    assert len(client.get_object(**PDF)["Body"].read()) == 1100
    assert ingestion.one()["metadata"]["contentType"] == "text/plain"
    body = client.get_object(**PDF)["Body"]
    assert body.read(300) == (b"0123456789\n" * 100)[:300]
    body.close()
    body.close()
    client.get_object(**PDF)["Body"].read(10)
    gc.collect()
    client.get_object(**PDF)["Body"].close()
    assert client.get_object(**PDF, Range="bytes=0-49")["Body"].read(50)
    assert len(list(client.get_object(**PDF)["Body"].iter_lines())) == 100
    assert len(list(client.get_object(**PDF)["Body"].iter_chunks(64))) == 18
    with client.get_object(**PDF)["Body"] as raw:
        raw.read(5)
    assert told(ingestion) == [("GetObject", size) for size in (1100, 300, 10, 0, 50, 1100, 1100, 5)]


def test_transfers_in_parts(client: Any, s3: SmallS3, ingestion: RecordingIngestion, tmp_path: Path) -> None:
    """Each part up, each range down, each part copied; beginning and completing move nothing."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * (12 * MEGABYTE))
    parts = TransferConfig(multipart_threshold=5 * MEGABYTE, multipart_chunksize=5 * MEGABYTE, max_concurrency=2)
    s3.refusals = [503]
    client.upload_file(str(source), "files", "large", Config=parts)
    assert sorted(told(ingestion)) == [("UploadPart", 2 * MEGABYTE), *[("UploadPart", 5 * MEGABYTE)] * 2]
    ingestion.clear()
    client.download_file("files", "large", str(target), Config=parts)
    assert target.read_bytes() == source.read_bytes()
    assert ingestion.total("bytes") == 12 * MEGABYTE
    ingestion.clear()
    client.copy({"Bucket": "files", "Key": "large"}, "files", "copy", Config=parts)
    assert sorted(told(ingestion)) == [("UploadPartCopy", 2 * MEGABYTE), *[("UploadPartCopy", 5 * MEGABYTE)] * 2]


def test_copies_and_deletes(client: Any, s3: SmallS3, ingestion: RecordingIngestion) -> None:
    """A copy's size is asked for, unless that is switched off; deletes move nothing."""
    client.put_object(**PDF, Body=b"x" * 700)
    client.copy_object(Bucket="files", Key="b.pdf", CopySource=PDF)
    client.delete_object(Bucket="files", Key="b.pdf")
    client.delete_objects(Bucket="files", Delete={"Objects": [{"Key": "a.pdf"}, {"Key": "c.pdf"}]})
    assert told(ingestion) == [("PutObject", 700), ("CopyObject", 700), ("DeleteObject", 0), ("DeleteObjects", 0)]
    assert ingestion.events[-1]["metadata"]["objects"] == 2
    assert [method for method, path in s3.requests].count("HEAD") == 1
    ingestion.strategy(S3Strategy, "storage").client(client, "bob", measure_copies=False)
    client.put_object(**PDF, Body=b"x" * 700)
    client.copy_object(Bucket="files", Key="b.pdf", CopySource=PDF)
    assert ingestion.events[-1]["metadata"]["estimated"] is True
    assert [event["external_customer_id"] for event in ingestion.events[-2:]] == ["bob", "bob"]
    assert len(ingestion.events) == 6  # the later meter took the earlier one's place


def test_what_failed_is_no_event(client: Any, s3: SmallS3, ingestion: RecordingIngestion) -> None:
    """A missing key, a refusal to the end; and a meter that fails fails alone."""
    with pytest.raises(ClientError):
        client.get_object(Bucket="files", Key="none")
    s3.refusals = [503] * 3
    with pytest.raises(ClientError):
        client.put_object(**PDF, Body=b"abc")
    assert ingestion.events == []
    ingestion.strategy(S3Strategy, "storage").client(client, lambda: {}["nobody"])
    client.put_object(**PDF, Body=b"abc")
    assert client.get_object(**PDF)["Body"].read() == b"abc"
    assert ingestion.events == []


def test_the_customer_of_the_moment(client: Any, ingestion: RecordingIngestion) -> None:
    """One client for all: a function is asked at each operation."""
    current = ["eve"]
    ingestion.strategy(S3Strategy, "storage").client(client, lambda: current[0])
    client.put_object(**PDF, Body=b"abc")
    current[0] = "bob"
    client.put_object(**PDF, Body=b"abc")
    assert [event["external_customer_id"] for event in ingestion.events] == ["eve", "bob"]


def test_aiobotocore(s3: SmallS3, ingestion: RecordingIngestion) -> None:
    """The same operations, asynchronously."""

    async def story() -> None:
        async with get_session().create_client("s3", endpoint_url=s3.url, config=CONFIG, **ACCESS) as plain:
            client: Any = ingestion.strategy(S3Strategy, "storage").client(plain, "ada")
            s3.refusals = [503, 503]
            await client.put_object(**PDF, Body=b"x" * 1000)
            async with (await client.get_object(**PDF))["Body"] as body:
                assert len(await body.read()) == 1000
            async with (await client.get_object(**PDF))["Body"] as body:
                await body.read(300)
            assert len([1 async for _ in (await client.get_object(**PDF))["Body"].iter_chunks(100)]) == 10
            await client.copy_object(Bucket="files", Key="b.pdf", CopySource=PDF)
            upload = await client.create_multipart_upload(Bucket="files", Key="c")
            part = {"Bucket": "files", "Key": "c", "UploadId": upload["UploadId"], "PartNumber": 1}
            await client.upload_part(**part, Body=b"y" * 50)
            await client.complete_multipart_upload(Bucket="files", Key="c", UploadId=upload["UploadId"])
            await client.delete_object(**PDF)
            with pytest.raises(ClientError):
                await client.get_object(**PDF)

    asyncio.run(story())
    assert told(ingestion) == [
        ("PutObject", 1000), ("GetObject", 1000), ("GetObject", 300), ("GetObject", 1000), ("CopyObject", 1000),
        ("UploadPart", 50), ("DeleteObject", 0),
    ]  # fmt: skip


def test_managed_transfers_belong_to_whom_the_caller_says(
    client: Any, ingestion: RecordingIngestion, tmp_path: Path
) -> None:
    """A function reads the caller's context, once for a transfer and each meter, though other threads do the work."""
    customer: ContextVar[str | None] = ContextVar("customer", default=None)
    source, target = tmp_path / "source", str(tmp_path / "target")
    source.write_bytes(b"x" * 100)
    ingestion.strategy(S3Strategy, "storage").client(client, customer.get)
    ingestion.strategy(S3Strategy, "traffic").client(client, lambda: {}["nobody"])
    ingestion.strategy(S3Strategy, "traffic").client(client, lambda: f"team of {customer.get()}")
    assert str(inspect.signature(client.upload_file)).startswith("(Filename, Bucket, Key, ExtraArgs=None")

    def transfers() -> None:
        client.upload_file(str(source), "files", "a.pdf")
        client.upload_fileobj(io.BytesIO(b"y" * 50), "files", "a.pdf")
        client.download_file("files", "a.pdf", target)
        client.download_fileobj("files", "a.pdf", io.BytesIO())
        client.copy(PDF, "files", "b.pdf")
        with pytest.raises(ClientError):
            client.download_file("files", "none", target)

    for name in ("ada", "bob"):
        customer.set(name)
        transfers()
        sizes = [("PutObject", 100), ("PutObject", 50), ("GetObject", 50), ("GetObject", 50), ("CopyObject", 50)]
        assert sorted(told(ingestion)) == sorted(sizes * 2)
        whose = {(event["name"], event["external_customer_id"]) for event in ingestion.events}
        assert whose == {("storage", name), ("traffic", f"team of {name}")}
        ingestion.clear()
