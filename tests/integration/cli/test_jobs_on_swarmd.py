"""Jobs and queues end to end: swarmctl against a swarmd with the process runtime."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import wait_for
from tests.e2e.local import BIN, Node

pytestmark = pytest.mark.slow
SHELL = ("/bin/sh", "-c")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    made = Node(tmp_path_factory.mktemp("jobs"), "alpha", "127.0.0.17")
    with contextlib.closing(made):
        made.start()
        made.init()
        yield made


def run(node: Node, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return node.run("job", "run", "--runtime", "process", "--name", name, *words)


def state(node: Node, name: str) -> str:
    form = ("--format", "{{.State}}")
    return node.ok("job", "ls", "-f", f"name={name}", *form).strip()


def test_an_array_of_tasks_each_knows_its_number(node: Node) -> None:
    script = 'echo "$SWARM_TASK_SLOT of $SWARM_ARRAY_SIZE, $NAMED"'
    words = ("--array", "5", "--max-concurrent", "2", "--env", "NAMED=part {{.Task.Slot}}")
    done = run(node, "array", *words, "--wait", *SHELL, script)
    assert done.returncode == 0, done
    lines = node.ok("job", "logs", "--raw", "array").splitlines()
    assert sorted(lines) == [f"{number} of 5, part {number}" for number in range(1, 6)]
    assert state(node, "array") == "complete"
    node.ok("job", "rm", "array")


def test_wait_ends_with_the_code_of_what_failed_after_its_retries(node: Node) -> None:
    words = ("--retries", "1", "--retry-delay", "100ms", "--wait", "-q")
    done = run(node, "bad", *words, *SHELL, "echo no luck; exit 7")
    assert done.returncode == 7, done
    assert done.stderr.startswith("Error: job 'bad' failed: task 1: exited with code 7\n")
    assert done.stderr.endswith("| no luck\n")
    assert node.ok("job", "ps", "bad").count("exit (7)") == 2
    assert node.run("job", "wait", "bad").returncode == 7, "also once it has ended"
    document = json.loads(node.ok("job", "inspect", "bad"))[0]
    assert document["JobStatus"]["State"] == "failed"
    assert document["JobStatus"]["ExitCode"] == 7
    node.ok("job", "rm", "bad")


@pytest.mark.parametrize("keep", [(), ("--keep", "0s")])
def test_a_task_that_runs_for_too_long_ends_the_wait_with_124(
    node: Node, keep: tuple[str, ...]
) -> None:
    done = run(node, "late", "--timeout", "500ms", *keep, "--wait", "-q", "sleep", "1000")
    assert done.returncode == 124, done
    assert "job 'late' timed out: task 1 ran for longer than 500ms" in done.stderr
    if keep:
        wait_for("it is removed", lambda: node.run("job", "ps", "late").returncode == 4)
    else:
        assert "ran for longer than 500ms" in node.ok("job", "ps", "late")
        node.ok("job", "rm", "late")


def test_what_cannot_be_started_ends_the_wait_with_125(node: Node) -> None:
    done = run(node, "nope", "--wait", "-q", "/no/such/program")
    assert done.returncode == 125, done
    assert "failed without an exit code" in done.stderr and "/no/such/program" in done.stderr
    node.ok("job", "rm", "nope")


def test_a_cancelled_job_stops_and_runs_again_when_forced(node: Node) -> None:
    run(node, "long", "sleep", "1000")
    wait_for("it runs", lambda: state(node, "long") == "running")
    assert node.run("job", "rm", "long").returncode == 5
    assert node.ok("job", "cancel", "long") == "long\n"
    done = node.run("job", "wait", "-q", "long")
    assert (done.returncode, done.stderr) == (130, "Error: job 'long' was cancelled\n")
    assert "the job was cancelled" in node.ok("job", "ps", "long")
    assert node.ok("job", "cancel", "long") == "long\n", "again: nothing to do"
    node.ok("service", "update", "--force", "-d", "long")
    wait_for("it runs again", lambda: state(node, "long") == "running")
    node.ok("job", "rm", "-f", "long")


def test_ctrl_c_leaves_the_job_going(node: Node) -> None:
    run(node, "patient", "sleep", "1000")
    waiting = subprocess.Popen(
        [BIN / "swarmctl", "--host", f"unix://{node.socket}", "job", "wait", "patient"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    assert line.startswith("patient:")
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=20) == 130
    assert "The job goes on; `swarmctl job wait patient` waits" in waiting.stderr.read()
    waiting.stderr.close()
    wait_for("it runs", lambda: state(node, "patient") == "running")
    node.ok("job", "rm", "-f", "patient")


def test_a_gang_that_does_not_fit_holds_nothing(node: Node) -> None:
    cpus = json.loads(node.ok("node", "inspect", "self"))[0]["Description"]["Resources"]["NanoCPUs"]
    each = f"{cpus / 1e9 * 0.6:.3f}"
    run(node, "gang", "--gang", "--array", "2", "--cpus", each, "sleep", "1000")
    done = run(node, "single", "--cpus", each, "--timeout", "1m", "--wait", "-q", "true")
    assert done.returncode == 0, done
    assert state(node, "gang") == "queued"
    node.ok("job", "rm", "-f", "gang", "single")


def test_a_queues_quota_holds_its_jobs_back(node: Node) -> None:
    refused = run(node, "first", "--queue", "batch", "sleep", "1000")
    assert refused.returncode == 2
    assert "there is no queue 'batch' (queues: default)" in refused.stderr
    node.ok("queue", "set", "batch", "--tasks", "1", "--weight", "2")
    run(node, "first", "--queue", "batch", "sleep", "1000")
    run(node, "second", "--queue", "batch", "sleep", "1000")
    wait_for("the first runs", lambda: state(node, "first") == "running")

    def row() -> str:
        form = ("--format", "{{.Name}} {{.Running}} {{.Waiting}} {{.Tasks}} {{.Next}}")
        return node.ok("queue", "ls", *form).splitlines()[1]

    wait_for("the second waits", lambda: row() == "batch 1 1 1/1 second")
    assert node.run("queue", "rm", "batch").returncode == 2
    node.ok("job", "cancel", "first")
    wait_for("the second runs", lambda: state(node, "second") == "running")
    node.ok("job", "rm", "-f", "first", "second")
    wait_for("both are gone", lambda: node.ok("job", "ls", "-q") == "")
    node.ok("queue", "rm", "batch")
    assert node.ok("queue", "ls", "-q") == "default\n"


def test_a_job_of_a_higher_priority_takes_the_place_of_a_lower_one(node: Node) -> None:
    cpus = json.loads(node.ok("node", "inspect", "self"))[0]["Description"]["Resources"]["NanoCPUs"]
    all_of_it = f"{cpus / 1e9 * 0.9:.3f}"
    run(node, "low", "--priority", "-1", "--cpus", all_of_it, "sleep", "1000")
    wait_for("low runs", lambda: state(node, "low") == "running")
    done = run(node, "high", "--priority", "5", "--cpus", all_of_it, "--wait", "-q", "true")
    assert done.returncode == 0, done
    assert "preempted by high (priority 5)" in node.ok("job", "ps", "low")
    wait_for("low runs again", lambda: state(node, "low") == "running")
    node.ok("job", "rm", "-f", "low", "high")


def test_jobs_of_a_stack(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(
        "services:\n"
        "  work:\n"
        "    runtime: process\n"
        "    command: [/bin/sh, -c, 'exit 0']\n"
        "    deploy:\n"
        "      mode: replicated-job\n"
        "      replicas: 2\n"
        "      priority: 3\n"
        "      job: {gang: true, timeout: 1m, keep: 24h}\n"
    )
    node.ok("stack", "deploy", "-c", file, "app")
    assert node.run("job", "wait", "app_work").returncode == 0
    document = json.loads(node.ok("job", "inspect", "app_work"))[0]["Spec"]
    assert document["Priority"] == 3
    assert document["Job"] == {"Gang": True, "Timeout": 60 * 10**9, "Keep": 86400 * 10**9}
    plan = node.run("stack", "deploy", "--dry-run", "-c", file, "app")
    assert plan.returncode == 0, plan
    file.write_text(file.read_text().replace("priority: 3", "priority: 4").replace("24h", "1h"))
    plan = node.run("stack", "deploy", "--dry-run", "-c", file, "app")
    assert "deploy.priority" in plan.stdout and "deploy.job.keep" in plan.stdout, plan.stdout
    node.ok("stack", "rm", "app")


def test_names_of_jobs_and_queues_complete(node: Node) -> None:
    run(node, "tune-a", "true")
    for words, expected in (
        ("swarmctl job logs tu", "tune-a"),
        ("swarmctl job run --queue de", "default"),
        ("swarmctl queue set d", "default"),
        ("swarmctl job ca", "cancel"),
    ):
        done = node.run_bare(
            env={
                "SWARM_HOST": f"unix://{node.socket}",
                "_SWARMCTL_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            }
        )
        assert f"plain,{expected}" in done.stdout.splitlines(), (words, done)
    node.ok("job", "rm", "-f", "tune-a")


def test_a_rebalance_evens_out_what_a_second_node_could_take(node: Node, tmp_path: Path) -> None:
    second = Node(tmp_path, "beta", "127.0.0.18")
    with contextlib.closing(second):
        node.ok("service", "create", "--runtime", "process", "--name", "web", "--replicas", "4",
                "--update-parallelism", "2", "sleep", "1000")  # fmt: skip
        second.start()
        second.join(node)
        wait_for("beta is ready", lambda: node.ok("node", "ls").count("Ready") == 2)
        before = time.monotonic()
        shown = node.ok("service", "rebalance", "--dry-run", "--format", "{{.To}}", "web")
        assert shown.split() == ["beta", "beta"]
        done = node.run("service", "rebalance", "web")
        assert done.returncode == 0 and "web: 2 tasks moved" in done.stderr, done
        assert time.monotonic() - before < 60
        form = ("--format", "{{.Node}} {{.CurrentState}}", "-f", "desired-state=running")
        rows = node.ok("service", "ps", *form, "web").splitlines()
        nodes = sorted(row.split()[0] for row in rows if " Running " in f" {row} ")
        assert nodes == ["alpha", "alpha", "beta", "beta"]
        node.ok("service", "rm", "web")
