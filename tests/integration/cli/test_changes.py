"""Commands that change the cluster: what they send, what they print, how they wait, how they end."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import msgspec
import pytest

from swarm.errors import Conflict, Invalid, NotManager, Unavailable, Unsupported
from swarm.v1 import (
    Availability,
    ClusterSpec,
    ContainerSpec,
    CreateRequest,
    DeployStackRequest,
    Driver,
    EndpointSpec,
    GenericResource,
    GetJoinTokensRequest,
    GetUnlockKeyRequest,
    HealthConfig,
    InitRequest,
    IpamConfig,
    JoinRequest,
    Kind,
    LeaveRequest,
    Network,
    NetworkSpec,
    NodeRole,
    PortConfig,
    RemoveRequest,
    Replicated,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Secret,
    SecretReference,
    SecretSpec,
    Service,
    ServiceMode,
    ServiceSpec,
    Stack,
    StackChange,
    StackSpec,
    Ulimit,
    UnlockRequest,
    UpdateConfig,
    UpdateRequest,
    UpdateState,
    UpdateStatus,
    WatchServicesRequest,
)
from tests.integration.cli.conftest import Answer, Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import node, service, status


def created(cluster: FakeCluster) -> ServiceSpec:
    spec = cluster.last(CreateRequest).spec
    assert spec is not None and spec.service is not None
    found: ServiceSpec = spec.service
    return found


def updated(cluster: FakeCluster) -> ServiceSpec:
    spec = cluster.last(UpdateRequest).spec
    assert spec is not None and spec.service is not None
    found: ServiceSpec = spec.service
    return found


def container_of(spec: ServiceSpec) -> ContainerSpec:
    assert spec.task is not None and spec.task.container is not None
    return spec.task.container


def words(text: str) -> list[str]:
    """A command line as its words."""
    return shlex.split(text)


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    found: Service = cluster.add(
        service(
            "web",
            id_="web1",
            ports=(
                PortConfig(
                    target_port=80, published_port=80, protocol="tcp", publish_mode="ingress"
                ),
            ),
        )
    )
    return found


# ------------------------------------------------------------------ create


def test_service_create_sends_what_docker_sends(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(Secret(id="secret1", spec=SecretSpec(name="sec1")))
    cluster.add(Network(id="net1", spec=NetworkSpec(name="front")))
    out = cli.ok(
        *words(
            "service create -d --name s1 -l l=1 --container-label cl=2 --replicas 2 --hostname h"
        ),
        *words("--env A=1 --workdir / --user 0:0 --init --stop-signal SIGINT --tty --read-only"),
        *words("--mount type=tmpfs,target=/t,tmpfs-size=1m --mount source=v1,target=/v"),
        *words("--stop-grace-period 1s --health-interval 2s --host a.b:1.2.3.4 --dns 1.1.1.1"),
        *words("--secret sec1 --sysctl net.core.somaxconn=100 --cap-add net_admin"),
        *words("--ulimit nofile=100:200 --limit-cpu 0.5 --limit-memory 64m --reserve-cpu .1"),
        *words("--reserve-memory 8m --generic-resource gpu=1 --restart-condition on-failure"),
        *words("--restart-delay 1s --restart-max-attempts 3 --restart-window 10s"),
        *words("--constraint node.role==manager --placement-pref spread=node.labels.zone"),
        *words("--network front --log-driver json-file --log-opt max-size=1m"),
        *words("--update-parallelism 2 --update-delay 1s --update-failure-action rollback"),
        *words("--update-monitor 1s --update-max-failure-ratio 0.2 --update-order start-first"),
        *words("-p 18080:80 --publish published=18081,target=81,mode=host --endpoint-mode vip"),
        *("--health-cmd", "true", "busybox:latest", "sleep", "--tty=false", "-x"),
    )
    assert out == "new101\n"
    spec = created(cluster)
    container = container_of(spec)
    assert spec.task is not None and container is not None
    assert (spec.name, spec.labels, container.labels) == ("s1", {"l": "1"}, {"cl": "2"})
    assert container.args == ("sleep", "--tty=false", "-x")
    assert (container.init, container.tty, container.read_only) == (True, True, True)
    assert (
        container.mounts[0].tmpfs_options
        and container.mounts[0].tmpfs_options.size_bytes == 1048576
    )
    assert (container.mounts[1].type, container.mounts[1].source) == ("volume", "v1")
    assert container.healthcheck == HealthConfig(
        test=("CMD-SHELL", "true"), interval_ns=2_000_000_000
    )
    assert container.hosts == ("1.2.3.4 a.b",)
    assert container.secrets[0].secret_id == "secret1"
    assert container.secrets[0].file and container.secrets[0].file.mode == 0o444
    assert container.capability_add == ("CAP_NET_ADMIN",)
    assert container.ulimits == (Ulimit(name="nofile", soft=100, hard=200),)
    assert container.stop_grace_period_ns == 1_000_000_000
    assert spec.task.resources == ResourceRequirements(
        limits=Resources(cpu_nano=500_000_000, memory_bytes=64 << 20),
        reservations=Resources(
            cpu_nano=100_000_000,
            memory_bytes=8 << 20,
            generic=(GenericResource(kind="gpu", count=1),),
        ),
    )
    assert spec.task.restart == RestartPolicy(
        condition="on-failure", delay_ns=10**9, max_attempts=3, window_ns=10**10
    )
    assert spec.task.placement and spec.task.placement.constraints == ("node.role==manager",)
    assert spec.task.networks[0].target == "net1"
    assert spec.task.log_driver == Driver(name="json-file", options={"max-size": "1m"})
    assert spec.mode == ServiceMode(replicated=Replicated(replicas=2))
    assert spec.update == UpdateConfig(
        parallelism=2,
        delay_ns=10**9,
        failure_action="rollback",
        monitor_ns=10**9,
        max_failure_ratio=0.2,
        order="start-first",
    )
    assert spec.endpoint == EndpointSpec(
        mode="vip",
        ports=(
            PortConfig(
                protocol="tcp", target_port=80, published_port=18080, publish_mode="ingress"
            ),
            PortConfig(protocol="tcp", target_port=81, published_port=18081, publish_mode="host"),
        ),
    )


def test_what_was_not_given_stays_absent(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("service", "create", "-d", "--name", "x", "busybox")
    spec = created(cluster)
    assert spec == ServiceSpec(
        name="x",
        task=msgspec.structs.replace(spec.task, container=ContainerSpec(image="busybox")),  # type: ignore[type-var]
        mode=ServiceMode(replicated=Replicated()),
    )
    assert spec.task is not None and spec.task.resources is None and spec.task.restart is None


def test_a_process_service_has_a_command_and_no_image(cli: Cli, cluster: FakeCluster) -> None:
    cli.ok("service", "create", "-d", "--runtime", "process", "sleep", "60")
    spec = created(cluster)
    assert spec.task is not None and spec.task.runtime == "process"
    assert spec.task.container == ContainerSpec(args=("sleep", "60"))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ("--mode global", "global_service"),
        ("--mode global-job", "global_job"),
        ("--mode replicated-job --replicas 5 --max-concurrent 2", "replicated_job"),
        ("--replicas 0", "replicated"),
    ],
)
def test_each_mode(cli: Cli, cluster: FakeCluster, flags: str, field: str) -> None:
    cli.ok("service", "create", "-d", *words(flags), "busybox")
    mode = created(cluster).mode
    assert mode is not None and getattr(mode, field) is not None
    if mode.replicated_job:
        assert (mode.replicated_job.max_concurrent, mode.replicated_job.total_completions) == (2, 5)
    if mode.replicated:
        assert mode.replicated.replicas == 0


def test_env_files_and_the_callers_environment(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_CALLER", "yes")
    (tmp_path / "e").write_text("# comment\n\nA=1\nB=x=y\nFROM_CALLER\nUNSET_ANYWHERE\n")
    cli.ok(
        "service",
        "create",
        "-d",
        "--env-file",
        str(tmp_path / "e"),
        "-e",
        "A=2",
        "-e",
        "C",
        "busybox",
    )
    task = created(cluster).task
    assert (
        task and task.container and task.container.env == ("A=2", "B=x=y", "FROM_CALLER=yes", "C")
    )


def test_registry_credentials_are_sent_when_asked(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"reg.example:5000": {"auth": "dTpw"}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    cli.ok("service", "create", "-d", "--with-registry-auth", "reg.example:5000/app")
    assert msgspec.json.decode(msgspec.json.encode(cluster.last(CreateRequest).registry_auth))
    cli.ok("service", "create", "-d", "reg.example:5000/app")
    assert cluster.last(CreateRequest).registry_auth == ""


# ------------------------------------------------------------------ waiting


def test_create_waits_until_the_service_has_converged(cli: Cli, cluster: FakeCluster) -> None:
    made = service("x", id_="new101")
    cluster.watch_script = [
        [status(made, 0, 3, states={"preparing": 3})],
        [status(made, 2, 3, states={"running": 2, "starting": 1}, reasons=("1 task starts",))],
        [status(made, 3, 3)],
    ]
    answer = cli("service", "create", "--name", "x", "busybox")
    assert answer.code == 0
    assert answer.out == "new101\n"
    assert answer.err == (
        "x: 0/3 running, 3 preparing\nx: 2/3 running, 1 starting; 1 task starts\n"
        "x: 3/3 running, converged\n"
    )
    assert cluster.last(WatchServicesRequest).services == ("new101",)


def test_a_deadline_ends_with_6_and_the_reasons(cli: Cli, cluster: FakeCluster) -> None:
    made = service("x", id_="new101")
    reason = "2 of 3 replicas not placed: 2 nodes short of memory (need 512 MiB, best free 384 MiB)"
    cluster.watch_script = [[status(made, 1, 3, reasons=(reason,), states={"pending": 2})]]
    answer = cli("service", "create", "--name", "x", "--timeout", "300ms", "busybox")
    assert answer.code == 6
    assert "service 'x' has not converged within 300ms\n" in answer.err
    assert reason in answer.err.splitlines()[-2]
    assert answer.err.endswith(
        "The change goes on; `swarmctl service wait x` waits for it, `swarmctl service ps x` shows "
        "how far it is.\n"
    )


def test_a_paused_update_ends_with_6(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    paused = UpdateStatus(
        state=UpdateState.PAUSED, started_at_ns=5, message="update paused due to failure"
    )
    cluster.watch_script = [[status(web, 2, 3, update_status=paused)]]
    answer = cli("service", "update", "--image", "bad:1", "web")
    assert answer.code == 6
    assert "service 'web' does not converge: the update of web is paused\n" in answer.err
    assert "  web: update paused due to failure\n" in answer.err
    assert answer.err.endswith("undo this update with `swarmctl service rollback web`.\n")


def test_a_paused_rollback_is_no_paused_update(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    paused = UpdateStatus(
        state=UpdateState.ROLLBACK_PAUSED, started_at_ns=5, message="rollback paused due to failure"
    )
    cluster.watch_script = [[status(web, 2, 3, update_status=paused)]]
    answer = cli("service", "rollback", "web")
    assert answer.code == 6
    assert "the rollback of web is paused\n  web: rollback paused due to failure\n" in answer.err
    assert "undo" not in answer.err, "there is nothing to undo it with"


def test_several_services_are_told_apart_from_the_one_that_fails(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    db = cluster.add(service("db", id_="db1"))
    back = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, started_at_ns=5)
    cluster.watch_script = [[status(db, 1, 1), status(web, 3, 3, update_status=back)]]
    answer = cli("service", "scale", "db=1", "web=3")
    assert answer.code == 7
    assert "Error: services db, web: web was rolled back\n" in answer.err


def test_a_rolled_back_update_ends_with_7(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    back = UpdateStatus(
        state=UpdateState.ROLLBACK_COMPLETED, started_at_ns=5, message="rollback completed"
    )
    cluster.watch_script = [[status(web, 3, 3, update_status=back)]]
    answer = cli("service", "update", "--image", "bad:1", "web")
    assert answer.code == 7
    assert "Error: service 'web' was rolled back\n" in answer.err


def test_a_rollback_that_was_asked_for_is_a_success(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    back = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, started_at_ns=5)
    cluster.watch_script = [[status(web, 3, 3, update_status=back)]]
    assert cli("service", "rollback", "web").code == 0
    assert cluster.last(UpdateRequest).rollback


def test_an_older_rollback_does_not_count(cli: Cli, cluster: FakeCluster) -> None:
    back = UpdateStatus(state=UpdateState.ROLLBACK_COMPLETED, started_at_ns=5)
    web = cluster.add(service("web", id_="web1", update_status=back))
    cluster.watch_script = [[status(web, 4, 4, update_status=back)]]
    assert cli("service", "scale", "web=4").code == 0


def test_waiting_survives_a_manager_that_restarts(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    cluster.watch_script = [[status(web, 1, 2)], Unavailable("stopping"), [status(web, 2, 2)]]
    answer = cli("service", "scale", "web=2")
    assert (answer.code, answer.out) == (0, "web scaled to 2\n")


def test_detach_does_not_wait_in_all_of_dockers_spellings(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    for flag in ("-d", "--detach", "--detach=true"):
        cli.ok("service", "scale", flag, "web=2")
    assert not [call for call in cluster.calls if isinstance(call, WatchServicesRequest)]
    cluster.watch_script = [[status(web, 2, 2)]]
    cli.ok("service", "scale", "--detach=false", "web=2")
    assert cluster.last(WatchServicesRequest)


# ------------------------------------------------------------------ update


def test_update_changes_only_what_is_given(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cli.ok("service", "update", "-d", "--limit-memory", "50M", "--label-add", "a=b", "web")
    assert web.spec is not None and web.spec.task is not None
    wanted = msgspec.structs.replace(
        web.spec,
        labels={"a": "b"},
        task=msgspec.structs.replace(
            web.spec.task, resources=ResourceRequirements(limits=Resources(memory_bytes=50 << 20))
        ),
    )
    assert updated(cluster) == wanted


def test_adding_and_removing(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.add(Secret(id="secret1", spec=SecretSpec(name="key")))
    cluster.add(Network(id="net1", spec=NetworkSpec(name="front")))
    cli.ok(
        *words(
            "service update -d --env-add A=1 --env-add B=2 --secret-add key --network-add front"
        ),
        *words(
            "--mount-add type=bind,source=/a,target=/b --publish-add 81:81 --host-add h:10.0.0.1"
        ),
        *words("--constraint-add node.role==worker --sysctl-add a.b=1 --cap-add SYS_TIME web"),
    )
    spec = updated(cluster)
    container = container_of(spec)
    assert spec.task and container and spec.endpoint
    assert container.env == ("A=1", "B=2")
    assert container.secrets[0] == SecretReference(
        secret_id="secret1", secret_name="key", file=container.secrets[0].file
    )
    assert [port.target_port for port in spec.endpoint.ports] == [80, 81]
    cli.ok(
        *words("service update -d --env-rm A --secret-rm key --network-rm front --mount-rm /b"),
        *("--publish-rm", "80", "--host-rm", "h:10.0.0.1", "--sysctl-rm", "a.b"),
        *("--constraint-rm", "node.role == worker", "--cap-drop", "SYS_TIME", "web"),
    )
    spec = updated(cluster)
    container = container_of(spec)
    assert spec.task and container and spec.endpoint and spec.task.placement
    assert container.env == ("B=2",)
    assert (container.secrets, container.mounts, container.hosts, spec.task.networks) == (
        (),
        (),
        (),
        (),
    )
    assert [port.target_port for port in spec.endpoint.ports] == [81]
    assert spec.task.placement.constraints == ()
    # What was added and is dropped is as the image has it.
    assert (container.capability_add, container.capability_drop) == ((), ())


def test_removing_what_is_not_there_changes_nothing_and_is_said(cli: Cli, web: Service) -> None:
    answer = cli("service", "update", "-d", "--env-rm", "NOPE", "web")
    assert (answer.code, answer.err) == (
        0,
        "Warning: --env-rm NOPE: the service has no such variable\n",
    )


def test_force_and_args_and_image(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cli.ok("service", "update", "-d", "--force", "--image", "nginx:2", "--args", "a 'b c'", "web")
    spec = updated(cluster)
    assert spec.task and spec.task.container
    assert spec.task.force_update == 1
    assert (spec.task.container.image, spec.task.container.args) == ("nginx:2", ("a", "b c"))


def test_an_update_is_repeated_when_somebody_else_was_faster(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    cluster.failures["update"] = [Conflict("update out of sequence")]
    answer = cli("service", "scale", "-d", "web=5")
    assert answer.code == 5  # nobody changed it: the conflict has another cause, and is told
    assert answer.err == "Error: update out of sequence\n"


def test_scaling_a_global_service_is_refused(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(service("agent", replicas=None))
    answer = cli("service", "scale", "agent=2")
    assert answer.code == 2
    assert "is global" in answer.err


# ------------------------------------------------------------------ stacks

COMPOSE = """
services:
  web:
    image: nginx:1.27
    deploy: {replicas: 2}
