"""A Docker Engine that takes what `docker stack deploy` sends and keeps it: the converter's oracle.

It answers just the calls of one deploy into an empty swarm (docker-api.md, section 2): secrets,
configs and networks that are asked for by name exist if they are external, all else is created.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

# Older ones read YAML 1.1 booleans and have no `stack config`.
CLI_VERSION = 28


@dataclass
class Deployed:
    """What one deploy did. `bodies` are by kind: services, networks, secrets, configs."""

    code: int
    error: str
    bodies: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def named(self, kind: str) -> dict[str, dict[str, Any]]:
        return {body["Name"]: body for body in self.bodies.get(kind, [])}


class _Server(ThreadingHTTPServer):
    address_family = socket.AF_UNIX
    daemon_threads = True
    names: ClassVar[list[str]]

    def __init__(self, path: str, external: Sequence[str]) -> None:
        self.known = list(external)
        self.bodies: dict[str, list[dict[str, Any]]] = {}
        super().__init__(path, _Handler, bind_and_activate=False)  # type: ignore[arg-type]
        self.socket.bind(path)
        self.server_activate()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, _ = self.socket.accept()
        return connection, ("docker", 0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        return

    def answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Api-Version", "1.50")
        self.send_header("Ostype", "linux")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.answer({})

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        kind, _, name = path.split("/", 2)[-1].partition("/")
        if kind == "info":
            self.answer(
                {
                    "Swarm": {
                        "ControlAvailable": True,
                        "LocalNodeState": "active",
                        "NodeID": "n",
                    }
                }
            )
        elif name:
            if kind == "networks" and name in self.server.known:
                self.answer({"Name": name, "Id": name, "Scope": "swarm"})
            else:
                self.answer({"message": f"{name} not found"}, 404)
        elif kind in ("secrets", "configs") and "name" in query:
            self.answer([{"ID": f"id-{n}", "Spec": {"Name": n}} for n in self.server.known])
        else:
            self.answer([])

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) if length else self.chunks())
        kind = self.path.split("/")[2]
        self.server.bodies.setdefault(kind, []).append(body)
        self.server.known.append(body["Name"])
        self.answer({"ID": f"id-{body['Name']}", "Id": "x"}, 201)

    def chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data


def docker_is_missing() -> str:
    """Why the oracle cannot be asked, or nothing."""
    if shutil.which("docker") is None:
        return "the docker CLI is not installed"
    done = subprocess.run(
        ["docker", "version", "--format", "{{.Client.Version}}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    version = done.stdout.strip().partition(".")[0]
    if not version.isdigit() or int(version) < CLI_VERSION:
        return f"the docker CLI is older than {CLI_VERSION}"
    return ""


def docker(*arguments: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs the docker CLI with a clean environment."""
    return subprocess.run(
        ["docker", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environment},
    )


def deploy(
    files: Sequence[Path],
    *,
    environment: Mapping[str, str] | None = None,
    external: Sequence[str] = (),
) -> Deployed:
    """Deploys the files as the stack st into an engine that knows the external objects."""
    with tempfile.TemporaryDirectory() as folder:
        server = _Server(f"{folder}/docker.sock", external)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            names = [word for file in files for word in ("-c", str(file))]
            done = docker(
                *("-H", f"unix://{folder}/docker.sock", "stack", "deploy"),
                *("--resolve-image", "never", "--detach=true", *names, "st"),
                environment=environment or {},
            )
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
        return Deployed(done.returncode, done.stderr, server.bodies)
