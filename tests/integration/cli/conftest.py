"""swarmctl against the fake cluster: in this process for answers, as a process for terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.main import run
from tests.integration.cli.fake import FakeCluster, FakeServer

COMMAND = (sys.executable, "-m", "cli.main")
PROCESS_S = 30


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str


class Cli:
    """Runs swarmctl with the socket of the fake cluster."""

    def __init__(self, socket: Path, config: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.socket = socket
        self.config = config
        self._capfd = capfd

    def __call__(self, *arguments: str) -> Answer:
        self._capfd.readouterr()
        code = run(["--host", f"unix://{self.socket}", *arguments])
        out, err = self._capfd.readouterr()
        return Answer(code, out, err)

    def ok(self, *arguments: str) -> str:
        """The output of a command that succeeds."""
        answer = self(*arguments)
        assert answer.code == 0, answer
        return answer.out

    def environment(self, **more: str) -> dict[str, str]:
        """For a process of its own."""
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.config)}
        return kept | {
            "SWARM_HOST": f"unix://{self.socket}",
            "SWARM_CONFIG": str(self.config),
            "SWARM_RESOLVE_IMAGE": "never",
            **more,
        }

    def process(
        self, *arguments: str, stdin: bytes | None = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        """The command as a process."""
        return subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment(**environment),
            timeout=PROCESS_S,
            check=False,
        )


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def cli(
    cluster: FakeCluster,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cli]:
    monkeypatch.setenv("SWARM_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("SWARM_HOST", "SWARM_CONTEXT", "SWARM_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    socket = tmp_path / "s"
    with FakeServer(cluster, socket):
        yield Cli(socket, tmp_path / "config", capfd)
