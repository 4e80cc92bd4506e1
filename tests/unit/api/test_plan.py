"""What plans say of each kind of change. That they come true is tested in test_plan_properties.py."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from swarm import errors
from swarm.v1 import (
    ConfigReference,
    DeployStackRequest,
    Kind,
    NetworkAttachmentSpec,
    NodeDescription,
    Placement,
    PlannedChange,
    PlanStackResponse,
    Resources,
    SecretReference,
    Service,
    StackRollback,
    StackSpec,
    UpdateState,
    UpdateStatus,
)
from tests.unit.api.harness import (
    CONTEXT,
    Api,
    changed,
    config,
    network,
    node,
    port,
    secret,
    service,
    task,
)


async def plan(api: Api, spec: StackSpec | None = None, **request: Any) -> PlanStackResponse:
    return await api.control.plan_stack(DeployStackRequest(spec=spec, **request), CONTEXT)


def only(response: PlanStackResponse, name: str) -> PlannedChange:
    found = [c for c in response.changes if c.change and c.change.name == name]
    assert len(found) == 1, response
    return found[0]


def fields(planned: PlannedChange) -> dict[str, tuple[str | None, str | None]]:
    return {f.path: (f.before, f.after) for f in planned.fields}


def stack(*services: Any, **objects: Any) -> StackSpec:
    return StackSpec(name="app", services=services, **objects)


@pytest.fixture
async def one(api: Api) -> Api:
    """With a node that takes containers."""
    await api.put(
        changed(
            node("n1"),
            description=NodeDescription(
                hostname="h1",
                runtimes=("docker",),
                resources=Resources(cpu_nano=4_000_000_000, memory_bytes=8 << 30),
            ),
        )
    )
    return api


async def running(api: Api, name: str) -> None:
    """The service has its first task, as it is now, and it runs."""
    await api.put(task(f"t-{name}", api.one(Service, name)))


async def test_a_plan_changes_nothing_and_says_what_the_deploy_says(one: Api):
    spec = stack(
        service("app_web", task={"networks": (NetworkAttachmentSpec(target="app_net"),)}),
        networks=(network("app_net"),),
        secrets=(secret("app_key"),),
    )
    before = one.store.revision
    said = await plan(one, spec)
    assert one.store.revision == before
    assert (said.stack_id, said.revision, said.differs, said.settled) == ("", 0, True, True)
    assert all(c.change and c.change.id == "" for c in said.changes)
    assert said == await plan(one, spec)
    done = await one.deploy(spec)
    assert [(c.change.kind, c.change.name, c.change.action) for c in said.changes if c.change] == [
        (c.kind, c.name, c.action) for c in done.changes
    ]
    web = only(said, "app_web").placement
    assert web is not None
    assert [(n.hostname, n.node_id, n.tasks) for n in web.nodes] == [("h1", "n1", 1)]
    again = await plan(one, spec)
    assert (again.stack_id, again.revision, again.differs) == (done.stack_id, done.revision, False)
    assert all(c.change and c.change.id and not c.fields for c in again.changes)


async def test_secrets_show_digests_and_configs_their_text(one: Api):
    def at(version: str) -> StackSpec:
        return stack(
            service(
                "app_web",
                container={
                    "secrets": (SecretReference(secret_name="app_key"),),
                    "configs": (ConfigReference(config_name="app_conf"),),
                },
            ),
            secrets=(secret("app_key", f"hidden {version}".encode()),),
            configs=(
                config("app_conf", f"shown {version}".encode()),
                config("app_blob", b"\xff" + version.encode()),
            ),
        )

    await one.deploy(at("one"))
    said = await plan(one, at("two"))
    assert "hidden" not in repr(said)
    key, conf, blob = (only(said, f"app_{n}") for n in ("key", "conf", "blob"))
    assert {c.effect for c in (key, conf, blob)} == {"replaced"}
    assert fields(conf) == {"data": ('"shown one"', '"shown two"')}
    for digested in (key, blob):
        before, after = fields(digested)["data"]
        assert before != after and before and len(json.loads(before)) == 12
    assert fields(only(said, "app_web")).keys() == {
        "task.container.secrets[/run/secrets/app_key].data",
        "task.container.configs[/app_conf].data",
    }
    assert (
        fields(only(said, "app_web"))["task.container.secrets[/run/secrets/app_key].data"]
        == (fields(key)["data"])
    )


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "another image": ({"container": {"image": "nginx:2"}}, "recreated"),
    "more replicas": ({"replicas": 3}, "scaled"),
    "another label": ({"labels": {"a": "b"}}, "kept"),
    "another published port": ({"ports": [port(8081)]}, "kept"),
    "another target port": ({"ports": [port(8080, 81)]}, "recreated"),
    "a constraint that its node satisfies": (
        {"task": {"placement": Placement(constraints=("node.hostname == h1",))}},
        "kept",
    ),
    "a constraint that its node does not satisfy": (
        {"task": {"placement": Placement(constraints=("node.hostname == h2",))}},
        "recreated",
    ),
}


@pytest.mark.parametrize("case", EDITS)
async def test_effects_follow_the_control_loop(one: Api, case: str):
    edit, effect = EDITS[case]
    given = {"replicas": 1, "ports": [port(8080)]}
    await one.deploy(stack(service("app_web", **given)))
    await running(one, "app_web")
    web = only(await plan(one, stack(service("app_web", **{**given, **edit}))), "app_web")
    assert web.effect == effect
    assert web.fields
    assert web.placement is not None
    # What no node could take is not begun: the task stays.
    never = any("can never be placed" in wait for wait in web.placement.waits)
    assert never == case.endswith("does not satisfy")
    assert web.placement.kept == (0 if effect == "recreated" and not never else 1)


async def test_a_paused_roll_out_that_a_deploy_takes_up_again_recreates_tasks(one: Api):
    await one.deploy(stack(service("app_web")))
    await running(one, "app_web")
    await one.deploy(stack(service("app_web", container={"image": "nginx:2"})))
    paused = UpdateStatus(state=UpdateState.PAUSED, message="update paused")
    await one.put(changed(one.one(Service, "app_web"), update_status=paused))
    again = stack(service("app_web", container={"image": "nginx:2"}))
    web = only(await plan(one, again), "app_web")
    assert (web.change and web.change.action, web.effect) == ("updated", "recreated")
    assert fields(web) == {"update_status": ('"paused"', '"taken up again"')}
    assert web.placement is not None
    assert (web.placement.created, web.placement.stopped) == (1, 1)


async def test_what_is_pruned_shows_what_stops(one: Api):
    await one.deploy(stack(service("app_web"), service("app_old")))
    await running(one, "app_old")
    said = await plan(one, stack(service("app_web")), prune=True)
    old = only(said, "app_old")
    assert old.change is not None
    assert (old.change.action, old.change.id) == ("removed", one.one(Service, "app_old").id)
    assert old.placement is not None
    assert (old.placement.kept, old.placement.stopped) == (0, 1)
    assert not any(
        c.change and c.change.name == "app_old"
        for c in (await plan(one, stack(service("app_web")))).changes
    )


async def test_errors_are_those_of_the_deploy(one: Api):
    wrong = stack(service("app_web", container={"image": ""}), secrets=(secret("app_k", b""),))
    with pytest.raises(errors.Invalid) as planned:
        await plan(one, wrong)
    with pytest.raises(errors.Invalid) as deployed:
        await one.deploy(wrong)
    assert planned.value.message == deployed.value.message


async def test_a_stack_that_is_being_removed_is_a_conflict_at_once(one: Api):
    await one.deploy(stack(service("app_web")))
    await running(one, "app_web")
    await one.remove(Kind.STACK, "app")
    with pytest.raises(errors.Conflict, match="still being removed"):
        await plan(one, stack(service("app_web")))


async def test_the_version_holds_until_the_stack_changes(one: Api):
    first, second = (stack(service("app_web", container={"image": i})) for i in ("i:1", "i:2"))
    await one.deploy(first)
    said = await plan(one, second)
    assert await plan(one, second, expected_version=said.version) == said
    await one.deploy(stack(service("app_web", container={"image": "i:3"})))
    with pytest.raises(errors.Conflict, match="stale"):
        await plan(one, second, expected_version=said.version)


async def test_a_rollback_can_be_planned(one: Api):
    for image in ("i:1", "i:2"):
        await one.deploy(stack(service("app_web", container={"image": image})))
    await running(one, "app_web")
    said = await plan(one, rollback=StackRollback(stack="app", revision=1))
    web = only(said, "app_web")
    assert web.effect == "recreated"
    assert fields(web) == {"task.container.image": ('"i:2"', '"i:1"')}


async def test_the_event_loop_goes_on_while_a_plan_is_made(one: Api):
    services = [service(f"app_s{i:03}", replicas=2) for i in range(1000)]
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    beside = asyncio.create_task(others())
    said = await plan(one, stack(*services))
    beside.cancel()
    assert sum(c.placement.created for c in said.changes if c.placement) == 2000
    assert turns > 5


async def test_a_task_replaced_without_a_difference_that_people_see_is_explained(one: Api):
    await one.deploy(stack(service("app_web", container={"env": ("A=1", "B=2")})))
    await running(one, "app_web")
    web = only(
        await plan(one, stack(service("app_web", container={"env": ("B=2", "A=1")}))), "app_web"
    )
    assert web.effect == "recreated"
    assert fields(web) == {"task.container.env": ('["A=1","B=2"]', '["B=2","A=1"]')}
