"""Several managers on the test bed, as their users see them: they come, go, fail and come back, any
of them serves, and no task notices.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deploy.testbed import Bed, Host
from swarm import tls
from swarm.v1 import (
    ConfigSpec,
    CreateRequest,
    GetRequest,
    Kind,
    NodeState,
    RemoveRequest,
    Spec,
)
from swarm.v1.services import ControlClient
from tests.e2e.cluster import wait_for
from tests.e2e.history import Run, check_runs
from tests.e2e.load import beating
from tests.e2e.managers import Managers, etcds, is_manager, kill, since_boot, start

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(180)]

REPLICAS = 4
# Agents of a manager that is gone are elsewhere within a second; more is waited for, so that a busy
# machine fails no test.
MOVED_S = 3.0


def fails(host: Host, *words: str) -> tuple[int, str]:
    """Runs swarmctl, which must fail; its exit code and what it said on stderr."""
    program = Path(sys.executable).parent / "swarmctl"
    command = host.command(program, "--host", f"unix://{host.swarm_socket}", *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0, done.stdout
    return done.returncode, done.stderr


def run_tasks(cluster: Managers, through: Host) -> None:
    async def create(control: ControlClient) -> None:
        spec = Spec(service=beating("web", REPLICAS, cluster.beats))
        await control.create(CreateRequest(spec=spec), timeout_s=10)

    cluster.ask(create, through)
    wait_for("all tasks beat", lambda: len(cluster.runs()) == REPLICAS)


def same_tasks(cluster: Managers, before: list[Run]) -> None:
    """The tasks that ran then run now, each started once."""
    since = since_boot()

    def beaten() -> bool:
        return all(run.last > since for run in cluster.runs())

    wait_for("all tasks beat on", beaten, timeout_s=5)
    after = cluster.runs()
    assert [r.task for r in after] == [r.task for r in before]
    assert not check_runs(after)


@pytest.fixture(scope="module")
def formed(bed: Bed) -> Iterator[tuple[Managers, list[Run]]]:
    """Made on the embedded store, with tasks, then joined by two managers more; the tasks before
    that.
    """
    cluster = Managers(bed, managers=3, workers=2)
    first, *more = cluster.managers
    start(*cluster.hosts)
    words = ("--advertise-addr", first.address, "--availability", "drain", "--store", "embedded")
    first.swarmctl("swarm", "init", *words)
    for host in cluster.workers:
        cluster.join(host, "worker")
    assert cluster.info(first).store_engine == "embedded"
    run_tasks(cluster, first)
    before = cluster.runs()
    for host in more:
        cluster.join(host, "manager")
    cluster.converge()
    yield cluster, before
    cluster.down()


@pytest.fixture
def cluster(formed: tuple[Managers, list[Run]]) -> Iterator[Managers]:
    """Whole before and after."""
    made, before = formed
    yield made
    made.converge()
    same_tasks(made, before)


def statuses(host: Host, *options: str) -> dict[str, tuple[str, str]]:
    """STATUS and MANAGER STATUS by host name, as `node ls` shows them."""
    form = "{{.Hostname}}|{{.Status}}|{{.ManagerStatus}}"
    rows = host.swarmctl(*options, "node", "ls", "--format", form).splitlines()
    return {name: (status, manager) for name, status, manager in (r.split("|") for r in rows)}


def test_state_has_moved_to_etcd_and_tasks_went_on(formed: tuple[Managers, list[Run]]) -> None:
    cluster, before = formed
    for host in cluster.managers:
        assert cluster.info(host).store_engine == "etcd"
        assert len(etcds(host)) == 1
    assert len(before) == REPLICAS
    same_tasks(cluster, before)


def test_each_manager_knows_at_once_what_another_was_told(cluster: Managers) -> None:
    async def create(control: ControlClient, name: str) -> None:
        spec = Spec(config=ConfigSpec(name=name, data=b"x"))
        await control.create(CreateRequest(spec=spec), timeout_s=10)

    async def get(control: ControlClient, name: str) -> None:
        await control.get(GetRequest(kind=Kind.CONFIG, ref=name), timeout_s=10)

    async def remove(control: ControlClient, name: str) -> None:
        await control.remove(RemoveRequest(kind=Kind.CONFIG, ref=name), timeout_s=10)

    for number, writer in enumerate(cluster.managers * 2):
        name = f"c{number}"
        cluster.ask(partial(create, name=name), writer, stale=False)
        for reader in cluster.managers:
            cluster.ask(partial(get, name=name), reader, stale=False)
        cluster.ask(partial(remove, name=name), cluster.managers[number % 2], stale=False)


def test_node_ls_tells_leader_and_others_at_each_manager(cluster: Managers) -> None:
    leader = cluster.leader()
    for host in cluster.managers:
        shown = statuses(host)
        assert {name: manager for name, (_, manager) in shown.items()} == {
            **{h.name: "Leader" if h is leader else "Reachable" for h in cluster.managers},
            **{h.name: "" for h in cluster.workers},
        }


def sessions(cluster: Managers, through: Host) -> dict[str, str]:
    """Whose manager holds each ready node's session, by host names."""
    nodes = cluster.nodes(through)
    names = {node.id: name for name, node in nodes.items()}
    return {
        name: names.get(node.status.manager_id, "")
        for name, node in nodes.items()
        if node.status is not None and node.status.state == NodeState.READY
    }


