"""Looking objects up, and Docker's filters."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from manager.store import STACK_LABEL
from swarm import errors
from swarm.v1 import (
    Driver,
    EngineDescription,
    ExplainTaskRequest,
    Filter,
    Global,
    Kind,
    ListRequest,
    NetworkAttachmentSpec,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    Secret,
    SecretSpec,
    Service,
    ServiceMode,
    TaskState,
)
from tests.unit.api.harness import CONTEXT, Api, config, network, node, secret, service, task


async def names(api: Api, kind: Kind, **filters: Any) -> list[str]:
    return [
        o.id if kind in (Kind.TASK, Kind.NODE) else o.spec.name
        for o in await api.list(kind, **filters)
    ]


@pytest.fixture
async def filled(api: Api) -> Api:
    """Some of each kind, ids chosen."""
    await api.put(
        Node(
            id="n1aa",
            spec=NodeSpec(role=NodeRole.MANAGER, labels={"zone": "a"}),
            description=NodeDescription(
                hostname="host-1", engine=EngineDescription(labels={"disk": "ssd"})
            ),
        ),
        node("n2bb", hostname="host-2", spec={"labels": {"zone": "b"}}),
        node("n2cc", hostname="other"),
    )
    await api.create(service=service("web", labels={STACK_LABEL: "app", "tier": "front"}))
    await api.create(service=service("web-admin", labels={"tier": "back"}))
    await api.create(service=service("agent", mode=ServiceMode(global_service=Global())))
    web = api.one(Service, "web")
    agent = api.one(Service, "agent")
    await api.put(
        task("t2", web, slot=2, node_id="n2bb"),
        task("t1", web, slot=1, node_id="n1aa", desired_state=TaskState.SHUTDOWN),
        task("g1", agent, slot=0, node_id="n2bb"),
        task("g2", agent, slot=0, node_id="n1aa"),
    )
    await api.create(secret=secret("su", labels={"a": "1"}))
    await api.create(secret=secret("su2"))
    await api.create(config=config("conf"))
    await api.create(network=network("net"))
    await api.create(network=network("br", driver=Driver(name="bridge")))
    return api


TABLE: dict[str, tuple[Kind, dict[str, Any], list[str]]] = {
    "no filter": (Kind.SERVICE, {}, ["agent", "web", "web-admin"]),
    "name is a prefix": (Kind.SERVICE, {"name": "web"}, ["web", "web-admin"]),
    "names of one key are alternatives": (Kind.SERVICE, {"name": ("agent", "web-")}, ["agent", "web-admin"]),
    "keys must all match": (Kind.SERVICE, {"name": "web", "label": "tier=back"}, ["web-admin"]),
    "label by name": (Kind.SERVICE, {"label": "tier"}, ["web", "web-admin"]),
    "labels must all match": (Kind.SERVICE, {"label": ("tier", "tier=back")}, ["web-admin"]),
    "label of a stack": (Kind.SERVICE, {"label": f"{STACK_LABEL}=app"}, ["web"]),
    "mode": (Kind.SERVICE, {"mode": "global"}, ["agent"]),
    "runtime": (Kind.SERVICE, {"runtime": "plugin"}, []),
    "key without values": (Kind.SERVICE, {"mode": ()}, ["agent", "web", "web-admin"]),
    "tasks in order": (Kind.TASK, {}, ["g2", "g1", "t1", "t2"]),
    "tasks of a service": (Kind.TASK, {"service": "web"}, ["t1", "t2"]),
    "tasks of a node by prefix": (Kind.TASK, {"node": "n1"}, ["g2", "t1"]),
    "tasks of a node by name": (Kind.TASK, {"node": "host-2", "service": "web"}, ["t2"]),
    "tasks by desired state": (Kind.TASK, {"desired-state": "shutdown"}, ["t1"]),
    "tasks of a stack": (Kind.TASK, {"label": f"{STACK_LABEL}=app"}, ["t1", "t2"]),
    "tasks by the service's label": (Kind.TASK, {"label": "tier=front"}, ["t1", "t2"]),
    "tasks by name": (Kind.TASK, {"name": "web.2"}, ["t2"]),
    "tasks by id": (Kind.TASK, {"id": "g"}, ["g2", "g1"]),
    "tasks up to date": (Kind.TASK, {"_up-to-date": "true", "service": "web"}, ["t1", "t2"]),
    "tasks out of date": (Kind.TASK, {"_up-to-date": "false"}, []),
    "nodes by role": (Kind.NODE, {"role": "manager"}, ["n1aa"]),
    "nodes by hostname": (Kind.NODE, {"name": "host"}, ["n1aa", "n2bb"]),
    "nodes by engine label": (Kind.NODE, {"label": "disk=ssd"}, ["n1aa"]),
    "nodes by label": (Kind.NODE, {"node.label": "zone=b"}, ["n2bb"]),
    "nodes by membership": (Kind.NODE, {"membership": "pending"}, []),
    "nodes by id": (Kind.NODE, {"id": "n2"}, ["n2bb", "n2cc"]),
    "secrets by prefix": (Kind.SECRET, {"name": "su"}, ["su", "su2"]),
    "secrets by whole name": (Kind.SECRET, {"names": "su"}, ["su"]),
    "secrets by label": (Kind.SECRET, {"label": "a"}, ["su"]),
    "networks by driver": (Kind.NETWORK, {"driver": "bridge"}, ["br"]),
    "networks by scope": (Kind.NETWORK, {"scope": "local"}, []),
    "networks by type": (Kind.NETWORK, {"type": "custom"}, ["br", "net"]),
    "dangling networks": (Kind.NETWORK, {"dangling": "1"}, ["br", "net"]),
    "stacks": (Kind.STACK, {}, []),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "filters", "expected"), TABLE.values(), ids=TABLE)
async def test_filters(filled: Api, kind: Kind, filters: dict[str, Any], expected: list[str]):
    assert await names(filled, kind, **filters) == expected


@pytest.mark.parametrize(
    ("kind", "filters", "message"),
    [
        (
            Kind.SERVICE,
            {"nmae": "x"},
            "invalid filter 'nmae' for services; accepted are id, name, label, mode, runtime; did you mean 'name'?",
        ),
        (Kind.NODE, {"service": "x"}, "invalid filter 'service' for nodes"),
        (
            Kind.SERVICE,
            {"mode": "swarmy"},
            "invalid mode 'swarmy'; accepted are replicated, global",
        ),
        (Kind.TASK, {"desired-state": "runing"}, "did you mean 'running'?"),
        (Kind.NODE, {"role": "boss"}, "invalid role 'boss'"),
        (Kind.TASK, {"_up-to-date": "maybe"}, "accepted are true and false"),
    ],
)
async def test_unknown_filters_and_values_are_refused(
    filled: Api, kind: Kind, filters: dict[str, Any], message: str
):
    with pytest.raises(errors.Invalid) as caught:
        await filled.list(kind, **filters)
    assert message in caught.value.message


async def test_filter_by_a_service_that_does_not_exist(filled: Api):
    with pytest.raises(errors.NotFound, match="service nope not found"):
        await filled.list(Kind.TASK, service="nope")


async def test_network_in_use_does_not_dangle(filled: Api):
    await filled.create(
        service=service("n", task={"networks": (NetworkAttachmentSpec(target="net"),)})
    )
    assert await names(filled, Kind.NETWORK, dangling="true") == ["br"]


async def test_list_has_its_revision_and_statuses_in_order(filled: Api):
    response = await filled.control.list(
        ListRequest(
            kind=Kind.SERVICE, filters=(Filter(key="name", values=("web",)),), with_status=True
        ),
        CONTEXT,
    )
    assert response.revision == filled.store.revision
    assert [s.name for s in response.service_statuses] == ["web", "web-admin"]


# ---------------------------------------------------------------- look-up


async def lookup(api: Api, kind: Kind, ref: str) -> Any:
    response = await api.get(kind, ref)
    return getattr(response.object, kind.name.lower())


async def test_id_goes_before_name_goes_before_prefix(api: Api):
    def kept(id_: str, name: str) -> Secret:
        return Secret(id=id_, spec=SecretSpec(name=name))

    await api.put(kept("abc", "x1"), kept("abd", "abc"), kept("zz1", "ab"))
    assert (await lookup(api, Kind.SECRET, "abc")).id == "abc"
    assert (await lookup(api, Kind.SECRET, "ab")).id == "zz1"
    assert (await lookup(api, Kind.SECRET, "abd")).id == "abd"
    assert (await lookup(api, Kind.SECRET, "z")).id == "zz1"
    with pytest.raises(errors.Invalid) as caught:
        await lookup(api, Kind.SECRET, "a")
    assert caught.value.message == (
        "secret a is ambiguous (2 matches found): abc (x1), abd (abc); give more of the id"
    )


@pytest.mark.parametrize("kind", [k for k in Kind if Kind.CLUSTER < k < Kind.SERVICE_REVISION])
async def test_what_does_not_exist(api: Api, kind: Kind):
    with pytest.raises(errors.NotFound, match=f"{kind.name.lower()} nope not found"):
        await api.get(kind, "nope")
    with pytest.raises(errors.Invalid, match="give its name or its id"):
        await api.get(kind, "")


@pytest.mark.parametrize("kind", [Kind.KEYRING, Kind.SERVICE_REVISION, Kind.UNSPECIFIED])
async def test_internal_kinds_are_not_served(api: Api, kind: Kind):
    with pytest.raises(errors.Invalid, match="is not served"):
        await api.get(kind, "x")
    with pytest.raises(errors.Invalid, match="is not served"):
        await api.list(kind)


async def test_tasks_have_names(filled: Api):
    assert (await lookup(filled, Kind.TASK, "web.2")).id == "t2"
    assert (await lookup(filled, Kind.TASK, "web.2.t2")).id == "t2"
    assert (await lookup(filled, Kind.TASK, "agent.n2bb")).id == "g1"
    with pytest.raises(errors.NotFound):
        await lookup(filled, Kind.TASK, "web.3")


async def test_name_of_a_slot_is_its_newest_wanted_task(filled: Api):
    filled.clock.advance(seconds=1)
    web = filled.one(Service, "web")
    await filled.put(task("t3", web, slot=2))
    assert (await lookup(filled, Kind.TASK, "web.2")).id == "t3"
    t3 = structs.replace(task("t3", web, slot=2), desired_state=TaskState.SHUTDOWN)
    await filled.put(t3)
    assert (await lookup(filled, Kind.TASK, "web.2")).id == "t2"


async def test_service_comes_with_previous_spec_and_status_task_with_its_own(filled: Api):
    await filled.update(
        filled.one(Service, "web"), service=service("web", container={"image": "nginx:2"})
    )
    of_service = await filled.get(Kind.SERVICE, "web")
    assert of_service.revision.spec.task.container.image == "nginx:1"
    assert of_service.service_status.name == "web"
    of_task = await filled.get(Kind.TASK, "t1")
    assert of_task.revision.spec_version == 1
    assert await names(filled, Kind.TASK, **{"_up-to-date": "false"}) == ["t1", "t2"]


async def test_explanation_names_the_task(filled: Api):
    answer = await filled.control.explain_task(ExplainTaskRequest(task="web.2"), CONTEXT)
    assert "task web.2" in answer.summary
