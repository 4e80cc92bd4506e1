"""The cluster's networks as bridges of one engine."""

from __future__ import annotations

import asyncio
import json

import pytest

from agent.runtime.base import Failed, Rejected
from swarm.ids import new_id, system_rng
from swarm.v1 import IpamConfig, IpamOptions, Network, NetworkAttachmentSpec, NetworkSpec
from tests.integration.runtime_docker.conftest import Harness

pytestmark = [pytest.mark.docker, pytest.mark.root]


def network(
    docker: Harness,
    name: str,
    subnet: str = "",
    *,
    users_choice: bool = False,
    internal: bool = False,
) -> Network:
    configs = (IpamConfig(subnet=subnet),) if subnet else ()
    made = Network(
        id=new_id(system_rng()),
        spec=NetworkSpec(
            name=name,
            labels={"com.docker.stack.namespace": "app"},
            internal=internal,
            ipam=IpamOptions(configs=configs) if users_choice else None,
        ),
        ipam=configs,
    )
    docker.networks[made.id] = made
    return made


def listed(docker: Harness, made: Network) -> list[str]:
    label = f"label=swarm-py.network.id={made.id}"
    return docker.host.docker("network", "ls", "-q", "--no-trunc", "--filter", label).split()


async def test_many_tasks_at_once_make_one_network(docker: Harness) -> None:
    made = network(docker, "app_default", "10.60.1.0/24")
    attachment = NetworkAttachmentSpec(target=made.id)
    works = [docker.work("sleep", "100", networks=[attachment]) for _ in range(6)]
    started = await asyncio.gather(*(docker.start(work) for work in works))
    (engine_id,) = listed(docker, made)
    found = json.loads(docker.host.docker("network", "inspect", engine_id))[0]
    assert found["Name"].startswith("app_default.")
    assert found["Driver"] == "bridge"
    assert found["Labels"]["com.docker.stack.namespace"] == "app"
    assert {s.address.rpartition(".")[0] for s in started} == {"10.60.1"}
    assert all(s.networks[0].network_id == made.id for s in started)


async def test_two_agents_on_one_engine_share_the_network(docker: Harness) -> None:
    made = network(docker, "app_shared", "10.60.2.0/24")
    other = Harness(docker.host, new_id(system_rng()))
    other.networks = docker.networks
    await other.open()
    try:
        attachment = NetworkAttachmentSpec(target="app_shared")
        await asyncio.gather(
            docker.run("sleep", "100", networks=[attachment]),
            other.run("sleep", "100", networks=[attachment]),
        )
        assert len(listed(docker, made)) == 1
        # The first that leaves does not take it from the other.
        await docker.runtime.release_network(made.id)
        assert len(listed(docker, made)) == 1
    finally:
        await other.close()
        other.drop_containers()


async def test_tasks_find_each_other_by_service_and_alias(docker: Harness) -> None:
    made = network(docker, "app_names")
    _, started = await docker.run(
        "sleep", "100", networks=[NetworkAttachmentSpec(target=made.id, aliases=("db", "app_db"))]
    )
    work, _ = await docker.run("sleep", "100", networks=[NetworkAttachmentSpec(target=made.id)])
    for name in ("db", "app_db", "app_web"):
        code, said = await docker.inside(work, "nslookup", name)
        assert code == 0, said
        assert name == "app_web" or started.address in said


async def test_a_task_is_on_all_its_networks_and_the_first_gives_its_address(
    docker: Harness,
) -> None:
    front = network(docker, "app_front", "10.60.4.0/24")
    back = network(docker, "app_back", "10.60.5.0/24")
    work = docker.work(
        "sleep",
        "100",
        networks=[
            NetworkAttachmentSpec(target=back.id),
            NetworkAttachmentSpec(target=front.id, priority=10),
        ],
    )
    result = await docker.start(work)
    assert result.address.startswith("10.60.4.")
    assert [n.network_id for n in result.networks] == [front.id, back.id]
    code, said = await docker.inside(work, "ip", "-o", "-4", "addr")
    assert code == 0
    assert "10.60.4." in said
    assert "10.60.5." in said
    # An agent that comes back knows them too.
    runtime = await docker.restart()
    (found,) = await runtime.adopt()
    assert found.started == result


async def test_a_fixed_address_is_given(docker: Harness) -> None:
    made = network(docker, "app_fixed", "10.60.6.0/24", users_choice=True)
    attachment = NetworkAttachmentSpec(target=made.id, ipv4_address="10.60.6.77")
    _, started = await docker.run("sleep", "100", networks=[attachment])
    assert started.address == "10.60.6.77"


async def test_an_internal_network_has_no_way_out(docker: Harness) -> None:
    made = network(docker, "app_internal", internal=True)
    work, started = await docker.run(
        "sleep", "100", networks=[NetworkAttachmentSpec(target=made.id)]
    )
    assert started.address
    code, _ = await docker.inside(work, "nc", "-w", "1", docker.host.address, "1")
    assert code != 0


async def test_a_released_network_is_gone_and_comes_back_when_needed(docker: Harness) -> None:
    made = network(docker, "app_again", "10.60.8.0/24")
    attachment = NetworkAttachmentSpec(target=made.id)
    work, _ = await docker.run("sleep", "100", networks=[attachment])
    await docker.runtime.remove(work.task_id)
    await docker.runtime.release_network(made.id)
    await docker.runtime.release_network(made.id)
    assert listed(docker, made) == []
    await docker.run("sleep", "100", networks=[attachment])
    assert len(listed(docker, made)) == 1


async def test_a_network_removed_by_hand_is_made_again(docker: Harness) -> None:
    made = network(docker, "app_removed")
    attachment = NetworkAttachmentSpec(target=made.id)
    work, _ = await docker.run("sleep", "100", networks=[attachment])
    await docker.runtime.remove(work.task_id)
    docker.host.docker("network", "rm", *listed(docker, made))
    _, started = await docker.run("sleep", "100", networks=[attachment])
    assert started.address


async def test_a_network_removed_between_prepare_and_start_is_made_again(docker: Harness) -> None:
    made = network(docker, "app_between")
    work = docker.work("sleep", "100", networks=[NetworkAttachmentSpec(target=made.id)])
    await docker.runtime.prepare(work)
    docker.host.docker("network", "rm", *listed(docker, made))
    assert (await docker.runtime.start(work)).address
    assert docker.events_of(work) == []


async def test_a_taken_subnet_is_replaced_unless_the_user_chose_it(docker: Harness) -> None:
    first = network(docker, "app_first", "10.60.10.0/24")
    await docker.run("sleep", "100", networks=[NetworkAttachmentSpec(target=first.id)])
    second = network(docker, "app_second", "10.60.10.0/24")
    _, started = await docker.run(
        "sleep", "100", networks=[NetworkAttachmentSpec(target=second.id)]
    )
    assert started.address
    assert not started.address.startswith("10.60.10.")
    third = network(docker, "app_third", "10.60.10.0/24", users_choice=True)
    with pytest.raises((Failed, Rejected), match="app_third.*overlaps"):
        await docker.run("sleep", "100", networks=[NetworkAttachmentSpec(target=third.id)])
