"""What swarmctl shows and asks where there are several managers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from msgspec import structs

from cli import renewal
from cli.contexts import Context, Contexts, Credentials
from cli.renewal import keep_good
from swarm import errors, tls
from swarm.clock import SystemClock
from swarm.rpc import Channel
from swarm.v1 import (
    Cluster,
    GetInfoRequest,
    GetInfoResponse,
    GetNodeInfoResponse,
    InitRequest,
    Kind,
    LeaveRequest,
    ManagerStatus,
    Node,
    NodeRole,
    Reachability,
)
from swarm.v1.services import CertificatesClient, ControlClient
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node

GIB = 1 << 30
MEMBER = ManagerStatus(
    reachability=Reachability.REACHABLE, addr="10.0.0.1:2377", engine_version="etcd 3.4.23"
)


def manager(name: str, *, role: NodeRole = NodeRole.MANAGER, **status: object) -> Node:
    """A member; without a `reachability` one that is none yet."""
    made = node(name, id_=f"{name}id")
    assert made.spec is not None
    member = structs.replace(MEMBER, **status) if status else None
    return structs.replace(made, spec=structs.replace(made.spec, role=role), manager_status=member)


UP, DOWN = Reachability.REACHABLE, Reachability.UNREACHABLE


@pytest.fixture
def five(cluster: FakeCluster) -> FakeCluster:
    """Managers a to d, one of which leads, one is gone, one goes; e comes, f is a worker."""
    cluster.add(manager("a", leader=True, reachability=UP))
    cluster.add(manager("b", reachability=UP))
    cluster.add(manager("c", reachability=DOWN, addr="10.0.0.3:2377"))
    cluster.add(manager("d", role=NodeRole.WORKER, reachability=UP))
    cluster.add(manager("e"))
    cluster.add(node("f", id_="fid"))
    cluster.node = GetNodeInfoResponse(
        node_id="bid", state="active", role=NodeRole.MANAGER, control_available=True
    )
    cluster.info = GetInfoResponse(
        cluster_id="c1",
        node_id="bid",
        leader_node_id="aid",
        store_engine="etcd",
        store_version="etcd 3.4.23",
        store_bytes=3 * GIB // 2,
        store_bytes_used=GIB // 2,
        revision=4711,
        managers=4,
        managers_reachable=3,
    )
    return cluster


# ---------------------------------------------------------------- nodes


def test_node_ls_says_what_each_manager_is(cli: Cli, five: FakeCluster) -> None:
    shown = cli.ok("node", "ls", "--format", "{{.Hostname}} {{.ManagerStatus}}")
    assert shown.splitlines() == [
        "a Leader",
        "b Reachable",
        "c Unreachable",
        "d Demoting",
        "e Promoting",
        "f ",
    ]


def test_node_inspect_says_it_too(cli: Cli, five: FakeCluster) -> None:
    pretty = cli.ok("node", "inspect", "--pretty", "c")
    assert "Manager Status:\n Address:               10.0.0.3:2377\n" in pretty
    assert " Raft Status:           Unreachable\n Leader:                No\n" in pretty
    assert " Store:                 etcd 3.4.23\n" in pretty
    assert "Role Change:            Demoting\n" in cli.ok("node", "inspect", "--pretty", "d")
    assert "Role Change:            Promoting\n" in cli.ok("node", "inspect", "--pretty", "e")
    found = json.loads(cli.ok("node", "inspect", "a"))[0]
    assert found["ManagerStatus"] == {
        "Leader": True,
        "Reachability": "reachable",
        "Addr": "10.0.0.1:2377",
        "EngineVersion": "etcd 3.4.23",
    }


# ---------------------------------------------------------------- info


def test_info_shows_the_managers_and_their_store(cli: Cli, five: FakeCluster) -> None:
    answer = cli("info")
    assert " Manager Status: Reachable\n Managers: 4 (3 reachable)\n" in answer.out
    assert " Store: etcd 3.4.23, revision 4711, 1.5 GiB (512 MiB used)\n" in answer.out
    assert "Warning: manager c (10.0.0.3:2377) is unreachable\n" in answer.err
    assert "Warning: 4 managers survive the loss of 1, as 3 would" in answer.err
    template = "{{.Swarm.ManagerStatus}} {{.Swarm.Cluster.ManagersReachable}}"
    assert cli.ok("info", "--format", template) == "Reachable 3\n"


def test_info_warns_of_two_managers(cli: Cli, five: FakeCluster) -> None:
    five.objects[Kind.NODE] = five.objects[Kind.NODE][:2]
    five.info = structs.replace(five.info, managers=2)
    assert "Warning: with two managers the loss of either stops all changes" in cli("info").err


def test_info_of_one_manager_asks_for_no_others(cli: Cli, five: FakeCluster) -> None:
    five.info = structs.replace(five.info, managers=1, node_id="aid")
    answer = cli("info")
    assert " Manager Status: Leader\n Managers: 1\n" in answer.out
    assert answer.err == ""


def test_info_of_a_manager_without_a_quorum_shows_what_it_knew(cli: Cli, five: FakeCluster) -> None:
    five.failures["get_info"] = [errors.Unavailable("too few managers are online")]
    answer = cli("info")
    assert answer.code == 0
    assert " Manager Status: Unreachable\n" in answer.out
    assert (
        "Warning: this is what the manager knew at revision 4711, and it may be old: "
        "too few managers are online\n" in answer.err
    )
    five.failures["get_info"] = [errors.Unavailable("no quorum"), errors.Unavailable("stopped")]
    answer = cli("info")
    assert (answer.code, answer.err) == (9, "Error: no quorum\n")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_stale_is_sent_with_every_call(
    cli: Cli, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("SWARM_STALE", "1")
    cli.ok(*(("--stale",) if how == "option" else ()), "node", "ls")
    assert cluster.stale == {"list": True, "get_info": True}


def test_without_it_nothing_is_stale(
    cli: Cli, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.ok("node", "ls")
    assert cluster.stale == {"list": False, "get_info": False}
    monkeypatch.setenv("SWARM_STALE", "yes")
    answer = cli("node", "ls")
    assert answer.code == 2 and "SWARM_STALE: 'yes' is neither 1 nor 0" in answer.err


# ---------------------------------------------------------------- init, leave


def _pem(folder: Path, name: str, mark: str) -> str:
    path = folder / name
    path.write_text(f"-----BEGIN {mark}-----\n{name}\n-----END {mark}-----\n")
    return str(path)


def test_init_on_somebody_elses_etcd(cli: Cli, cluster: FakeCluster, tmp_path: Path) -> None:
    ca = _pem(tmp_path, "ca", "CERTIFICATE")
    cert = _pem(tmp_path, "cert", "CERTIFICATE")
    key = _pem(tmp_path, "key", "EC PRIVATE KEY")
    cli.ok(
        *("swarm", "init", "--etcd-endpoints", "e1:2379,https://e2:2379", "--etcd-prefix", "/p/"),
        *("--etcd-ca", ca, "--etcd-cert", cert, "--etcd-key", key),
    )
    request = cluster.last(InitRequest)
    assert request.store == "etcd" and request.etcd is not None
    assert (request.etcd.endpoints, request.etcd.prefix) == (("e1:2379", "e2:2379"), "/p")
    assert "\nca\n" in request.etcd.ca_pem and "\nkey\n" in request.etcd.key_pem
    cli.ok("swarm", "init", "--store", "embedded")
    assert cluster.last(InitRequest).store == "embedded"
    assert cluster.last(InitRequest).etcd is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--etcd-prefix", "/x"), "--etcd-prefix needs --etcd-endpoints"),
        (("--etcd-endpoints", "e", "--store", "embedded"), "exclude each other"),
        (("--etcd-endpoints", "e"), "'e' is not an address; write host:port"),
        (("--etcd-endpoints", "ftp://e:1"), "'ftp://e:1' is not an address"),
        (("--etcd-endpoints", "https://e:1"), "is reached with TLS, and --etcd-ca is missing"),
        (("--etcd-endpoints", "e:1", "--etcd-prefix", "x"), "'x' must begin with /"),
        (("--etcd-endpoints", "e:1", "--etcd-prefix", "/"), "'/' must begin with / and not be /"),
        (("--etcd-endpoints", "e:1", "--etcd-cert", "{pem}"), "--etcd-cert and --etcd-key go tog"),
        (("--etcd-endpoints", "e:1", "--etcd-ca", "/no"), "/no: there is no such file for the etc"),
        (("--etcd-endpoints", "e:1", "--etcd-ca", "{text}"), "--etcd-ca: {text} holds no root cer"),
        (("--etcd-endpoints", "e:1", "--etcd-key", "{pem}"), "{pem} holds no private key in PEM"),
        (("--external-ca", "protocol=cfssl,url=https://x"), "signed by the cluster's own root"),
    ],
)
def test_init_refuses_what_does_not_fit(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    files = {"pem": _pem(tmp_path, "pem", "CERTIFICATE"), "text": str(tmp_path / "text")}
    Path(files["text"]).write_text("hello")
    answer = cli("swarm", "init", *(a.format(**files) for a in arguments))
    assert answer.code in (2, 4, 12)
    assert message.format(**files) in answer.err
    assert not cluster.calls


def test_init_with_force_says_what_becomes_of_the_others(cli: Cli, cluster: FakeCluster) -> None:
    out = cli.ok("swarm", "init", "--force-new-cluster")
    assert cluster.last(InitRequest).force_new_cluster
    assert out.startswith("This node (n1) goes on with its cluster, as its only manager.")
    assert "'swarmctl swarm leave --force' on each of\nthem before it joins again" in out


def test_leave_says_what_is_left_to_do(cli: Cli, cluster: FakeCluster) -> None:
    cluster.leave_warnings = ("remove it with `swarmctl node rm`",)
    answer = cli("swarm", "leave", "--force")
    assert answer.out == "Node left the swarm.\n"
    assert answer.err == "Warning: remove it with `swarmctl node rm`\n"
    assert cluster.last(LeaveRequest).force


# ---------------------------------------------------------------- contexts


def _credentials() -> Credentials:
    now_ns = SystemClock().now_ns()
    root, root_key = tls.new_root(now_ns=now_ns, cluster_id="c1")
    key = tls.new_key_pem()
    certificate = tls.sign(
        tls.load_csr(tls.csr_pem(key)),
        root_pem=root,
        root_key_pem=root_key,
        common_name="ada",
        unit=tls.OU_ADMIN,
        organization="c1",
        now_ns=now_ns,
        lifetime_ns=30 * 24 * 3600 * 10**9,
    )
    return Credentials(root, certificate, key)


@pytest.mark.parametrize(
    ("follows", "age_s", "kept_up"),
    [
        pytest.param(True, renewal.ADDRESSES_S * 2, True, id="old"),
        pytest.param(True, 0.0, False, id="fresh"),
        pytest.param(False, renewal.ADDRESSES_S * 2, False, id="with addresses of its own"),
    ],
)
async def test_a_context_keeps_up_with_the_managers(
    cli: Cli, cluster: FakeCluster, follows: bool, age_s: float, kept_up: bool
) -> None:
    mine = _credentials()
    cluster.objects[Kind.CLUSTER] = [Cluster(id="c1", root_ca_pem=mine.root_ca_pem)]
    cluster.info = GetInfoResponse(manager_addrs=("a:1", "b:2"))
    contexts = Contexts(cli.config)
    contexts.add(Context(name="prod", addresses=("a:1",), credentials=mine, follows=follows))
    written_s = time.time() - age_s
    os.utime(cli.config / "contexts" / "prod.json", (written_s, written_s))
    async with Channel.unix(str(cli.socket)) as channel:
        kept = await keep_good(
            mine,
            context="prod",
            contexts=contexts,
            control=ControlClient(channel),
            certificates=CertificatesClient(channel),
        )
    assert kept == mine
    assert contexts.get("prod").addresses == (("a:1", "b:2") if kept_up else ("a:1",))
    asked = [c for c in cluster.calls if isinstance(c, GetInfoRequest)]
    assert bool(asked) == kept_up
    assert contexts.get("prod").credentials == mine
