"""Watches: every change once and in order; how far services have come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from manager.store import STACK_LABEL
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Dependency,
    Filter,
    Kind,
    ReplicatedJob,
    Secret,
    Service,
    ServiceMode,
    StackSpec,
    Task,
    TaskState,
    UpdateConfig,
    WatchRequest,
    WatchServicesRequest,
)
from tests.unit.api.harness import CONTEXT, Api, changed, config, node, secret, service, task


def request(*kinds: Kind, from_revision: int = 0, **filters: str) -> WatchRequest:
    return WatchRequest(
        kinds=kinds,
        from_revision=from_revision,
        filters=tuple(Filter(key=k, values=(v,)) for k, v in filters.items()),
    )


async def take(stream: AsyncIterator[Any], count: int) -> list[Any]:
    """The next events, of however many messages."""
    out: list[Any] = []
    async with asyncio.timeout(5):
        while len(out) < count:
            out.extend((await anext(stream)).events)
    return out


async def opened(api: Api, wanted: WatchRequest) -> AsyncGenerator[Any, None]:
    """A watch that stands: its first, empty message has come."""
    stream = api.control.watch(wanted, CONTEXT)
    first = await anext(stream)
    assert first.events == ()
    return stream


async def test_create_update_and_remove_are_told_with_before_and_after(api: Api):
    stream = await opened(api, request(Kind.SECRET))
    await api.create(secret=secret("key"))
    await api.create(config=config("other"))
    await api.update(api.one(Secret, "key"), secret=secret("key", b"", labels={"a": "b"}))
    await api.remove(Kind.SECRET, "key")
    events = await take(stream, 3)
    assert [e.action for e in events] == ["create", "update", "remove"]
    assert [e.kind for e in events] == [Kind.SECRET] * 3
    assert events[0].old is None
    assert events[1].old.secret.spec.labels == {}
    assert events[1].object.secret.spec.labels == {"a": "b"}
    assert events[2].object.secret.spec.name == "key"
    assert all(e.time_ns for e in events)
    await stream.aclose()


async def test_nothing_secret_is_told(api: Api):
    stream = await opened(api, request())
    await api.create(secret=secret("key"))
    (event,) = await take(stream, 1)
    assert (event.object.secret.sealed, event.object.secret.digest) == (b"", "")
    await api.create(service=service())
    (event,) = await take(stream, 1)
    assert event.kind == Kind.SERVICE, "revisions are internal and not told"
    await stream.aclose()


async def test_watch_from_a_lists_revision_misses_nothing_and_repeats_nothing(api: Api):
    for i in range(5):
        await api.create(config=config(f"c{i}"))
    revision = api.store.revision
    for i in range(5, 10):
        await api.create(config=config(f"c{i}"))
    stream = await opened(api, request(Kind.CONFIG, from_revision=revision + 1))
    creating = asyncio.create_task(api.create(config=config("last")))
    events = await take(stream, 6)
    await creating
    assert [e.object.config.spec.name for e in events] == ["c5", "c6", "c7", "c8", "c9", "last"]
    revisions = [e.revision for e in events]
    assert revisions == sorted(set(revisions))
    await stream.aclose()


async def test_one_large_commit_comes_in_several_messages(api: Api):
    stream = await opened(api, request(Kind.NODE))
    await api.put(*(node(f"n{i}") for i in range(1100)))
    sizes = [len((await anext(stream)).events) for _ in range(3)]
    assert sizes == [500, 500, 100]
    await stream.aclose()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"action": "remove"}, ["remove web"]),
        ({"name": "we"}, ["create web", "remove web"]),
        ({"label": "tier"}, ["create web", "remove web"]),
        ({"label": "tier=back"}, []),
        ({"stack": "app"}, ["create web", "remove web"]),
    ],
)
async def test_filters(api: Api, filters: dict[str, Any], expected: list[str]):
    stream = await opened(api, request(Kind.SERVICE, **filters))
    last = await opened(api, request(Kind.CONFIG))
    await api.create(service=service("web", labels={"tier": "front", STACK_LABEL: "app"}))
    await api.create(service=service("db"))
    await api.drop(api.one(Service, "web"))
    await api.create(config=config("end"))
    await take(last, 1)
    got: list[Any] = []
    if expected:
        got = await take(stream, len(expected))
    assert [f"{e.action} {e.object.service.spec.name}" for e in got] == expected
    await stream.aclose()
    await last.aclose()


async def test_events_of_one_service_hold_its_tasks(api: Api):
    await api.create(service=service("web"))
    stream = await opened(api, request(service="web"))
    await api.put(task("t1", api.one(Service, "web")), task("t2", "other"))
    (event,) = await take(stream, 1)
    assert event.object.task.id == "t1"
    await stream.aclose()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (request(nmae="x"), "invalid filter 'nmae' for events"),
        (request(action="delete"), "invalid action 'delete'; accepted are create, update, remove"),
        (request(from_revision=-1), "a revision is not negative"),
        (request(Kind.KEYRING), "kind KEYRING is not served"),
    ],
)
async def test_bad_requests(api: Api, wanted: WatchRequest, message: str):
    with pytest.raises(errors.Invalid) as caught:
        await opened(api, wanted)
    assert message in caught.value.message


async def test_filter_by_what_does_not_exist(api: Api):
    with pytest.raises(errors.NotFound, match="service nope not found"):
        await opened(api, request(service="nope"))


# ---------------------------------------------------------------- services


def watching(api: Api, *services: str, stack: str = "") -> AsyncGenerator[Any, None]:
    wanted = WatchServicesRequest(services=services, stack=stack)
    return api.control.watch_services(wanted, CONTEXT)


async def following(stream: AsyncIterator[Any]) -> Any:
    async with asyncio.timeout(5):
        return await anext(stream)


async def test_statuses_come_at_once_and_after_each_change(api: Api):
    await api.create(service=service("web", replicas=2))
    stream = watching(api, "web")
    (status,) = (await following(stream)).statuses
    assert (status.name, status.desired, status.running, status.converged) == ("web", 2, 0, False)
    web = api.one(Service, "web")
    await api.put(node("n1"), task("t1", web), task("t2", web, slot=2))
    response = await following(stream)
    (status,) = response.statuses
    assert (status.running, status.converged) == (2, False), "tasks are watched at first"
    assert response.revision == api.store.revision
    await stream.aclose()


async def test_the_end_of_the_watched_time_is_told_without_any_change(api: Api):
    soon = UpdateConfig(parallelism=1, monitor_ns=SECOND_NS // 20)
    await api.create(service=service("web", replicas=1, update=soon))
    await api.put(node("n1"), task("t1", api.one(Service, "web")))
    stream = watching(api, "web")
    first = await following(stream)
    assert (first.statuses[0].converged, first.statuses[0].settles_in_ns) == (
        False,
        SECOND_NS // 20,
    )
    api.clock.advance(seconds=1)
    second = await following(stream)
    assert (second.statuses[0].converged, second.statuses[0].settles_in_ns) == (True, 0)
    assert second.revision == first.revision
    await stream.aclose()


async def test_a_change_costs_the_services_it_is_about(api: Api):
    """The other services' statuses are the very same objects, not made anew."""
    names = tuple(f"s{i:02}" for i in range(50))
    for name in names:
        await api.create(service=service(name, replicas=0))
    stream = watching(api, *names)
    await following(stream)
    await api.put(task("t1", api.one(Service, "s07")))
    before = (await following(stream)).statuses
    await api.put(task("t2", api.one(Service, "s07")))
    after = (await following(stream)).statuses
    new = [a.name for a, b in zip(after, before, strict=True) if a is not b]
    assert new == ["s07"]
    await stream.aclose()


