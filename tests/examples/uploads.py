"""Uploads the files of a folder to S3 and meters the bytes of each.

    UPLOAD_URL=http://127.0.0.1:8000 UPLOAD_TOKEN=... python -m tests.examples.uploads FOLDER BUCKET CUSTOMER

Large files go up in parts, each of which is an event; retries are none. Leaving the ``with`` block sends what is left,
for up to 30 seconds: there is no spool that would keep it.
"""

import os
import sys
from pathlib import Path

import boto3

from ingest.client import Ingestion, Limits
from ingest.client.strategies.s3 import S3Strategy


def upload(folder: Path, bucket: str, customer: str) -> None:
    """Upload every file under its name."""
    token, url = os.environ["UPLOAD_TOKEN"], os.environ["UPLOAD_URL"]
    with Ingestion(token, base_url=url, spool=None, limits=Limits(close_s_max=30)) as ingestion:
        storage = ingestion.strategy(S3Strategy, "storage", region="eu")
        s3 = storage.client(boto3.client("s3", endpoint_url=os.environ.get("UPLOAD_S3")), customer)
        for path in sorted(folder.iterdir()):
            s3.upload_file(str(path), bucket, path.name)


if __name__ == "__main__":
    upload(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
