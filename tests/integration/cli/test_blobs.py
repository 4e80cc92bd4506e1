"""Secrets and configs at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from swarm.errors import NotFound
from swarm.v1 import (
    Config,
    ConfigSpec,
    Kind,
    ListRequest,
    Meta,
    RotateRequest,
    RotateResponse,
    Secret,
    SecretSpec,
    UpdateState,
    UpdateStatus,
    WatchServicesRequest,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import STORE_REVISION, FakeCluster
from tests.integration.cli.samples import ago_ns, service, status

KINDS = ("secret", "config")


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data"
    path.write_bytes(b"new\n")
    return str(path)


def add(cluster: FakeCluster, kind: str, id_: str, name: str, *, superseded: bool = False) -> None:
    meta = Meta(version=2, created_at_ns=ago_ns(7200), updated_at_ns=ago_ns(60))
    if kind == "secret":
        cluster.add(Secret(id=id_, meta=meta, spec=SecretSpec(name=name), superseded=superseded))
    else:
        spec = ConfigSpec(name=name, data="gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n\n".encode())
        cluster.add(Config(id=id_, meta=meta, spec=spec, superseded=superseded))


@pytest.mark.parametrize("kind", KINDS)
def test_rotate_prints_what_is_rolled_and_waits(
    cli: Cli, cluster: FakeCluster, data: str, kind: str
) -> None:
    add(cluster, kind, "k1", "app_key")
    web = cluster.add(service("app_web", id_="w1"))
    cluster.rotated = RotateResponse(
        id="k2", services=("app_web",), service_ids=("w1",), revision=STORE_REVISION
    )
    cluster.watch_script = [
        (STORE_REVISION - 1, [status(web, 3, 3)]),
        [status(web, 2, 3)],
        [status(web, 3, 3)],
    ]
    answer = cli(kind, "rotate", "k1", data)
    assert (answer.code, answer.out) == (
        0,
        f"Rotated {kind} app_key (id: k2)\nUpdating service app_web (id: w1)\n",
    )
    assert answer.err.splitlines()[-1] == "app_web: 3/3 running, converged"
    request = cluster.last(RotateRequest)
    assert request == RotateRequest(kind=Kind[kind.upper()], ref="k1", data=b"new\n")
    assert cluster.last(WatchServicesRequest).services == ("w1",)


def test_an_update_that_was_paused_before_the_rotation_does_not_end_the_wait(
    cli: Cli, cluster: FakeCluster, data: str
) -> None:
    add(cluster, "secret", "k1", "key")
    paused = UpdateStatus(state=UpdateState.PAUSED, started_at_ns=5)
    web = cluster.add(service("web", id_="w1", update_status=paused))
    cluster.rotated = RotateResponse(id="k2", services=("web",), service_ids=("w1",), revision=1)
    cluster.watch_script = [
        [status(web, 1, 3, update_status=paused)],
        [status(web, 3, 3)],
    ]
    assert cli("secret", "rotate", "key", data).code == 0


def test_rotate_detached_reads_standard_input(cli: Cli, cluster: FakeCluster) -> None:
    add(cluster, "config", "k1", "conf")
    cluster.rotated = RotateResponse(id="k2", services=("a",), service_ids=("a1",), revision=1)
    done = cli.process("config", "rotate", "-d", "conf", "-", stdin=b"from stdin")
    assert done.returncode == 0, done
    assert done.stdout == b"Rotated config conf (id: k2)\nUpdating service a (id: a1)\n"
    assert cluster.last(RotateRequest).data == b"from stdin"
    assert not [call for call in cluster.calls if isinstance(call, WatchServicesRequest)]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            RotateResponse(id="k1", revision=7),
            "Nothing to change: secret key has this content already\n",
        ),
        (RotateResponse(id="k2", revision=7), "Rotated secret key (id: k2)\nNo service uses it\n"),
    ],
)
def test_rotate_says_when_nothing_is_rolled(
    cli: Cli, cluster: FakeCluster, data: str, answer: RotateResponse, text: str
) -> None:
    add(cluster, "secret", "k1", "key")
    cluster.rotated = answer
    assert cli.ok("secret", "rotate", "key", data) == text


def test_rotating_what_is_not_there_is_an_error(cli: Cli, cluster: FakeCluster, data: str) -> None:
    answer = cli("secret", "rotate", "nope", data)
    assert (answer.code, answer.err) == (4, "Error: secret nope not found\n")
    add(cluster, "secret", "k1", "key")
    cluster.failures["rotate"] = [NotFound("secret key not found")]
    assert cli("secret", "rotate", "key", data).code == 4


@pytest.mark.parametrize("kind", KINDS)
def test_earlier_versions_are_listed_when_all_are_asked_for(
    cli: Cli, cluster: FakeCluster, kind: str
) -> None:
    add(cluster, kind, "k2", "key")
    add(cluster, kind, "k1", "key.k1", superseded=True)
    cli.ok(kind, "ls")
    assert cluster.last(ListRequest).filters == ()
    lines = cli.ok(kind, "ls", "--all").splitlines()
    [asked] = cluster.last(ListRequest).filters
    assert (asked.key, set(asked.values)) == ("superseded", {"true", "false"})
    assert lines[0].endswith("SUPERSEDED")
    assert [line.split()[0] for line in lines[1:]] == ["k2", "k1"]
    assert [line.split()[-1] for line in lines[1:]] == ["false", "true"]
    assert cli.ok(kind, "ls", "-q", "--filter", "superseded=true") == "k1\n"
    row = json.loads(cli.ok(kind, "ls", "--filter", "superseded=false", "--format", "json"))
    assert (row["ID"], row["Superseded"]) == ("k2", False)
    assert ("Driver" in row) == (kind == "secret")


def test_a_config_is_shown_in_clear_and_a_secret_without_its_data(
    cli: Cli, cluster: FakeCluster
) -> None:
    add(cluster, "config", "c1", "conf")
    add(cluster, "secret", "s1", "key")
    assert "Data:\ngr\N{LATIN SMALL LETTER U WITH DIAERESIS}n\n" in cli.ok(
        "config", "inspect", "--pretty", "conf"
    )
    assert "Data" not in cli.ok("secret", "inspect", "--pretty", "key")
    assert json.loads(cli.ok("config", "inspect", "conf"))[0]["Spec"]["Data"] == "Z3LDvG4K"


def test_only_secrets_have_drivers(cli: Cli, cluster: FakeCluster) -> None:
    assert "--driver" in cli.ok("secret", "create", "--help")
    assert "--driver TEXT" not in cli.ok("config", "create", "--help").replace("--template-", "")
    assert cli("config", "create", "--driver", "vault", "x").code == 2
    assert cli("secret", "create", "-d", "vault", "x").code == 0
