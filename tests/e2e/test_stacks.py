"""Stacks as people change them, on three Docker hosts: secrets by content, start order, plans that come true, and a
wait that tells the truth."""

import json
import random
import signal
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.testbed import Bed, Host
from tests.e2e.cluster import Cluster, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.root, pytest.mark.slow]

NOT_CONVERGED, ROLLED_BACK, DIFFERS, CONFLICT = 6, 7, 3, 5
SLEEP = "exec sleep 1000"


@pytest.fixture(scope="module")
def cluster(bed: Bed) -> Iterator[Cluster]:
    made = Cluster(bed.docker_hosts(3))
    made.up()
    yield made
    made.down()


@pytest.fixture
def app(cluster: Cluster, tmp_path: Path) -> Iterator["App"]:
    made = App(cluster, tmp_path / "compose.yml")
    yield made
    cluster.ctl("stack", "rm", "app", check=False)
    wait_for("no container is left", lambda: not any(cluster.containers(h) for h in cluster.hosts))
    for kind in ("secret", "config", "network"):
        assert cluster.json(kind, "ls") == []


class App:
    """A stack and its file."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster = cluster
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(textwrap.dedent(text))

    def deploy(self, *words: str) -> str:
        return self.cluster.ctl("stack", "deploy", "-c", str(self.path), *words, "app")

    def deploy_fails(self, *words: str) -> tuple[int, str]:
        return self.cluster.fails("stack", "deploy", "-c", str(self.path), *words, "app")

    def plan(self) -> dict[str, Any]:
        out = self.cluster.ctl(
            *("stack", "deploy", "-c", str(self.path), "--prune", "--dry-run"),
            *("--format", "json", "app"),
        )
        plan: dict[str, Any] = json.loads(out)
        return plan

    def tasks(self, service: str) -> set[str]:
        return {t["ID"] for t in self.cluster.running(f"app_{service}")}

    def container(self, service: str) -> tuple[Host, dict[str, Any]]:
        """The service's only running container, as its engine describes it."""
        found = self.containers(service)
        assert len(found) == 1, found
        return found[0]

    def containers(self, service: str, *, every: bool = False) -> list[tuple[Host, dict[str, Any]]]:
        label = f"label=com.docker.swarm.service.name=app_{service}"
        found = []
        for host in self.cluster.hosts:
            ids = host.docker("ps", "-q", "--filter", label, *(["-a"] if every else [])).split()
            if ids:
                found += [(host, c) for c in json.loads(host.docker("inspect", *ids))]
        return found


def at(text: str) -> datetime:
    """One of Docker's times, which have nanoseconds."""
    return datetime.fromisoformat(text[:26].rstrip("Z")).replace(tzinfo=UTC)


# ------------------------------------------------------------------ secrets by content

SECRETS = """\
services:
  user1: &user
    image: busybox:latest
    command: &sleep ["sh", "-c", "exec sleep 1000"]
    stop_grace_period: 0s
    deploy: &soon {update_config: {monitor: 1s}}
    secrets: [password]
  user2:
    <<: *user
    secrets: [{source: password, target: /etc/db/pass, uid: "99", gid: "98", mode: 0o440}]
  bystander:
    image: busybox:latest
    command: *sleep
    stop_grace_period: 0s
    deploy: *soon
    secrets: [other]
secrets:
  password: {file: ./password.txt}
  other: {file: ./other.txt}
"""


def read(host: Host, container: dict[str, Any], path: str) -> str:
    return host.docker("exec", container["Id"], "cat", path)


def test_a_changed_secret_file_rolls_exactly_its_users(app: App) -> None:
    folder = app.path.parent
    (folder / "password.txt").write_text("first")
    (folder / "other.txt").write_text("never changes")
    app.write(SECRETS)
    app.deploy()
    before = {name: app.tasks(name) for name in ("user1", "user2", "bystander")}
    (folder / "password.txt").write_text("second")
    app.deploy()
    assert app.tasks("bystander") == before["bystander"]
    assert not app.tasks("user1") & before["user1"]
    assert not app.tasks("user2") & before["user2"]
    host, container = app.container("user1")
    assert read(host, container, "/run/secrets/password") == "second"
    host, container = app.container("user2")
    assert read(host, container, "/etc/db/pass") == "second"
    assert host.docker(
        "exec", container["Id"], "stat", "-c", "%u:%g:%a", "/etc/db/pass"
    ).split() == ["99:98:440"]
    names = {s["Name"] for s in app.cluster.json("secret", "ls")}
    assert names == {"app_password", "app_other"}, "old versions are not in the way"