def test_agents_of_a_killed_manager_move_and_it_is_shown_as_unreachable(
    cluster: Managers,
) -> None:
    held = sessions(cluster, cluster.managers[0])
    lost = next(h for h in cluster.managers if h.name in {held[w.name] for w in cluster.workers})
    others = [h for h in cluster.managers if h is not lost]
    kill(lost)
    rest = {h.name for h in cluster.hosts if h is not lost}
    names = {h.name for h in others}

    def moved() -> bool:
        now = sessions(cluster, others[0])
        return all(now.get(name) in names for name in rest)

    wait_for("all agents have moved", moved, timeout_s=MOVED_S, every_s=0.05)
    wait_for(
        "it is unreachable and down",
        lambda: cluster.standing(others[0]).get(lost.name) == ("Down", "Unreachable"),
    )
    assert statuses(others[0])[lost.name] == ("Down", "Unreachable")
    assert all(cluster.standing(others[1])[name][0] == "Ready" for name in rest)
    start(lost)


def test_worker_becomes_a_manager_and_a_worker_again(cluster: Managers) -> None:
    host, through = cluster.workers[0], cluster.managers[1]
    through.swarmctl("node", "promote", host.name)
    wait_for(
        "it is a member", lambda: cluster.standing(through).get(host.name) == ("Ready", "Reachable")
    )
    wait_for("it serves", lambda: cluster.info(host, stale=False).managers == 4)
    host.swarmctl("node", "demote", host.name)
    wait_for(
        "it is none any more", lambda: cluster.standing(through).get(host.name) == ("Ready", "")
    )
    wait_for("its etcd is gone", lambda: not etcds(host))
    assert not is_manager(cluster.nodes(through)[host.name])
    code, said = fails(host, "node", "ls")
    assert code == 9 and "not a swarm manager" in said
    wait_for("its worker is connected", lambda: "Connected: true" in host.swarmctl("info"))


def test_logs_come_from_every_manager_wherever_the_session_is(cluster: Managers) -> None:
    first = cluster.managers[0]
    words = ("--mode", "global", "--runtime", "process", "--constraint", "node.role==worker")
    first.swarmctl(
        *("service", "create", "--name", "talk", *words, "--env", "NAME={{.Node.Hostname}}"),
        *("sh", "-c", 'echo "here is $NAME"; exec sleep 1000000'),
    )
    wanted = {f"here is {h.name}" for h in cluster.workers}
    for host in cluster.managers:

        def heard(host: Host = host) -> bool:
            out = host.swarmctl("service", "logs", "--raw", "talk")
            return set(out.splitlines()) == wanted

        wait_for(f"{host.name} shows what all tasks said", heard, timeout_s=10)
        task = host.swarmctl("service", "ps", "-q", "--no-trunc", "talk").split()[0]
        assert host.swarmctl("exec", task, "echo", "in").strip() == "in"
    first.swarmctl("service", "rm", "talk")


def test_without_a_quorum_calls_fail_with_the_reason_and_stale_reads_work(
    cluster: Managers,
) -> None:
    left, *gone = cluster.managers
    kill(*gone)
    code, said = fails(left, "service", "ls")
    assert code in (9, 10)
    assert "quorum" in said or "managers" in said, said
    code, said = fails(left, "service", "create", "--name", "no", "--runtime", "process", "true")
    assert code in (9, 10), said
    assert "web" in left.swarmctl("--stale", "service", "ls")
    begun = time.monotonic()
    start(*gone)
    cluster.converge()
    print(f"whole {time.monotonic() - begun:.1f} s after the others' start")
    assert "no" not in left.swarmctl("service", "ls", "--format", "{{.Name}}").split()


def test_manager_that_leaves_is_no_member_and_may_join_again(cluster: Managers) -> None:
    stays, _, goes = cluster.managers
    code, said = fails(goes, "swarm", "leave")
    assert code == 5 and "--force" in said
    goes.swarmctl("swarm", "leave", "--force")
    wait_for("two are left", lambda: cluster.info(stays, stale=False).managers == 2)
    assert not etcds(goes)
    assert "Swarm: inactive" in goes.swarmctl("info")
    wait_for("it is down", lambda: cluster.standing(stays).get(goes.name) == ("Down", ""))
    stays.swarmctl("node", "rm", goes.name)
    cluster.join(goes, "manager", through=stays)
    wait_for(
        "it is a member", lambda: cluster.standing(stays).get(goes.name) == ("Ready", "Reachable")
    )


