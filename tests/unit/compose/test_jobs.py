"""Jobs and priorities in compose files: what they become, what is refused, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cli.compose import dump, load, normal_form
from swarm.v1 import GlobalJob, JobSpec, ReplicatedJob, ServiceMode, ServiceSpec
from tests.unit.compose.helpers import document, loaded, marked, problems

SECOND_NS = 1_000_000_000
WEB = "services:\n  web:\n    image: busybox\n"
JOB = "services:\n  web:\n    image: busybox\n    deploy:\n      mode: replicated-job\n"


def spec_of(lines: str) -> ServiceSpec:
    return loaded(document(lines)).spec.services[0]


def test_a_job_in_full() -> None:
    found = spec_of(
        "deploy: {mode: replicated-job, replicas: 4, priority: -20, "
        "job: {queue: batch, gang: true, timeout: 90m, keep: 24h, x-mine: 1}}"
    )
    assert found.mode == ServiceMode(
        replicated_job=ReplicatedJob(max_concurrent=4, total_completions=4)
    )
    assert found.priority == -20
    assert found.job == JobSpec(
        queue="batch", gang=True, timeout_ns=5400 * SECOND_NS, keep_ns=86400 * SECOND_NS
    )


@pytest.mark.parametrize(
    ("lines", "job"),
    [
        ("deploy: {mode: replicated-job}", None),
        ("deploy: {mode: replicated-job, job: null}", None),
        ("deploy: {mode: replicated-job, job: {}}", JobSpec()),
        ("deploy: {mode: global-job, job: {keep: 0s}}", JobSpec(keep_ns=0)),
        ("deploy: {mode: replicated-job, job: {gang: 'no', timeout: 0}}", JobSpec()),
    ],
)
def test_what_a_job_leaves_out(lines: str, job: JobSpec | None) -> None:
    assert spec_of(lines).job == job


def test_a_service_has_a_priority_too() -> None:
    assert spec_of("deploy: {priority: 1000}").priority == 1000
    assert spec_of("deploy: {priority: '5'}").priority == 5
    assert spec_of("deploy: {}").priority == 0
    assert spec_of("deploy: {mode: global-job}").mode == ServiceMode(global_job=GlobalJob())


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (f"{WEB}    deploy: {{priority: §1001}}\n", "from -1000 to 1000", "0 is that of"),
        (f"{WEB}    deploy: {{priority: §high}}\n", "must be a whole number", ""),
        (f"{WEB}    deploy: {{job: §{{queue: a}}}}\n", "run to completion", "replicated-job"),
        (f"{WEB}    deploy: {{mode: replicated, job: §{{}}}}\n", "run to completion", ""),
        (f"{WEB}    §priority: 5\n", 'unknown key "priority"', "belongs under deploy"),
        (f"{WEB}    §gang: true\n", 'unknown key "gang"', "deploy.job"),
        (f"{JOB}      §gang: true\n", 'unknown key "gang"', "deploy.job"),
        (f"{JOB}      job: {{§gagn: true}}\n", 'unknown key "gagn"', '"gang"?'),
        (f"{JOB}      job: {{§retries: 3}}\n", 'unknown key "retries"', ""),
        (f"{JOB}      job: §batch\n", "must be a mapping", ""),
        (f"{JOB}      job: {{queue: §''}}\n", "must not be empty", ""),
        (f"{JOB}      job: {{queue: §a b}}\n", "is not a name of a queue", "at most 63"),
        (f"{JOB}      job: {{gang: §maybe}}\n", "must be true or false", ""),
        (f"{JOB}      job: {{timeout: §60}}\n", "60 has no unit", "60s"),
        (f"{JOB}      job: {{keep: §-1h}}\n", "", ""),
        (
            f"{WEB}    deploy: {{mode: global-job, job: {{gang: §true}}}}\n",
            "no number of tasks",
            "replicated-job",
        ),
    ],
)
def test_mistakes_are_found_in_their_place(text: str, message: str, hint: str) -> None:
    source, line, column = marked(text)
    [found] = problems(source).problems
    assert (found.line, found.column) == (line, column), found
    assert message in found.message and hint in found.hint, found


def test_jobs_of_two_files_are_merged_key_by_key(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yml", tmp_path / "b.yml"
    first.write_text(f"{JOB}      priority: 1\n      job: {{queue: a, timeout: 1h}}\n")
    second.write_text("services: {web: {deploy: {priority: 2, job: {queue: b}}}}\n")
    made = load([str(first), str(second)], stack="s", environment={}).spec.services[0]
    assert made.job == JobSpec(queue="b", timeout_ns=3600 * SECOND_NS)
    assert made.priority == 2


def test_the_normal_form_has_them_and_reads_back_the_same() -> None:
    text = (
        f"{JOB}      priority: -5\n      job: {{keep: 0s, queue: a, gang: yes, timeout: 90s}}\n"
        "      replicas: 2\n"
    )
    made = normal_form(["-"], environment={}, project_directory=Path("/nonexistent"), stdin=text)
    printed = yaml.safe_load(dump(made.document))
    deploy = printed["services"]["web"]["deploy"]
    assert deploy["priority"] == -5
    assert deploy["job"] == {"queue": "a", "gang": True, "timeout": "1m30s", "keep": "0s"}
    assert not made.warnings

    def read(source: str) -> ServiceSpec:
        found = load(
            ["-"], stack="s", environment={}, project_directory=Path("/nonexistent"), stdin=source
        )
        return found.spec.services[0]

    assert read(dump(made.document)) == read(text)