def test_rotate_rolls_exactly_the_users_and_a_rollback_brings_the_old_content_back(
    app: App,
) -> None:
    folder = app.path.parent
    (folder / "password.txt").write_text("first")
    (folder / "other.txt").write_text("never changes")
    app.write(SECRETS)
    app.deploy()
    bystander = app.tasks("bystander")
    (folder / "new.txt").write_text("rotated")
    app.cluster.ctl("secret", "rotate", "app_password", str(folder / "new.txt"))
    for name, path in (("user1", "/run/secrets/password"), ("user2", "/etc/db/pass")):
        host, container = app.container(name)
        assert read(host, container, path) == "rotated"
    (folder / "password.txt").write_text("third")
    app.deploy()
    assert read(*app.container("user1"), "/run/secrets/password") == "third"
    app.cluster.ctl("stack", "rollback", "app", "1")
    assert read(*app.container("user1"), "/run/secrets/password") == "first"
    assert app.tasks("bystander") == bystander
    revisions = app.cluster.json("stack", "history", "app")
    assert len(revisions) == 3


# ------------------------------------------------------------------ start order

ORDER = """\
services:
  web:
    image: web:latest
    environment: {VERSION: "VERSION_HERE"}
    stop_grace_period: 0s
    depends_on:
      db: {condition: service_healthy}
      migrate: {condition: service_completed_successfully}
    deploy: {replicas: 2, update_config: {monitor: 1s}}
  migrate:
    image: busybox:latest
    environment: {VERSION: "VERSION_HERE"}
    command: ["sh", "-c", "sleep 1; echo migrated to $$VERSION"]
    depends_on:
      db: {condition: service_healthy}
    deploy: {mode: replicated-job}
  db:
    image: busybox:latest
    command: ["sh", "-c", "sleep 2; touch /ready; exec sleep 1000"]
    stop_grace_period: 0s
    healthcheck: {test: ["CMD", "test", "-f", "/ready"], interval: 500ms, retries: 20}
    deploy:
      placement: {constraints: ["node.labels.zone == a"]}
"""


def healthy_since(container: dict[str, Any]) -> datetime:
    """The end of the first check that passed. An engine keeps the last five."""
    log = container["State"]["Health"]["Log"]
    return min(at(entry["End"]) for entry in log if entry["ExitCode"] == 0)


def test_services_start_in_the_order_of_depends_on(app: App) -> None:
    hosts = app.cluster.hosts
    app.cluster.ctl("node", "update", "--label-add", "zone=a", hosts[1].name)
    app.write(ORDER.replace("VERSION_HERE", "1"))
    app.deploy("--detach")
    # Its first check that passed is soon forgotten by the engine, so it is read while it is fresh.
    wait_for(
        "the database is healthy",
        lambda: any(c["State"]["Health"]["Status"] == "healthy" for _, c in app.containers("db")),
        every_s=0.2,
    )
    healthy = healthy_since(app.container("db")[1])
    app.cluster.ctl("stack", "wait", "app")
    migrate = app.containers("migrate", every=True)
    assert len(migrate) == 1
    assert healthy <= at(migrate[0][1]["State"]["StartedAt"])
    finished = at(migrate[0][1]["State"]["FinishedAt"])
    web = app.containers("web")
    assert len(web) == 2
    assert all(finished <= at(c["State"]["StartedAt"]) for _, c in web)

    # A changed migration goes before the changed service; until it has completed the old one runs.
    app.write(ORDER.replace("VERSION_HERE", "2"))
    app.deploy()
    again = max(
        (c for _, c in app.containers("migrate", every=True)), key=lambda c: str(c["Created"])
    )
    assert "VERSION=2" in again["Config"]["Env"]
    finished = at(again["State"]["FinishedAt"])
    web = app.containers("web")
    assert all("VERSION=2" in c["Config"]["Env"] for _, c in web)
    assert all(finished <= at(c["State"]["StartedAt"]) for _, c in web)


