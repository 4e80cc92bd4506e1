"""Rebalance: what it asks the control loop for, what it says would move, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from swarm import errors
from swarm.v1 import (
    Global,
    GlobalJob,
    Kind,
    NodeDescription,
    RebalanceRequest,
    RebalanceResponse,
    RebalanceStatus,
    ReplicatedJob,
    Service,
    ServiceMode,
)
from tests.unit.api.harness import CONTEXT, Api, node, service, task


async def crowded(api: Api, *names: str) -> None:
    """Services with four tasks each on n1, and n2 empty."""
    for id_, name in (("n1", "alpha"), ("n2", "beta")):
        description = NodeDescription(hostname=name, runtimes=("docker",))
        await api.put(structs.replace(node(id_), description=description))
    for name in names:
        await api.create(service=service(name, replicas=4))
        made = api.one(Service, name)
        await api.put(*(task(f"{name}-{slot}", made, slot) for slot in range(1, 5)))


async def ask(api: Api, **fields: Any) -> RebalanceResponse:
    return await api.control.rebalance(RebalanceRequest(**fields), CONTEXT)


async def test_a_dry_run_says_what_would_move_and_changes_nothing(api: Api):
    await crowded(api, "web")
    before = api.store.revision
    answer = await ask(api, service="web", dry_run=True)
    assert api.store.revision == before
    assert answer.service_ids == (api.one(Service, "web").id,)
    assert len(answer.moves) == 2
    assert {(m.from_node_id, m.to_node_id) for m in answer.moves} == {("n1", "n2")}
    assert all(m.name.startswith("web.") for m in answer.moves)


async def test_asking_writes_the_wish_and_says_what_would_move(api: Api):
    await crowded(api, "web", "db")
    answer = await ask(api, service="web")
    assert len(answer.moves) == 2
    status = api.one(Service, "web").rebalance_status
    assert status == RebalanceStatus(running=True, started_at_ns=api.clock.now_ns())
    assert api.one(Service, "db").rebalance_status is None
    # Asked again: it begins anew.
    done = structs.replace(status, running=False, moved=2, message="no move makes it better")
    await api.put(structs.replace(api.one(Service, "web"), rebalance_status=done))
    await ask(api, service="web")
    assert api.one(Service, "web").rebalance_status.running


async def test_a_nodes_rebalance_asks_the_services_that_have_tasks_there(api: Api):
    await crowded(api, "web", "db")
    await api.create(service=service("idle"))
    await api.create(service=service("all", mode=ServiceMode(global_service=Global())))
    await api.put(task("all-1", api.one(Service, "all"), 0))
    answer = await ask(api, node="alpha")
    ids = {name: api.one(Service, name).id for name in ("db", "web")}
    assert answer.service_ids == (ids["db"], ids["web"])
    for name in ids:
        assert api.one(Service, name).rebalance_status.node_id == "n1"
    for name in ("idle", "all"):
        assert api.one(Service, name).rebalance_status is None
    assert (await ask(api, node="n2", dry_run=True)).moves == ()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (ServiceMode(global_service=Global()), "is a global service and cannot be rebalanced"),
        (ServiceMode(replicated_job=ReplicatedJob()), "is a replicated job and cannot be"),
        (ServiceMode(global_job=GlobalJob()), "tasks of jobs run to their end where they are"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
async def test_what_stays_where_it_is_cannot_be_rebalanced(
    api: Api, mode: ServiceMode, words: str, dry_run: bool
):
    await api.create(service=service(mode=mode))
    with pytest.raises(errors.Invalid, match=words):
        await ask(api, service="web", dry_run=dry_run)


async def test_exactly_one_is_to_be_named_and_must_be_there(api: Api):
    for wrong in ({}, {"service": "a", "node": "b"}):
        with pytest.raises(errors.Invalid, match="name either a service or a node"):
            await ask(api, **wrong)
    for kind in ("service", "node"):
        with pytest.raises(errors.NotFound):
            await ask(api, **{kind: "nope"})


async def test_a_service_that_is_being_removed_is_not_rebalanced(api: Api):
    await crowded(api, "web")
    await api.remove(Kind.SERVICE, "web")
    with pytest.raises(errors.Conflict, match="is being removed"):
        await ask(api, service="web")
