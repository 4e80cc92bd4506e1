"""Lists look as Docker's do, column by column."""

from __future__ import annotations

import json

import pytest
import yaml

from swarm.v1 import (
    Availability,
    Config,
    ConfigSpec,
    ContainerSpec,
    Driver,
    Kind,
    ListRequest,
    Meta,
    Network,
    NetworkSpec,
    NodeState,
    PortConfig,
    ReplicatedJob,
    Secret,
    SecretSpec,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    Stack,
    StackSpec,
    TaskSpec,
    TaskState,
    Volume,
    VolumeSpec,
)
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster
from tests.integration.cli.samples import ago_ns, node, service, status, task

WEB_PORTS = (
    PortConfig(target_port=80, published_port=4000, protocol="tcp"),
    PortConfig(target_port=81, published_port=4001, protocol="tcp"),
    PortConfig(target_port=53, published_port=53, protocol="udp"),
    PortConfig(target_port=99, published_port=99, publish_mode="host"),
)


@pytest.fixture
def web(cluster: FakeCluster) -> Service:
    found: Service = cluster.add(
        service("app_web", ports=WEB_PORTS, labels={"com.docker.stack.namespace": "app"})
    )
    cluster.statuses[found.id] = status(found, 2, 3)
    cluster.add(node("alpha", id_="n1" + "0" * 23, leader=True))
    cluster.add(node("beta", id_="n2" + "0" * 23))
    cluster.info = type(cluster.info)(node_id="n1" + "0" * 23)
    return found


