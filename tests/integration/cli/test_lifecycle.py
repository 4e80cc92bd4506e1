"""The life of a service's updates: history, going back, pauses for a person, and how waiting for
them ends.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from swarm.v1 import (
    ContainerSpec,
    FieldChange,
    GetServiceHistoryResponse,
    Meta,
    ResumeUpdateRequest,
    Service,
    ServiceRevision,
    ServiceSpec,
    ServiceVersion,
    TaskSpec,
    UpdateRequest,
    UpdateState,
    UpdateStatus,
)
from tests.fakes.registry import DIGEST, Registry
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import ago_ns, service, status

AWAITS = "update paused after 1 of 3 replicas, as asked: resume it or roll back"


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    found: Service = cluster.add(service("web", id_="web1"))
    return found


def version(number: int, image: str, *changes: FieldChange, **more: object) -> ServiceVersion:
    shown = {name: more.pop(name) for name in ("tasks", "previous") if name in more}
    fields: dict[str, object] = {"who": "admin ada", "task_version": number, **more}
    spec = ServiceSpec(name="web", task=TaskSpec(container=ContainerSpec(image=image)))
    revision = ServiceRevision(
        id=f"web1.{number}",
        meta=Meta(created_at_ns=ago_ns(3600 * (8 - number))),
        service_id="web1",
        spec_version=number,
        spec=spec,
        **fields,  # type: ignore[arg-type]  # of these names
    )
    return ServiceVersion(revision=revision, changes=changes, **shown)  # type: ignore[arg-type]


def change(path: str, before: object = None, after: object = None) -> FieldChange:
    def text(value: object) -> str | None:
        return None if value is None else json.dumps(value)

    return FieldChange(path=path, before=text(before), after=text(after))


@pytest.fixture
def kept(cluster: FakeCluster, web: Service) -> tuple[ServiceVersion, ...]:
    image = "task.container.image"
    versions = (
        version(7, "nginx:1.26", change(image, "nginx:1.28", "nginx:1.26"), who="", rollback_to=4),
        version(
            6,
            "nginx:1.28@sha256:" + "b" * 64,
            change(image, "nginx:1.26", "nginx:1.28"),
            change("task.container.env[DEBUG]", None, "1"),
            change("update.delay_ns", 5_000_000_000, 10_000_000_000),
            change("task.container.user", "www"),
            tasks=2,
        ),
        version(4, "nginx:1.26", change(image, "nginx:1.25", "nginx:1.26"), previous=True, tasks=1),
        version(1, "nginx:1.25", who="local"),
    )
    cluster.service_histories["web1"] = GetServiceHistoryResponse(versions=versions)
    return versions


# ------------------------------------------------------------------ history


def test_history_lists_versions_with_who_made_them_and_what_changed(
    cli: Cli, kept: tuple[ServiceVersion, ...]
) -> None:
    assert cli.ok("service", "history", "web") == (
        "VERSION      CREATED             WHO         IMAGE        TASKS     CHANGES\n"
        "7 present    About an hour ago   cluster     nginx:1.26   0         rollback to 4; "
        "image: nginx:1.28 -> nginx:1.26\n"
        "6            2 hours ago         admin ada   nginx:1.28   2         "
        "image: nginx:1.26 -> nginx:1.28; + environment.DEBUG: 1; - user; 1 more\n"
        "4 previous   4 hours ago         admin ada   nginx:1.26   1         "
        "image: nginx:1.25 -> nginx:1.26\n"
        "1            7 hours ago         local       nginx:1.25   0         created\n"
    )


def test_history_tells_all_changes_field_by_field(
    cli: Cli, kept: tuple[ServiceVersion, ...]
) -> None:
    lines = cli.ok("service", "history", "--no-trunc", "web").splitlines()
    assert lines[1].startswith("7 present ")
    assert lines[2:4] == ["    rollback to 4", "    ~ image: nginx:1.28 -> nginx:1.26"]
    assert "sha256:bbbb" in lines[4]
    assert lines[5:9] == [
        "    ~ image: nginx:1.26 -> nginx:1.28",
        "    + environment.DEBUG: 1",
        "    - user: www",
        "    ~ deploy.update_config.delay: 5s -> 10s",
    ]


def test_history_for_machines(cli: Cli, kept: tuple[ServiceVersion, ...]) -> None:
    assert cli.ok("service", "history", "-q", "web") == "7\n6\n4\n1\n"
    form = "{{.Version}} {{.Present}} {{.Previous}} {{.RollbackTo}}"
    assert cli.ok("service", "history", "--format", form, "web").splitlines()[::2] == [
        "7 true false 4",
        "4 false true 0",
    ]
    second = json.loads(cli.ok("service", "history", "--format", "json", "web").splitlines()[1])
    assert second["Fields"][2] == {
        "Path": "update.delay_ns",
        "Key": "deploy.update_config.delay",
        "Before": 5_000_000_000,
        "After": 10_000_000_000,
    }


# ------------------------------------------------------------------ going back


@pytest.mark.parametrize(
    "words",
    [
        ("rollback", "--to", "4", "-d", "web"),
        ("update", "--rollback", "--to", "4", "-d", "web"),
    ],
    ids=["rollback", "update --rollback"],
)
def test_a_rollback_may_name_its_version(
    cli: Cli, cluster: FakeCluster, web: Service, words: tuple[str, ...]
) -> None:
    cli.ok("service", *words)
    request = cluster.last(UpdateRequest)
    assert (request.rollback, request.rollback_to, request.spec) == (True, 4, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("update", "--to", "4", "web"), "--to names the version for --rollback"),
        (("update", "--rollback", "--image", "x", "web"), "--rollback and --image exclude"),
        (("update", "--pause-after", "2", "web"), "`swarmctl service resume`"),
        (("rollback", "--to", "v4", "web"), "'v4' is not a version; write its number, as "),
        (("update", "--pause-after", "0", "--force", "web"), "--pause-after"),
    ],
)
def test_what_does_not_fit_together_is_said(
    cli: Cli, cluster: FakeCluster, web: Service, words: tuple[str, ...], said: str
) -> None:
    answer = cli("service", *words)
    assert answer.code == 2
    assert said in answer.err
    assert not [call for call in cluster.calls if isinstance(call, UpdateRequest)]


@pytest.mark.parametrize(
    ("words", "at"),
    [
        ("swarmctl service rollback web --to ", 5),
        ("swarmctl service update --rollback web --to ", 6),
    ],
)
def test_versions_to_go_back_to_complete(
    cli: Cli, kept: tuple[ServiceVersion, ...], words: str, at: int
) -> None:
    answered = cli.process(_SWARMCTL_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(at))
    found = [line.partition(b",")[2] for line in answered.stdout.splitlines()]
    assert found == [b"6", b"4", b"1"], answered


# ------------------------------------------------------------------ images


def test_a_new_image_is_recorded_with_its_digest(
    cli: Cli, cluster: FakeCluster, web: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def sent() -> str:
        spec = cluster.last(UpdateRequest).spec
        assert spec is not None and spec.service is not None and spec.service.task is not None
        assert spec.service.task.container is not None
        return str(spec.service.task.container.image)

    monkeypatch.delenv("SWARM_RESOLVE_IMAGE", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with Registry() as registry:
        image = f"{registry.host}/team/app:1.4"
        cli.ok("service", "update", "-d", "--image", image, "web")
        assert sent() == f"{image}@{DIGEST}"
        cli.ok("service", "update", "-d", "--no-resolve-image", "--image", image, "web")
        assert sent() == image
        answer = cli("service", "update", "-d", "--image", f"{image}0", "web")
    assert (answer.code, sent()) == (0, f"{image}0")
    assert "is not recorded (127.0.0.1:" in answer.err and "answers 404" in answer.err


# ------------------------------------------------------------------ pauses


def test_an_update_that_pauses_as_asked_ends_well_and_says_what_to_do(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    paused = UpdateStatus(
        state=UpdateState.PAUSED, started_at_ns=5, message=AWAITS, pause_after=1, awaits_resume=True
    )
    seen = status(web, 3, 3, converged=False, up_to_date=1, update_status=paused, reasons=(AWAITS,))
    cluster.watch_script = [[seen]]
    answer = cli("service", "update", "--image", "new:2", "--pause-after", "1", "web")
    assert answer.code == 0
    assert cluster.last(UpdateRequest).pause_after == 1
    assert answer.err == (
        "web: 1/3 updated, awaits a person\n"
        "web: update paused after 1 of 3 replicas, as asked.\n"
        "Let it go on with `swarmctl service resume web`, or undo this update with "
        "`swarmctl service rollback web`.\n"
    )


def test_who_waits_without_having_asked_for_a_pause_is_told(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    paused = UpdateStatus(
        state=UpdateState.PAUSED, started_at_ns=5, message=AWAITS, pause_after=1, awaits_resume=True
    )
    seen = status(web, 3, 3, converged=False, up_to_date=1, update_status=paused, reasons=(AWAITS,))
    cluster.watch_script = [[seen]]
    answer = cli("service", "wait", "web")
    assert answer.code == 6
    assert answer.err.endswith(
        "Error: service 'web' does not converge: the update of web awaits a person\n"
        f"  web: {AWAITS}\n"
    )


def test_resume_lets_the_update_go_on_and_waits(cli: Cli, cluster: FakeCluster) -> None:
    paused = UpdateStatus(state=UpdateState.PAUSED, started_at_ns=5, awaits_resume=True)
    web = cluster.add(service("web", id_="web1", update_status=paused))
    goes = replace(paused, state=UpdateState.UPDATING, awaits_resume=False)
    ended = replace(goes, state=UpdateState.COMPLETED)
    cluster.watch_script = [
        # From before it was resumed.
        (3, [status(web, 3, 3, converged=False, update_status=paused)]),
        [status(web, 3, 3, converged=False, up_to_date=2, update_status=goes)],
        [status(web, 3, 3, update_status=ended)],
    ]
    answer = cli("service", "resume", "--pause-after", "2", "web")
    assert (answer.code, answer.out) == (0, "web\n")
    request = cluster.last(ResumeUpdateRequest)
    assert (request.service, request.version, request.pause_after) == ("web1", 5, 2)
    assert answer.err.splitlines()[-1] == "web: 3/3 running, converged"


# ------------------------------------------------------------------ how waiting ends


def test_an_update_without_progress_ends_with_its_reason(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    why = (
        "update paused: no progress for 10m: 3 of 12 replicas of the new version have no place: "
        "no suitable node (3 nodes short of memory)"
    )
    paused = UpdateStatus(state=UpdateState.PAUSED, started_at_ns=5, message=why)
    cluster.watch_script = [[status(web, 2, 3, update_status=paused, reasons=(why,), stuck=True)]]
    answer = cli("service", "update", "--image", "new:2", "web")
    assert answer.code == 6
    assert answer.err.count("no progress for 10m") == 1
    assert answer.err.endswith(
        "Let it go on with `swarmctl service resume web`, update it again, or undo this update "
        "with `swarmctl service rollback web`.\n"
    )


def test_an_update_that_somebody_else_supersedes_ends_as_a_conflict(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    going = UpdateStatus(state=UpdateState.UPDATING, started_at_ns=5)
    later = replace(going, started_at_ns=6)
    cluster.watch_script = [
        [status(web, 2, 3, update_status=going, spec_version=3)],
        [status(web, 2, 3, update_status=later, spec_version=4)],
    ]
    answer = cli("service", "update", "--image", "new:2", "web")
    assert answer.code == 5
    assert answer.err.endswith(
        "Error: service 'web' was changed again before this change was done\n"
        "  web: version 4 has taken its place, and goes on\n"
        "`swarmctl service history web` tells by whom; `swarmctl service wait web` waits for that "
        "change.\n"
    )


def test_a_rollback_by_a_failure_is_no_other_change(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    why = "update rolled back due to failure or early termination of task abc"
    back = UpdateStatus(state=UpdateState.ROLLBACK_STARTED, started_at_ns=6, message=why)
    over = replace(back, state=UpdateState.ROLLBACK_COMPLETED, message=f"rollback completed; {why}")
    cluster.watch_script = [
        [status(web, 2, 3, update_status=back, spec_version=4)],
        [status(web, 3, 3, converged=False, update_status=over, spec_version=4)],
    ]
    answer = cli("service", "update", "--image", "new:2", "web")
    assert answer.code == 7
    assert answer.err.endswith(
        f"Error: service 'web' was rolled back\n  web: {why}\n"
        "`swarmctl service history web` shows what was tried.\n"
    )


def test_lists_show_updates_that_are_paused(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    assert "UPDATE" not in cli.ok("service", "ls")
    paused = UpdateStatus(state=UpdateState.PAUSED, awaits_resume=True)
    cluster.add(service("api", id_="api1", update_status=paused))
    form = ("--format", "{{.Name}}:{{.Update}}")
    assert cli.ok("service", "ls", *form) == "api:awaits resume\nweb:\n"
    assert "UPDATE" in cli.ok("service", "ls")