def test_leader_hands_over_when_it_is_demoted(cluster: Managers) -> None:
    leader = cluster.leader()
    others = [h for h in cluster.managers if h is not leader]
    others[0].swarmctl("node", "demote", leader.name)
    wait_for(
        "it is none any more", lambda: cluster.standing(others[0]).get(leader.name) == ("Ready", "")
    )
    assert sorted(cluster.standing(others[1])[h.name][1] for h in others) == ["Leader", "Reachable"]
    others[0].swarmctl("node", "promote", leader.name)
    wait_for(
        "it is one",
        lambda: cluster.standing(others[0]).get(leader.name, ("", ""))[1] == "Reachable",
    )


@pytest.mark.long  # with one manager: test_root_rotation.py
def test_root_is_rotated_on_all_managers_and_nothing_is_interrupted(cluster: Managers) -> None:
    before = {h.name: tls.split_pem(h.swarmctl("swarm", "ca")) for h in cluster.managers}
    rotating = cluster.managers[1]
    rotated = rotating.swarmctl("swarm", "ca", "--rotate", "--timeout", "60s")
    (new,) = tls.split_pem(rotated)
    for host in cluster.managers:
        assert tls.split_pem(host.swarmctl("swarm", "ca")) == (new,) != before[host.name]

    cluster.converge()
    # Members that start now prove themselves by it to those that did not.
    host = cluster.managers[2]
    kill(host)
    start(host)


def test_locked_managers_are_unlocked_one_by_one(cluster: Managers) -> None:
    first, second, _ = cluster.managers
    first.swarmctl("swarm", "update", "--autolock=true")
    key = second.swarmctl("swarm", "unlock-key", "-q").strip()
    try:
        kill(second)
        start(second)
        code, said = fails(second, "node", "ls")
        assert code == 9 and "needs to be unlocked" in said
        assert not etcds(second)
        wait_for(
            "two go on",
            lambda: cluster.standing(first).get(second.name, ("", ""))[1] == "Unreachable",
        )
        program = Path(sys.executable).parent / "swarmctl"
        url = f"unix://{second.swarm_socket}"
        second.run(program, "--host", url, "swarm", "unlock", stdin=f"{key}\n".encode())
        wait_for(
            "it is back",
            lambda: cluster.standing(first).get(second.name, ("", ""))[1] == "Reachable",
        )
    finally:
        first.swarmctl("swarm", "update", "--autolock=false")


# ------------------------------------------------------------------ what ends a cluster


@pytest.mark.long  # three managers that leave wait for others that will never answer
def test_cluster_is_forced_on_and_restored_from_its_backup(bed: Bed, tmp_path: Path) -> None:
    """Two of three managers are gone for good; later the third one as well."""
    cluster = Managers(bed, managers=3, workers=1, first=31)
    first, second, last = cluster.managers
    (worker,) = cluster.workers
    try:
        cluster.up("--store", "etcd")
        run_tasks(cluster, second)
        before = cluster.runs()
        file = tmp_path / "b.swarm"
        second.swarmctl("swarm", "backup", str(file))
        kill(first, second)
        code, said = fails(last, "service", "ls")
        assert code in (9, 10), said

        last.swarmctl(
            *("swarm", "init", "--force-new-cluster", "--advertise-addr", last.address),
        )
        wait_for(
            "it leads alone", lambda: cluster.standing(last).get(last.name) == ("Ready", "Leader")
        )
        wait_for(
            "the worker is there",
            lambda: cluster.standing(last).get(worker.name, ("", ""))[0] == "Ready",
        )
        wait_for(
            "the others are gone",
            lambda: cluster.standing(last).get(first.name, ("", ""))[0] == "Down",
        )
        same_tasks(cluster, before)
        assert "web" in last.swarmctl("service", "ls")
        last.swarmctl("service", "update", "-d", "--label-add", "a=b", "web")
        for host in (first, second):
            last.swarmctl("node", "rm", "--force", host.name)

        # Now this one's disk is lost as well: the backup is the second manager's, who has its place.
        kill(last)
        start(first, second, last)
        for host in (first, second, last):
            host.swarmctl("swarm", "leave", "--force", check=False)
        second.swarmctl("swarm", "restore", "--advertise-addr", second.address, str(file))
        wait_for(
            "it leads", lambda: cluster.standing(second).get(second.name) == ("Ready", "Leader")
        )
        assert "web" in second.swarmctl("service", "ls")
        wait_for(
            "the worker is back",
            lambda: cluster.standing(second).get(worker.name, ("", ""))[0] == "Ready",
        )
        same_tasks(cluster, before)
        second.swarmctl("service", "rm", "web")
    finally:
        cluster.down()
