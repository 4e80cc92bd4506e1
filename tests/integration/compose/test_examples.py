"""The commands of the web examples do what their comments say."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.compose import load
from tests.ports import free_port

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples"
DEADLINE_S = 10.0


def command(name: str) -> list[str]:
    (web,) = load([str(EXAMPLES / name)], stack="a", environment={}).spec.services
    assert web.task is not None
    assert web.task.container is not None
    return list(web.task.container.args)


@contextmanager
def running(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        words, env={"PATH": os.environ["PATH"], **environment}, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)


def answer(port: int) -> str:
    """What the server says, once it listens."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as reply:
                text: str = reply.read().decode().strip()
                return text
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_the_process_example_answers_with_its_tasks_name_and_ends_on_sigterm() -> None:
    port = free_port()
    given = {"SWARM_BIND_ADDR": "127.0.0.1", "PORT": str(port), "SWARM_TASK_NAME": "app_web.3.x"}
    with running(command("web-process.yml"), given) as process:
        assert answer(port) == "app_web.3.x"
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed")
def test_the_container_example_answers_with_its_host_name_and_ends_on_sigterm(
    tmp_path: Path,
) -> None:
    port = free_port()
    shell, flag, script = command("web.yml")
    script = script.replace("/tmp/www", str(tmp_path / "www")).replace("-p 80", f"-p {port}")
    for applet in ("mkdir", "hostname", "httpd"):
        script = script.replace(f"{applet} ", f"busybox {applet} ", 1)
    with running(["busybox", shell, flag, script], {}) as process:
        assert answer(port) == socket.gethostname()
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
