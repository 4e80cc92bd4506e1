"""Managers join, leave, are promoted and demoted over and over while clients are at work: nothing
acknowledged is lost and no task notices.

MEMBERSHIP_ROUNDS=n sets how often; once of each kind by default.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from deploy.testbed import Bed, Host
from tests.e2e.cluster import wait_for
from tests.e2e.load import Load
from tests.e2e.managers import Managers, etcds
from tests.e2e.scene import Scene

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROUNDS = int(os.environ.get("MEMBERSHIP_ROUNDS", "3"))
ROUND_S = 60.0  # limit of one round
CHANGED_S = 40.0


@pytest.fixture
def scene(bed: Bed) -> Iterator[Scene]:
    cluster = Managers(bed, managers=3, workers=2)
    cluster.up("--store", "etcd")
    yield Scene(cluster)
    cluster.down()


def reachable(cluster: Managers, through: Host, host: Host) -> None:
    wait_for(
        f"{host.name} is a member, ready and reachable",
        lambda: (
            (shown := cluster.standing(through).get(host.name, ("", "")))[0] == "Ready"
            and shown[1] in ("Reachable", "Leader")
        ),
        timeout_s=CHANGED_S,
    )


def worker(cluster: Managers, through: Host, host: Host) -> None:
    wait_for(
        f"{host.name} is a worker",
        lambda: cluster.standing(through).get(host.name) == ("Ready", "") and not etcds(host),
        timeout_s=CHANGED_S,
    )


def promote_and_demote(cluster: Managers, load: Load, host: Host, through: Host) -> None:
    """A worker becomes a manager for a while."""
    through.swarmctl("node", "promote", host.name)
    reachable(cluster, through, host)
    load.progress()
    through.swarmctl("node", "demote", host.name)
    worker(cluster, through, host)


def demote_and_promote(cluster: Managers, load: Load, host: Host, through: Host) -> None:
    """A manager, the leader perhaps, becomes a worker for a while."""
    through.swarmctl("node", "demote", host.name)
    worker(cluster, through, host)
    load.progress([h.name for h in cluster.managers if h is not host])
    through.swarmctl("node", "promote", host.name)
    reachable(cluster, through, host)


def leave_and_join(cluster: Managers, load: Load, host: Host, through: Host) -> None:
    """A manager, the leader perhaps, leaves and comes back as a new node."""
    (old,) = (i for name, i in cluster.ids(through).items() if name == host.name)
    host.swarmctl("swarm", "leave", "--force")
    load.progress([h.name for h in cluster.managers if h is not host])
    wait_for(
        f"{host.name} is down",
        lambda: cluster.standing(through).get(host.name) == ("Down", ""),
        timeout_s=CHANGED_S,
    )
    through.swarmctl("node", "rm", old)
    cluster.join(host, "manager", through=through)
    reachable(cluster, through, host)


@pytest.mark.long  # each step by itself: test_managers.py, test_roles.py
@pytest.mark.timeout(60 + int(ROUND_S) * ROUNDS)
def test_managers_come_and_go_and_nothing_is_lost(scene: Scene) -> None:
    cluster = scene.cluster
    rng = random.Random(1)
    kinds = (promote_and_demote, demote_and_promote, leave_and_join)
    with scene.load() as load:
        for number in range(ROUNDS):
            kind = kinds[number % len(kinds)]
            host = rng.choice(cluster.workers if kind is promote_and_demote else cluster.managers)
            through = rng.choice([h for h in cluster.managers if h is not host])
            kind(cluster, load, host, through)
            took_s = load.progress()
            print(f"{number + 1}: {kind.__name__} {host.name} through {through.name}, {took_s:.2f}")
