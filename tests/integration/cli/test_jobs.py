"""`swarmctl job` and `swarmctl queue` against the fake cluster: what they send, print and end with."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from swarm.errors import Conflict, Invalid, Unavailable
from swarm.v1 import (
    ClusterSpec,
    ContainerStatus,
    CreateRequest,
    Event,
    JobSpec,
    JobState,
    JobStatus,
    Kind,
    ListQueuesResponse,
    LogLine,
    LogsResponse,
    Object,
    QueueSpec,
    QueueUsage,
    RemoveRequest,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    SchedulingConfig,
    Service,
    ServiceMode,
    ServiceSpec,
    StopCause,
    TaskState,
    TaskStatus,
    UpdateRequest,
    WatchRequest,
    WatchServicesRequest,
)
from tests.integration.cli.conftest import COMMAND, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.pty_process import PtyProcess
from tests.integration.cli.samples import ago_ns, service, status, task

SECOND_NS = 1_000_000_000
GIB = 1 << 30


def job(
    name: str,
    state: JobState | None = None,
    *,
    total: int = 1,
    iteration: int = 0,
    spec: JobSpec | None = None,
    priority: int = 0,
    **ended,
) -> Service:
    found = service(name)
    assert found.spec is not None
    mode = ServiceMode(replicated_job=ReplicatedJob(total_completions=total, max_concurrent=total))
    found = msgspec.structs.replace(
        found,
        spec=msgspec.structs.replace(found.spec, mode=mode, job=spec, priority=priority),
        job_iteration=iteration,
    )
    if state is None:
        return found
    return with_state(found, state, iteration=iteration, **ended)


def with_state(of: Service, state: JobState, **fields) -> Service:
    times = {"queued_at_ns": ago_ns(120)}
    if state is not JobState.QUEUED:
        times["started_at_ns"] = ago_ns(90)
    if state in (JobState.COMPLETE, JobState.FAILED, JobState.CANCELLED):
        times["ended_at_ns"] = ago_ns(60)
    return msgspec.structs.replace(of, job_status=JobStatus(state=state, **(times | fields)))


def created(cluster: FakeCluster) -> ServiceSpec:
    spec = cluster.last(CreateRequest).spec
    assert spec is not None and spec.service is not None
    found: ServiceSpec = spec.service
    return found


# ------------------------------------------------------------------ run


def test_run_makes_a_job_and_does_not_wait(cli: Cli, cluster: FakeCluster) -> None:
    assert cli.ok("job", "run", "python:3.12", "python", "-c", "pass") == "new101\n"
    spec = created(cluster)
    assert spec.name.startswith("job-")
    assert spec.mode == ServiceMode(
        replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1)
    )
    assert spec.task is not None and spec.task.container is not None
    assert spec.task.container.args == ("python", "-c", "pass")
    assert spec.task.container.env == ("SWARM_TASK_SLOT={{.Task.Slot}}", "SWARM_ARRAY_SIZE=1")
    assert spec.task.restart == RestartPolicy(condition="none")
    assert spec.job == JobSpec() and spec.priority == 0
    assert not [call for call in cluster.calls if isinstance(call, WatchServicesRequest)]


def test_run_takes_the_flags_of_jobs_and_those_of_services(cli: Cli, cluster: FakeCluster) -> None:
    words = "--name train --array 8 --gang --cpus 2 --memory 4g --priority 50 --queue batch"
    more = "--timeout 2h --retries 3 --retry-delay 10s --keep 24h --env A=1"
    where = "--constraint node.labels.zone==a --mount type=volume,source=d,target=/d"
    cli.ok("job", "run", *words.split(), *more.split(), *where.split(), "img", "--gang", "x")
    spec = created(cluster)
    assert spec.name == "train" and spec.priority == 50
    assert spec.mode == ServiceMode(
        replicated_job=ReplicatedJob(max_concurrent=8, total_completions=8)
    )
    assert spec.job == JobSpec(
        queue="batch", gang=True, timeout_ns=7200 * SECOND_NS, keep_ns=86400 * SECOND_NS
    )
    task_spec = spec.task
    assert task_spec is not None and task_spec.container is not None
    assert task_spec.container.args == ("--gang", "x")
    assert task_spec.container.env[0] == "A=1"
    assert task_spec.container.env[-1] == "SWARM_ARRAY_SIZE=8"
    assert task_spec.restart == RestartPolicy(
        condition="on-failure", max_attempts=3, delay_ns=10 * SECOND_NS
    )
    assert task_spec.resources == ResourceRequirements(
        reservations=Resources(cpu_nano=2_000_000_000, memory_bytes=4 * GIB),
        limits=Resources(memory_bytes=4 * GIB),
    )
    assert task_spec.placement is not None
    assert task_spec.placement.constraints == ("node.labels.zone==a",)
    assert task_spec.container.mounts[0].target == "/d"


def test_run_asks_for_gpus(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("job", "run", "--gpus", "2", "--gpu-model", "A100|H100", "img")
    task_spec = created(cluster).task
    assert task_spec is not None and task_spec.resources is not None
    reserved = task_spec.resources.reservations
    assert reserved is not None
    [claim] = reserved.devices
    assert (claim.count, claim.capabilities) == (2, ("gpu",))
    assert claim.options == {"model": "A100|H100"}


def test_run_with_other_limits_than_what_is_set_aside(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("job", "run", "--memory", "1g", "--limit-memory", "2g", "--array", "9",
           "--max-concurrent", "3", "--env", "SWARM_TASK_SLOT=mine", "img")  # fmt: skip
    spec = created(cluster)
    assert spec.task is not None and spec.task.resources is not None
    assert spec.task.resources.limits == Resources(memory_bytes=2 * GIB)
    assert spec.mode is not None
    assert spec.mode.replicated_job == ReplicatedJob(max_concurrent=3, total_completions=9)
    assert spec.task.container is not None
    assert spec.task.container.env == ("SWARM_TASK_SLOT=mine", "SWARM_ARRAY_SIZE=9")


def test_run_of_a_process_has_a_command_and_no_image(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("job", "run", "--runtime", "process", "/bin/true", "x")
    spec = created(cluster)
    assert spec.task is not None
    assert spec.task.container is not None and spec.task.runtime == "process"
    assert (spec.task.container.image, spec.task.container.args) == ("", ("/bin/true", "x"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gang --array 4 --max-concurrent 2 x", "leave --max-concurrent out"),
        ("--array 2 --max-concurrent 3 x", "--max-concurrent 3 is more than --array 2"),
        ("--array 0 x", "0 is not in the range"),
        ("--retry-delay 5s x", "--retry-delay says nothing without --retries"),
        ("--retries -1 x", "-1 is not in the range"),
        ("--priority 1001 x", "1001 is not in the range"),
        ("--timeout 5 x", "'5' is not a duration"),
        ("--replicas 2 x", "No such option"),
        ("--mode global x", "No such option"),
        ("--update-order start-first x", "No such option"),
        ("--restart-condition any x", "No such option"),
        ("--gpu-memory lots x", "--gpu-memory"),
        ("", "Missing argument 'IMAGE'"),
    ],
)
def test_run_refuses_what_does_not_fit(
    cli: Cli, cluster: FakeCluster, words: str, said: str
) -> None:
    answer = cli("job", "run", *words.split())
    assert answer.code == 2 and said in answer.err and not cluster.calls, answer


def test_help_of_run_has_the_jobs_own_options_first(cli: Cli) -> None:
    out = cli.ok("job", "run", "--help")
    own, rest = out.split("Options of its tasks, as of service create:")
    for flag in ("--array", "--gang", "--gpus", "--queue", "--timeout", "--wait", "--keep"):
        assert f"  {flag}" in own and f"  {flag} " not in rest
    assert "--mount" in rest and "--update-order" not in out and "--health" not in out


# ------------------------------------------------------------------ wait


def ends_as(cluster: FakeCluster, before: Service, *after: Service) -> None:
    """The job is as `before` until the watch stands, and then becomes what follows."""
    cluster.add(before)
    cluster.watch_events = [
        Event(action="update", kind=Kind.SERVICE, object=Object(service=one), revision=i + 1)
        for i, one in enumerate(after)
    ]


@pytest.mark.parametrize(
    ("after", "code", "said"),
    [
        ({"state": JobState.COMPLETE, "exit_code": 0}, 0, ""),
        (
            {"state": JobState.FAILED, "exit_code": 3, "message": "task train.2 failed"},
            3,
            "Error: job 'train' failed: task train.2 failed\n",
        ),
        (
            {"state": JobState.FAILED, "message": "no such image"},
            125,
            "Error: job 'train' failed without an exit code: no such image\n",
        ),
    ],
)
def test_wait_ends_with_the_jobs_exit_code(
    cli: Cli, cluster: FakeCluster, after: dict[str, Any], code: int, said: str
) -> None:
    before = job("train", JobState.RUNNING)
    ends_as(cluster, before, with_state(before, **after))
    answer = cli("job", "wait", "train")
    assert (answer.code, answer.out, answer.err) == (code, "", said)


def test_wait_ends_with_130_once_a_cancelled_jobs_tasks_have_stopped(
    cli: Cli, cluster: FakeCluster
) -> None:
    before = job("train", JobState.RUNNING, spec=JobSpec(cancelled=True))
    ends_as(cluster, before, with_state(before, JobState.CANCELLED))
    answer = cli("job", "wait", "train")
    assert (answer.code, answer.err) == (130, "Error: job 'train' was cancelled\n")


def test_wait_ends_with_124_when_a_task_ran_for_too_long(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(job("train", JobState.FAILED, timed_out=True, message="task 1 ran for too long"))
    answer = cli("job", "wait", "train")
    assert answer.code == 124
    assert answer.err == "Error: job 'train' timed out: task 1 ran for too long\n"


def test_wait_for_several_ends_as_the_first_named_that_is_not_complete(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.add(job("a", JobState.COMPLETE, exit_code=0))
    cluster.add(job("b", JobState.FAILED, exit_code=7))
    cluster.add(job("c", JobState.FAILED, exit_code=9))
    answer = cli("job", "wait", "c", "a", "b")
    assert answer.code == 9
    assert answer.err == "Error: job 'c' failed\nError: job 'b' failed\n"


def test_wait_gives_up_at_its_deadline_and_says_that_the_job_goes_on(
    cli: Cli, cluster: FakeCluster
) -> None:
    cluster.add(job("a", JobState.COMPLETE))
    cluster.add(job("train", JobState.RUNNING))
    answer = cli("job", "wait", "--timeout", "200ms", "a", "train")
    assert answer.code == 6
    assert "Error: job 'train' has not ended within 200ms" in answer.err
    assert "The job goes on; `swarmctl job wait train` waits for it" in answer.err


def test_wait_takes_no_end_of_an_earlier_iteration_for_the_present_one(
    cli: Cli, cluster: FakeCluster
) -> None:
    again = job("train", iteration=2)
    old = msgspec.structs.replace(again, job_status=JobStatus(state=JobState.COMPLETE, iteration=1))
    ends_as(cluster, old, with_state(again, JobState.FAILED, iteration=2, exit_code=5))
    assert cli("job", "wait", "train").code == 5


def test_wait_says_that_a_job_was_removed(cli: Cli, cluster: FakeCluster) -> None:
    before = cluster.add(job("train", JobState.RUNNING))
    cluster.watch_events = [
        Event(action="remove", kind=Kind.SERVICE, object=Object(service=before), revision=1)
    ]
    answer = cli("job", "wait", "train")
    assert (answer.code, answer.err) == (4, "Error: job 'train' was removed before it ended\n")


def test_wait_knows_the_end_of_a_job_that_is_removed_with_it(
    cli: Cli, cluster: FakeCluster
) -> None:
    before = cluster.add(job("train", JobState.RUNNING))
    ended = with_state(before, JobState.FAILED, exit_code=3)
    cluster.watch_events = [
        Event(action="remove", kind=Kind.SERVICE, object=Object(service=ended), revision=1)
    ]
    assert cli("job", "wait", "train").code == 3


def test_wait_shows_progress_and_the_last_lines_of_what_failed(
    cli: Cli, cluster: FakeCluster
) -> None:
    before = job("train", JobState.RUNNING, total=2)
    ends_as(cluster, before, with_state(before, JobState.FAILED, exit_code=3))
    failed = task(before, "t" * 25, slot=1, state=TaskState.FAILED)
    ran = TaskStatus(state=TaskState.FAILED, container=ContainerStatus(exit_code=3))
    cluster.add(msgspec.structs.replace(failed, status=ran))
    cluster.log_script = [LogsResponse(lines=(LogLine(data=b"out of memory"),))]
    cluster.statuses[before.id] = status(before, 0, 2, job=True, failing_task_id="t" * 25)
    answer = cli("job", "wait", "train")
    assert answer.code == 3
    assert "Error: job 'train' failed\n  last lines of task" in answer.err
    assert answer.err.endswith("  | out of memory\n")


def test_wait_knows_the_exit_code_though_nobody_answers_any_more(
    cli: Cli, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = job("train", JobState.RUNNING)
    ends_as(cluster, before, with_state(before, JobState.FAILED, exit_code=3))
    note = cluster.note
    looks: list[bool] = []

    def gone(name: str, request: Any) -> None:
        if name == "get":
            looks.append(any(isinstance(call, WatchRequest) for call in cluster.calls))
            if sum(looks) > 1:  # it has looked at the job once the watch stood
                raise Unavailable("the manager is gone")
        note(name, request)

    monkeypatch.setattr(cluster, "note", gone)
    answer = cli("job", "wait", "train")
    assert (answer.code, answer.err) == (3, "Error: job 'train' failed\n")


def test_run_with_wait_ends_as_the_job_does(cli: Cli, cluster: FakeCluster) -> None:
    made = job("train")
    cluster.watch_events = [
        Event(
            action="update",
            kind=Kind.SERVICE,
            object=Object(
                service=msgspec.structs.replace(
                    with_state(made, JobState.FAILED, exit_code=4), id="new101"
                )
            ),
            revision=1,
        )
    ]
    answer = cli("job", "run", "--wait", "--name", "train", "img")
    assert (answer.code, answer.out) == (4, "new101\n")


def test_ctrl_c_ends_the_wait_and_not_the_job(cli: Cli, cluster: FakeCluster) -> None:
    found = cluster.add(job("train", JobState.RUNNING, total=4))
    cluster.watch_script = [[status(found, 2, 4, job=True, states={"running": 2})]]
    command = [*COMMAND, "job", "wait", "train"]
    with PtyProcess(command, cli.environment(NO_COLOR="1")) as process:
        process.expect(b"2 running")
        process.interrupt()
        assert process.wait() == 130
        last = process.screen.decode().rsplit("0/4", 1)[1]
    assert "The job goes on; `swarmctl job wait train` waits for it" in last, last


def test_a_narrow_terminal_shows_jobs_whole(cli: Cli, cluster: FakeCluster) -> None:
    found = cluster.add(job("train-resnet", JobState.QUEUED, priority=50, total=4))
    why = "4 of 4 tasks are not placed: no suitable node (2 of 2 nodes short of GPUs: need 8)"
    cluster.statuses[found.id] = status(found, 0, 4, reasons=(why,))
    cluster.add(job("evaluate", JobState.FAILED, exit_code=3, message="task 1: " + "why " * 30))
    for columns in (80, 120):
        command = [*COMMAND, "job", "ls"]
        with PtyProcess(command, cli.environment(NO_COLOR="1"), columns=columns) as process:
            assert process.wait() == 0
            lines = process.screen.decode().split("\r\n")
        assert max(map(len, lines)) <= columns, lines
        assert why in " ".join(" ".join(lines).split())


def test_the_queues_of_a_narrow_terminal_fit(cli: Cli, cluster: FakeCluster) -> None:
    spec = QueueSpec(name="nightly", weight=2, cpu_nano=64 * 10**9, memory_bytes=64 * GIB)
    cluster.queues = ListQueuesResponse(queues=(QueueUsage(spec=spec),))
    with PtyProcess([*COMMAND, "queue", "ls"], cli.environment(NO_COLOR="1")) as process:
        assert process.wait() == 0
        lines = process.screen.decode().split("\r\n")
    assert max(map(len, lines)) <= 80, lines


# ------------------------------------------------------------------ ls, ps, inspect


def test_ls_shows_where_jobs_stand(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(service("web"))
    waits = cluster.add(job("a2", JobState.QUEUED, total=4, spec=JobSpec(queue="batch")))
    runs = cluster.add(job("a10", JobState.RUNNING, total=10, priority=5))
    failed = cluster.add(job("b", JobState.FAILED, exit_code=3, message="task b.1 failed"))
    cluster.add(job("c", JobState.CANCELLED, spec=JobSpec(cancelled=True)))
    cluster.add(job("d", JobState.RUNNING, spec=JobSpec(cancelled=True)))
    cluster.statuses[waits.id] = status(waits, 0, 4, reasons=("the queue's quota is used up",))
    states = {"running": 3, "pending": 2, "complete": 4}
    cluster.statuses[runs.id] = status(runs, 3, 10, completed=4, states=states)
    cluster.statuses[failed.id] = status(failed, 0, 1)
    lines = cli.ok("job", "ls").splitlines()
    assert lines[0].split() == ["ID", "NAME", "QUEUE", "PRIO", "TASKS", "STATE", "DETAILS"]
    assert [line.split()[1] for line in lines[1:]] == ["a2", "a10", "b", "c", "d"]
    assert "batch" in lines[1] and "Queued 2 minutes ago" in lines[1]
    assert lines[1].endswith("the queue's quota is used up")
    assert " 4/10 " in lines[2] and "Running about a minute ago" in lines[2]
    assert lines[2].endswith(" 3 running, 2 pending")
    assert "Failed (3) about a minute ago" in lines[3] and "task b.1 failed" in lines[3]
    assert "Cancelled" in lines[4] and "Cancelling" in lines[5]
    assert cli.ok("job", "ls", "-f", "queue=batch", "--format", "{{.Name}}") == "a2\n"
    assert cli.ok("job", "ls", "-f", "state=failed", "--format", "{{.ExitCode}}") == "3\n"
    assert cli.ok("job", "ls", "-q").splitlines()[0] == waits.id[:12]
    assert "PRIO" not in cli.ok("job", "ls", "-f", "name=b")


def test_ps_inspect_and_the_others_take_jobs_only(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(service("web"))
    found = cluster.add(job("train", JobState.COMPLETE, exit_code=0, completed=1))
    cluster.add(task(found, "t1", slot=1, state=TaskState.COMPLETE))
    cluster.add(task(web, "t2", slot=1))
    assert "train.1" in cli.ok("job", "ps", "train")
    document = json.loads(cli.ok("job", "inspect", "train"))[0]
    assert document["Spec"]["Name"] == "train"
    for words in (("ps",), ("inspect",), ("cancel",), ("rm",), ("wait",)):
        answer = cli("job", *words, "web")
        assert answer.code == 2 and "service 'web' is no job" in answer.err
        assert "web.1" not in answer.out
    assert cli("job", "inspect", "nope").code == 4


def test_logs_are_those_of_the_service(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(job("train", JobState.RUNNING))
    line = LogLine(task_id="t1", service_name="train", slot=1, node_name="n1", data=b"step 1")
    cluster.log_script = [LogsResponse(lines=(line,))]
    assert cli.ok("job", "logs", "train").endswith("| step 1\n")


# ------------------------------------------------------------------ cancel, rm


def test_cancel_changes_nothing_but_that(cli: Cli, cluster: FakeCluster) -> None:
    found = cluster.add(job("train", JobState.RUNNING, spec=JobSpec(queue="batch")))
    assert cli.ok("job", "cancel", "train") == "train\n"
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.service is not None
    assert spec.service.job == JobSpec(queue="batch", cancelled=True)
    assert msgspec.structs.replace(spec.service, job=None) == msgspec.structs.replace(
        found.spec, job=None
    )
    cluster.calls.clear()
    assert cli.ok("job", "cancel", "train") == "train\n"  # again: nothing is left to do
    assert not [call for call in cluster.calls if isinstance(call, UpdateRequest)]


def test_cancel_of_what_has_ended_is_a_conflict(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(job("train", JobState.COMPLETE))
    cluster.add(job("next", JobState.RUNNING))
    answer = cli("job", "cancel", "train", "next")
    assert answer.code == 5 and answer.out == "next\n"
    assert "job 'train' has ended already: it is complete" in answer.err


def test_force_runs_a_cancelled_job_again(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(job("train", JobState.CANCELLED, spec=JobSpec(cancelled=True, gang=True)))
    cli.ok("service", "update", "-d", "--force", "train")
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.service is not None and spec.service.task is not None
    assert spec.service.job == JobSpec(gang=True)
    assert spec.service.task.force_update == 1


def test_rm_leaves_what_has_not_ended_unless_forced(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(job("a", JobState.RUNNING))
    cluster.add(job("b", JobState.COMPLETE))
    answer = cli("job", "rm", "a", "b")
    assert (answer.code, answer.out) == (5, "b\n")
    assert "job 'a' is running; cancel it first, or give --force" in answer.err
    assert cli.ok("job", "rm", "-f", "a") == "a\n"
    assert [call.ref for call in cluster.calls if isinstance(call, RemoveRequest)]


# ------------------------------------------------------------------ queues


def queues_sent(cluster: FakeCluster) -> tuple[QueueSpec, ...]:
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.cluster is not None and spec.cluster.scheduling is not None
    found: tuple[QueueSpec, ...] = spec.cluster.scheduling.queues
    return found


def with_queues(cluster: FakeCluster, *queues: QueueSpec) -> None:
    [found] = cluster.objects[Kind.CLUSTER]
    config = SchedulingConfig(strategy="binpack", queues=queues)
    spec = msgspec.structs.replace(found.spec or ClusterSpec(), scheduling=config)
    cluster.objects[Kind.CLUSTER] = [msgspec.structs.replace(found, spec=spec)]


def test_queue_set_makes_and_changes_queues(cli: Cli, cluster: FakeCluster) -> None:
    words = "--weight 2 --cpus 64 --memory 1TiB --gpus 8.5 --tasks 100"
    assert cli.ok("queue", "set", "batch", *words.split()) == "batch\n"
    full = QueueSpec(
        name="batch",
        weight=2,
        cpu_nano=64_000_000_000,
        memory_bytes=1 << 40,
        gpu_nano=8_500_000_000,
        tasks=100,
    )
    assert queues_sent(cluster) == (full,)
    with_queues(cluster, full)
    cli.ok("queue", "set", "batch", "--gpus", "0")
    assert queues_sent(cluster) == (msgspec.structs.replace(full, gpu_nano=0),)
    cli.ok("queue", "set", "alpha")
    assert [queue.name for queue in queues_sent(cluster)] == ["alpha", "batch"]
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.cluster is not None and spec.cluster.scheduling is not None
    assert spec.cluster.scheduling.strategy == "binpack", "the rest stays"


def test_queue_set_goes_again_after_a_conflict(cli: Cli, cluster: FakeCluster) -> None:
    cluster.failures["update"] = [Conflict("update out of sequence")]
    assert cli.ok("queue", "set", "batch") == "batch\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("set default", 2, "queue 'default' exists and nothing is to be changed"),
        ("set batch", 2, "queue 'batch' exists and nothing is to be changed"),
        ("set batch --weight 0", 2, "0 is not in the range"),
        ("set batch --cpus lots", 2, "'lots' is not a number of CPUs"),
        ("rm default", 2, "queue 'default' is always there"),
        ("rm bach", 4, "there is no queue 'bach' (queues: default, batch)"),
    ],
)
def test_queue_refuses(cli: Cli, cluster: FakeCluster, words: str, code: int, said: str) -> None:
    with_queues(cluster, QueueSpec(name="batch"))
    answer = cli("queue", *words.split())
    assert answer.code == code and said in answer.err, answer


def test_queue_rm_takes_the_named_ones_away(cli: Cli, cluster: FakeCluster) -> None:
    with_queues(cluster, QueueSpec(name="a"), QueueSpec(name="b"), QueueSpec(name="c"))
    assert cli.ok("queue", "rm", "c", "a") == "c\na\n"
    assert queues_sent(cluster) == (QueueSpec(name="b"),)


def test_queue_rm_tells_what_the_manager_says(cli: Cli, cluster: FakeCluster) -> None:
    with_queues(cluster, QueueSpec(name="a"))
    cluster.failures["update"] = [Invalid("cluster: queues[a]: jobs are in it")]
    answer = cli("queue", "rm", "a")
    assert (answer.code, answer.out) == (2, "") and "jobs are in it" in answer.err


def test_queue_ls_shows_what_is_held_of_what_may_be(cli: Cli, cluster: FakeCluster) -> None:
    cluster.queues = ListQueuesResponse(
        queues=(
            QueueUsage(spec=QueueSpec(name="default"), jobs_running=1, tasks=3),
            QueueUsage(
                spec=QueueSpec(name="batch", weight=2, cpu_nano=64_000_000_000, gpu_nano=8 * 10**9),
                cpu_nano=12_500_000_000,
                memory_bytes=3 * GIB,
                gpu_nano=2_500_000_000,
                tasks=5,
                jobs_running=2,
                waiting=("train", "tune"),
                fair_share=97_650,
            ),
        )
    )
    lines = [line.split("  ") for line in cli.ok("queue", "ls").splitlines()]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert " ".join(rows[0]) == "NAME WEIGHT SHARE RUNNING WAITING CPUS MEMORY GPUS TASKS"
    assert rows[1] == ["default", "1", "0%", "1", "0", "0", "0 B", "0", "3"]
    assert rows[2] == ["batch", "2", "9.77%", "2", "2", "12.5/64", "3 GiB", "2.5/8", "5"]
    assert cli.ok("queue", "ls", "-q") == "default\nbatch\n"
    assert cli.ok("queue", "ls", "--format", "{{.Next}}") == "\ntrain, tune\n"


# ------------------------------------------------------------------ priorities


def test_priority_of_a_service(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("service", "create", "-d", "--priority", "-5", "nginx")
    assert created(cluster).priority == -5
    cluster.add(service("web"))
    cli.ok("service", "update", "-d", "--priority", "7", "web")
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.service is not None and spec.service.priority == 7


def test_priorities_stand_in_service_ls_where_there_are_any(cli: Cli, cluster: FakeCluster) -> None:
    web = cluster.add(service("web"))
    assert "PRIORITY" not in cli.ok("service", "ls")
    assert web.spec is not None
    spec = msgspec.structs.replace(web.spec, name="db", priority=-7)
    cluster.add(msgspec.structs.replace(web, id="d" * 25, spec=spec))
    lines = cli.ok("service", "ls").splitlines()
    assert lines[0].split()[:4] == ["ID", "NAME", "MODE", "PRIORITY"]
    assert lines[1].split()[3] == "-7" and lines[2].split()[3] == "0"
    assert json.loads(cli.ok("service", "inspect", "db"))[0]["Spec"]["Priority"] == -7
    assert "Priority:       -7" in cli.ok("service", "inspect", "--pretty", "db").splitlines()
    assert "Priority" not in cli.ok("service", "inspect", "--pretty", "web")


# ------------------------------------------------------------------ what inspect and ps tell


def test_inspect_tells_all_of_a_job(cli: Cli, cluster: FakeCluster) -> None:
    spec = JobSpec(queue="batch", gang=True, timeout_ns=90 * SECOND_NS, keep_ns=0)
    found = job("train", total=2, spec=spec, priority=5, iteration=3)
    ended = with_state(
        found,
        JobState.FAILED,
        iteration=3,
        queued_at_ns=1,
        started_at_ns=2,
        ended_at_ns=3,
        exit_code=3,
        message="task 1: exited with code 3",
        completed=1,
        failed=1,
    )
    cluster.add(ended)
    document = json.loads(cli.ok("job", "inspect", "train"))[0]
    assert document["Spec"]["Job"] == {
        "Queue": "batch",
        "Gang": True,
        "Timeout": 90 * SECOND_NS,
        "Keep": 0,
    }
    time = "1970-01-01T00:00:00.00000000"
    assert document["JobStatus"] == {
        "JobIteration": {"Index": 3},
        "State": "failed",
        "QueuedAt": f"{time}1Z",
        "StartedAt": f"{time}2Z",
        "EndedAt": f"{time}3Z",
        "Message": "task 1: exited with code 3",
        "ExitCode": 3,
        "Completed": 1,
        "Failed": 1,
    }
    assert cli.ok("job", "inspect", "--format", "{{.JobStatus.State}}", "train") == "failed\n"
    pretty = cli.ok("job", "inspect", "--pretty", "train").splitlines()
    assert pretty[2:20] == [
        "Service Mode:   ReplicatedJob",
        " Max Concurrent: 2",
        " Total Completions: 2",
        "Priority:       5",
        "Queue:          batch",
        "Gang:           true",
        "Timeout:        1m30s",
        "Keep:           0s",
        "Job State:      Failed",
        f" Queued:        {time}1Z",
        f" Started:       {time}2Z",
        f" Ended:         {time}3Z",
        " Exit Code:     3",
        " Completed:     1",
        " Failed:        1",
        " Message:       task 1: exited with code 3",
        "ContainerSpec:",
        " Image:         nginx:1.27@sha256:" + "a" * 64,
    ]


def test_ps_tells_why_the_cluster_stopped_a_task(cli: Cli, cluster: FakeCluster) -> None:
    found = cluster.add(job("train", JobState.RUNNING))
    ended: dict[str, Any] = {
        "slot": 1,
        "state": TaskState.SHUTDOWN,
        "desired": TaskState.SHUTDOWN,
    }
    taken = msgspec.structs.replace(
        task(found, "t" * 25, **ended, seconds=20),
        stop_cause=StopCause.PREEMPTED,
        stop_message="preempted by web (priority 9)",
    )
    cluster.add(taken)
    both = msgspec.structs.replace(
        task(found, "u" * 25, **ended, seconds=30, err="exit (1)"),
        stop_cause=StopCause.GANG,
        stop_message="task 2 of its gang failed",
    )
    cluster.add(both)
    out = cli.ok("service", "ps", "train")
    assert '"preempted by web (priority 9)"' in out
    assert '"task 2 of its gang failed; exit (1)"' in out
    document = json.loads(cli.ok("task", "inspect", "t" * 25))[0]
    assert document["StopCause"] == "preempted"
    assert document["StopMessage"] == "preempted by web (priority 9)"