async def test_a_jobs_status_follows_its_tasks_one_by_one(api: Api):
    """It is kept from change to change: tasks come further, fail, are tried again and go."""
    mode = ServiceMode(replicated_job=ReplicatedJob(total_completions=500, max_concurrent=400))
    await api.create(service=service("batch", mode=mode))
    job = api.one(Service, "batch")
    fields = {"job_iteration": job.job_iteration, "desired_state": TaskState.COMPLETE}
    tasks = [task(f"t{i}", job, slot=i, **fields) for i in range(1, 401)]
    await api.put(node("n1"), *tasks)
    stream = watching(api, "batch")

    async def counts() -> tuple[int, int, int]:
        (status,) = (await following(stream)).statuses
        return status.desired, status.running, status.completed

    def ended(number: int, state: TaskState) -> Task:
        found = api.store.get(Task, f"t{number}")
        assert found is not None
        out: Task = changed(found, status=changed(found.status, state=state))
        return out

    assert await counts() == (500, 400, 0)
    await api.put(*(ended(i, TaskState.COMPLETE) for i in range(1, 11)))
    assert await counts() == (500, 390, 10)
    await api.put(ended(11, TaskState.FAILED))
    assert await counts() == (500, 389, 10)
    await api.put(task("again", job, slot=11, **fields))
    assert await counts() == (500, 390, 10)
    await api.drop(api.store.get(Task, "t12"))
    assert await counts() == (500, 389, 10)
    await stream.aclose()


async def test_a_status_follows_the_services_it_waits_for(api: Api):
    """Also those that are not watched and come later."""
    gate = Dependency(service="db", condition="service_started", required=False)
    await api.create(service=service("web", depends_on=(gate,)))
    stream = watching(api, "web")
    (status,) = (await following(stream)).statuses
    assert status.reasons == ("1 of 1 replica is not created yet",)
    await api.create(service=service("db"))
    (status,) = (await following(stream)).statuses
    waits = "the service waits until service db has started"
    assert status.reasons == (f"{waits} (0 of 1 task so far)",)
    db = api.one(Service, "db")
    await api.put(node("n1"), task("t1", db))
    (status,) = (await following(stream)).statuses
    assert status.reasons == ("1 of 1 replica is not created yet",)
    await stream.aclose()


