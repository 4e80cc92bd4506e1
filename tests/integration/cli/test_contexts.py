"""Contexts: certificates in files that only their owner reads, and which connection counts."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from cli.connection import default_socket, resolve
from cli.contexts import Context, Contexts, Credentials
from cli.main import run
from cli.settings import Settings
from swarm.errors import Invalid, NotFound
from swarm.v1 import GetInfoResponse, IssueClientCertificateRequest
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster


def test_a_context_is_made_exported_imported_and_used(
    cli: Cli, cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.info = GetInfoResponse(manager_addrs=("10.0.0.1:2377", "10.0.0.2:2377"))
    assert cli.ok("context", "create", "prod", "--description", "the real one") == "prod\n"
    assert cluster.last(IssueClientCertificateRequest).csr_pem.startswith(
        "-----BEGIN CERTIFICATE REQUEST"
    )
    held = cli.config / "contexts" / "prod.json"
    assert stat.S_IMODE(held.stat().st_mode) == 0o600
    data = json.loads(held.read_text())
    assert data["credentials"]["certificate_pem"] == "CERT\n"
    assert "PRIVATE KEY" in data["credentials"]["key_pem"]
    file = tmp_path / "prod.json"
    assert cli.ok("context", "export", "prod", str(file)) == f"Written file '{file}'\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cli("context", "export", "prod", str(file)).code == 5
    assert cli.ok("context", "import", "copy", str(file)) == "copy\n"
    assert cli.ok("context", "use", "copy") == "copy\n"
    assert "PRIVATE" not in cli.ok("context", "inspect", "copy")
    answer = cli("context", "rm", "copy")
    assert answer.code == 5 and "is in use" in answer.err
    assert cli.ok("context", "rm", "-f", "copy", "prod") == "copy\nprod\n"
    assert cli("context", "create", "default").code == 5


def test_contexts_are_listed_with_the_current_one(
    cli: Cli, capfd: pytest.CaptureFixture[str]
) -> None:
    contexts = Contexts(cli.config)
    contexts.add(Context(name="prod", addresses=("a:1", "b:2")))
    contexts.add(Context(name="test", description="a test", socket="/tmp/s"))
    contexts.use("test")
    capfd.readouterr()
    assert run(["context", "ls"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "DESCRIPTION", "ENDPOINT", "ERROR"]
    assert lines[2].split() == ["prod", "tcp://a:1,b:2"]
    assert lines[3] == "test *    a test                       unix:///tmp/s"
    assert run(["context", "show"]) == 0
    assert capfd.readouterr().out == "test\n"


def _settings(tmp_path: Path, *, host: str = "", context: str = "", **environment: str) -> Settings:
    return Settings.from_environment(
        {"SWARM_CONFIG": str(tmp_path), "HOME": str(tmp_path), **environment},
        host=host or None,
        context_name=context or None,
        debug=False,
    )


def test_which_connection_counts(tmp_path: Path) -> None:
    mine = Credentials("r", "c", "k")
    contexts = Contexts(tmp_path)
    contexts.add(Context(name="prod", addresses=("a:1",), credentials=mine))
    contexts.add(Context(name="test", socket="/t"))
    assert resolve(_settings(tmp_path, host="unix:///h", SWARM_HOST="unix:///e")).socket == "/h"
    assert resolve(_settings(tmp_path, context="prod", SWARM_HOST="unix:///e")).addresses == (
        "a:1",
    )
    assert resolve(_settings(tmp_path, SWARM_HOST="unix:///e", SWARM_CONTEXT="prod")).socket == "/e"
    assert resolve(_settings(tmp_path, SWARM_CONTEXT="prod")).credentials == mine
    contexts.use("test")
    assert resolve(_settings(tmp_path)).socket == "/t"
    assert resolve(_settings(tmp_path, context="default")).context == ""
    assert resolve(_settings(tmp_path, host="tcp://a:1")).credentials == mine
    with pytest.raises(NotFound, match=r"contexts: default, prod, test"):
        resolve(_settings(tmp_path, context="nope"))


def test_certificates_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"ca\.pem"):
        resolve(_settings(tmp_path, host="tcp://x", SWARM_CERT_PATH=str(tmp_path)))
    for name in ("ca", "cert", "key"):
        (tmp_path / f"{name}.pem").write_text(name)
    target = resolve(_settings(tmp_path, host="tcp://x", SWARM_CERT_PATH=str(tmp_path)))
    assert target.addresses == ("x:2377",)
    assert target.credentials == Credentials("ca", "cert", "key")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "credentials": 3}']
)
def test_a_damaged_context_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "contexts").mkdir()
    (tmp_path / "contexts" / "bad.json").write_text(text)
    with pytest.raises(Invalid, match="is not a context"):
        resolve(_settings(tmp_path, context="bad"))
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Invalid, match="cannot be read"):
        resolve(_settings(tmp_path))


def test_the_default_socket(tmp_path: Path) -> None:
    assert default_socket(_settings(tmp_path), root=True) == "/run/swarm/swarmd.sock"
    env = {"XDG_RUNTIME_DIR": str(tmp_path / "run")}
    assert (
        default_socket(_settings(tmp_path, **env), root=False)
        == f"{tmp_path}/run/swarm/swarmd.sock"
    )
    state = tmp_path / ".local/state/swarm"
    state.mkdir(parents=True)
    (state / "swarmd.sock").touch()
    assert default_socket(_settings(tmp_path, **env), root=False) == str(state / "swarmd.sock")