def test_the_order_holds_when_a_host_is_lost(app: App) -> None:
    _, lost, spare = app.cluster.hosts
    app.cluster.ctl("node", "update", "--label-add", "zone=a", lost.name)
    text = yaml.safe_load(ORDER)
    text["services"]["web"]["deploy"] = {
        "replicas": 1,
        "placement": {"constraints": ["node.labels.zone == a"]},
    }
    app.write(yaml.safe_dump(text))
    app.deploy()
    assert {h.name for h, _ in (*app.containers("db"), *app.containers("web"))} == {lost.name}
    app.cluster.ctl("node", "update", "--label-add", "zone=a", spare.name)
    lost.cut()
    try:

        def there(service: str) -> list[dict[str, Any]]:
            return [c for h, c in app.containers(service) if h is spare]

        wait_for(
            "the database is healthy elsewhere",
            lambda: any(c["State"]["Health"]["Status"] == "healthy" for c in there("db")),
            every_s=0.2,
        )
        healthy = healthy_since(there("db")[0])
        web = wait_for("web runs elsewhere", lambda: there("web"))
        assert healthy <= at(web[0]["State"]["StartedAt"])
    finally:
        lost.heal()
    wait_for(
        "the lost host's tasks are stopped",
        lambda: not [h for s in ("db", "web") for h, _ in app.containers(s) if h is lost],
    )
    # Not before: the tasks would move back.
    app.cluster.ctl("node", "update", "--label-rm", "zone", spare.name)


# ------------------------------------------------------------------ plans come true


def random_stack(rng: random.Random) -> dict[str, Any]:
    """A stack of up to four services; two calls give stacks that share some of them."""
    services: dict[str, Any] = {}
    for name in rng.sample(["a", "b", "c", "d"], rng.randint(1, 4)):
        deploy: dict[str, Any] = {"labels": {"round": str(rng.randint(0, 1))}}
        if name == "d":  # a mode cannot be changed
            deploy["mode"] = "global"
        else:
            deploy["replicas"] = rng.randint(0, 4)
            deploy["update_config"] = {
                "parallelism": rng.choice([0, 1, 2]),
                "order": rng.choice(["stop-first", "start-first"]),
                "monitor": "1s",
            }
        if rng.random() < 0.3:
            deploy["placement"] = {"constraints": [f"node.hostname != h{rng.randint(1, 3)}"]}
        if rng.random() < 0.2:
            deploy.setdefault("resources", {})["reservations"] = {"memory": "900G"}
        services[name] = {
            "image": "busybox:latest",
            "command": ["sh", "-c", SLEEP],
            "stop_grace_period": "0s",
            "environment": {"A": str(rng.randint(0, 1))},
            "configs": ["settings"] if rng.random() < 0.5 else [],
            "deploy": deploy,
        }
    return {
        "services": services,
        "configs": {"settings": {"content": f"value {rng.randint(0, 1)}"}},
    }


def observed(app: App) -> dict[str, dict[str, str]]:
    """Each service's tasks that should run, with the node of each; '' for those that wait."""
    found: dict[str, dict[str, str]] = {}
    for service in app.cluster.json("stack", "services", "app"):
        name = str(service["Name"])
        found[name] = {
            # A global service's task names the node that it waits for.
            t["ID"]: "" if str(t["CurrentState"]).startswith("Pending") else t["Node"]
            for t in app.cluster.tasks(name)
            if t["DesiredState"] == "Running"
        }
    return found


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.long) for s in (1, 2, 3))])
def test_a_dry_run_says_exactly_what_the_deploy_then_does(app: App, seed: int) -> None:
    rng = random.Random(seed)
    app.write(yaml.safe_dump(random_stack(rng)))
    app.deploy("--detach")
    settle(app)
    for _ in range(2):
        app.write(yaml.safe_dump(random_stack(rng)))
        before = observed(app)
        plan = app.plan()
        assert app.plan()["Version"] == plan["Version"], "a plan changes nothing"
        app.deploy("--detach", "--prune", "--check-version", plan["Version"])
        settle(app)
        after = observed(app)
        for change in plan["Changes"]:
            if change["Kind"] != "service":
                continue
            name, placement = change["Name"], change["Placement"]
            if change["Action"] == "removed":
                assert name not in after
                continue
            old, new = before.get(name, {}), after[name]
            made = {t: node for t, node in new.items() if t not in old}
            assert placement["Kept"] == len(new) - len(made), (name, plan)
            assert placement["Created"] == len(made), (name, plan)
            assert placement["Stopped"] == len(set(old) - set(new)), (name, plan)
            nodes = {n["Hostname"]: n["Tasks"] for n in placement["Nodes"]}
            assert nodes == Counter(n for n in made.values() if n), (name, plan)
            assert sum(p["Tasks"] for p in placement["Pending"]) == sum(
                not n for n in made.values()
            )
        assert {c["Name"] for c in plan["Changes"] if c["Kind"] == "service"} >= set(after)
        assert not app.plan()["Differs"]
        code, said = app.deploy_fails("--check-version", plan["Version"])
        assert code == CONFLICT, said