def test_service_ls(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    agent = cluster.add(service("agent", replicas=None, image="busybox"))
    cluster.statuses[agent.id] = status(agent, 2, 2)
    capped = cluster.add(service("capped", max_replicas=2))
    cluster.statuses[capped.id] = status(capped, 3, 3)
    job = cluster.add(
        Service(
            id="job0000000000",
            spec=ServiceSpec(
                name="job",
                task=TaskSpec(container=ContainerSpec(image="busybox")),
                mode=ServiceMode(
                    replicated_job=ReplicatedJob(max_concurrent=2, total_completions=9)
                ),
            ),
        )
    )
    cluster.statuses[job.id] = status(job, 2, 2, completed=4)
    assert cli.ok("service", "ls") == (
        "ID             NAME      MODE             REPLICAS               IMAGE        PORTS\n"
        "agent0000000   agent     global           2/2                    busybox\n"
        "appweb000000   app_web   replicated       2/3                    nginx:1.27   *:53->53/udp, *:4000-4001->80-81/tcp\n"
        "capped000000   capped    replicated       3/3 (max 2 per node)   nginx:1.27\n"
        "job000000000   job       replicated job   2/2 (4/9 completed)    busybox\n"
    )


def test_lists_take_formats(cli: Cli, web: Service) -> None:
    assert cli.ok("service", "ls", "-q") == "appweb000000\n"
    assert cli.ok("service", "ls", "--format", "{{.Name}}: {{.Replicas}}") == "app_web: 2/3\n"
    assert cli.ok("service", "ls", "--format", r"table {{.ID}}\t{{.Name | upper}}\t{{.Mode}}") == (
        "ID             NAME      MODE\nappweb000000   APP_WEB   replicated\n"
    )
    assert cli.ok("service", "ls", "--format", '{{.Label "com.docker.stack.namespace"}}') == "app\n"
    row = json.loads(cli.ok("service", "ls", "--format", "json"))
    assert row["Name"] == "app_web" and row["Replicas"] == "2/3" and "Label" not in row
    assert yaml.safe_load(cli.ok("service", "ls", "--format", "yaml"))[0]["Name"] == "app_web"
    assert cli.ok("service", "ls", "--no-trunc", "-q") == web.id + "\n"


def test_an_empty_list_is_its_header(cli: Cli) -> None:
    assert cli.ok("service", "ls") == "ID        NAME      MODE      REPLICAS   IMAGE     PORTS\n"
    assert cli.ok("service", "ls", "-q") == ""
    assert cli.ok("service", "ls", "--format", "json") == ""
    assert cli.ok("service", "ls", "--format", "yaml") == "[]\n"
    assert cli.ok("service", "ls", "--format", "table {{.Name}}") == "NAME\n"


def test_filters_are_sent_together_by_key(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cli.ok(
        "service",
        "ls",
        "-f",
        "name=app",
        "--filter",
        "name=db",
        "-f",
        "label=com.docker.stack.namespace=app",
    )
    sent = cluster.last(ListRequest)
    assert {f.key: f.values for f in sent.filters} == {
        "name": ("app", "db"),
        "label": ("com.docker.stack.namespace=app",),
    }


def test_node_ls_marks_the_one_that_answers(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.add(
        node("gamma", id_="n3" + "0" * 23, state=NodeState.DOWN, availability=Availability.DRAIN)
    )
    assert cli.ok("node", "ls") == (
        "ID                            HOSTNAME   STATUS    AVAILABILITY   MANAGER STATUS   ENGINE VERSION\n"
        "n100000000000000000000000 *   alpha      Ready     Active         Leader           20.10.24\n"
        "n200000000000000000000000     beta       Ready     Active                          20.10.24\n"
        "n300000000000000000000000     gamma      Down      Drain                           20.10.24\n"
    )
    assert (
        cli.ok("node", "ls", "--format", "{{.Hostname}} {{.Self}}")
        == "alpha true\nbeta false\ngamma false\n"
    )
    assert cli.ok("node", "ls", "-q").split() == ["n1" + "0" * 23, "n2" + "0" * 23, "n3" + "0" * 23]
    assert "_ID" not in cli.ok("node", "ls", "--format", "json")


def test_service_ps_shows_the_history_of_each_slot(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    n1, n2 = "n1" + "0" * 23, "n2" + "0" * 23
    cluster.add(task(web, "t2aaaaaaaaaaaaaaaa", slot=10, node_id=n2, seconds=7200))
    cluster.add(task(web, "t1bbbbbbbbbbbbbbbb", slot=2, node_id=n1, seconds=65))
    cluster.add(
        task(
            web,
            "t1aaaaaaaaaaaaaaaa",
            slot=2,
            node_id=n2,
            seconds=300,
            state=TaskState.FAILED,
            desired=TaskState.SHUTDOWN,
            err="task: non-zero exit (137)",
            spec_version=1,
        )
    )
    cluster.add(
        task(
            web,
            "t3aaaaaaaaaaaaaaaa",
            slot=11,
            state=TaskState.PENDING,
            seconds=30,
            err="no suitable node (2 nodes short of memory)",
        )
    )
    cluster.revisions[(web.id, 1)] = ServiceRevision(
        id="r", spec=ServiceSpec(task=TaskSpec(container=ContainerSpec(image="nginx:1.26")))
    )
    assert cli.ok("service", "ps", "app_web") == (
        "ID             NAME            IMAGE        NODE      DESIRED STATE   CURRENT STATE                ERROR                                          PORTS\n"
        "t1bbbbbbbbbb   app_web.2       nginx:1.27   alpha     Running         Running about a minute ago\n"
        't1aaaaaaaaaa    \\_ app_web.2   nginx:1.26   beta      Shutdown        Failed 5 minutes ago         "task: non-zero exit (137)"\n'
        "t2aaaaaaaaaa   app_web.10      nginx:1.27   beta      Running         Running 2 hours ago\n"
        't3aaaaaaaaaa   app_web.11      nginx:1.27             Running         Pending 30 seconds ago       "no suitable node (2 nodes short of memory)"\n'
    )


def test_ps_shows_the_first_reason_of_an_account_or_all(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    why = "no suitable node (1 of 2 nodes short of CPU: need 8, best free 4 on n1; 1 node drained)"
    cluster.add(task(web, "t1" + "c" * 23, slot=1, state=TaskState.PENDING, err=why))
    form = ("--format", "{{.Error}}")
    assert cli.ok("service", "ps", "app_web", *form) == (
        '"no suitable node (1 of 2 nodes short of CPU: need 8, best free 4 on n1; 1 more reason)"\n'
    )
    assert cli.ok("service", "ps", "--no-trunc", "app_web", *form) == f'"{why}"\n'


def test_ps_with_whole_ids_shows_digests_and_ids(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    ports = (PortConfig(target_port=80, published_port=8080, host_ip="10.0.0.1"),)
    cluster.add(task(web, "t1" + "c" * 23, slot=1, node_id="n1" + "0" * 23, host_ports=ports))
    out = cli.ok(
        "service",
        "ps",
        "--no-trunc",
        "--no-resolve",
        "app_web",
        "--format",
        "{{.ID}} {{.Name}} {{.Node}} {{.Image}} {{.Ports}}",
    )
    assert (
        out
        == f"t1{'c' * 23} {web.id}.1 n1{'0' * 23} nginx:1.27@sha256:{'a' * 64} 10.0.0.1:8080->80/tcp\n"
    )
    assert cli.ok("service", "ps", "-q", "app_web") == "t1" + "c" * 23 + "\n"


def test_tasks_of_global_services_are_named_by_node(cli: Cli, cluster: FakeCluster) -> None:
    agent = cluster.add(service("agent", replicas=None))
    cluster.add(task(agent, "t1", slot=0, node_id="n9"))
    assert cli.ok("service", "ps", "agent", "--format", "{{.Name}}") == "agent.n9\n"


def test_node_ps_and_stack_ps_and_task_ls_ask_for_their_tasks(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    cluster.add(task(web, "t1", slot=1, node_id="n1" + "0" * 23))
    cluster.add(task(web, "t2", slot=2, node_id="n2" + "0" * 23))
    cluster.add(Stack(id="s1", spec=StackSpec(name="app", services=(web.spec,))))  # type: ignore[arg-type]
    assert cli.ok("node", "ps", "-q") == "t1\n"
    assert cli.ok("node", "ps", "beta", "-q") == "t2\n"
    assert cli.ok("stack", "ps", "app", "-q") == "t1\nt2\n"
    assert cli.ok("task", "ls", "-q") == "t1\nt2\n"
    answer = cli("service", "ps", "app_web", "nope", "-q")
    assert answer.out == "t1\nt2\n"
    assert (answer.code, answer.err) == (4, "Error: service nope not found\n")


def test_stack_ls_and_services(cli: Cli, cluster: FakeCluster, web: Service) -> None:
    cluster.add(Stack(id="s1", spec=StackSpec(name="app", services=(web.spec, web.spec))))  # type: ignore[arg-type]
    assert cli.ok("stack", "ls") == "NAME      SERVICES\napp       2\n"
    assert "appweb000000   app_web   replicated   2/3" in cli.ok("stack", "services", "app")
    assert cli("stack", "services", "nope").code == 4


def test_secret_config_network_and_volume_ls(cli: Cli, cluster: FakeCluster) -> None:
    meta = Meta(created_at_ns=ago_ns(7200), updated_at_ns=ago_ns(90))
    cluster.add(
        Secret(id="s" * 25, meta=meta, spec=SecretSpec(name="key", driver=Driver(name="vault")))
    )
    cluster.add(Config(id="c" * 25, meta=meta, spec=ConfigSpec(name="conf")))
    cluster.add(
        Network(
            id="e" * 25, meta=meta, spec=NetworkSpec(name="front", driver=Driver(name="overlay"))
        )
    )
    cluster.add(Volume(id="v" * 25, meta=meta, spec=VolumeSpec(name="data")))
    assert cli.ok("secret", "ls") == (
        "ID                          NAME      DRIVER    CREATED       UPDATED\n"
        "sssssssssssssssssssssssss   key       vault     2 hours ago   About a minute ago\n"
    )
    assert cli.ok("config", "ls") == (
        "ID                          NAME      CREATED       UPDATED\n"
        "ccccccccccccccccccccccccc   conf      2 hours ago   About a minute ago\n"
    )
    assert cli.ok("network", "ls") == (
        "NETWORK ID     NAME      DRIVER    SCOPE\neeeeeeeeeeee   front     overlay   swarm\n"
    )
    assert cli.ok("volume", "ls") == "DRIVER    VOLUME NAME\nlocal     data\n"
    assert cli.ok("volume", "ls", "-q") == "data\n"


def test_the_number_of_calls_of_a_list_does_not_grow(
    cli: Cli, cluster: FakeCluster, web: Service
) -> None:
    for number in range(50):
        cluster.add(task(web, f"t{number}", slot=number + 1, spec_version=1))
    cluster.revisions[(web.id, 1)] = ServiceRevision(id="r", spec=web.spec)
    cli.ok("service", "ps", "app_web")
    kinds = [call.kind for call in cluster.calls if isinstance(call, ListRequest)]
    assert sorted(kinds) == sorted([Kind.TASK, Kind.SERVICE, Kind.NODE])
    assert len(cluster.calls) == 5  # the service, three lists, and one old spec
