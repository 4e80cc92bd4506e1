"""Jobs, their queues, priorities: what is refused with which words, and when a job runs again."""

from __future__ import annotations

import pytest
from msgspec import structs

from manager.api.objects import update_cluster
from swarm import errors
from swarm.v1 import (
    Cluster,
    Global,
    GlobalJob,
    JobSpec,
    JobState,
    JobStatus,
    QueueSpec,
    Replicated,
    ReplicatedJob,
    SchedulingConfig,
    Service,
    ServiceMode,
    StackSpec,
)
from tests.unit.api.harness import Api, service

JOB = ServiceMode(replicated_job=ReplicatedJob(total_completions=3))


def job(name: str = "web", *, mode: ServiceMode = JOB, **fields):
    again = fields.pop("again", 0)
    labels = fields.pop("labels", {})
    spec = service(name, mode=mode, task={"force_update": again}, labels=labels)
    return structs.replace(spec, job=JobSpec(**fields))


async def set_queues(api: Api, *queues: QueueSpec) -> None:
    cluster = next(iter(api.store.all(Cluster)))
    assert cluster.spec is not None
    spec = structs.replace(cluster.spec, scheduling=SchedulingConfig(queues=queues))
    await api.update(cluster, cluster=spec)


# ---------------------------------------------------------------- what a job may say


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (structs.replace(service(), job=JobSpec()), "job: only services of mode replicated-job"),
        (
            job(mode=ServiceMode(global_service=Global()), queue="x"),
            "job: only services of mode replicated-job or global-job can have it",
        ),
        (job(queue="-x"), "job.queue: '-x' is not a name of a queue"),
        (job(queue="x" * 64), "is not a name of a queue: at most 63 characters"),
        (job(queue="batch"), "there is no queue 'batch' (queues: default); make it with"),
        (job(queue="defalt"), "did you mean 'default'?"),
        (job(timeout_ns=-1), "job.timeout: a duration cannot be negative (-1)"),
        (job(keep_ns=-1), "job.keep: a duration cannot be negative (-1)"),
        (
            job(mode=ServiceMode(global_job=GlobalJob()), gang=True),
            "job.gang: a global job has no number of tasks to start together",
        ),
        (
            job(
                mode=ServiceMode(
                    replicated_job=ReplicatedJob(total_completions=3, max_concurrent=2)
                ),
                gang=True,
            ),
            "job.gang: a gang runs all of its tasks at once, and this job runs 2 of 3",
        ),
        (structs.replace(service(), priority=1001), "priority: 1001 is not from -1000 to 1000"),
        (structs.replace(service(), priority=-1001), "priority: -1001 is not from -1000 to 1000"),
    ],
)
async def test_wrong_jobs_are_refused_with_what_to_write(api: Api, spec, words: str):
    with pytest.raises(errors.Invalid) as caught:
        await api.create(service=spec)
    assert words in caught.value.message


@pytest.mark.parametrize(
    "spec",
    [
        job(gang=True),
        job(mode=ServiceMode(replicated_job=ReplicatedJob()), gang=True),
        job(mode=ServiceMode(replicated_job=ReplicatedJob(max_concurrent=4)), gang=True),
        job(mode=ServiceMode(global_job=GlobalJob()), queue="default", timeout_ns=1, keep_ns=0),
        structs.replace(service(), priority=-1000),
        structs.replace(job(cancelled=True), priority=1000),
    ],
)
async def test_jobs_and_priorities_that_are_taken(api: Api, spec):
    await api.create(service=spec)
    assert api.one(Service, "web").spec.job == spec.job
    assert api.one(Service, "web").spec.priority == spec.priority


# ---------------------------------------------------------------- queues


@pytest.mark.parametrize(
    ("queues", "words"),
    [
        ([QueueSpec()], "scheduling.queues[0].name: a queue needs a name"),
        ([QueueSpec(name="a b")], "queues[a b].name: 'a b' is not a name of a queue"),
        ([QueueSpec(name="a"), QueueSpec(name="a")], "queue 'a' is named twice"),
        ([QueueSpec(name="a", cpu_nano=-1)], "queues[a].cpus: a quota cannot be negative"),
        ([QueueSpec(name="a", memory_bytes=-1)], "queues[a].memory: a quota cannot be negative"),
        ([QueueSpec(name="a", gpu_nano=-1)], "queues[a].gpus: a quota cannot be negative"),
        ([QueueSpec(name="a", tasks=-1)], "queues[a].tasks: a quota cannot be negative"),
        ([QueueSpec(name="a", weight=1_000_001)], "weight: 1000001 is more than the limit"),
        ([QueueSpec(name=f"q{i}") for i in range(1001)], "1001 queues are more than the limit"),
    ],
)
async def test_wrong_queues_are_refused(api: Api, queues, words: str):
    with pytest.raises(errors.Invalid) as caught:
        await set_queues(api, *queues)
    assert words in caught.value.message


