"""The table of published services."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from random import Random

import pytest
from msgspec import structs

from agent.published import Published, unpacked
from manager.ca import Sealer
from manager.dispatcher.ingress import IngressTable
from manager.dispatcher.session import Session
from manager.store import Draft
from swarm import errors
from swarm.limits import MESSAGE_BYTES_MAX
from swarm.v1 import (
    Assignments,
    Cluster,
    ClusterInfo,
    IngressChange,
    IngressService,
    IngressUpdate,
    ManagerMessage,
    PortConfig,
    RelayRequest,
    Service,
    Task,
    TaskState,
    encode,
)
from tests.unit.dispatcher.tables import node, service, task, view

S = TaskState
PORT = PortConfig(target_port=80, published_port=8080, protocol="tcp")
HOST = PortConfig(target_port=80, published_port=9090, publish_mode="host")


def backends(table: IngressTable, service_id: str = "s") -> list[str]:
    return [b.task_id for b in table.services[service_id].backends]


def test_backends_are_the_tasks_that_run_and_are_to_stay() -> None:
    draft = view(
        node("n"),
        node("m", addr="10.0.0.2"),
        *service(ports=(PORT, HOST)),
        task("a", state=S.RUNNING),
        task("b", state=S.RUNNING, node_id="m"),
        task("c", state=S.STARTING),
        task("d", state=S.RUNNING, desired=S.SHUTDOWN),
        task("e", state=S.FAILED),
        task("f", state=S.RUNNING, node_id="unknown"),
    )
    table = IngressTable()
    assert table.load(draft) == {"s"}
    assert backends(table) == ["a", "b"]
    assert table.services["s"].ports == (PORT,)
    assert [b.relay_addr for b in table.services["s"].backends] == ["10.0.0.1", "10.0.0.2"]


@pytest.mark.parametrize(
    "ports",
    [(), (HOST,), (PortConfig(target_port=80),)],
    ids=["none", "host mode", "not yet given"],
)
def test_service_without_published_ports_is_not_in_the_table(
    ports: tuple[PortConfig, ...],
) -> None:
    table = IngressTable()
    assert table.load(view(node("n"), *service(ports=ports), task("a", state=S.RUNNING))) == set()


def test_only_services_that_differ_are_told_and_others_keep_their_object() -> None:
    draft = view(
        node("n"),
        *service("s", ports=(PORT,)),
        *service("t", ports=(structs.replace(PORT, published_port=8081),)),
        task("a", state=S.RUNNING),
    )
    table = IngressTable()
    table.load(draft)
    before = table.services["t"]
    draft.put(task("b", state=S.RUNNING))
    assert table.rebuild(draft, ["s", "t"]) == {"s"}
    assert table.services["t"] is before
    assert table.rebuild(draft, ["s", "t"]) == set()


def test_removed_service_leaves_the_table() -> None:
    draft = view(node("n"), *service(ports=(PORT,)), task("a", state=S.RUNNING))
    table = IngressTable()
    table.load(draft)
    stored = draft.get(Service, "s")
    assert stored is not None
    draft.put(structs.replace(stored, pending_delete=True))
    assert table.rebuild(draft, ["s"]) == {"s"}
    assert table.services == {}
    assert table.rebuild(draft, ["s"]) == set()


def test_services_of_a_node_are_found_by_their_backends() -> None:
    draft = view(node("n"), *service(ports=(PORT,)), task("a", state=S.RUNNING))
    table = IngressTable()
    table.load(draft)
    assert table.on_node("n") == {"s"}
    assert table.on_node("m") == set()
    draft.delete(Task, "a")
    table.rebuild(draft, ["s"])
    assert table.services["s"].backends == ()


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "whole"])
@pytest.mark.parametrize("seed", range(8))
async def test_agents_that_hear_now_and_then_come_to_what_the_table_says(
    seed: int, packs: bool
) -> None:
    rng = Random(seed)
    draft = view(Cluster(id="c"), node("n"), node("m", addr="10.0.0.2"))
    table = IngressTable()
    sealer = Sealer(b"k" * 32)
    agents = []
    for _ in range(4):
        session = Session(
            "s",
            "n",
            draft,
            description=None,
            addr="",
            sealer=sealer,
            ingress=table,
            info=lambda _: ClusterInfo(),
            period_s=lambda: 1.0,
            packs=packs,
        )
        agents.append((session, session.messages(), Published()))
    for _, messages, published in agents:
        await anext(messages)  # the welcome
        first = (await anext(messages)).assignments
        assert first is not None
        published.take(first)
    for _ in range(150):
        changed = table.update(draft, _some_change(draft, rng))
        for session, messages, published in agents:
            session.mark(services=changed)
            if rng.random() < 0.1:
                await _hear(session, messages, published)
    for session, messages, published in agents:
        await _hear(session, messages, published)
        known = {s.service_id: s for s in published.services()}
        fresh = IngressTable()
        fresh.load(draft)
        for found in (dict(table.services), known):
            assert {i: _sorted(s) for i, s in found.items()} == dict(fresh.services)


async def _hear(
    session: Session, messages: AsyncIterator[ManagerMessage], published: Published
) -> None:
    """The agent hears all that it does not know."""
    session.acknowledge_heartbeat(1)
    while True:
        message = await anext(messages)
        if message.assignments is not None:
            published.take(message.assignments)
        elif message.heartbeat is not None:
            session.ask_relay(RelayRequest(relay_id="the end"))
        elif message.relay is not None:
            return


def _some_change(draft: Draft, rng: Random) -> dict[str, set[str]]:
    """Changes a service or one of its tasks; what has changed, as the dispatcher tells it."""
    service_id = rng.choice("stu")
    if rng.random() < 0.1:
        ports = rng.choice([(), (PORT,), (structs.replace(PORT, published_port=8081),)])
        for o in service(service_id, ports=ports):
            stored = draft.get(type(o), o.id)
            draft.put(structs.replace(o, meta=stored.meta) if stored is not None else o)
        return {service_id: {t.id for t in draft.by(Task, "service", service_id)}}
    task_id = f"{service_id}{rng.randrange(9)}"
    before = draft.get(Task, task_id)
    if rng.random() < 0.3:
        if before is not None:
            draft.delete(Task, task_id)
    else:
        state = rng.choice([S.STARTING, S.RUNNING, S.FAILED])
        now = task(task_id, service_id=service_id, node_id=rng.choice("nm"), state=state)
        draft.put(structs.replace(now, meta=before.meta) if before is not None else now)
    return {service_id: {task_id}}


def _sorted(found: IngressService) -> IngressService:
    return structs.replace(found, backends=tuple(sorted(found.backends, key=lambda b: b.task_id)))


def test_agents_that_know_as_much_are_sent_the_same_bytes_and_only_the_difference() -> None:
    tasks = [task(f"t{i:04d}", state=S.RUNNING) for i in range(1000)]
    draft = view(node("n"), *service(ports=(PORT,)), *tasks)
    table = IngressTable()
    table.load(draft)
    whole = table.packed({}, ["s"])
    assert table.packed({}, ["s"]) is whole
    known = table.numbers()
    assert table.packed(known, ["s"]) == b""
    draft.put(task("new", state=S.RUNNING))
    assert table.update(draft, {"s": {"new"}}) == {"s"}
    change = unpacked(table.packed(known, ["s"]))
    assert [b.task_id for b in change.changes[0].backends] == ["new"]
    assert not change.services


def test_agent_that_is_told_of_changes_of_a_service_it_does_not_know_begins_anew() -> None:
    update = IngressUpdate(changes=(IngressChange(service_id="s", removed=("t",)),))
    message = Assignments(packed_ingress=zlib.compress(encode(update)))
    with pytest.raises(errors.Unavailable, match="which it has not named"):
        Published().take(message)


@pytest.mark.parametrize(
    "packed",
    [b"none", zlib.compress(b"x" * 1000)[:-4], zlib.compress(bytes(MESSAGE_BYTES_MAX + 1))],
    ids=["not packed", "cut off", "too large"],
)
def test_list_of_services_that_cannot_be_read_ends_the_session(packed: bytes) -> None:
    with pytest.raises(errors.Unavailable, match="starting a new session"):
        Published().take(Assignments(packed_ingress=packed))
