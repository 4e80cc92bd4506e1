"""Every stack of the corpus in a cluster: its plan says what its deploy then does."""

from __future__ import annotations

import pytest

from swarm.v1 import (
    DeployStackRequest,
    GenericResource,
    Gpu,
    NodeRole,
    PlannedChange,
    PlanStackResponse,
    ServiceSpec,
    StackSpec,
)
from tests.corpus.cases import loaded, names
from tests.unit.api.conftest import opened
from tests.unit.api.harness import CONTEXT, Api
from tests.unit.api.harness import config as config_spec
from tests.unit.api.harness import network as network_spec
from tests.unit.api.harness import secret as secret_spec
from tests.unit.control.world import CPU, GIB, make_node

# A small cluster in which most of the corpus finds room: three managers, a GPU host and a big one.
# Labels are those that the stacks ask for; what nobody has, stays pending, which a plan must tell.
NODES = (
    make_node(
        "m1",
        role=NodeRole.MANAGER,
        hostname="db-1",
        labels={"db": "primary", "traefik-public.certificates": "true", "mongo.replica": "1"},
    ),
    make_node("m2", role=NodeRole.MANAGER, labels={"zone": "a", "elastic": "true", "kafka": "1"}),
    make_node("m3", role=NodeRole.MANAGER, labels={"zone": "b", "rabbitmq": "true"}),
    make_node(
        "gpu",
        cpu=64 * CPU,
        memory=512 * GIB,
        labels={"accelerator": "gpu", "gpu.model": "h100", "rack": "1", "fabric": "ib0"},
        generic=(
            GenericResource(kind="NVIDIA-GPU", count=8),
            GenericResource(kind="fpga", count=4),
        ),
        gpus=tuple(
            Gpu(
                uuid=f"GPU-{i}",
                index=i,
                model="NVIDIA H100",
                memory_bytes=80 * GIB,
                numa_node=-1,
                healthy=True,
            )
            for i in range(4)
        ),
    ),
    make_node("big", cpu=128 * CPU, memory=1024 * GIB, labels={"ci": "true", "rack": "2"}),
)


async def prepare(api: Api, spec: StackSpec) -> None:
    """The nodes, and what the stack expects to be there."""
    await api.put(*NODES)
    for name in spec.external_networks:
        await api.create(network=network_spec(name, attachable=True))
    for name in spec.external_secrets:
        await api.create(secret=secret_spec(name))
    for name in spec.external_configs:
        await api.create(config=config_spec(name))


async def plan(api: Api, spec: StackSpec) -> PlanStackResponse:
    return await api.control.plan_stack(DeployStackRequest(spec=spec), CONTEXT)


def made(spec: StackSpec) -> list[str]:
    """The names of all objects of the stack."""
    kinds = (spec.services, spec.networks, spec.secrets, spec.configs, spec.volumes)
    return sorted(each.name for objects in kinds for each in objects)


def tasks_wanted(spec: ServiceSpec) -> int | None:
    """How many tasks the service has at once; None where the nodes decide."""
    mode = spec.mode
    assert mode is not None
    if mode.replicated is not None:
        return 1 if mode.replicated.replicas is None else mode.replicated.replicas
    return None


def actions(changes: list[PlannedChange]) -> dict[tuple[str, str], str]:
    found = [c.change for c in changes if c.change is not None]
    return {(c.kind.name, c.name): c.action for c in found}


@pytest.mark.parametrize("name", names())
async def test_a_plan_says_what_the_deploy_then_does(name: str) -> None:
    spec = loaded(name).spec
    async with opened() as api:
        await prepare(api, spec)
        before = api.store.revision
        first = await plan(api, spec)
        assert api.store.revision == before
        assert first.differs
        assert first.settled
        planned = actions(list(first.changes))
        assert set(planned.values()) == {"created"}
        assert sorted(object_name for _, object_name in planned) == made(spec)

        done = await api.control.deploy_stack(
            DeployStackRequest(spec=spec, expected_version=first.version), CONTEXT
        )
        assert {(c.kind.name, c.name): c.action for c in done.changes} == planned

        second = await plan(api, spec)
        assert not second.differs
        assert set(actions(list(second.changes)).values()) == {"unchanged"}
        assert [c for c in second.changes if c.fields or c.effect] == []


@pytest.mark.parametrize("name", names())
async def test_a_plan_accounts_for_every_replica(name: str) -> None:
    """A replica that a first deploy asks for gets a node, or is said to stay pending, or waits."""
    spec = loaded(name).spec
    async with opened() as api:
        await prepare(api, spec)
        found = await plan(api, spec)
    placements = {c.change.name: c.placement for c in found.changes if c.change and c.placement}
    for service in spec.services:
        placement = placements[service.name]
        assert placement.kept == placement.stopped == 0
        placed = sum(n.tasks for n in placement.nodes)
        assert placed + sum(p.tasks for p in placement.pending) == placement.created
        wanted = tasks_wanted(service)
        if placement.waits:
            assert service.depends_on
        elif wanted is not None:
            assert placement.created == wanted, service.name