async def test_a_job_goes_into_a_queue_that_exists_and_keeps_it(api: Api):
    await set_queues(api, QueueSpec(name="batch", weight=2), QueueSpec(name="night"))
    with pytest.raises(errors.Invalid, match=r"queue 'batc'; did you mean 'batch'\? \(queues: def"):
        await api.create(service=job(queue="batc"))
    await api.create(service=job(queue="batch"))
    with pytest.raises(errors.Invalid) as caught:
        await set_queues(api, QueueSpec(name="night"))
    assert 'queues[batch]: it cannot be removed while jobs are in it: service "web"' in str(
        caught.value
    )
    await set_queues(api, QueueSpec(name="batch", tasks=1))  # others may change and go


@pytest.mark.parametrize("how", ["ended", "removed"])
async def test_a_queue_goes_when_its_jobs_have_ended_or_are_removed(api: Api, how: str):
    await set_queues(api, QueueSpec(name="batch"))
    await api.create(service=job(queue="batch"))
    found = api.one(Service, "web")
    status = JobStatus(state=JobState.CANCELLED) if how == "ended" else None
    await api.put(structs.replace(found, job_status=status, pending_delete=how == "removed"))
    await set_queues(api)


async def test_a_queue_does_not_go_from_under_a_job_that_is_made_meanwhile(api: Api):
    await set_queues(api, QueueSpec(name="batch"))
    draft = api.store.draft()
    cluster = next(iter(draft.all(Cluster)))
    assert cluster.spec is not None
    update_cluster(draft, cluster, structs.replace(cluster.spec, scheduling=None))
    await api.create(service=job(queue="batch"))
    with pytest.raises(errors.Conflict):
        await api.store.commit(draft)


# ---------------------------------------------------------------- running again


async def test_a_cancelled_job_that_is_taken_back_runs_from_the_start(api: Api):
    await api.create(service=job())
    await api.update(api.one(Service, "web"), service=job(cancelled=True))
    assert api.one(Service, "web").job_iteration == 0
    await api.update(api.one(Service, "web"), service=job(cancelled=True, labels={"a": "b"}))
    assert api.one(Service, "web").job_iteration == 0
    await api.update(api.one(Service, "web"), service=job())
    assert api.one(Service, "web").job_iteration == 1
    await api.update(api.one(Service, "web"), service=job(again=1))
    assert api.one(Service, "web").job_iteration == 2


async def test_what_a_job_asks_for_beside_its_template_does_not_run_it_again(api: Api):
    await api.create(service=job())
    for spec in (job(timeout_ns=5), job(keep_ns=5), structs.replace(job(), priority=5)):
        await api.update(api.one(Service, "web"), service=spec)
    assert api.one(Service, "web").job_iteration == 0


async def test_deploying_a_stack_leaves_its_cancelled_job_cancelled_until_it_changes(api: Api):
    first = StackSpec(name="app", services=(job("app_work"),))
    await api.deploy(first)
    found = api.one(Service, "app_work")
    cancelled = structs.replace(found.spec, job=JobSpec(cancelled=True))
    await api.update(found, service=cancelled)
    await api.deploy(first)
    assert api.one(Service, "app_work").spec.job.cancelled
    assert api.one(Service, "app_work").job_iteration == 0
    changed = service("app_work", mode=JOB, container={"image": "nginx:9"})
    await api.deploy(StackSpec(name="app", services=(changed,)))
    now = api.one(Service, "app_work")
    assert now.spec.job is None or not now.spec.job.cancelled
    assert now.job_iteration == 1


async def test_a_stack_is_refused_for_a_queue_that_does_not_exist(api: Api):
    spec = StackSpec(name="app", services=(job("app_work", queue="batch"),))
    with pytest.raises(errors.Invalid, match="there is no queue 'batch'"):
        await api.deploy(spec)


async def test_a_service_that_is_no_job_says_nothing_of_queues(api: Api):
    mode = ServiceMode(replicated=Replicated(replicas=2))
    await api.create(service=service(mode=mode))
    assert api.one(Service, "web").spec.job is None
