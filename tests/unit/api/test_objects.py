"""Secrets, configs, networks, volumes, nodes, the cluster: what may be done to them."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs
from structlog.testing import capture_logs

from swarm import errors, tls
from swarm.v1 import (
    Availability,
    Cluster,
    ClusterSpec,
    Config,
    ConfigSpec,
    CreateRequest,
    Driver,
    ExternalCa,
    GetInfoRequest,
    GetJoinTokensRequest,
    IpamConfig,
    IpamOptions,
    Keyring,
    Kind,
    ManagerStatus,
    Network,
    NetworkAttachmentSpec,
    NetworkSpec,
    Node,
    NodeRole,
    NodeSpec,
    NodeState,
    RebalanceConfig,
    RemoveRequest,
    SchedulingConfig,
    Secret,
    SecretReference,
    SecretSpec,
    Service,
    Spec,
    TaskState,
    UpdateRequest,
    Volume,
    VolumeSpec,
)
from tests.unit.api.harness import (
    CONTEXT,
    Api,
    config,
    network,
    node,
    secret,
    service,
    task,
)


def ipam(*subnets: str, **fields: Any) -> IpamOptions:
    return IpamOptions(configs=tuple(IpamConfig(subnet=s, **fields) for s in subnets))


# ---------------------------------------------------------------- create

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "secret name": ({"secret": secret("-key")}, "secret \"-key\": name: '-key' is not a name"),
    "secret name too long": ({"secret": secret("k" * 65)}, "at most 64 characters"),
    "secret without data": ({"secret": secret(data=b"")}, "data: a secret holds 1 to 512000 bytes, this one 0"),
    "secret too large": ({"secret": secret(data=b"x" * 512_001)}, "this one 512001"),
    "secret driver": ({"secret": secret(driver=Driver(name="vault"))}, "secret drivers ('vault') are not offered"),
    "secret template": ({"secret": secret(templating=Driver(name="jinja"))}, "template_driver: 'jinja' is not one of golang"),
    "secret template text": ({"secret": secret(data=b"a\n{{secret}", templating=Driver(name="golang"))}, "data: line 2, column 9: '}' cannot be read here"),
    "config template text": ({"config": config(data=b"{{nope}}", templating=Driver(name="golang"))}, "data: line 1, column 3: there is no function 'nope'"),
    "secret template field": ({"secret": secret(data=b"a\n{{.Task.Solt}}", templating=Driver(name="golang"))}, "data: line 2, column 3: there is no field 'Solt'; did you mean 'Slot'?"),
    "template options": ({"config": config(templating=Driver(name="golang", options={"a": "b"}))}, "template_driver: a template driver has no options"),
    "config too large": ({"config": config(data=b"x" * 1_024_001)}, "a config holds up to 1024000 bytes"),
    "config label": ({"config": config(labels={" ": "x"})}, "labels: a label has no name"),
    "network name": ({"network": network("a b")}, "network \"a b\": name: 'a b' is not a name"),
    "network of each engine": ({"network": network("host")}, "is a network that every engine has"),
    "network driver": ({"network": network(driver=Driver(name="ipvlan"))}, "driver: 'ipvlan' is not one of"),
    "subnet": ({"network": network(ipam=ipam("10.0.0.1/24"))}, "ipam.config[0].subnet: '10.0.0.1/24' is not a subnet"),
    "subnets that overlap": ({"network": network(ipam=ipam("10.0.0.0/16", "10.0.1.0/24"))}, "10.0.1.0/24 overlaps with config[0] (10.0.0.0/16)"),
    "gateway outside": ({"network": network(ipam=ipam("10.0.0.0/24", gateway="10.0.1.1"))}, "gateway: '10.0.1.1' is not an address of 10.0.0.0/24"),
    "range outside": ({"network": network(ipam=ipam("10.0.0.0/24", range="10.0.1.0/25"))}, "ip_range: '10.0.1.0/25' is not a part"),
    "gateway alone": ({"network": network(ipam=ipam("", gateway="10.0.1.1"))}, "given without its subnet"),
    "ipv6 without a subnet": ({"network": network(ipv6=True)}, "an IPv6 network needs an IPv6 subnet"),
    "ingress network": ({"network": network(ingress=True)}, "the routing mesh needs no network here"),
    "config-only network": ({"network": network(config_only=True)}, "are not offered"),
    "ipam driver": ({"network": network(ipam=IpamOptions(driver=Driver(name="dhcp")))}, "ipam.driver: 'dhcp' is not one of default"),
    "volume name": ({"volume": VolumeSpec(name="/data")}, "'/data' is not a name"),
    "node": ({"node": NodeSpec(name="n")}, "a node cannot be created; nodes join with"),
    "cluster": ({"cluster": ClusterSpec(name="x")}, "a cluster cannot be created"),
    "nothing": ({}, "the spec is missing: set exactly one kind of spec"),
    "two": ({"secret": secret(), "config": config()}, "set exactly one kind of spec"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), BAD.values(), ids=BAD)
async def test_refused_with_object_field_and_reason(api: Api, spec: dict[str, Any], message: str):
    before = api.store.revision
    with pytest.raises(errors.Invalid) as caught:
        await api.create(**spec)
    assert message in caught.value.message
    assert api.store.revision == before


@pytest.mark.parametrize(
    "data",
    [
        b"{{.Service.Labels.tier}}",
        b'{{if eq (env "A") "x"}}{{.Nope}}{{end}}',
        b'{{slice (secret "key") 0 4}}',
        b'{{range $i, $c := printf "%2000d" 1}}{{$i}}{{end}}{{.Nope}}',
    ],
    ids=["label", "condition", "secret", "long"],
)
async def test_a_template_that_some_task_may_expand_is_taken(api: Api, data: bytes):
    await api.create(config=config("x", data, templating=Driver(name="golang")))


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({"secret": secret("x")}, id="secret"),
        pytest.param({"config": config("x")}, id="config"),
        pytest.param({"network": network("x")}, id="network"),
        pytest.param({"volume": VolumeSpec(name="x")}, id="volume"),
    ],
)
async def test_name_that_is_taken_is_a_conflict(api: Api, spec: dict[str, Any]):
    await api.create(**spec)
    with pytest.raises(errors.Conflict, match="name 'x' is taken"):
        await api.create(**spec)


async def test_secret_is_stored_sealed_and_never_given_back(api: Api):
    id_ = await api.create(secret=secret("key", b"s3cret"))
    kept = api.stored(Secret, id_)
    assert kept.spec.data == b""
    assert b"s3cret" not in kept.sealed
    assert api.sealer.open(kept.sealed) == b"s3cret"
    for shown in (
        (await api.get(Kind.SECRET, "key")).object.secret,
        *(await api.list(Kind.SECRET)),
    ):
        assert shown.sealed == b""
        assert shown.digest == ""
        assert shown.spec.data == b""


async def test_config_is_given_back_with_its_data(api: Api):
    await api.create(config=config("conf", b"x=1"))
    assert (await api.get(Kind.CONFIG, "conf")).object.config.spec.data == b"x=1"


async def test_networks_get_the_lowest_free_subnets(api: Api):
    for name in ("a", "b"):
        await api.create(network=network(name))
    await api.create(network=network("c", ipam=ipam("10.0.2.0/24")))
    await api.create(network=network("d"))
    subnets = {n.spec.name: n.ipam[0].subnet for n in api.all(Network)}
    assert subnets == {
        "a": "10.0.0.0/24",
        "b": "10.0.1.0/24",
        "c": "10.0.2.0/24",
        "d": "10.0.3.0/24",
    }
    assert api.one(Network, "a").driver_state.name == "overlay"


async def test_subnet_of_another_network_is_refused(api: Api):
    await api.create(network=network("a"))
    with pytest.raises(
        errors.Invalid, match='10.0.0.0/25 overlaps with 10.0.0.0/24 of network "a"'
    ):
        await api.create(network=network("b", ipam=ipam("10.0.0.0/25")))


async def test_pool_of_the_cluster_is_used_and_nodes_are_left_alone(api: Api):
    cluster = next(iter(api.all(Cluster)))
    await api.put(
        structs.replace(cluster, default_addr_pool=("172.30.0.0/15",), subnet_size=20),
        node("n1", manager_status=ManagerStatus(addr="172.30.0.4:2377")),
    )
    await api.create(network=network("a"))
    assert api.one(Network, "a").ipam[0].subnet == "172.31.0.0/20"


# ---------------------------------------------------------------- update


async def test_only_labels_of_a_secret_may_change(api: Api):
    await api.create(secret=secret("key"))
    made = api.one(Secret, "key")
    await api.update(made, secret=secret("key", b"", labels={"a": "b"}))
    assert api.one(Secret, "key").spec.labels == {"a": "b"}
    await api.update(api.one(Secret, "key"), secret=secret("key", b"s3cret"))
    with pytest.raises(
        errors.Invalid, match="data differs, and only updates to labels are allowed"
    ):
        await api.update(api.one(Secret, "key"), secret=secret("key", b"other"))
    with pytest.raises(errors.Invalid, match="name differs"):
        await api.update(api.one(Secret, "key"), secret=secret("other", b""))


async def test_only_labels_of_configs_networks_and_volumes_may_change(api: Api):
    await api.create(config=config("c"))
    await api.create(network=network("n"))
    await api.create(volume=VolumeSpec(name="v"))
    await api.update(api.one(Config, "c"), config=config("c", b"", labels={"a": "b"}))
    await api.update(api.one(Network, "n"), network=network("n", labels={"a": "b"}))
    await api.update(api.one(Volume, "v"), volume=VolumeSpec(name="v", labels={"a": "b"}))
    assert api.one(Config, "c").spec == ConfigSpec(name="c", labels={"a": "b"}, data=b"x=1")
    with pytest.raises(errors.Invalid, match="data differs"):
        await api.update(api.one(Config, "c"), config=config("c", b"x=2"))
    with pytest.raises(errors.Invalid, match="internal differs"):
        await api.update(api.one(Network, "n"), network=NetworkSpec(name="n", internal=True))
    with pytest.raises(errors.Invalid, match="driver differs"):
        await api.update(
            api.one(Volume, "v"), volume=VolumeSpec(name="v", driver=Driver(name="nfs"))
        )


async def test_spec_of_another_kind_is_refused(api: Api):
    await api.create(config=config("c"))
    with pytest.raises(errors.Invalid, match='the spec is one of a secret, while config "c"'):
        await api.update(api.one(Config, "c"), secret=SecretSpec(name="c"))


async def test_only_services_roll_back(api: Api):
    await api.create(config=config("c"))
    with pytest.raises(errors.Invalid, match="only services can be rolled back"):
        await api.update(api.one(Config, "c"), rollback=True)


def node_spec(**fields: Any) -> NodeSpec:
    full = {"role": NodeRole.WORKER, "availability": Availability.ACTIVE, **fields}
    return NodeSpec(**full)


async def test_node_is_drained(api: Api):
    await api.put(node("n1"))
    spec = node_spec(availability=Availability.DRAIN, labels={"zone": "a"})
    await api.update(api.stored(Node, "n1"), node=spec)
    assert api.stored(Node, "n1").spec == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        pytest.param(
            NodeSpec(role=NodeRole.WORKER), "give active, pause or drain", id="availability"
        ),
        pytest.param(
            NodeSpec(availability=Availability.ACTIVE), "give worker or manager", id="role"
        ),
        pytest.param(node_spec(name="a b"), "'a b' is not a name", id="name"),
    ],
)
async def test_node_spec_is_checked(api: Api, spec: NodeSpec, message: str):
    await api.put(node("n1"))
    with pytest.raises(errors.Invalid, match=message):
        await api.update(api.stored(Node, "n1"), node=spec)


CLUSTER_BAD = {
    "expiry": (ClusterSpec(name="default", node_cert_expiry_ns=10**9), "certificates live for at least 1h"),
    "history": (ClusterSpec(name="default", task_history_limit=-1), "task_history_limit: a number of tasks"),
    "heartbeat": (ClusterSpec(name="default", heartbeat_period_ns=1), "at least 100ms"),
    "name": (ClusterSpec(name="other"), "a cluster keeps its name ('default')"),
    "external CA": (ClusterSpec(name="default", external_cas=(ExternalCa(url="https://ca"),)), "external CAs are not offered"),
    "key alone": (ClusterSpec(name="default", signing_ca_key="KEY"), "ca_cert: the certificate that belongs to the key is missing"),
    "root alone": (ClusterSpec(name="default", signing_ca_cert="PEM"), "ca_key: the private key that belongs to the certificate"),
    "strategy": (ClusterSpec(name="default", scheduling=SchedulingConfig(strategy="best")), "scheduling.strategy: 'best' is not one of spread, binpack"),
    "gpu policy": (ClusterSpec(name="default", scheduling=SchedulingConfig(gpu_policy="fdg")), "scheduling.gpu_policy: 'fdg' is not one of fgd, fgd-paper"),
    "quiet": (ClusterSpec(name="default", scheduling=SchedulingConfig(rebalance=RebalanceConfig(quiet_ns=-1))), "scheduling.rebalance.quiet: a duration cannot be negative"),
    "no root": (ClusterSpec(name="default", signing_ca_cert="PEM", signing_ca_key="KEY"), "ca_cert: not a certificate in PEM"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), CLUSTER_BAD.values(), ids=CLUSTER_BAD)
async def test_cluster_spec_is_checked(api: Api, spec: ClusterSpec, message: str):
    with pytest.raises(errors.Invalid) as caught:
        await api.update(api.stored(Cluster, "c"), cluster=spec)
    assert message in caught.value.message


async def test_own_roots_key_goes_to_the_keyring_and_is_never_shown(api: Api):
    now_ns = api.clock.now_ns()
    (old, old_key), (own, own_key) = (tls.new_root(now_ns=now_ns, cluster_id="c") for _ in "ab")
    cluster = structs.replace(api.stored(Cluster, "c"), root_ca_pem=old)
    await api.put(cluster, Keyring(id="c", root_ca_key_pem=old_key))
    before = api.stored(Cluster, "c")
    given = structs.replace(before.spec, signing_ca_cert=own, signing_ca_key=own_key)
    await api.update(before, cluster=given)
    shown = (await api.get(Kind.CLUSTER, "")).object.cluster
    assert (shown.spec.signing_ca_cert, shown.spec.signing_ca_key) == (own, "")
    assert shown.root_rotation_in_progress
    assert api.stored(Cluster, "c").spec.signing_ca_key == ""
    assert api.stored(Keyring, "c").root_ca_key_pem == own_key
    await api.update(shown, cluster=structs.replace(shown.spec, task_history_limit=7))
    after = api.stored(Cluster, "c")
    assert after.spec.task_history_limit == 7
    assert after.root_ca_pem == shown.root_ca_pem, "no second rotation"


async def test_count_of_rotations_never_falls(api: Api):
    cluster = api.stored(Cluster, "c")
    await api.put(structs.replace(cluster, spec=structs.replace(cluster.spec, ca_force_rotate=2)))
    with pytest.raises(errors.Invalid, match="counted up only, and is 2 already"):
        await api.update(api.stored(Cluster, "c"), cluster=cluster.spec)


# ---------------------------------------------------------------- remove


async def test_what_services_use_is_not_removed(api: Api):
    await api.create(secret=secret("key"))
    await api.create(network=network("net"))
    for name in ("b", "a"):
        await api.create(
            service=service(
                name,
                container={"secrets": (SecretReference(secret_name="key"),)},
                task={"networks": (NetworkAttachmentSpec(target="net"),)},
            )
        )
    with pytest.raises(errors.Conflict) as caught:
        await api.remove(Kind.SECRET, "key")
    assert caught.value.message == (
        'secret "key" is in use by service "a", service "b"; remove it from there, or remove the '
        "service, then try again"
    )
    with pytest.raises(errors.Conflict, match='network "net" is in use by'):
        await api.remove(Kind.NETWORK, "net")
    await api.drop(*api.all(Service))
    await api.remove(Kind.SECRET, "key")
    await api.remove(Kind.NETWORK, "net")
    assert api.names(Secret) == api.names(Network) == []


@pytest.mark.parametrize("state", [NodeState.DOWN, NodeState.DISCONNECTED])
async def test_node_that_is_down_is_removed(api: Api, state: NodeState):
    await api.put(node("n1", state=state))
    assert await api.remove(Kind.NODE, "n1") == "n1"
    assert api.all(Node) == []


async def test_node_that_is_up_is_removed_by_force_only(api: Api):
    await api.put(node("n1", hostname="host-1"))
    with pytest.raises(errors.Conflict, match="node host-1 .n1. is not down and can't be removed"):
        await api.remove(Kind.NODE, "host-1")
    await api.remove(Kind.NODE, "host-1", force=True)
    assert api.all(Node) == []


async def test_manager_is_not_removed_even_by_force(api: Api):
    await api.put(node("m", spec={"role": NodeRole.MANAGER}, state=NodeState.DOWN))
    with pytest.raises(errors.Conflict, match="must be demoted to worker before removal"):
        await api.remove(Kind.NODE, "m", force=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Kind.TASK, "tasks go with their service"),
        (Kind.CLUSTER, "`swarmctl swarm leave --force`"),
        (Kind.KEYRING, "kind KEYRING is not served"),
        (Kind.SERVICE_REVISION, "kind SERVICE_REVISION is not served"),
        (Kind.UNSPECIFIED, "kind UNSPECIFIED is not served"),
    ],
)
async def test_kinds_that_cannot_be_removed(api: Api, kind: Kind, message: str):
    with pytest.raises(errors.Invalid, match=message):
        await api.control.remove(RemoveRequest(kind=kind, ref="x"), CONTEXT)


async def test_tasks_cannot_be_updated(api: Api):
    await api.create(service=service())
    made = task("t1", api.one(Service, "web"))
    await api.put(made)
    with pytest.raises(errors.Invalid, match="the spec is missing|cannot be updated"):
        await api.control.update(
            UpdateRequest(kind=Kind.TASK, id="t1", version=api.store.revision), CONTEXT
        )


# ---------------------------------------------------------------- info, tokens


async def test_info_counts(api: Api):
    leader = ManagerStatus(leader=True, addr="10.9.0.1:2377")
    await api.put(
        node("m", spec={"role": NodeRole.MANAGER}, manager_status=leader),
        node("n1", state=NodeState.DOWN),
    )
    await api.create(service=service())
    made = api.one(Service, "web")
    await api.put(task("t1", made), task("t2", made, slot=2, state=TaskState.PENDING))
    info = await api.control.get_info(GetInfoRequest(), CONTEXT)
    assert (info.nodes, info.nodes_ready, info.managers) == (2, 1, 1)
    assert (info.services, info.tasks, info.tasks_running) == (1, 2, 1)
    assert (info.leader_node_id, info.manager_addrs) == ("m", ("10.9.0.1:2377",))
    assert (info.cluster_id, info.node_id, info.version) == ("c", "m", "1.2.3")
    assert info.revision == api.store.revision


async def test_tokens_are_given_and_rotated_one_by_one(api: Api):
    answer = await api.control.get_join_tokens(GetJoinTokensRequest(), CONTEXT)
    assert (answer.worker, answer.addr) == ("SWMTKN-1-worker-0", "10.9.0.1:2377")
    answer = await api.control.get_join_tokens(GetJoinTokensRequest(rotate_worker=True), CONTEXT)
    assert (answer.worker, answer.manager) == ("SWMTKN-1-worker-1", "SWMTKN-1-manager-0")


async def test_reads_wait_for_the_barrier():
    waited: list[int] = []

    async def barrier() -> None:
        waited.append(1)

    api = Api(barrier=barrier)
    await api.open()
    await api.list(Kind.NODE)
    await api.control.get_info(GetInfoRequest(), CONTEXT)
    assert len(waited) == 2
    await api.store.close()


async def test_each_change_is_one_line_that_says_who_did_what(api: Api):
    with capture_logs() as lines:
        id_ = await api.create(secret=secret("key", b"s3cret"))
        with pytest.raises(errors.Conflict):
            await api.create(secret=secret("key"))
        await api.control.create(CreateRequest(spec=Spec(config=config("c"))), CONTEXT)
        await api.remove(Kind.SECRET, "key")
    changes = [line for line in lines if line["event"] == "change"]
    assert [(c["who"], c["what"], c["kind"], c["name"]) for c in changes] == [
        ("admin ada", "create", "secret", "key"),
        ("admin ada", "create", "config", "c"),
        ("admin ada", "remove", "secret", "key"),
    ]
    assert changes[0]["id"] == id_
    assert changes[0]["revision"] < changes[1]["revision"]
    assert "s3cret" not in repr(lines)
