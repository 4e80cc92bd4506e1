"""swarm backup, restore and audit: files, checks, and what people read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from swarm.backup import Header, Keys, Row, Writer
from swarm.v1 import AuditRecord, BackupRequest, Kind, ListAuditRequest, RestoreRequest
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster

TIME_NS = 1_795_250_000_000_000_005


def pieces() -> list[bytes]:
    header = Header(
        cluster_id="c1",
        node_id="n1",
        revision=7,
        time_ns=TIME_NS,
        version="0.1.0",
        cluster_name="default",
        counts={"service": 2},
        rows=2,
    )
    rows = [
        Row(int(Kind.SERVICE), id_, 3, b"\x01" + msgspec.msgpack.encode({"id": id_}))
        for id_ in ("s1", "s2")
    ]
    writer = Writer()
    return [writer.begin(header, Keys(seal_key=b"k" * 32)), *writer.rows(rows), writer.end()]


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("b"))


def test_backup_is_written_whole_and_private(
    cli: Cli, cluster: FakeCluster, tmp_path: Path
) -> None:
    cluster.backup = pieces()
    path = tmp_path / "b"
    answer = cli("swarm", "backup", str(path))
    assert (answer.code, answer.out) == (0, "")
    assert answer.err == (
        "Backed up cluster c1 (default), revision 7, 2026-11-21T08:33:20.000000005Z, written by "
        "manager n1 (0.1.0)\n2 objects: 2 service\n"
        "It holds the cluster's keys and is not sealed: keep it private.\n"
    )
    assert path.read_bytes() == b"".join(pieces())
    assert path.stat().st_mode & 0o777 == 0o600
    assert cluster.last(BackupRequest)
    assert cli("swarm", "backup", str(path)).code == 5
    assert cli("swarm", "backup", "--force", str(path)).code == 0
    assert files(tmp_path) == ["b"]


def test_backup_to_a_pipe_has_nothing_else_on_it(cli: Cli, cluster: FakeCluster) -> None:
    cluster.backup = pieces()
    done = cli.process("swarm", "backup", "-")
    assert done.stdout == b"".join(pieces())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_backup_that_ends_early_leaves_no_file(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, kept: int
) -> None:
    cluster.backup = pieces()[:kept]
    answer = cli("swarm", "backup", str(tmp_path / "b"))
    assert answer.code == 2 and "as it came from the manager" in answer.err
    assert files(tmp_path) == []


def test_verify_tells_what_is_wrong_and_where(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "b"
    data = b"".join(pieces())
    path.write_bytes(data)
    assert "The backup is whole: cluster c1" in cli.ok("swarm", "backup", "--verify", str(path))
    path.write_bytes(data[:40])
    answer = cli("swarm", "backup", "--verify", str(path))
    assert answer.code == 2
    assert f"{path} is damaged at byte 40: it ends here, in the middle" in answer.err
    path.write_bytes(b"something else")
    assert "is no backup of a cluster" in cli("swarm", "backup", "--verify", str(path)).err
    assert cli("swarm", "backup", "--verify", str(tmp_path / "none")).code == 4


def test_sealed_backup_needs_its_passphrase(cli: Cli, cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.backup = pieces()
    good, bad, path = tmp_path / "good", tmp_path / "ill", tmp_path / "b"
    good.write_text("correct horse\nsecond line\n")
    bad.write_text("another horse\n")
    answer = cli("swarm", "backup", "--passphrase-file", str(good), str(path))
    assert answer.code == 0 and "not sealed" not in answer.err
    assert b"cluster_id" not in path.read_bytes()
    words = ("swarm", "backup", "--verify")
    assert "The backup is whole" in cli.ok(*words, "--passphrase-file", str(good), str(path))
    assert cli(*words, str(path)).code == 8
    assert (
        "cannot be opened with this passphrase"
        in cli(*words, "--passphrase-file", str(bad), str(path)).err
    )
    assert cli.ok("swarm", "restore", "--passphrase-file", str(good), str(path))
    sent = b"".join(c.data for c in cluster.calls if isinstance(c, RestoreRequest))
    assert sent == b"".join(pieces())


def test_restore_sends_how_to_listen_then_the_backup_and_tells_the_outcome(
    cli: Cli, cluster: FakeCluster, tmp_path: Path
) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"".join(pieces()))
    out = cli.ok("swarm", "restore", "--advertise-addr", "10.0.0.1", str(path))
    calls = [c for c in cluster.calls if isinstance(c, RestoreRequest)]
    assert calls[0].start is not None and calls[0].start.advertise_addr == "10.0.0.1"
    assert b"".join(c.data for c in calls) == path.read_bytes()
    assert calls[-1].finish and not any(c.finish for c in calls[:-1])
    assert out.startswith("Restored cluster c1 at revision 1000000007 (backup: 7): this node (n1)")


def test_damaged_file_is_not_sent(cli: Cli, cluster: FakeCluster, tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"".join(pieces())[:-1])
    assert cli("swarm", "restore", str(path)).code == 2
    assert not any(isinstance(c, RestoreRequest) for c in cluster.calls)


def test_full_disk_is_said(cli: Cli, cluster: FakeCluster) -> None:
    cluster.backup = pieces()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "swarm", "backup", "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=cli.environment(),
            timeout=30,
            check=False,
        )
    assert done.returncode == 9 and b"No space left on device; no backup was made" in done.stderr


# ------------------------------------------------------------------ audit


def test_audit_is_a_table_and_its_filters_reach_the_manager(cli: Cli, cluster: FakeCluster) -> None:
    cluster.audit = [
        AuditRecord(
            time_ns=TIME_NS,
            who="admin ada",
            peer="ipv4:10.0.0.1:9",
            method="Create",
            what="create",
            kind="service",
            name="web",
            outcome="done",
        ),
        AuditRecord(
            time_ns=TIME_NS,
            who="worker n2",
            peer="ipv4:10.0.0.2:9",
            method="Session",
            outcome="denied",
            error="Removed: node n2 was removed",
        ),
    ]
    assert cli.ok("swarm", "audit").splitlines() == [
        "TIME                   WHO         FROM              WHAT      KIND      NAME      OUTCOME",
        "2026-11-21T08:33:20Z   admin ada   ipv4:10.0.0.1:9   create    service   web       done",
        "2026-11-21T08:33:20Z   worker n2   ipv4:10.0.0.2:9   Session                       denied: Removed",
    ]
    assert "denied: Removed: node n2 was removed" in cli.ok("swarm", "audit", "--no-trunc")
    cli.ok(
        "swarm",
        "audit",
        "-n",
        "all",
        "--since",
        "2026-11-21",
        "--filter",
        "who=admin ada",
        "--format",
        "json",
    )
    request = cluster.last(ListAuditRequest)
    assert (request.limit, request.since_ns) == (0, 1_795_219_200_000_000_000)
    assert [(f.key, f.values) for f in request.filters] == [("who", ("admin ada",))]


def test_audit_names_records_that_cannot_be_read(cli: Cli, cluster: FakeCluster) -> None:
    cluster.damaged = ("/x/audit-000001.jsonl, line 2: garbage",)
    answer = cli("swarm", "audit")
    assert answer.code == 0
    assert "Warning: this record cannot be read: /x/audit-000001.jsonl, line 2" in answer.err
    assert cli("swarm", "audit", "-n", "0").code == 2
