"""Promotion, demotion and removal of managers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec import structs

from manager.api import ControlService, NodeFacts
from swarm import errors
from swarm.v1 import (
    Cluster,
    Kind,
    ManagerStatus,
    Node,
    NodeRole,
    NodeState,
    Reachability,
    Spec,
    UpdateRequest,
)
from tests.unit.api.conftest import opened
from tests.unit.api.harness import CONTEXT, Api, node

ETCD = "3.4.23"


def host(id_: str, *, etcd: str = ETCD, **fields: Any) -> Node:
    made = node(id_, **fields)
    assert made.description is not None
    return structs.replace(made, description=structs.replace(made.description, etcd_version=etcd))


def manager(id_: str, *, reachable: bool = True, member: bool = True, **fields: Any) -> Node:
    """One that is to be a manager; a `member` is one."""
    reach = Reachability.REACHABLE if reachable else Reachability.UNREACHABLE
    status = ManagerStatus(reachability=reach, addr=f"{id_}:2377") if member else None
    return structs.replace(
        host(id_, spec={"role": NodeRole.MANAGER}, **fields), manager_status=status
    )


async def of(api: Api, *nodes: Node, engine: str = "etcd") -> None:
    await api.put(structs.replace(api.stored(Cluster, "c"), store_engine=engine), *nodes)


async def change(control: ControlService, found: Node, role: NodeRole) -> None:
    assert found.spec is not None and found.meta is not None
    spec = Spec(node=structs.replace(found.spec, role=role))
    request = UpdateRequest(kind=Kind.NODE, id=found.id, version=found.meta.version, spec=spec)
    await control.update(request, CONTEXT)


async def promote(api: Api, id_: str) -> None:
    await change(api.control, api.stored(Node, id_), NodeRole.MANAGER)


async def demote(api: Api, id_: str) -> None:
    await change(api.control, api.stored(Node, id_), NodeRole.WORKER)


# ---------------------------------------------------------------- promotion


@pytest.mark.parametrize("engine", ["embedded", "etcd"])
async def test_a_node_with_etcd_is_promoted(api: Api, engine: str) -> None:
    await of(api, manager("m"), host("n1"), engine=engine)
    await promote(api, "n1")
    assert api.stored(Node, "n1").spec.role == NodeRole.MANAGER


@pytest.mark.parametrize(
    ("own", "other", "named"),
    [
        pytest.param("", ETCD, "no etcd on m;", id="here"),
        pytest.param(ETCD, "", "no etcd on n1;", id="there"),
        pytest.param("", "", "no etcd on m and n1;", id="both"),
    ],
)
async def test_the_first_promotion_needs_etcd_on_both_nodes(
    api: Api, own: str, other: str, named: str
) -> None:
    await of(api, manager("m", etcd=own), host("n1", etcd=other), engine="embedded")
    with pytest.raises(errors.Unsupported) as caught:
        await promote(api, "n1")
    assert named in caught.value.message
    assert "apt-get install etcd-server" in caught.value.message


async def test_a_further_promotion_needs_etcd_on_that_node_alone(api: Api) -> None:
    await of(api, manager("m", etcd=""), host("n1"), host("n2", etcd=""))
    await promote(api, "n1")
    with pytest.raises(errors.Unsupported, match="no etcd on n2;"):
        await promote(api, "n2")


async def test_with_an_etcd_of_somebody_elses_no_binary_is_needed() -> None:
    async with opened(facts=NodeFacts("m", "10.9.0.1:2377", "1", external_etcd=True)) as api:
        await of(api, manager("m", etcd=""), host("n1", etcd=""))
        await promote(api, "n1")
        assert api.stored(Node, "n1").spec.role == NodeRole.MANAGER


# ---------------------------------------------------------------- demotion


async def test_last_manager_is_not_demoted(api: Api) -> None:
    await of(api, manager("m"))
    with pytest.raises(errors.Invalid, match="attempting to demote the last manager of the swarm"):
        await demote(api, "m")


async def test_one_of_three_is_demoted_and_then_another(api: Api) -> None:
    await of(api, manager("a"), manager("b"), manager("c"))
    await demote(api, "a")
    assert api.stored(Node, "a").manager_status is not None  # the keeper's to take away
    await demote(api, "b")
    with pytest.raises(errors.Invalid, match="last manager"):
        await demote(api, "c")


async def test_the_one_that_is_gone_is_demoted_and_no_other(api: Api) -> None:
    await of(api, manager("a"), manager("b"), manager("c", reachable=False))
    with pytest.raises(errors.Conflict) as caught:
        await demote(api, "a")
    said = caught.value.message
    assert "can't remove member from the raft: this would result in a loss of quorum" in said
    assert "of the 2 that would remain, 2 must be reachable, and c is not" in said
    assert "start swarmd on c again, or demote what is gone for good first" in said
    await demote(api, "c")
    await demote(api, "a")  # what is on its way out does not count


async def test_those_that_are_promoted_but_not_members_do_not_count(api: Api) -> None:
    await of(api, manager("a"), manager("b", member=False))
    with pytest.raises(errors.Conflict, match=r"b is promoted, but not a member yet; wait until"):
        await demote(api, "a")


async def test_a_promotion_is_taken_back_before_the_node_is_a_member(api: Api) -> None:
    await of(api, manager("a"), manager("b", member=False))
    await demote(api, "b")
    assert api.stored(Node, "b").spec.role == NodeRole.WORKER


async def test_two_that_are_demoted_at_once_at_two_managers_do_not_both_go(api: Api) -> None:
    await of(api, manager("a"), manager("b"))
    beside = api.beside()
    results = await asyncio.gather(
        change(api.control, api.stored(Node, "a"), NodeRole.WORKER),
        change(beside, api.stored(Node, "b"), NodeRole.WORKER),
        return_exceptions=True,
    )
    refused = [r for r in results if r is not None]
    assert len(refused) == 1 and "last manager of the swarm" in str(refused[0])
    roles = sorted(n.spec.role for n in api.all(Node))
    assert roles == [NodeRole.WORKER, NodeRole.MANAGER]


# ---------------------------------------------------------------- removal


async def test_a_manager_is_demoted_before_it_is_removed(api: Api) -> None:
    await of(api, manager("a"), manager("b", state=NodeState.DOWN, reachable=False), manager("c"))
    with pytest.raises(errors.Conflict, match=r"must be demoted .* \(`swarmctl node demote b`\)"):
        await api.remove(Kind.NODE, "b", force=True)
    await demote(api, "b")
    with pytest.raises(errors.Conflict, match="is being demoted and still a member"):
        await api.remove(Kind.NODE, "b", force=True)
    await api.put(structs.replace(api.stored(Node, "b"), manager_status=None))
    await api.remove(Kind.NODE, "b")
    assert api.stored(Node, "b") is None
