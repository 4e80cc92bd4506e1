"""depends_on with restart: who is rolled together with whom."""

from __future__ import annotations

import pytest
from msgspec import structs

from swarm.v1 import Dependency, Service, ServiceRevision, StackSpec
from tests.unit.api.harness import Api, service
from tests.unit.api.test_stacks import actions


def on(name: str, *, restart: bool = True) -> Dependency:
    return Dependency(service=name, condition="service_started", required=True, restart=restart)


def stack(db: str = "i:1", web: str = "i:1", **fields) -> StackSpec:
    """top follows web, web follows db, api depends on db and does not follow it."""
    return StackSpec(
        name="app",
        services=(
            service("app_top", depends_on=(on("app_web"),)),
            service("app_web", container={"image": web}, depends_on=(on("app_db"),), **fields),
            service("app_api", depends_on=(on("app_db", restart=False),)),
            service("app_db", container={"image": db}),
        ),
    )


def versions(api: Api) -> dict[str, tuple[int, int]]:
    """Spec version and force_update by name."""
    return {s.spec.name: (s.spec_version, s.spec.task.force_update) for s in api.all(Service)}


async def test_deploy_restarts_those_who_follow_a_changed_service(api: Api):
    await api.deploy(stack())
    response = await api.deploy(stack(db="i:2"))
    assert actions(response) == {
        "app_db": "updated",
        "app_web": "updated",
        "app_api": "unchanged",
        "app_top": "unchanged",
    }
    assert versions(api) == {
        "app_db": (2, 0),
        "app_web": (2, 1),
        "app_api": (1, 0),
        "app_top": (1, 0),
    }
    web = api.one(Service, "app_web")
    assert web.task_version == 2
    again = await api.deploy(stack(db="i:2"))
    assert set(actions(again).values()) == {"unchanged"}


async def test_follower_that_changes_as_well_gets_one_new_version(api: Api):
    await api.deploy(stack())
    await api.deploy(stack(db="i:2", web="i:2"))
    assert versions(api)["app_web"] == (2, 0), "it is rolled by its own change"
    await api.deploy(stack(db="i:3", web="i:2", labels={"a": "b"}))
    assert versions(api)["app_web"] == (3, 1)
    web = api.one(Service, "app_web")
    assert web.previous_spec_version == 2
    assert api.stored(ServiceRevision, f"{web.id}.3").spec == web.spec


@pytest.mark.parametrize("change", ["labels", "replicas"])
async def test_change_that_replaces_no_task_restarts_nobody(api: Api, change: str):
    await api.deploy(stack())
    spec = stack()
    fields = {"labels": {"a": "b"}} if change == "labels" else {"replicas": 3}
    db = service("app_db", container={"image": "i:1"}, **fields)
    response = await api.deploy(structs.replace(spec, services=(*spec.services[:3], db)))
    assert actions(response)["app_db"] == "updated"
    assert actions(response)["app_web"] == "unchanged"


async def test_follower_that_the_file_no_longer_names_is_restarted_too(api: Api):
    await api.deploy(stack())
    response = await api.deploy(
        StackSpec(name="app", services=(service("app_db", container={"image": "i:2"}),))
    )
    assert actions(response) == {"app_db": "updated", "app_web": "updated"}


async def test_follower_that_is_pruned_is_left_alone(api: Api):
    await api.deploy(stack())
    db = service("app_db", container={"image": "i:2"})
    await api.deploy(StackSpec(name="app", services=(db,)), prune=True)
    assert versions(api)["app_web"] == (1, 0)


async def test_new_services_restart_nobody(api: Api):
    await api.deploy(
        StackSpec(
            name="app",
            services=(
                service("app_web", depends_on=(structs.replace(on("app_db"), required=False),)),
            ),
        )
    )
    response = await api.deploy(StackSpec(name="app", services=(service("app_db"),)))
    assert actions(response) == {"app_db": "created"}
    assert versions(api)["app_web"] == (1, 0)


async def test_update_and_rollback_of_a_service_restart_its_followers(api: Api):
    await api.deploy(stack())
    db = api.one(Service, "app_db")
    container = structs.replace(db.spec.task.container, image="i:2")
    await api.update(
        db,
        service=structs.replace(db.spec, task=structs.replace(db.spec.task, container=container)),
    )
    assert versions(api)["app_web"] == (2, 1)
    assert versions(api)["app_top"] == (1, 0), "one step only"
    await api.update(api.one(Service, "app_db"), rollback=True)
    assert versions(api)["app_web"] == (3, 2)
    db = api.one(Service, "app_db")
    await api.update(db, service=structs.replace(db.spec, labels={**db.spec.labels, "a": "b"}))
    assert versions(api)["app_web"] == (3, 2)
