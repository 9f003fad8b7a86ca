"""An S3 emulator on 127.0.0.1, and a proxy before it that loses answers, for tests.

with S3Server() as s3:
    bucket = s3.make_bucket()
    storage = open_storage(f"s3://{bucket}/my.store", storage_options=s3.storage_options)
    with FaultyProxy(s3.endpoint_url) as proxy:
        proxy.inject(Fault("PUT", "drop-response"))
        storage = open_storage(..., storage_options={**s3.storage_options, "endpoint_url": proxy.endpoint_url})
"""

import http.client
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_KEY, _SECRET = "AKIATESTTESTTESTTEST", "canary-secret-of-the-emulator"

_SERVE = """
import logging, sys
logging.disable(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """moto in a process of its own, which ends with this one: its standard input closes."""

    def __enter__(self) -> "S3Server":
        env = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the S3 emulator did not start: is moto[server] installed?")
        self.endpoint_url = f"http://127.0.0.1:{int(port)}"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.terminate()
        self._process.wait(timeout=30)

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for `open_storage("s3://...", storage_options=...)`."""
        return {
            "key": _KEY,
            "secret": _SECRET,
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def make_bucket(self) -> str:
        """Create a bucket with a new name and return the name."""
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self._call("PUT", f"/{bucket}")
        return bucket

    def delete_bucket(self, bucket: str) -> None:
        """Remove an empty bucket."""
        self._call("DELETE", f"/{bucket}")

    def _call(self, method: str, path: str) -> None:
        address = urlsplit(self.endpoint_url)
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        try:
            auth = f"AWS4-HMAC-SHA256 Credential={_KEY}/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
            connection.request(method, path, headers={"Authorization": auth})
            answer = connection.getresponse()
            answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{method} {path} on the S3 emulator: HTTP {answer.status}")
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Fault:
    """What the proxy does to one request."""

    method: str
    """Method of the requests it waits for: PUT, GET, HEAD, DELETE."""

    action: str
    """drop-request, drop-response (the server has done it), cut-body, or an HTTP status such as "503"."""

    part: str = ""
    """Text that the request's path must contain."""

    code: str = "SlowDown"
    """S3 error code in the answer, when `action` is a status."""


class FaultyProxy:
    """A loopback HTTP proxy that forwards to an endpoint and applies each injected fault to one request, in order."""

    def __init__(self, endpoint_url: str) -> None:
        self._target = urlsplit(endpoint_url)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self.hits = 0
        self.requests: list[tuple[str, str]] = []

    def inject(self, *faults: Fault) -> None:
        """Have each of `faults` hit the next request that fits it."""
        with self._lock:
            self._faults.extend(faults)

    def clear(self) -> None:
        """Forget the faults that have not hit and the requests seen so far."""
        with self._lock:
            self._faults.clear()
            self.hits = 0
            self.requests.clear()

    def pending(self) -> int:
        """Return how many faults have not hit."""
        with self._lock:
            return len(self._faults)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the fault for a request, which is then used up."""
        with self._lock:
            self.requests.append((method, path))
            for index, fault in enumerate(self._faults):
                if fault.method == method and fault.part in path:
                    self.hits += 1
                    return self._faults.pop(index)
        return None

    def forward(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the endpoint's answer."""
        connection = http.client.HTTPConnection(self._target.hostname or "", self._target.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=dict(headers))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def __enter__(self) -> "FaultyProxy":
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                _serve_one(self, proxy)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=30)


def _serve_one(handler: BaseHTTPRequestHandler, proxy: FaultyProxy) -> None:
    """Answer one request, or fail to."""
    headers = {
        name: value for name, value in handler.headers.items() if name.lower() not in ("expect", "connection")
    }
    body = _read_body(handler)
    headers.pop("Transfer-Encoding", None)
    if body:
        headers["Content-Length"] = str(len(body))
    fault = proxy.take(handler.command, handler.path)
    if fault is not None and fault.action == "drop-request":
        _hang_up(handler)
        return
    if fault is not None and fault.action.isdigit():
        text = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
        _answer(handler, int(fault.action), {"Content-Type": "application/xml"}, text, len(text))
        return
    status, answer_headers, answer = proxy.forward(handler.command, handler.path, headers, body)
    if fault is not None and fault.action == "drop-response":
        _hang_up(handler)
        return
    length = int(answer_headers.get("Content-Length", "0")) if handler.command == "HEAD" else len(answer)
    if fault is not None and fault.action == "cut-body":
        _answer(handler, status, answer_headers, answer[: len(answer) // 2], length)
        _hang_up(handler)
        return
    _answer(handler, status, answer_headers, answer, length)


def _read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" in handler.headers.get("Transfer-Encoding", ""):
        body = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body
    return handler.rfile.read(int(handler.headers.get("Content-Length", "0")))


def _answer(
    handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes, length: int
) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in ("content-length", "transfer-encoding", "connection"):
            handler.send_header(name, value)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
    handler.wfile.flush()


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with suppress(OSError):
        handler.connection.shutdown(2)


@contextmanager
def s3_bucket() -> Iterator[tuple[str, dict[str, Any]]]:
    """Give (URL, storage options) of a new, empty bucket on a new server."""
    with S3Server() as server:
        yield f"s3://{server.make_bucket()}/test.store", server.storage_options