async def test_watch_ends_when_the_services_are_gone(api: Api):
    await api.create(service=service("web"))
    stream = watching(api, "web")
    await following(stream)
    await api.drop(api.one(Service, "web"))
    (status,) = (await following(stream)).statuses
    assert (status.removed, status.converged, status.name) == (True, True, "web")
    with pytest.raises(StopAsyncIteration):
        await following(stream)


async def test_watch_of_a_stack_shows_services_that_come_later(api: Api):
    await api.deploy(StackSpec(name="app", services=(service("app_a"),)))
    stream = watching(api, stack="app")
    assert [s.name for s in (await following(stream)).statuses] == ["app_a"]
    await api.deploy(StackSpec(name="app", services=(service("app_a"), service("app_b"))))
    assert [s.name for s in (await following(stream)).statuses] == ["app_a", "app_b"]
    await stream.aclose()


async def test_many_changes_become_few_messages(api: Api):
    await api.create(service=service("web"))
    stream = watching(api, "web")
    await following(stream)
    web = api.one(Service, "web")
    for i in range(1, 31):
        await api.put(task(f"t{i}", web, slot=i))
    messages = 0
    running = 0
    while running < 30:
        (status,) = (await following(stream)).statuses
        running = status.running + status.stopping
        messages += 1
    assert messages <= 10
    await stream.aclose()


async def test_unrelated_changes_are_not_told(api: Api):
    await api.create(service=service("web"))
    await api.create(service=service("db"))
    stream = watching(api, "web")
    await following(stream)
    await api.put(task("t1", api.one(Service, "db")), node("n7"))
    await api.update(api.one(Service, "web"), service=service("web", replicas=0))
    (status,) = (await following(stream)).statuses
    assert status.desired == 0
    await stream.aclose()


async def test_watch_of_nothing_and_of_what_does_not_exist(api: Api):
    with pytest.raises(errors.Invalid, match="name the services, or the stack"):
        await following(watching(api))
    with pytest.raises(errors.NotFound, match="service nope not found"):
        await following(watching(api, "nope"))
    with pytest.raises(errors.NotFound, match="stack nope not found"):
        await following(watching(api, stack="nope"))


async def test_watch_ends_with_a_sentence_when_the_manager_stops(api: Api):
    await api.create(service=service("web"))
    stream = watching(api, "web")
    await following(stream)
    waiting = asyncio.create_task(following(stream))
    await asyncio.sleep(0)
    await api.store.close()
    with pytest.raises(errors.Unavailable, match="the manager is stopping"):
        await waiting


async def test_no_watch_stays_open_behind_a_caller_that_left(api: Api):
    await api.create(service=service("web"))
    stream = watching(api, "web")
    await following(stream)
    await stream.aclose()
    other = await opened(api, request())
    await other.aclose()
    assert not api.store._hub._open


# ---------------------------------------------------------------- times, and who asked


async def test_a_watch_of_the_past_ends_at_its_time_and_says_who_asked(api: Api) -> None:
    times = []
    for name in "abc":
        times.append(api.clock.now_ns())
        await api.create(config=config(name))
        api.clock.advance(seconds=10)
    wanted = WatchRequest(kinds=(Kind.CONFIG,), since_ns=times[1], until_ns=times[2])
    async with asyncio.timeout(5):
        answers = [a async for a in api.control.watch(wanted, CONTEXT)]
    events = [e for a in answers for e in a.events]
    assert [(e.object.config.spec.name, e.who) for e in events if e.object] == [("b", "admin ada")]  # type: ignore[union-attr]
    assert answers[0].kept_from_ns == 0


async def test_a_watch_says_from_when_on_changes_are_kept(api: Api) -> None:
    begun_ns = api.clock.now_ns()
    stream = api.control.watch(WatchRequest(since_ns=begun_ns - SECOND_NS), CONTEXT)
    assert (await anext(stream)).kept_from_ns == begun_ns
    await stream.aclose()


async def test_what_the_cluster_does_by_itself_has_nobody_who_asked(api: Api) -> None:
    stream = await opened(api, request(Kind.NODE))
    await api.put(node("n1"))
    (event,) = await take(stream, 1)
    assert event.who == ""


@pytest.mark.parametrize(
    "wanted",
    [WatchRequest(since_ns=5, from_revision=3), WatchRequest(since_ns=5, until_ns=4)],
    ids=["both", "backwards"],
)
async def test_beginnings_that_contradict_are_refused(api: Api, wanted: WatchRequest) -> None:
    with pytest.raises(errors.Invalid):
        await anext(api.control.watch(wanted, CONTEXT))
