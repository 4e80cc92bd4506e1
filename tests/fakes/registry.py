"""A registry of one image, as far as it tells digests."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIGEST = "sha256:" + "5" * 64
MANIFEST = b'{"schemaVersion": 2}'


class Registry(ThreadingHTTPServer):
    """One repository, team/app, with a tag 1.4; on this machine, without TLS. Serves while it is a
    context.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.told_digest = True
        # Empty, "basic" or "bearer": what it wants.
        self.wants = ""
        self.seen: list[tuple[str, str, str]] = []

        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Registry

    def _answer(self) -> None:
        registry, given = self.server, self.headers.get("Authorization", "")
        registry.seen.append((self.command, self.path, given))
        if self.path.startswith("/token?"):
            self._send(200, json.dumps({"token": "secret"}).encode(), {})
            return
        if registry.wants == "basic" and not given.startswith("Basic "):
            self._send(401, b"", {"WWW-Authenticate": 'Basic realm="here"'})
            return
        if registry.wants == "bearer" and given != "Bearer secret":
            realm = f'Bearer realm="http://{registry.host}/token",service="reg",scope="pull"'
            self._send(401, b"", {"WWW-Authenticate": realm})
            return
        if self.path != "/v2/team/app/manifests/1.4":
            self._send(404, b"", {})
            return
        told = {"Docker-Content-Digest": DIGEST} if registry.told_digest else {}
        self._send(200, MANIFEST, told)

    do_GET = do_HEAD = _answer

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""