"""


@pytest.fixture
def compose(tmp_path: Path) -> str:
    path = tmp_path / "compose.yml"
    path.write_text(COMPOSE)
    return str(path)


def test_stack_deploy_prints_docker_s_words_and_waits(
    cli: Cli, cluster: FakeCluster, compose: str
) -> None:
    web = service("app_web", id_="w1")
    cluster.deploy_changes = (
        StackChange(kind=Kind.NETWORK, name="app_default", id="n", action="created"),
        StackChange(kind=Kind.SERVICE, name="app_web", id="w1", action="updated"),
        StackChange(kind=Kind.SERVICE, name="app_db", id="w2", action="unchanged"),
        StackChange(kind=Kind.SERVICE, name="app_old", id="w3", action="removed"),
    )
    cluster.watch_script = [[status(web, 1, 2)], [status(web, 2, 2)]]
    answer = cli("stack", "deploy", "-c", compose, "--prune", "app")
    assert answer.code == 0, answer
    assert answer.out == (
        "Creating network app_default\nUpdating service app_web (id: w1)\n"
        "Removing service app_old\n1 unchanged\n"
    )
    assert answer.err.endswith("app_web: 2/2 running, converged\n")
    request = cluster.last(DeployStackRequest)
    assert request.prune and request.spec and request.spec.services[0].name == "app_web"
    assert cluster.last(WatchServicesRequest).stack == "app"


def test_stack_deploy_sends_each_service_the_credentials_of_its_registry(
    cli: Cli, cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"auths": {"reg.example": {"auth": "dTpw"}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    path = tmp_path / "c.yml"
    path.write_text("services:\n  a: {image: reg.example/a}\n  b: {image: redis}\n")
    cli.ok("stack", "deploy", "-d", "--with-registry-auth", "-c", str(path), "app")
    assert set(cluster.last(DeployStackRequest).registry_auths) == {"app_a"}


def test_a_bad_compose_file_names_the_place_and_sends_nothing(
    cli: Cli, cluster: FakeCluster, tmp_path: Path
) -> None:
    path = tmp_path / "c.yml"
    path.write_text("services:\n  web:\n    image: nginx\n    prots: [80]\n")
    answer = cli("stack", "deploy", "-c", str(path), "app")
    assert answer.code == 2
    assert "c.yml:4:5" in answer.err and "ports" in answer.err
    assert not cluster.calls


def test_stack_config_prints_the_normal_form(cli: Cli, compose: str) -> None:
    import yaml

    document = yaml.safe_load(cli.ok("stack", "config", "-c", compose))
    assert document["version"] == "3.13"
    assert document["services"]["web"]["image"] == "nginx:1.27"
    assert json.loads(cli.ok("stack", "config", "-c", compose, "--format", "json")) == document
    assert cli.ok("stack", "config", "-c", compose, "--services") == "web\n"
    assert cli.ok("stack", "config", "-c", compose, "--images") == "nginx:1.27\n"


def test_stack_config_prints_what_a_deploy_refuses_and_says_so(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("services:\n  web:\n    build: .\n    image: ${X:-a$$b}\n")
    answer = cli("stack", "config", "-c", str(path))
    assert answer.code == 0
    assert "context: ." in answer.out and "image: a$b" in answer.out
    assert "c.yml:3:5: a deploy refuses this" in answer.err and "build and push" in answer.err
    assert "image: a$$b" in cli("stack", "config", "-c", str(path), "--exact").out
    assert (
        "image: ${X:-a$$b}" in cli("stack", "config", "-c", str(path), "--skip-interpolation").out
    )
    assert cli("stack", "config", "-c", str(path), "--skip-interpolation", "--exact").code != 0


def test_stack_config_refuses_malformed_files_with_the_place(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "c.yml"
    path.write_text("services:\n  web:\n    image: x\n    stop_grace_period: tens\n")
    answer = cli("stack", "config", "-c", str(path))
    assert answer.code == 2
    assert "c.yml:4:24" in answer.err
    assert not answer.out


def test_stack_rm_waits_until_all_is_gone(cli: Cli, cluster: FakeCluster) -> None:
    label = {"com.docker.stack.namespace": "app"}
    web = cluster.add(service("app_web", id_="w1", labels=label))
    cluster.add(
        Stack(id="s1", spec=StackSpec(name="app", networks=(NetworkSpec(name="app_default"),)))
    )
    cluster.watch_script = [
        [status(web, 0, 0, stopping=2, converged=False)],
        [status(web, 0, 0, removed=True)],
    ]
    answer = cli("stack", "rm", "app")
    assert answer.code == 0, answer
    assert answer.out == "Removing service app_web\nRemoving network app_default\n"
    assert answer.err.splitlines()[-1] == "app_web: removed"
    assert cluster.last(RemoveRequest).kind is Kind.STACK
    assert cli("stack", "rm", "nope").code == 4


# ------------------------------------------------------------------ swarm and nodes


def test_swarm_init_prints_how_to_join(cli: Cli, cluster: FakeCluster) -> None:
    out = cli.ok(
        *words("swarm init --advertise-addr 10.0.0.1 --task-history-limit 2 --cert-expiry 48h"),
        *words("--availability drain --default-addr-pool 10.10.0.0/16 --store embedded"),
    )
    assert out == (
        "Swarm initialized: current node (n1) is now a manager.\n\n"
        "To add a worker to this swarm, run the following command:\n\n"
        "    swarmctl swarm join --token SWMTKN-1-w 10.0.0.1:2377\n\n"
        "To add a manager to this swarm, run 'swarmctl swarm join-token manager' and follow the instructions.\n\n"
    )
    request = cluster.last(InitRequest)
    assert request.spec and request.spec.task_history_limit == 2
    assert request.spec.node_cert_expiry_ns == 48 * 3600 * 10**9
    assert (request.availability, request.subnet_size, request.store) == (
        Availability.DRAIN,
        24,
        "embedded",
    )


def test_join_leave_and_tokens(cli: Cli, cluster: FakeCluster) -> None:
    assert (
        cli.ok("swarm", "join", "--token", "T", "10.0.0.1:2377")
        == "This node joined a swarm as a worker.\n"
    )
    assert cluster.last(JoinRequest).remote_addrs == ("10.0.0.1:2377",)
    assert cli.ok("swarm", "leave", "--force") == "Node left the swarm.\n"
    assert cluster.last(LeaveRequest).force
    assert cli.ok("swarm", "join-token", "-q", "worker") == "SWMTKN-1-w\n"
    assert cli.ok("swarm", "join-token", "--rotate", "manager").startswith(
        "Successfully rotated manager join token.\n\nTo add a manager to this swarm"
    )
    assert cluster.last(GetJoinTokensRequest) == GetJoinTokensRequest(rotate_manager=True)


def test_swarm_update_and_ca(cli: Cli, cluster: FakeCluster) -> None:
    assert (
        cli.ok("swarm", "update", "--task-history-limit", "3", "--autolock=false")
        == "Swarm updated.\n"
    )
    spec = cluster.last(UpdateRequest).spec
    assert spec and spec.cluster and spec.cluster.task_history_limit == 3
    assert isinstance(spec.cluster, ClusterSpec)
    assert cli.ok("swarm", "ca") == "PEM\n"
    assert cli("swarm", "update").code == 2
    assert cli("swarm", "update", "--cert-expiry", "1s").code == 2


def test_data_keys_are_replaced_when_asked_for_and_after_a_time(
    cli: Cli, cluster: FakeCluster
) -> None:
    assert cli.ok("swarm", "update", "--rotate-data-key") == "Swarm updated.\n"
    spec = cluster.last(UpdateRequest).spec
    assert spec and spec.cluster and spec.cluster.data_key_force_rotate == 1
    cli.ok("swarm", "update", "--data-key-lifetime", "48h")
    spec = cluster.last(UpdateRequest).spec
    assert spec and spec.cluster and spec.cluster.data_key_lifetime_ns == 48 * 3600 * 10**9
    cli.ok("swarm", "init", "--data-key-lifetime", "1h")
    assert cluster.last(InitRequest).spec is not None
    refused = cli("swarm", "update", "--data-key-lifetime", "59m")
    assert refused.code == 2
    assert "the shortest lifetime of data keys is 1h" in refused.err


KEY_TEXT = (
    "To unlock a swarm manager after it restarts, run the `swarmctl swarm unlock`\n"
    "command and provide the following key:\n\n"
    "    SWMKEY-1-old\n\n"
    "Please remember to store this key in a password manager, since without it you\n"
    "will not be able to restart the manager.\n"
)


def test_unlock_key_is_shown_and_then_said_to_be_received(cli: Cli, cluster: FakeCluster) -> None:
    assert cli.ok("swarm", "unlock-key") == KEY_TEXT
    assert cluster.last(GetUnlockKeyRequest) == GetUnlockKeyRequest(), "it is in force already"
    assert cli.ok("swarm", "unlock-key", "-q") == "SWMKEY-1-old\n"
    rotated = cli.ok("swarm", "unlock-key", "--rotate")
    assert rotated.startswith("Successfully rotated manager unlock key.\n\nTo unlock a swarm")
    assert cluster.last(GetUnlockKeyRequest) == GetUnlockKeyRequest(received="SWMKEY-1-new")


def test_autolock_gives_the_key_out_once_it_is_on(cli: Cli, cluster: FakeCluster) -> None:
    assert cli.ok("swarm", "update", "--autolock") == "Swarm updated.\n" + KEY_TEXT
    assert cli.ok("swarm", "update", "--autolock") == "Swarm updated.\n", "it was on already"
    assert cli.ok("swarm", "init", "--autolock").endswith(KEY_TEXT)
    spec = cluster.last(InitRequest).spec
    assert spec is not None
    assert spec.autolock_managers


def test_unlock_reads_the_key_and_says_when_there_is_nothing_to_unlock(
    cli: Cli, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlock(typed: str) -> Answer:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return cli("swarm", "unlock")

    refused = unlock("SWMKEY-1-x\n")
    assert (refused.code, refused.err) == (5, "Error: swarm is not locked\n")
    cluster.node = msgspec.structs.replace(cluster.node, state="locked")
    assert unlock("\n").code == 2
    assert unlock(" SWMKEY-1-x \n").code == 0
    assert cluster.last(UnlockRequest).unlock_key == "SWMKEY-1-x"
    cluster.node = msgspec.structs.replace(cluster.node, state="inactive")
    assert "This node is not part of a swarm" in unlock("SWMKEY-1-x\n").err


def test_node_update_promote_demote_rm(cli: Cli, cluster: FakeCluster) -> None:
    cluster.add(node("alpha", id_="n1", leader=True))
    cluster.add(node("beta", id_="n2"))
    assert (
        cli.ok("node", "update", "--availability", "drain", "--label-add", "zone=a", "beta")
        == "beta\n"
    )
    spec = cluster.last(UpdateRequest).spec
    assert spec and spec.node and spec.node.availability is Availability.DRAIN
    assert spec.node.labels == {"zone": "a"} and spec.node.role is NodeRole.WORKER
    assert cli.ok("node", "update", "--label-rm", "zone", "beta") == "beta\n"
    assert cli("node", "update", "--label-rm", "zone", "beta").code == 4
    assert cli.ok("node", "promote", "beta", "alpha") == (
        "Node beta promoted to a manager in the swarm.\nNode alpha is already a manager.\n"
    )
    assert cli.ok("node", "demote", "beta") == "Manager beta demoted in the swarm.\n"
    answer = cli("node", "rm", "--force", "beta", "nope")
    assert (answer.code, answer.out) == (4, "beta\n")
    assert answer.err == "Error: node nope not found\n"


def test_secrets_configs_and_networks_are_created(
    cli: Cli, cluster: FakeCluster, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"\x00s3cret\n")
    assert cli.ok("secret", "create", "-l", "a=b", "key", str(path)) == "new101\n"
    spec = cluster.last(CreateRequest).spec
    assert spec and spec.secret == SecretSpec(name="key", labels={"a": "b"}, data=b"\x00s3cret\n")
    assert (
        cli.ok("config", "create", "--template-driver", "golang", "conf", str(path)) == "new102\n"
    )
    cli.ok(
        *words(
            "network create --subnet 10.1.0.0/24 --gateway 10.1.0.1 --ip-range 10.1.0.128/25 --opt encrypted=true --attachable net"
        )
    )
    spec = cluster.last(CreateRequest).spec
    assert spec and spec.network and spec.network.ipam
    assert spec.network.ipam.configs == (
        IpamConfig(subnet="10.1.0.0/24", range="10.1.0.128/25", gateway="10.1.0.1"),
    )
    assert spec.network.driver == Driver(name="overlay", options={"encrypted": "true"})
    assert cli.ok("secret", "rm", "key") == "key\n"


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Invalid("port 99999 is not a port"), 2),
        (Conflict("service web exists already"), 5),
        (Unavailable("no leader"), 9),
        (NotManager("This node is not a swarm manager. Use …"), 9),
        (Unsupported("volumes of type cluster"), 12),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_its_exit_code(
    cli: Cli, cluster: FakeCluster, error: Exception, code: int
) -> None:
    cluster.failures["list"] = [error]  # type: ignore[list-item]
    answer = cli("service", "ls")
    assert (answer.code, answer.out, answer.err) == (code, "", f"Error: {error}\n")
