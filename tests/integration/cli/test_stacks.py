"""Stacks at the command line: plans, deploys that wait, history, rollback and removal."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from swarm.errors import Conflict, Invalid, NotFound, Unavailable
from swarm.v1 import (
    ContainerStatus,
    DeployStackRequest,
    Event,
    FieldChange,
    GetStackHistoryResponse,
    Kind,
    LogLine,
    LogsRequest,
    LogsResponse,
    Meta,
    NetworkSpec,
    Object,
    PlannedChange,
    PlanStackResponse,
    Service,
    ServicePlacement,
    ServiceRevision,
    Stack,
    StackChange,
    StackRevision,
    StackRollback,
    StackSpec,
    Task,
    TaskState,
    TaskStatus,
    UpdateState,
    UpdateStatus,
    WatchRequest,
    WatchServicesRequest,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import STORE_REVISION, FakeCluster
from tests.integration.cli.samples import ago_ns, node, service, status, task
from tests.integration.cli.test_terminal import on_terminal

VERSION = "3.71.16644a611f7f4f81.2c9a0bc0cc1c2c17"
LABEL = {"com.docker.stack.namespace": "app"}
COMPOSE = "services:\n  web:\n    image: nginx:1.27\n    deploy: {replicas: 2}\n"
PLAN = PlanStackResponse(
    stack_id="s1",
    revision=3,
    version=VERSION,
    differs=True,
    settled=True,
    warnings=("ports of the mesh need a network",),
    changes=(
        PlannedChange(
            change=StackChange(kind=Kind.NETWORK, name="app_default", id="n", action="unchanged")
        ),
        PlannedChange(
            change=StackChange(kind=Kind.SERVICE, name="app_web", id="w1", action="updated"),
            effect="recreated",
            fields=(FieldChange(path="task.container.image", before='"a:1"', after='"a:2"'),),
            placement=ServicePlacement(created=2, stopped=2),
        ),
    ),
)
SAME = PlanStackResponse(
    stack_id="s1", revision=3, version=VERSION, settled=True, changes=PLAN.changes[:1]
)


@pytest.fixture
def compose(tmp_path: Path) -> str:
    path = tmp_path / "compose.yml"
    path.write_text(COMPOSE)
    return str(path)


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    cluster.add(
        Stack(
            id="s1",
            meta=Meta(version=5),
            spec=StackSpec(name="app", networks=(NetworkSpec(name="app_default"),)),
            revision=3,
        )
    )
    found = cluster.add(service("app_web", id_="w1", labels=LABEL))
    assert isinstance(found, Service)
    return found


# ------------------------------------------------------------------ plans

SHOWN = (
    "~ service app_web  recreated: its tasks are replaced\n"
    "    ~ image: a:1 -> a:2\n"
    "    tasks: 2 start; 2 stop\n"
    "\n"
    f"0 to create, 1 to change, 0 to remove, 1 unchanged; plan {VERSION}\n"
)


@pytest.mark.parametrize("words", [("stack", "diff"), ("stack", "deploy", "--dry-run")], ids=str)
def test_a_plan_is_shown_and_nothing_is_deployed(
    cli: Cli, cluster: FakeCluster, compose: str, words: tuple[str, ...]
) -> None:
    cluster.plan = PLAN
    answer = cli(*words, "--prune", "-c", compose, "app")
    assert (answer.code, answer.out) == (0, SHOWN)
    assert answer.err == "Warning: ports of the mesh need a network\n"
    [request] = cluster.calls
    assert isinstance(request, DeployStackRequest)
    assert request.prune and request.spec and request.spec.services[0].name == "app_web"


def test_the_exit_code_tells_of_a_difference_where_asked(
    cli: Cli, cluster: FakeCluster, compose: str
) -> None:
    cluster.plan = PLAN
    assert cli("stack", "diff", "-c", compose, "app").code == 0
    assert cli("stack", "diff", "--exit-code", "-c", compose, "app").code == 3
    assert cli("stack", "deploy", "--dry-run", "--exit-code", "-c", compose, "app").code == 3
    quiet = cli("stack", "diff", "--exit-code", "-q", "-c", compose, "app")
    assert (quiet.code, quiet.out) == (3, "")
    cluster.plan = SAME
    same = cli("stack", "diff", "--exit-code", "-c", compose, "app")
    assert (same.code, same.out) == (
        0,
        f"No differences: stack app stays as it is; plan {VERSION}\n",
    )


def test_a_plan_for_machines(cli: Cli, cluster: FakeCluster, compose: str) -> None:
    cluster.plan = PLAN
    out = cli.ok("stack", "diff", "--format", "json", "-c", compose, "app")
    assert out.count("\n") == 1
    plan = json.loads(out)
    assert plan["Version"] == VERSION and plan["Changes"][1]["Fields"][0]["After"] == "a:2"
    again = yaml.safe_load(cli.ok("stack", "diff", "--format", "yaml", "-c", compose, "app"))
    assert again == plan

    def templated(template: str) -> str:
        return cli.ok("stack", "diff", "--format", template, "-c", compose, "app")

    assert templated("{{.Version}}") == f"{VERSION}\n"
    names = "{{range .Changes}}{{.Name}}:{{.Action}} {{end}}"
    assert templated(names) == "app_default:unchanged app_web:updated \n"
    assert templated("table {{.Name}}\t{{.Effect}}").splitlines()[2].split() == [
        "app_web",
        "recreated",
    ]
    slip = cli("stack", "diff", "--format", "{{.Versoin}}", "-c", compose, "app")
    assert slip.code == 2 and "Version" in slip.err


def test_a_rollback_s_plan_describes_what_comes_back(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    old = service("app_old", replicas=4)
    cluster.history = GetStackHistoryResponse(
        revisions=tuple(
            StackRevision(revision=n, spec=StackSpec(services=(old.spec,) if old.spec else ()))
            for n in (3, 2, 1)
        )
    )
    created = StackChange(kind=Kind.SERVICE, name="app_old", action="created")
    cluster.plan = PlanStackResponse(
        stack_id="s1", revision=3, version="v", differs=True, settled=True, changes=(PlannedChange(change=created),)
    )  # fmt: skip
    for words in ((), ("2",)):
        out = cli.ok("stack", "rollback", "--dry-run", "app", *words)
        assert out.startswith("+ service app_old  nginx:1.27, 4 replicas\n")
        request = cluster.last(DeployStackRequest)
        assert request.rollback == StackRollback(stack="app", revision=int("".join(words) or 0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("deploy", "--exit-code"), "--exit-code is for a plan; add --dry-run."),
        (("deploy", "--format", "json"), "--format is for a plan; add --dry-run."),
    ],
)
def test_what_only_a_plan_can_use_is_refused_without_one(
    cli: Cli, cluster: FakeCluster, compose: str, words: tuple[str, ...], message: str
) -> None:
    answer = cli("stack", *words, "-c", compose, "app")
    assert answer.code == 2 and message in answer.err
    assert not cluster.calls


# ------------------------------------------------------------------ deploys


def test_a_stale_plan_is_refused_and_how_to_plan_again_is_told(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.failures["deploy_stack"] = [Conflict("the plan has gone stale: revision 4 now")]
    answer = cli(*("stack", "deploy", "--check-version", VERSION, "--prune", "-c", compose, "app"))
    assert answer.code == 5
    assert answer.err == (
        "Error: the plan has gone stale: revision 4 now\n"
        f"To plan again: swarmctl stack diff --prune -c {compose} app\n"
    )
    assert cluster.last(DeployStackRequest).expected_version == VERSION


def test_a_deploy_that_changes_nothing_says_so(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.deploy_changes = (
        StackChange(kind=Kind.NETWORK, name="app_default", id="n", action="unchanged"),
        StackChange(kind=Kind.SERVICE, name="app_web", id="w1", action="unchanged"),
    )
    out = cli.ok("stack", "deploy", "-d", "-c", compose, "app")
    assert out == "Nothing to change in stack app: 2 unchanged\n"


def test_statuses_from_before_the_deploy_do_not_count(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.watch_script = [
        (STORE_REVISION - 1, [status(web, 2, 2)]),
        [status(web, 1, 2)],
        [status(web, 2, 2)],
    ]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.code == 0
    assert answer.err.splitlines() == ["app_web: 1/2 running", "app_web: 2/2 running, converged"]


def test_a_deploy_that_another_one_supersedes_says_so(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.deploy_changes = (
        StackChange(kind=Kind.SERVICE, name="app_web", id=web.id, action="updated", spec_version=4),
    )
    cluster.watch_script = [
        [status(web, 1, 2, spec_version=4)],
        [status(web, 1, 2, spec_version=5)],
    ]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.code == 5
    assert answer.err.endswith(
        "Error: stack 'app': app_web was changed again before this change was done\n"
        "  app_web: version 5 has taken its place, and goes on\n"
        "`swarmctl stack history app` tells by whom; `swarmctl stack wait app` waits for that "
        "change.\n"
    )


def test_watched_tasks_are_verified_and_said_once(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    watched = status(web, 2, 2, converged=False, settles_in_ns=5 * 10**9)
    later = status(web, 2, 2, converged=False, settles_in_ns=3 * 10**9)
    cluster.watch_script = [[watched], [later], [status(web, 2, 2)]]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert (answer.code, answer.err.splitlines()) == (
        0,
        ["app_web: 2/2 running, verifying", "app_web: 2/2 running, converged"],
    )


def failed(cluster: FakeCluster, web: Service, status: TaskStatus) -> Task:
    """A task that failed."""
    cluster.add(node("beta", id_="n2"))
    found = task(web, "t1" + "0" * 23, slot=2, node_id="n2", state=status.state)
    cluster.revisions[(web.id, found.spec_version)] = ServiceRevision(id="r", spec=web.spec)
    cluster.add(replace(found, status=status))
    return found


ENDED = TaskStatus(state=TaskState.FAILED, container=ContainerStatus(container_id="c", exit_code=3))


def broken(cluster: FakeCluster, web: Service) -> None:
    """A task that failed, and what it printed."""
    task_id = failed(cluster, web, ENDED).id
    said = [b"one", b"it is \x1b[31mbroken\x1b[0m here"]
    lines = tuple(
        LogLine(
            task_id=task_id, timestamp_ns=n, data=data, service_name="app_web", slot=2, node_name="beta"
        )
        for n, data in enumerate(said)
    )  # fmt: skip
    cluster.log_script = [LogsResponse(lines=lines)]


def test_a_stuck_service_ends_the_wait_with_6_its_reasons_and_its_last_lines(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    broken(cluster, web)
    reasons = ("1 of 2 replicas is in a crash loop: exited with code 3",)
    stuck = status(web, 1, 2, stuck=True, reasons=reasons, failing_task_id="t1")
    cluster.watch_script = [[stuck]]
    begun = time.monotonic()
    answer = cli("stack", "deploy", "--timeout", "60s", "-c", compose, "app")
    assert time.monotonic() - begun < 20, "it does not sit out the deadline"
    assert answer.code == 6
    assert answer.err == (
        "app_web: 1/2 running, stuck; 1 of 2 replicas is in a crash loop: exited with code 3\n"
        "Error: stack 'app' does not converge: app_web is stuck\n"
        "  app_web: 1/2 running, stuck\n"
        "    1 of 2 replicas is in a crash loop: exited with code 3\n"
        "    last lines of app_web.2 (t10000000000 on beta, exit code 3):\n"
        "    | one\n"
        "    | it is \ufffd[31mbroken\ufffd[0m here\n"
        "Correct the file and deploy again, or remove the stack with `swarmctl stack rm app`.\n"
    )
    request = cluster.last(LogsRequest)
    assert request.options and (request.options.tail, request.options.follow) == (10, False)


def test_the_others_may_come_to_their_end_when_one_is_stuck(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    db = service("app_db", id_="d1", labels=LABEL)
    stuck = status(web, 0, 2, stuck=True, reasons=("the image is missing",))
    cluster.watch_script = [
        [stuck, status(db, 0, 1)],
        1.5,
        [stuck, status(db, 1, 1)],
    ]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.code == 6
    assert "app_db: 1/1 running, converged\n" in answer.err
    assert "app_db" not in answer.err.partition("Error:")[2]
    assert not [call for call in cluster.calls if isinstance(call, LogsRequest)]


def test_what_is_stuck_for_a_moment_only_goes_on(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.watch_script = [[status(web, 0, 2, stuck=True)], 0.3, [status(web, 1, 2)], 1.0, [status(web, 2, 2)]]  # fmt: skip
    assert cli("stack", "deploy", "-c", compose, "app").code == 0


def test_a_rolled_back_deploy_ends_with_7_its_reason_and_the_last_lines(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    broken(cluster, web)
    going = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED, started_at_ns=7, message="update failed: 2 tasks ended"
    )
    done = UpdateStatus(
        state=UpdateState.ROLLBACK_COMPLETED,
        started_at_ns=7,
        message="rollback completed; update failed: 2 tasks ended",
    )
    cluster.watch_script = [
        [status(web, 1, 2, converged=False, update_status=going, failing_task_id="t1")],
        [status(web, 2, 2, converged=False, update_status=done)],
    ]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.code == 7
    assert "Error: stack 'app': app_web was rolled back\n" in answer.err
    assert "  app_web: update failed: 2 tasks ended\n    last lines of app_web.2" in answer.err
    assert "rollback completed" not in answer.err and "| one\n" in answer.err


def test_a_task_that_printed_nothing_is_told_with_its_exit_code(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    failed(cluster, web, ENDED)
    cluster.watch_script = [[status(web, 1, 2, stuck=True, reasons=("why",), failing_task_id="t1")]]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert "    app_web.2 (t10000000000 on beta, exit code 3) printed nothing\n" in answer.err


@pytest.mark.parametrize(("reason", "times"), [("why", 1), ("1 of 2 replicas: no such user", 0)])
def test_the_error_of_a_task_without_a_container_is_told_once(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service, reason: str, times: int
) -> None:
    failed(cluster, web, TaskStatus(state=TaskState.REJECTED, err="no such user"))
    stuck = status(web, 1, 2, stuck=True, reasons=(reason,), failing_task_id="t1")
    cluster.watch_script = [[stuck]]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.err.count("    app_web.2 (t10000000000 on beta): no such user\n") == times


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        (Unavailable("node beta does not answer"), "cannot be read: node beta does not answer"),
        (NotFound("task t1 not found"), ""),
    ],
)
def test_a_log_that_cannot_be_read_hides_nothing_else(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service, failure: Exception, line: str
) -> None:
    broken(cluster, web)
    cluster.failures["logs"] = [failure]  # type: ignore[list-item]
    cluster.watch_script = [[status(web, 1, 2, stuck=True, reasons=("why",), failing_task_id="t1")]]
    answer = cli("stack", "deploy", "-c", compose, "app")
    assert answer.code == 6 and "    why\n" in answer.err
    assert line in answer.err and "defect" not in answer.err


def test_ctrl_c_leaves_the_deploy_going(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    cluster.watch_script = [[status(web, 1, 2)]]
    with on_terminal(cli, "stack", "deploy", "-c", compose, "app") as process:
        process.expect(b"1/2")
        process.interrupt()
        assert process.wait() == 130
    assert b"The deploy goes on; `swarmctl stack wait app` waits for it" in process.screen
    assert b"Error" not in process.screen and b"Traceback" not in process.screen


def test_a_terminal_counts_down_while_tasks_are_watched(
    cli: Cli, cluster: FakeCluster, compose: str, web: Service
) -> None:
    watched = status(web, 2, 2, converged=False, settles_in_ns=2 * 10**9)
    cluster.watch_script = [[watched], 1.6, [status(web, 2, 2)]]
    with on_terminal(cli, "stack", "deploy", "-c", compose, "app", NO_COLOR="1") as process:
        assert process.wait() == 0
        screen = process.screen.decode()
    assert screen.index("verifying, 2 s") < screen.index("verifying, 1 s")
    assert "✓ app_web" in screen and "verifying, 0 s" not in screen


# ------------------------------------------------------------------ waiting


BACK = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, started_at_ns=7)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, 0),
        ({"update_status": BACK}, 0),
        ({"update_status": BACK, "converged": False}, 7),
        ({"update_status": UpdateStatus(state=UpdateState.PAUSED), "converged": False}, 6),
    ],
    ids=["converged", "rolled back by hand", "rolled back by itself", "paused"],
)
def test_stack_wait_tells_how_what_others_did_ends(
    cli: Cli, cluster: FakeCluster, web: Service, fields: dict[str, object], code: int
) -> None:
    cluster.watch_script = [[status(web, 1, 2)], [status(web, 2, 2, **fields)]]
    assert cli("stack", "wait", "-q", "app").code == code
    assert cluster.last(WatchServicesRequest).stack == "app"


def test_a_stack_without_services_has_converged(cli: Cli, cluster: FakeCluster) -> None:
    cluster.watch_script = [[]]
    assert cli("stack", "wait", "app").code == 0


def test_waiting_for_an_unknown_stack_is_an_error(cli: Cli, cluster: FakeCluster) -> None:
    cluster.watch_script = [NotFound("stack nope not found")]
    answer = cli("stack", "wait", "nope")
    assert (answer.code, answer.err) == (4, "Error: stack nope not found\n")


def test_a_deadline_ends_with_6(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.watch_script = [[status(web, 1, 2, reasons=("the image is pulled",))]]
    answer = cli("service", "wait", "-q", "--timeout", "200ms", "app_web")
    assert answer.code == 6
    assert answer.err == (
        "Error: service 'app_web' has not converged within 200ms\n"
        "  app_web: 1/2 running\n    the image is pulled\n"
        "Stopped waiting; nothing was changed.\n"
    )
    assert cluster.last(WatchServicesRequest).services == ("app_web",)


# ------------------------------------------------------------------ history and rollback


@pytest.fixture
def history(cluster: FakeCluster, web: Service) -> GetStackHistoryResponse:
    def change(name: str, action: str) -> StackChange:
        return StackChange(kind=Kind.SERVICE, name=name, action=action)

    cluster.history = GetStackHistoryResponse(
        stack=Stack(id="s1", revision=4),
        revisions=(
            StackRevision(
                revision=4,
                meta=Meta(created_at_ns=ago_ns(30)),
                who="admin ada",
                rollback_to=2,
                spec=StackSpec(name="app"),
                changes=(change("a", "updated"), change("b", "removed")),
            ),
            StackRevision(
                revision=2,
                meta=Meta(created_at_ns=ago_ns(7200)),
                who="local",
                prune=True,
                spec=StackSpec(name="app", networks=(NetworkSpec(name="app_net"),)),
                changes=(change("a", "created"), change("b", "created"), change("c", "updated")),
            ),
        ),
    )
    return cluster.history


def test_history_lists_deploys_newest_first(cli: Cli, history: GetStackHistoryResponse) -> None:
    assert cli.ok("stack", "history", "app").splitlines() == [
        "REVISION   DEPLOYED         BY          CHANGES                NOTE",
        "4 *        30 seconds ago   admin ada   1 updated, 1 removed   rollback to 2",
        "2          2 hours ago      local       2 created, 1 updated   pruned",
    ]
    assert cli.ok("stack", "history", "-q", "app") == "4\n2\n"
    rows = [json.loads(line) for line in cli.ok("stack", "history", "--format", "json", "app").splitlines()]  # fmt: skip
    assert [row["Revision"] for row in rows] == [4, 2]
    assert rows[0]["RollbackTo"] == 2 and rows[0]["Present"] is True and "_Revision" not in rows[0]
    table = cli.ok("stack", "history", "--format", "table {{.Revision}}\t{{.By}}", "app")
    assert table.splitlines()[0].split() == ["REVISION", "BY"]


def test_a_deploy_of_what_ran_already_says_so_in_history(
    cli: Cli, cluster: FakeCluster, history: GetStackHistoryResponse
) -> None:
    # After a rollback by failure, a deploy of the file before it asks for what runs.
    same = StackRevision(revision=4, meta=Meta(created_at_ns=ago_ns(30)), who="local")
    cluster.history = replace(history, revisions=(same,))
    [line] = cli.ok("stack", "history", "app").splitlines()[1:]
    assert line.split() == ["4", "*", "30", "seconds", "ago", "local", "none"]


def test_history_shows_what_a_deploy_asked_for(cli: Cli, history: GetStackHistoryResponse) -> None:
    found = yaml.safe_load(cli.ok("stack", "history", "--revision", "2", "app"))
    assert found["Networks"][0]["Name"] == "app_net"
    answer = cli("stack", "history", "--revision", "3", "app")
    assert (answer.code, answer.err) == (4, "Error: stack 'app' has no revision 3; kept are 4, 2\n")


def test_rollback_deploys_an_earlier_revision_and_waits(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    cluster.deploy_changes = (
        StackChange(kind=Kind.SERVICE, name="app_web", id="w1", action="updated"),
    )
    cluster.watch_script = [[status(web, 2, 2)]]
    answer = cli("stack", "rollback", "s1", "2", "--check-version", VERSION)
    assert (answer.code, answer.out) == (0, "Updating service app_web (id: w1)\n")
    request = cluster.last(DeployStackRequest)
    assert request.rollback == StackRollback(stack="s1", revision=2)
    assert (request.expected_version, request.spec) == (VERSION, None)
    assert cluster.last(WatchServicesRequest).stack == "app", "by its name, whatever was typed"
    assert cli.ok("stack", "rollback", "-d", "app")
    assert cluster.last(DeployStackRequest).rollback == StackRollback(stack="app", revision=0)


@pytest.mark.parametrize("text", ["0", "-1", "latest", "1.5"])
def test_a_revision_is_a_number(cli: Cli, cluster: FakeCluster, text: str) -> None:
    answer = cli("stack", "rollback", "--", "app", text)
    assert answer.code == 2 and "swarmctl stack history" in answer.err
    assert not cluster.calls


def test_revisions_complete(cli: Cli, history: GetStackHistoryResponse) -> None:
    def completed(words: str, index: int) -> list[str]:
        environment = {
            "_SWARMCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(index),
        }
        done = subprocess.run(
            [sys.executable, "-c", "from cli.main import main; main()"],
            env=cli.environment(**environment),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.stdout.split()

    assert completed("swarmctl stack rollback app ", 4) == ["plain,4", "plain,2"]
    assert completed("swarmctl stack history app --revision 2", 5) == ["plain,2"]
    assert completed("swarmctl stack ro", 2) == ["plain,rollback"]
    assert completed("swarmctl stack diff ", 3) == ["plain,app"]


# ------------------------------------------------------------------ removal


def test_rm_waits_for_the_stack_itself(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.keep_removed = True
    cluster.watch_script = [
        [status(web, 0, 0, stopping=1, converged=False)],
        [status(web, 0, 0, removed=True)],
    ]
    gone = Event(action="remove", kind=Kind.STACK, object=Object(stack=Stack(id="s1")))

    def waits() -> bool:
        # Its tasks are gone; its networks are not yet.
        return any(isinstance(call, WatchRequest) for call in cluster.calls)

    with after(waits, lambda: cluster.watch_events.append(gone)):
        answer = cli("stack", "rm", "app")
    assert (answer.code, answer.out) == (
        0,
        "Removing service app_web\nRemoving network app_default\n",
    )
    assert answer.err.splitlines()[-1] == "app_web: removed"
    assert cluster.last(WatchRequest).kinds == (Kind.STACK,)


class after:
    """Does something in another thread once a condition holds; a context manager."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        self._condition = condition
        self._action = action
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.01):
            if self._condition():
                self._action()
                return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_rm_says_what_is_left_at_the_deadline(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.keep_removed = True
    cluster.watch_script = [[status(web, 0, 0, removed=True)]]
    answer = cli("stack", "rm", "--timeout", "300ms", "app")
    assert answer.code == 6
    assert "Error: stack 'app' is not gone within 300ms: its tasks are" in answer.err


def test_rm_goes_on_with_the_others_when_one_is_unknown(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    answer = cli("stack", "rm", "-d", "nope", "app")
    assert (answer.code, answer.err) == (4, "Error: stack nope not found\n")
    assert "Removing service app_web\n" in answer.out
    assert not cluster.objects[Kind.STACK]


def test_an_invalid_stack_is_told_by_the_manager(
    cli: Cli, cluster: FakeCluster, compose: str
) -> None:
    cluster.failures["plan_stack"] = [Invalid("secret 'x' is declared as external")]
    answer = cli("stack", "diff", "-c", compose, "app")
    assert (answer.code, answer.err) == (2, "Error: secret 'x' is declared as external\n")
