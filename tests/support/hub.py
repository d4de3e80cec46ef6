"""A Hugging Face hub with one tiny repository, on a local port: what huggingface_hub asks of one to download it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

REPO = "org/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Use it as a context manager. `files` by name; `broken` files end after half of what was promised."""

    def __init__(self, files: dict[str, bytes], *, token: str = "", broken: frozenset[str] = frozenset()) -> None:
        self.files = files
        self.commit = COMMIT
        self.token = token
        self.broken = broken
        self.downloads: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        """One request."""
        path = request.path.partition("?")[0]
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            _send(request, 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif re.fullmatch(f"/api/models/{REPO}(/revision/.*)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            _send_json(request, {"id": REPO, "modelId": REPO, "sha": self.commit, "siblings": siblings})
        elif path.startswith(f"/api/models/{REPO}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            _send_json(request, tree)
        elif (found := re.fullmatch(f"/{REPO}/resolve/[^/]+/(.+)", path)) and found[1] in self.files:
            self._send_file(request, found[1], body=body)
        else:
            _send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound" if REPO in path else "RepoNotFound"})

    def _send_file(self, request: BaseHTTPRequestHandler, name: str, *, body: bool) -> None:
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.commit}
        if body:
            self.downloads.append(name)
        sent = data[: len(data) // 2] if name in self.broken else data
        _send(request, 200, sent if body else b"", headers, promised=len(data))


def _send_json(request: BaseHTTPRequestHandler, value: Any) -> None:
    _send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], *, promised: int | None = None
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if promised is None else promised))
    request.send_header("Connection", "close")
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True