REST_S = 4.0  # longer than any step of these roll-outs takes: start, one second of watch, stop


def settle(app: App) -> None:
    """Until no task has changed for a while, and each that should run does, or waits for a place: a
    roll-out whose new task fits nowhere goes on for ever.
    """
    seen: list[Any] = []
    since_s = time.monotonic()

    def at_rest() -> bool:
        nonlocal seen, since_s
        tasks = app.cluster.json("stack", "ps", "--no-trunc", "app")
        states = {t["ID"]: str(t["CurrentState"]).split()[0] for t in tasks}
        now = sorted((t["ID"], t["DesiredState"], states[t["ID"]], t["Node"]) for t in tasks)
        done = all(
            states[t["ID"]] in ("Running", "Pending")
            if t["DesiredState"] == "Running"
            else states[t["ID"]] != "Running"
            for t in tasks
        )
        if now != seen or not done:
            seen, since_s = now, time.monotonic()
        return time.monotonic() - since_s > REST_S

    wait_for("the stack is at rest", at_rest, timeout_s=90, every_s=0.3)


def test_exit_code_tells_whether_there_is_a_difference(app: App) -> None:
    app.write("services: {web: {image: 'web:latest', stop_grace_period: 0s}}")
    words = ("stack", "diff", "--exit-code", "-c", str(app.path), "app")
    code, _ = app.cluster.fails(*words)
    assert code == DIFFERS
    app.deploy()
    assert "no differences" in app.cluster.ctl(*words).lower()


# ------------------------------------------------------------------ a wait that tells the truth

BROKEN = {
    "image missing": ("image: busybox:nope", "busybox:nope"),
    "never fits": (
        "image: busybox:latest\n    deploy: {resources: {reservations: {memory: 900G}}}",
        "900",
    ),
    "crash loop": (
        "image: busybox:latest\n"
        "    command: ['sh', '-c', 'echo it is broken here; exit 3']\n"
        "    deploy: {restart_policy: {delay: 200ms}}",
        "it is broken here",
    ),
    "ran for an instant": (
        "image: busybox:latest\n"
        "    command: ['sh', '-c', 'sleep 1; echo it ran a little; exit 4']\n"
        "    deploy: {restart_policy: {condition: none}}",
        "it ran a little",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_deploy_ends_with_6_and_the_reason_when_it_cannot_converge(app: App, case: str) -> None:
    body, expected = BROKEN[case]
    app.write(
        f"services:\n  good:\n    image: web:latest\n    stop_grace_period: 0s\n  bad:\n    {body}\n"
    )
    begun = time.monotonic()
    code, said = app.deploy_fails("--timeout", "50s")
    assert code == NOT_CONVERGED, said
    assert expected in said
    assert "app_bad" in said
    assert time.monotonic() - begun < 45, "it is known long before the time is over"


def test_deploy_ends_with_7_when_it_was_rolled_back(app: App) -> None:
    text = """\
    services:
      web:
        image: web:latest
        stop_grace_period: 0s
        deploy:
          update_config: {failure_action: rollback, monitor: 2s}
    """
    app.write(text)
    app.deploy()
    app.write(
        text.replace("image: web:latest", "image: busybox:latest\n        command: ['false']")
    )
    code, said = app.deploy_fails()
    assert code == ROLLED_BACK, said
    assert "rolled back" in said
    assert app.container("web")[1]["Config"]["Image"].startswith("web")


def test_ctrl_c_leaves_the_deploy_going_and_says_so(app: App) -> None:
    app.write(ORDER.replace("VERSION_HERE", "1"))
    host = app.cluster.hosts[0]
    app.cluster.ctl("node", "update", "--label-add", "zone=a", app.cluster.hosts[1].name)
    command = host.command(
        Path(".venv/bin/swarmctl").absolute(),
        *("--host", f"unix://{host.swarm_socket}", "stack", "deploy"),
        *("-c", str(app.path), "app"),
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        wait_for("the deploy was taken", lambda: app.cluster.json("stack", "ls"))
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=20)
    assert running.returncode == 130
    assert "goes on" in said.decode()
    app.cluster.ctl("stack", "wait", "app")
    assert app.cluster.replicas("app_web") == "2/2"


def test_finished_jobs_and_zero_replicas_count_as_converged(app: App) -> None:
    app.write(
        """\
        services:
          job:
            image: busybox:latest
            command: ["true"]
            deploy: {mode: replicated-job, replicas: 3}
          none:
            image: busybox:latest
            deploy: {replicas: 0}
        """
    )
    app.deploy()
    assert app.cluster.replicas("app_none") == "0/0"
