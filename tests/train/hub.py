"""A server on the loopback that answers as the Hugging Face hub does, good answers and bad ones."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """repositories: "org/name" -> {file: content}; `behave` maps "org/name" to one of the bad answers."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.behave: dict[str, str] = {}
        "refused (401) | gated | broken: the connection ends in the middle of weights | slow: no answer"
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Quiet."""

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._stop = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """No more answers."""
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        """One request."""
        if self._stop.is_set():  # a connection that was kept open
            request.close_connection = True
            return None
        self.requests.append((request.command, request.path))
        parts = request.path.split("?")[0].strip("/").split("/")
        if parts[0] == "cdn":
            repository, name = "/".join(parts[1:3]), parts[3]
        elif len(parts) == 5 and parts[2] == "resolve":
            repository, name = "/".join(parts[:2]), parts[4]
        else:
            return self._error(request, 404, "")
        mode = self.behave.get(repository)
        if mode == "slow":
            self._stop.wait(5)
            return None
        if mode == "refused":
            return self._error(request, 401, "")
        if mode == "gated":
            return self._error(request, 403, "GatedRepo")
        files = self.repositories.get(repository)
        if files is None:
            # The hub does not say to a stranger whether a repository exists.
            return self._error(request, 401, "RepoNotFound")
        if name not in files:
            return self._error(request, 404, "EntryNotFound")
        content = files[name]
        etag = hashlib.sha256(content).hexdigest()
        if parts[0] != "cdn" and name.endswith(".safetensors"):
            # Large files lie elsewhere: the hub names size and hash, and redirects.
            request.send_response(302)
            request.send_header("X-Linked-Size", str(len(content)))
            request.send_header("X-Linked-Etag", f'"{etag}"')
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("Location", f"{self.url}/cdn/{repository}/{name}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return None
        if mode == "broken" and request.headers.get("Range", "bytes=0-") != "bytes=0-":
            request.close_connection = True  # nor is there more for one who asks for the rest
            return None
        request.send_response(200)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body and mode == "broken" and parts[0] == "cdn":
            request.wfile.write(content[: len(content) // 2])
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
        elif body:
            request.wfile.write(content)
        return None

    @staticmethod
    def _error(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        if code:
            request.send_header("X-Error-Code", code)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Content-Length", "0")
        request.end_headers()
