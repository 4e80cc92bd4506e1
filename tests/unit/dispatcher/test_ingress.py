"""The table of published services."""

from __future__ import annotations

import pytest
from msgspec import structs

from manager.dispatcher.ingress import IngressTable
from swarm.v1 import PortConfig, Service, Task, TaskState
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
