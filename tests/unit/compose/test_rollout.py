"""Deadlines of roll-outs and the longest restart delay in compose files: at their place, or as keys
of the service that Docker leaves alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.compose import dump, load, normal_form
from swarm.v1 import RestartPolicy, ServiceSpec, UpdateConfig
from tests.unit.compose.helpers import document, loaded, marked, problems

SECOND_NS = 1_000_000_000
WEB = "services:\n  web:\n    image: busybox\n"
JOB = f"{WEB}    deploy: {{mode: replicated-job}}\n"


def spec_of(lines: str) -> ServiceSpec:
    return loaded(document(lines)).spec.services[0]


@pytest.mark.parametrize(
    ("lines", "config"),
    [
        (
            "deploy: {update_config: {parallelism: 2, deadline: 45m}}",
            UpdateConfig(parallelism=2, deadline_ns=2700 * SECOND_NS),
        ),
        (
            "x-update-deadline: 45m\ndeploy: {update_config: {parallelism: 2}}",
            UpdateConfig(parallelism=2, deadline_ns=2700 * SECOND_NS),
        ),
        # One at a time, as where nothing is said.
        ("x-update-deadline: 0s", UpdateConfig(parallelism=1, deadline_ns=0)),
        ("deploy: {update_config: {deadline: 0}}", UpdateConfig(parallelism=1, deadline_ns=0)),
        ("deploy: {update_config: {}}", UpdateConfig(parallelism=1)),
        ("x-update-deadline: null", None),
    ],
)
def test_the_deadline_of_updates(lines: str, config: UpdateConfig | None) -> None:
    assert spec_of(lines).update == config
    rollbacks = lines.replace("update_config", "rollback_config").replace("x-update", "x-rollback")
    assert spec_of(rollbacks).rollback == config


@pytest.mark.parametrize(
    ("lines", "policy"),
    [
        (
            "deploy: {restart_policy: {delay: 1s, max_delay: 2m}}",
            RestartPolicy(delay_ns=SECOND_NS, max_delay_ns=120 * SECOND_NS),
        ),
        (
            "restart: on-failure:3\nx-restart-max-delay: 2m",
            RestartPolicy(condition="on-failure", max_attempts=3, max_delay_ns=120 * SECOND_NS),
        ),
        ("x-restart-max-delay: 0s", RestartPolicy(max_delay_ns=0)),
    ],
)
def test_the_longest_delay_between_restarts(lines: str, policy: RestartPolicy) -> None:
    found = spec_of(lines).task
    assert found is not None and found.restart == policy


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (f"{WEB}    x-update-deadline: §45\n", "45 has no unit", "45s"),
        (f"{WEB}    deploy: {{update_config: {{deadline: §soon}}}}\n", "not a duration", ""),
        (f"{WEB}    deploy: {{update_config: {{§dead-line: 1m}}}}\n", "unknown key", '"deadline"?'),
        (f"{WEB}    deploy: {{restart_policy: {{max_delay: §[]}}}}\n", "must be", ""),
        (f"{WEB}    §deadline: 5m\n", 'unknown key "deadline"', "deploy.update_config"),
        (
            f"{WEB}    x-update-deadline: §5m\n    deploy: {{update_config: {{deadline: 6m}}}}\n",
            "the same as deploy.update_config.deadline",
            "remove one",
        ),
        (f"{JOB}    x-rollback-deadline: §5m\n", "a job is not updated in steps", "remove it"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(text: str, message: str, hint: str) -> None:
    source, line, column = marked(text)
    [found] = problems(source).problems
    assert (found.line, found.column) == (line, column), found
    assert message in found.message and hint in found.hint, found


def test_a_later_file_takes_the_place_of_an_earlier_ones_deadline(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yml", tmp_path / "b.yml"
    first.write_text(f"{WEB}    x-update-deadline: 5m\n    x-restart-max-delay: 1m\n")
    second.write_text("services: {web: {x-update-deadline: 6m}}\n")
    made = load([str(first), str(second)], stack="s", environment={}).spec.services[0]
    assert made.update == UpdateConfig(parallelism=1, deadline_ns=360 * SECOND_NS)
    assert made.task is not None and made.task.restart is not None
    assert made.task.restart.max_delay_ns == 60 * SECOND_NS


@pytest.mark.parametrize("exact", [False, True])
def test_the_normal_form_reads_back_the_same(*, exact: bool) -> None:
    text = (
        f"{WEB}    x-update-deadline: 90s\n    x-restart-max-delay: 2m\n"
        "    deploy: {rollback_config: {deadline: 0s}, restart_policy: {condition: any}}\n"
    )
    nowhere = Path("/nonexistent")
    made = normal_form(["-"], environment={}, project_directory=nowhere, stdin=text, exact=exact)
    assert not made.warnings
    printed = dump(made.document)
    assert "x-update-deadline: 90s" in printed

    def read(source: str) -> ServiceSpec:
        found = load(["-"], stack="s", environment={}, project_directory=nowhere, stdin=source)
        return found.spec.services[0]

    assert read(printed) == read(text)
