"""As much of S3 as clients need: objects, ranges, copies, multipart uploads, deletes; and refusals on demand."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

PATIENCE_S = 20.0


class SmallS3:
    """The service: ``url``, ``objects`` by path (content and type), ``requests`` (method and path)."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refusals: list[int] = []  # statuses of the next answers
        self.uploads: dict[str, dict[int, bytes]] = {}
        service = self

        class Handler(_Handler):
            pass

        Handler.service = service
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(PATIENCE_S)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: SmallS3

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        self.service.requests.append((self.command, parts.path))
        if self.service.refusals:
            status = self.service.refusals.pop(0)
            self._answer(b"<Error><Code>SlowDown</Code><Message>later</Message></Error>", status)
            return
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        getattr(self, "_" + self.command.lower())(unquote(parts.path), query, body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self, body: bytes = b"", status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _put(self, path: str, query: dict[str, str], body: bytes) -> None:
        kind = self.headers.get("Content-Type", "binary/octet-stream")
        is_copy = "x-amz-copy-source" in self.headers
        if is_copy:
            body, kind = self.service.objects["/" + unquote(self.headers["x-amz-copy-source"]).lstrip("/")]
            body = _ranged(body, self.headers.get("x-amz-copy-source-range"))
        if "uploadId" in query:
            self.service.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.service.objects[path] = body, kind
        named = b"CopyPartResult" if "uploadId" in query else b"CopyObjectResult"
        told = b"<%s><ETag>e</ETag></%s>" % (named, named) if is_copy else b""
        self._answer(told, ETag='"e"')

    def _get(self, path: str, query: dict[str, str], body: bytes) -> None:
        if path not in self.service.objects:
            self._answer(b"<Error><Code>NoSuchKey</Code><Message>none</Message></Error>", 404)
            return
        content, kind = self.service.objects[path]
        content = _ranged(content, self.headers.get("Range"))
        self._answer(content, 206 if "Range" in self.headers else 200, ETag='"e"', Content_Type=kind)

    def _head(self, path: str, query: dict[str, str], body: bytes) -> None:
        content, kind = self.service.objects.get(path, (b"", ""))
        self._answer(b"", 200 if kind else 404, len(content), ETag='"e"', Content_Type=kind)

    def _delete(self, path: str, query: dict[str, str], body: bytes) -> None:
        self.service.objects.pop(path, None)
        self._answer(b"", 204)

    def _post(self, path: str, query: dict[str, str], body: bytes) -> None:
        if "uploads" in query:
            number = str(len(self.service.uploads))
            self.service.uploads[number] = {}
            told = f"<UploadId>{number}</UploadId>"
            self._answer(f"<InitiateMultipartUploadResult>{told}</InitiateMultipartUploadResult>".encode())
        elif "delete" in query:
            keys = [entry.text for entry in ElementTree.fromstring(body).iter()  # noqa: S314 (a test's own)
                    if entry.tag.endswith("Key")]  # fmt: skip
            for key in keys:
                self.service.objects.pop(f"{path.rstrip('/')}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._answer(f"<DeleteResult>{deleted}</DeleteResult>".encode())
        else:
            parts = self.service.uploads.pop(query["uploadId"])
            self.service.objects[path] = b"".join(parts[number] for number in sorted(parts)), "binary/octet-stream"
            self._answer(b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>")


def _ranged(content: bytes, asked: str | None) -> bytes:
    if not asked:
        return content
    first, _, last = asked.removeprefix("bytes=").partition("-")
    return content[int(first) : int(last) + 1 if last else None]
