"""Containers, agents, the manager and the network are taken away; tasks are neither lost nor doubled."""

import time
from collections.abc import Iterator

import pytest

from deploy.testbed import Bed, Host
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

REPLICAS = 6
DELAY_S = 1.0


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture
def web(cluster: Cluster) -> Iterator[Cluster]:
    cluster.ctl(
        *("service", "create", "--name", "web", "--replicas", str(REPLICAS)),
        *("--restart-delay", f"{DELAY_S:g}s", "--stop-grace-period", "0s"),
        *("--publish", "4001:80", "web:latest"),
    )
    yield cluster
    cluster.ctl("service", "rm", "web")
    wait_for("no container is left", lambda: not any(cluster.containers(h) for h in cluster.hosts))


def all_running(cluster: Cluster) -> bool:
    return cluster.replicas("web") == f"{REPLICAS}/{REPLICAS}"


def live(cluster: Cluster) -> dict[str, str]:
    """Running containers by id, with their hosts."""
    return {c: h.name for h in cluster.hosts for c in cluster.containers(h, every=False)}


def test_a_killed_container_is_replaced_after_the_restart_delay(web: Cluster) -> None:
    victim, name = next(iter(live(web).items()))
    host = next(h for h in web.hosts if h.name == name)
    killed = time.monotonic()
    host.docker("kill", victim)
    wait_for("the failure is seen", lambda: not all_running(web))
    wait_for("a replacement runs", lambda: all_running(web))
    assert DELAY_S <= time.monotonic() - killed < DELAY_S + 8
    ended = [t for t in web.tasks("web") if str(t["CurrentState"]).startswith("Failed")]
    assert len(ended) == 1
    assert "137" in ended[0]["Error"]


@pytest.mark.parametrize("which", [1, 0], ids=["agent", "manager"])
def test_kill_9_of_a_daemon_loses_no_task_and_starts_none_twice(web: Cluster, which: int) -> None:
    before = live(web)
    tasks = {t["ID"] for t in web.running("web")}
    host = web.hosts[which]
    host.kill("swarmd")
    assert live(web) == before, "containers must go on without their agent"
    host.start_swarmd()
    wait_for("the cluster is whole again", lambda: all_running(web))
    wait_for(
        "all nodes are ready",
        lambda: all(n["Status"] == "Ready" for n in web.json("node", "ls")),
    )
    assert live(web) == before
    assert {t["ID"] for t in web.running("web")} == tasks
    assert {web.ask(host, 4001) for _ in range(20)}


def test_what_happened_while_the_agent_was_away_is_reported(web: Cluster) -> None:
    host = next(h for h in web.hosts[1:] if web.containers(h, every=False))
    victim = web.containers(host, every=False)[0]
    host.kill("swarmd")
    host.docker("kill", victim)
    host.start_swarmd()
    wait_for(
        "the task is failed",
        lambda: any(str(t["CurrentState"]).startswith("Failed") for t in web.tasks("web")),
    )
    wait_for("a replacement runs", lambda: all_running(web))
    assert len(live(web)) == REPLICAS


def test_kill_9_of_the_manager_keeps_every_acknowledged_change(web: Cluster) -> None:
    manager = web.hosts[0]
    for round_ in range(3):
        web.ctl("service", "update", "-d", "--label-add", f"round={round_}", "web")
        web.ctl(
            "service", "create", "-d", "--name", f"kept{round_}", "--replicas", "0", "web:latest"
        )
        manager.kill("swarmd")
        manager.start_swarmd()
        names = {s["Name"] for s in web.json("service", "ls")}
        assert names == {"web", *(f"kept{i}" for i in range(round_ + 1))}
    wait_for("the cluster is whole again", lambda: all_running(web))
    for round_ in range(3):
        web.ctl("service", "rm", f"kept{round_}")


def test_a_host_cut_off_is_replaced_and_its_old_tasks_stop_when_it_heals(web: Cluster) -> None:
    lost = next(h for h in web.hosts[1:] if web.containers(h, every=False))
    others = [h for h in web.hosts if h is not lost]
    cut = time.monotonic()
    lost.cut()
    wait_for(
        "replacements run elsewhere",
        lambda: sum(len(web.containers(h, every=False)) for h in others) == REPLICAS,
        timeout_s=20,
        every_s=0.05,
    )
    took = time.monotonic() - cut
    assert web.containers(lost, every=False), "tasks go on while no manager answers"
    _hold_until(cut + 10)
    lost.heal()
    wait_for(
        "the old tasks are stopped",
        lambda: sum(len(web.containers(h, every=False)) for h in web.hosts) == REPLICAS,
    )
    wait_for("the cluster is whole", lambda: all_running(web))
    print(f"replacements ran {took:.2f} s after the cut")
    # The bound of the specification is 5 s; twice that is where something is broken, not slow.
    assert took < 10


def test_a_drained_host_is_emptied_and_comes_back(web: Cluster) -> None:
    host = web.hosts[2]
    web.ctl("node", "update", "--availability", "drain", host.name)
    wait_for("no container runs there", lambda: not web.containers(host, every=False))
    wait_for("all replicas run elsewhere", lambda: all_running(web))
    web.ctl("node", "update", "--availability", "active", host.name)
    web.ctl("service", "scale", f"web={REPLICAS + 2}")
    assert web.containers(host, every=False), "an active node takes new tasks again"
    web.ctl("service", "scale", f"web={REPLICAS}")


def test_a_node_removed_while_cut_off_stops_its_tasks_when_it_is_back(cluster: Cluster) -> None:
    lost = cluster.hosts[2]
    cluster.ctl(
        *("service", "create", "--name", "stray", "--constraint", f"node.hostname=={lost.name}"),
        *("--stop-grace-period", "0s", "web:latest"),
    )
    lost.cut()
    wait_for(
        "the node is down",
        lambda: any(
            n["Hostname"] == lost.name and n["Status"] == "Down" for n in cluster.json("node", "ls")
        ),
    )
    cluster.ctl("node", "rm", "--force", lost.name)
    assert cluster.containers(lost, every=False)
    lost.heal()
    wait_for("its tasks are gone", lambda: not cluster.containers(lost))
    cluster.ctl("service", "rm", "stray")
    lost.swarmctl("swarm", "leave")
    token = cluster.ctl("swarm", "join-token", "-q", "worker").strip()
    lost.swarmctl("swarm", "join", "--token", token, f"{cluster.hosts[0].address}:2377")


def _hold_until(when: float) -> None:
    """The cut lasts as long as the case says, whatever happened meanwhile."""
    wait_for("the cut has lasted", lambda: time.monotonic() >= when, timeout_s=30)


def test_the_engine_restarting_does_not_lose_tasks(web: Cluster) -> None:
    host: Host = next(h for h in web.hosts[1:] if web.containers(h, every=False))
    host.stop("dockerd")
    host.start_docker()
    wait_for(
        "all replicas run", lambda: all_running(web) and len(live(web)) == REPLICAS, timeout_s=60
    )
