"""A Hugging Face Hub on loopback, as far as a download needs one: the files of one model, and faults on request.

It answers what `huggingface_hub` asks (`/api/models/ID/revision/REV?blobs=true`, `/ID/resolve/COMMIT/FILE` with
ranges). `*.safetensors` are LFS files with a SHA-256, others have a Git blob id.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`files`: name -> bytes. Faults are used up one by one: `faults[name]` is a list of what its next answers do."""

    def __init__(self, files: dict[str, bytes], repository: str = "whales/blue") -> None:
        self.files = files
        self.repository = repository
        self.faults: dict[str, list[str]] = {}
        """`cut` (half of what was asked, then the connection drops), `flip` (a wrong bit), `503`, `403`, `no-range`."""
        self.asked: list[tuple[str, int]] = []
        """File and first byte of every download."""
        self.url = ""

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
            one: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git}
            if name.endswith(".safetensors"):
                sha = hashlib.sha256(data).hexdigest()
                one |= {"blobId": "f" * 40, "lfs": {"sha256": sha, "size": len(data), "pointerSize": 130}}
            siblings.append(one)
        return {"id": self.repository, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


@contextlib.contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` until the end of the block; its `url` is then the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if re.fullmatch(rf"/api/models/{hub.repository}(/revision/(main|{COMMIT}))?", path):
                self._send(200, json.dumps(hub.listing()).encode(), content_type="application/json")
                return
            name = path.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
            if name not in hub.files:
                self._send(404, b"{}", x_error_code="RepoNotFound")
                return
            self._file(name)

        def _file(self, name: str) -> None:
            data, faults = hub.files[name], hub.faults.get(name, [])
            fault = faults.pop(0) if faults else ""
            start = int((self.headers.get("range") or "bytes=0-")[6:-1])
            hub.asked.append((name, start))
            if fault.isdigit():
                self._send(int(fault), b"no")
                return
            if fault == "no-range":
                start = 0
            body = bytearray(data[start:])
            if fault == "flip":
                body[len(body) // 3] ^= 16
            self.send_response(206 if start else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if fault == "cut":
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(body)

    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
