"""Objects of the contract in Docker's JSON: the shapes that `inspect`, `--format` and templates
show.

The tables below say, per message, which of Docker's fields it has and where each comes from, in
Docker's order (Docker Engine API 1.41 to 1.50). A field that is absent or zero is left out, unless
Docker always writes it. Fields that Docker lacks follow at the end, named in the same style.
`KNOWN` holds every field name, so that templates can tell a slip from an absent value.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable
from typing import Any

from cli.times import rfc3339
from swarm.errors import Internal, invariant
from swarm.v1 import (
    Cluster,
    Config,
    GenericResource,
    GetResponse,
    Kind,
    Message,
    Meta,
    Network,
    Node,
    Object,
    Secret,
    Service,
    ServiceStatus,
    Stack,
    Task,
    TmpfsOptions,
    Volume,
)

__all__ = [
    "KNOWN",
    "cluster",
    "config",
    "from_answer",
    "network",
    "node",
    "secret",
    "service",
    "service_spec",
    "stack",
    "task",
    "volume",
]

Json = dict[str, Any]
Convert = Callable[[Any], Any]
# Docker's name, ours, how the value is converted, and whether it is written although it is empty.
Field = tuple[str, str, Convert | None, bool]
Table = tuple[Field, ...]
_NAMES: set[str] = set()


def _table(text: str, **converters: Convert) -> Table:
    """A table from lines `DockerName our_name`; a `!` at the end: always written. A converter is
    given by our name.
    """
    fields: list[Field] = []
    for line in text.split("\n"):
        words = line.split()
        if not words:
            continue
        always = words[-1] == "!"
        name, ours = words[0], words[1]
        _NAMES.add(name)
        fields.append((name, ours, converters.get(ours), always))
    return tuple(fields)


def _convert(message: Message, table: Table) -> Json:
    out: Json = {}
    defaults = _defaults(type(message))
    for name, ours, converter, always in table:
        value = getattr(message, ours)
        # Fields with presence have None as default, so a zero or an empty message that was given
        # is written.
        if not always and (value == defaults[ours] or value == {}):
            continue
        out[name] = converter(value) if converter and value is not None else _plain(value)
    return out


@functools.cache
def _defaults(kind: type[Message]) -> dict[str, Any]:
    return dict(zip(kind.__struct_fields__, kind.__struct_defaults__, strict=True))


def _plain(value: Any) -> Any:
    match value:
        case tuple():
            return list(value)
        case dict():
            return dict(sorted(value.items()))
        case bytes():
            return base64.b64encode(value).decode()
        case float() if value.is_integer():
            return int(value)  # as Go writes it
    return value


def _of(table: Table) -> Convert:
    return lambda message: _convert(message, table)


def _each(table: Table) -> Convert:
    return lambda messages: [_convert(message, table) for message in messages]


def _label(value: Any) -> str:
    """An enum's name in lower case; unspecified is empty."""
    return "" if value == 0 else str(value.name).lower()


# ------------------------------------------------------------------ specs

_DRIVER = _table("Name name\nOptions options")
_PRIVILEGES = _table(
    """
    CredentialSpec credential_spec !
    SELinuxContext selinux_context !
    Seccomp seccomp
    AppArmor apparmor
    NoNewPrivileges no_new_privileges !
    """,
    credential_spec=_of(_table("Config config\nFile file\nRegistry registry")),
    selinux_context=_of(
        _table("Disable disable !\nUser user !\nRole role !\nType type !\nLevel level !")
    ),
    seccomp=_of(_table("Mode mode\nProfile profile")),
    apparmor=_of(_table("Mode mode")),
)
_NAMES |= {"SizeBytes", "Mode", "Options"}


def _tmpfs(options: TmpfsOptions) -> Json:
    out: Json = {}
    if options.size_bytes:
        out["SizeBytes"] = options.size_bytes
    if options.mode:
        out["Mode"] = options.mode
    if options.options:
        out["Options"] = [list(option.words) for option in options.options]
    return out


_MOUNT = _table(
    """
    Type type
    Source source
    Target target
    ReadOnly read_only
    Consistency consistency
    BindOptions bind_options
    VolumeOptions volume_options
    TmpfsOptions tmpfs_options
    """,
    bind_options=_of(
        _table(
            """
            Propagation propagation
            NonRecursive non_recursive
            CreateMountpoint create_mountpoint
            ReadOnlyNonRecursive read_only_non_recursive
            ReadOnlyForceRecursive read_only_force_recursive
            SELinux selinux
            """
        )
    ),
    volume_options=_of(
        _table(
            "NoCopy no_copy\nLabels labels\nDriverConfig driver_config\nSubpath subpath",
            driver_config=_of(_DRIVER),
        )
    ),
    tmpfs_options=_tmpfs,
)
_FILE = _table("Name name !\nUID uid !\nGID gid !\nMode mode !")
_CONTAINER = _table(
    """
    Image image
    Labels labels
    Command command
    Args args
    Hostname hostname
    Env env
    Dir dir
    User user
    Groups groups
    Privileges privileges
    Init init
    StopSignal stop_signal
    TTY tty
    OpenStdin open_stdin
    ReadOnly read_only
    Mounts mounts
    StopGracePeriod stop_grace_period_ns
    Healthcheck healthcheck
    Hosts hosts
    DNSConfig dns
    Secrets secrets
    Configs configs
    Isolation isolation
    Sysctls sysctls
    CapabilityAdd capability_add
    CapabilityDrop capability_drop
    Ulimits ulimits
    OomScoreAdj oom_score_adj
    Privileged privileged
    Devices devices
    ShmSize shm_size_bytes
    IpcMode ipc_mode
    PidMode pid_mode
    UsernsMode userns_mode
    UTSMode uts_mode
    CgroupnsMode cgroupns_mode
    NetworkMode network_mode
    SecurityOpt security_opt
    CgroupParent cgroup_parent
    Domainname domainname
    MacAddress mac_address
    OomKillDisable oom_kill_disable
    PullPolicy pull_policy
    Platform platform
    Expose expose
    Annotations annotations
    StorageOpt storage_opt
    CpusetCpus cpuset
    CpuShares cpu_shares
    MemorySwap memory_swap_bytes
    MemoryReservation memory_reservation_bytes
    MemorySwappiness memory_swappiness
    DeviceCgroupRules device_cgroup_rules
    """,
    privileges=_of(_PRIVILEGES),
    mounts=_each(_MOUNT),
    healthcheck=_of(
        _table(
            """
            Test test
            Interval interval_ns
            Timeout timeout_ns
            StartPeriod start_period_ns
            StartInterval start_interval_ns
            Retries retries
            """
        )
    ),
    dns=_of(_table("Nameservers nameservers\nSearch search\nOptions options")),
    secrets=_each(
        _table("File file\nSecretID secret_id !\nSecretName secret_name !", file=_of(_FILE))
    ),
    configs=_each(
        _table("File file\nConfigID config_id !\nConfigName config_name !", file=_of(_FILE))
    ),
    ulimits=_each(_table("Name name !\nHard hard !\nSoft soft !")),
    devices=_each(
        _table("PathOnHost source\nPathInContainer target\nCgroupPermissions permissions")
    ),
)


def _generic(resources: Iterable[GenericResource]) -> list[Json]:
    return [
        {"NamedResourceSpec": {"Kind": resource.kind, "Value": resource.name}}
        if resource.name
        else {
            "DiscreteResourceSpec": {
                "Kind": resource.kind,
                **({} if resource.count is None else {"Value": resource.count}),
            }
        }
        for resource in resources
    ]


_NAMES |= {"NamedResourceSpec", "DiscreteResourceSpec", "Kind", "Value"}
_DEVICE_REQUEST = _table(
    """
    Driver driver
    Count count
    DeviceIDs device_ids
    Capabilities capabilities
    Options options
    """
)
_RESOURCES = _table(
    """
    NanoCPUs cpu_nano
    MemoryBytes memory_bytes
    Pids pids
    GenericResources generic
    Devices devices
    """,
    generic=_generic,
    devices=_each(_DEVICE_REQUEST),
)
_PLATFORM = _table("Architecture architecture\nOS os")
_NAMES |= {"Spread", "SpreadDescriptor"}
_PLACEMENT = _table(
    """
    Constraints constraints
    Preferences preferences
    MaxReplicas max_replicas
    Platforms platforms
    """,
    preferences=lambda preferences: [
        {"Spread": {"SpreadDescriptor": preference.spread}} for preference in preferences
    ],
    platforms=_each(_PLATFORM),
)
_TASK_SPEC = _table(
    """
    ContainerSpec container
    Resources resources
    RestartPolicy restart
    Placement placement
    Networks networks
    LogDriver log_driver
    ForceUpdate force_update !
    Runtime docker_runtime
    ContainerRuntime runtime
    """,
    container=_of(_CONTAINER),
    resources=_of(
        _table(
            """
            Limits limits
            Reservations reservations
            SwapBytes swap_bytes
            MemorySwappiness memory_swappiness
            """,
            limits=_of(_RESOURCES),
            reservations=_of(_RESOURCES),
        )
    ),
    restart=_of(
        _table(
            """
            Condition condition
            Delay delay_ns
            MaxAttempts max_attempts
            Window window_ns
            """
        )
    ),
    placement=_of(_PLACEMENT),
    networks=_each(
        _table(
            """
            Target target
            Aliases aliases
            DriverOpts driver_opts
            IPv4Address ipv4_address
            IPv6Address ipv6_address
            Priority priority
            """
        )
    ),
    log_driver=_of(_DRIVER),
)
_NAMES |= {"Replicated", "Global", "ReplicatedJob", "GlobalJob"}
_MODE = _table(
    """
    Replicated replicated
    Global global_service
    ReplicatedJob replicated_job
    GlobalJob global_job
    """,
    replicated=_of(_table("Replicas replicas")),
    global_service=_of(()),
    replicated_job=_of(_table("MaxConcurrent max_concurrent\nTotalCompletions total_completions")),
    global_job=_of(()),
)
_UPDATE_CONFIG = _table(
    """
    Parallelism parallelism !
    Delay delay_ns
    FailureAction failure_action
    Monitor monitor_ns
    MaxFailureRatio max_failure_ratio !
    Order order
    """
)
_PORT = _table(
    """
    Name name
    Protocol protocol
    TargetPort target_port
    PublishedPort published_port
    PublishMode publish_mode
    HostIP host_ip
    """
)
_ENDPOINT_SPEC = _table("Mode mode\nPorts ports", ports=_each(_PORT))
_SERVICE_SPEC = _table(
    """
    Name name !
    Labels labels !
    TaskTemplate task !
    Mode mode !
    UpdateConfig update
    RollbackConfig rollback
    EndpointSpec endpoint
    DependsOn depends_on
    """,
    task=_of(_TASK_SPEC),
    mode=_of(_MODE),
    update=_of(_UPDATE_CONFIG),
    rollback=_of(_UPDATE_CONFIG),
    endpoint=_of(_ENDPOINT_SPEC),
    depends_on=_each(
        _table("Service service\nCondition condition\nRequired required !\nRestart restart !")
    ),
)


# ------------------------------------------------------------------ objects

_NAMES |= {"ID", "Version", "Index", "CreatedAt", "UpdatedAt", "Spec", "PreviousSpec"}


def _head(id_: str, meta: Meta | None) -> Json:
    meta = meta or Meta()
    return {
        "ID": id_,
        "Version": {"Index": meta.version},
        "CreatedAt": rfc3339(meta.created_at_ns),
        "UpdatedAt": rfc3339(meta.updated_at_ns),
    }


def _held(answer: GetResponse) -> Object:
    """The object of a Get."""
    invariant(answer.object is not None, "a Get answers with an object")
    return answer.object or Object()


def _time(time_ns: int) -> str:
    return rfc3339(time_ns)


_UPDATE_STATUS = _table(
    """
    State state
    StartedAt started_at_ns
    CompletedAt completed_at_ns
    Message message
    """,
    state=_label,
    started_at_ns=_time,
    completed_at_ns=_time,
)
_ENDPOINT = _table(
    "Spec spec !\nPorts ports\nVirtualIPs virtual_ips",
    spec=_of(_ENDPOINT_SPEC),
    ports=_each(_PORT),
    virtual_ips=_each(_table("NetworkID network_id\nAddr addr")),
)
_SERVICE = _table(
    "Spec spec !\nEndpoint endpoint !\nUpdateStatus update_status",
    spec=_of(_SERVICE_SPEC),
    endpoint=_of(_ENDPOINT),
    update_status=_of(_UPDATE_STATUS),
)
_NAMES |= {"ServiceStatus", "RunningTasks", "DesiredTasks", "CompletedTasks"}
_NAMES |= {"JobStatus", "JobIteration", "PendingDelete"}


def service_spec(spec: Message) -> Json:
    """A ServiceSpec."""
    return _convert(spec, _SERVICE_SPEC)


def service(answer: GetResponse | Service) -> Json:
    """A Service; from a Get also its previous spec and its status."""
    found = answer if isinstance(answer, Service) else _held(answer).service
    assert found is not None
    out = _head(found.id, found.meta) | _convert(found, _SERVICE)
    out["Endpoint"] = out["Endpoint"] or {"Spec": {}}
    if isinstance(answer, GetResponse):
        if answer.revision is not None and answer.revision.spec is not None:
            out["PreviousSpec"] = service_spec(answer.revision.spec)
        if answer.service_status is not None:
            out["ServiceStatus"] = _status(answer.service_status)
    mode = found.spec.mode if found.spec else None
    if mode and (mode.replicated_job or mode.global_job):
        out["JobStatus"] = {"JobIteration": {"Index": found.job_iteration}}
    if found.pending_delete:
        out["PendingDelete"] = True
    return out


def _status(status: ServiceStatus) -> Json:
    return {
        "RunningTasks": status.running,
        "DesiredTasks": status.desired,
        "CompletedTasks": status.completed,
    }


_TASK_STATUS = _table(
    """
    Timestamp timestamp_ns
    State state
    Message message
    Err err
    ContainerStatus container
    PortStatus ports !
    """,
    timestamp_ns=_time,
    state=_label,
    container=_of(_table("ContainerID container_id\nPID pid !\nExitCode exit_code")),
    ports=lambda ports: {"Ports": [_convert(port, _PORT) for port in ports]} if ports else {},
)
_TASK = _table(
    """
    Labels labels !
    ServiceID service_id
    Slot slot
    NodeID node_id
    Status status !
    DesiredState desired_state
    GenericResources assigned_generic
    AssignedGPUs assigned_gpus
    NetworksAttachments networks
    HostPorts host_ports
    SpecVersion spec_version
    """,
    status=_of(_TASK_STATUS),
    desired_state=_label,
    assigned_generic=_generic,
    networks=lambda attachments: [
        {"Network": {"ID": a.network_id}, "Addresses": list(a.addresses)} for a in attachments
    ],
    host_ports=_each(_PORT),
)
_NAMES |= {"Network", "Addresses"}


def task(answer: GetResponse | Task) -> Json:
    """A Task; from a Get with the spec it runs."""
    found = answer if isinstance(answer, Task) else _held(answer).task
    assert found is not None
    out = _head(found.id, found.meta)
    if isinstance(answer, GetResponse) and answer.revision and answer.revision.spec:
        template = answer.revision.spec.task
        out["Spec"] = _convert(template, _TASK_SPEC) if template else {}
    return out | _convert(found, _TASK)


_NODE = _table(
    """
    Spec spec !
    Description description !
    Status status !
    ManagerStatus manager_status
    Revoked revoked
    """,
    spec=_of(
        _table(
            "Name name\nLabels labels !\nRole role\nAvailability availability",
            role=_label,
            availability=_label,
        )
    ),
    description=_of(
        _table(
            """
            Hostname hostname
            Platform platform
            Resources resources
            Engine engine
            Runtimes runtimes
            AgentVersion agent_version
            DataPathAddr data_path_addr
            DataPathPort data_path_port
            Warnings warnings
            GPUs gpus
            """,
            platform=_of(_PLATFORM),
            resources=_of(_RESOURCES),
            engine=_of(
                _table(
                    "EngineVersion version\nEngineName name\nLabels labels\nPlugins plugins",
                    plugins=_each(_table("Type type\nName name")),
                )
            ),
            gpus=_each(
                _table(
                    """
                    UUID uuid
                    Index index !
                    Model model
                    MemoryBytes memory_bytes
                    ComputeCapability compute_capability
                    ParentUUID parent_uuid
                    NUMANode numa_node !
                    NVLinkPeers nvlink_peers
                    Healthy healthy !
                    HealthMessage health_message
                    """
                )
            ),
        )
    ),
    status=_of(
        _table(
            "State state\nMessage message\nAddr addr\nSince since_ns", state=_label, since_ns=_time
        )
    ),
    manager_status=_of(
        _table(
            "Leader leader\nReachability reachability\nAddr addr",
            reachability=_label,
        )
    ),
)


def node(found: Node) -> Json:
    """A Node."""
    out = _head(found.id, found.meta) | _convert(found, _NODE)
    if found.certificate_expires_at_ns:
        out["CertificateExpiresAt"] = rfc3339(found.certificate_expires_at_ns)
    return out


_NAMES |= {"CertificateExpiresAt", "TLSInfo"}
_NAMED = "Name name !\nLabels labels !\n"
_SECRET_SPEC = _table(
    _NAMED + "Driver driver\nTemplating templating",
    driver=_of(_DRIVER),
    templating=_of(_DRIVER),
)
_CONFIG_SPEC = _table(_NAMED + "Data data\nTemplating templating", templating=_of(_DRIVER))
_VOLUME_SPEC = _table(_NAMED + "Driver driver", driver=_of(_DRIVER))


def secret(found: Secret) -> Json:
    """A Secret, without its data."""
    return _head(found.id, found.meta) | {
        "Spec": _convert(found.spec, _SECRET_SPEC) if found.spec else {}
    }


def config(found: Config) -> Json:
    """A Config; its data in base64."""
    return _head(found.id, found.meta) | {
        "Spec": _convert(found.spec, _CONFIG_SPEC) if found.spec else {}
    }


def volume(found: Volume) -> Json:
    """A Volume."""
    return _head(found.id, found.meta) | {
        "Spec": _convert(found.spec, _VOLUME_SPEC) if found.spec else {}
    }


_IPAM = _table(
    "Subnet subnet\nIPRange range\nGateway gateway\nAuxiliaryAddresses aux_addresses",
)
_NAMES |= {"Name", "Id", "Created", "Scope", "Driver", "EnableIPv4", "EnableIPv6", "IPAM"}
_NAMES |= {"Config", "Internal", "Attachable", "Ingress", "ConfigFrom", "ConfigOnly", "Containers"}
_NAMES |= {"Peers"}


def network(found: Network) -> Json:
    """A Network, in the shape of Docker's networks (`Id`, `Created`), not of its swarm objects."""
    spec = found.spec
    assert spec is not None
    state = found.driver_state or spec.driver
    asked = spec.ipam.configs if spec.ipam else ()
    driver = spec.ipam.driver if spec.ipam else None
    return {
        "Name": spec.name,
        "Id": found.id,
        "Created": rfc3339((found.meta or Meta()).created_at_ns),
        "Scope": spec.scope or "swarm",
        "Driver": (spec.driver.name if spec.driver else "") or "overlay",
        "EnableIPv4": spec.ipv4 is not False,
        "EnableIPv6": spec.ipv6,
        "IPAM": {
            "Driver": (driver.name if driver else "") or "default",
            "Options": dict(driver.options) if driver and driver.options else None,
            "Config": [_convert(c, _IPAM) for c in found.ipam or asked],
        },
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": spec.ingress,
        "ConfigFrom": {"Network": spec.config_from},
        "ConfigOnly": spec.config_only,
        "Options": dict(sorted(state.options.items())) if state and state.options else None,
        "Labels": dict(sorted(spec.labels.items())),
    }


_NAMES |= {"Orchestration", "TaskHistoryRetentionLimit", "Raft", "Dispatcher", "HeartbeatPeriod"}
_NAMES |= {"CAConfig", "NodeCertExpiry", "ForceRotate", "TaskDefaults", "EncryptionConfig"}
_NAMES |= {"AutoLockManagers", "TrustRoot", "RootRotationInProgress", "DefaultAddrPool"}
_NAMES |= {"SubnetSize", "DataPathPort", "StoreEngine", "ExternalCAs", "LogDriver"}
_RAFT = _table(
    """
    SnapshotInterval snapshot_interval
    KeepOldSnapshots keep_old_snapshots
    LogEntriesForSlowFollowers log_entries_for_slow_followers
    ElectionTick election_tick !
    HeartbeatTick heartbeat_tick !
    """
)
_EXTERNAL_CA = _table("Protocol protocol\nURL url\nOptions options\nCACert ca_cert")


def cluster(found: Cluster) -> Json:
    """The Cluster."""
    spec = found.spec
    assert spec is not None
    ca: Json = {"NodeCertExpiry": spec.node_cert_expiry_ns}
    if spec.external_cas:
        ca["ExternalCAs"] = [_convert(item, _EXTERNAL_CA) for item in spec.external_cas]
    if spec.ca_force_rotate:
        ca["ForceRotate"] = spec.ca_force_rotate
    defaults = spec.default_log_driver
    return _head(found.id, found.meta) | {
        "Spec": {
            "Name": spec.name or "default",
            "Labels": dict(sorted(spec.labels.items())),
            "Orchestration": {"TaskHistoryRetentionLimit": spec.task_history_limit},
            "Raft": _convert(spec.raft, _RAFT) if spec.raft else {},
            "Dispatcher": {"HeartbeatPeriod": spec.heartbeat_period_ns},
            "CAConfig": ca,
            "TaskDefaults": {"LogDriver": _convert(defaults, _DRIVER)} if defaults else {},
            "EncryptionConfig": {"AutoLockManagers": spec.autolock_managers},
        },
        "TLSInfo": {"TrustRoot": found.root_ca_pem},
        "RootRotationInProgress": found.root_rotation_in_progress,
        "DefaultAddrPool": list(found.default_addr_pool) or None,
        "SubnetSize": found.subnet_size,
        "DataPathPort": found.data_path_port,
        "StoreEngine": found.store_engine,
    }


_NETWORK_SPEC = _table(
    _NAMED
    + """
    DriverConfiguration driver
    IPv6Enabled ipv6
    Internal internal
    Attachable attachable
    Ingress ingress
    IPAMOptions ipam
    Scope scope
    """,
    driver=_of(_DRIVER),
    ipam=_of(_table("Driver driver\nConfigs configs", driver=_of(_DRIVER), configs=_each(_IPAM))),
)
_STACK_SPEC = _table(
    """
    Name name !
    Services services
    Networks networks
    Secrets secrets
    Configs configs
    Volumes volumes
    ExternalNetworks external_networks
    ExternalSecrets external_secrets
    ExternalConfigs external_configs
    """,
    services=_each(_SERVICE_SPEC),
    networks=_each(_NETWORK_SPEC),
    secrets=_each(_SECRET_SPEC),
    configs=_each(_CONFIG_SPEC),
    volumes=_each(_VOLUME_SPEC),
)
_NAMES.add("Revision")


def stack(found: Stack) -> Json:
    """A Stack; Docker has no such object."""
    return _head(found.id, found.meta) | {
        "Spec": _convert(found.spec, _STACK_SPEC) if found.spec else {},
        "Revision": found.revision,
    }


def from_answer(kind: Kind, answer: GetResponse) -> Json:
    """The object of a Get of this kind."""
    found = answer.object
    invariant(found is not None, "a Get answers with an object")
    match kind, found:
        case Kind.SERVICE, _:
            return service(answer)
        case Kind.TASK, _:
            return task(answer)
        case Kind.NODE, Object(node=Node() as one):
            return node(one)
        case Kind.SECRET, Object(secret=Secret() as one):
            return secret(one)
        case Kind.CONFIG, Object(config=Config() as one):
            return config(one)
        case Kind.NETWORK, Object(network=Network() as one):
            return network(one)
        case Kind.VOLUME, Object(volume=Volume() as one):
            return volume(one)
        case Kind.STACK, Object(stack=Stack() as one):
            return stack(one)
        case Kind.CLUSTER, Object(cluster=Cluster() as one):
            return cluster(one)
    raise Internal(f"the manager answered a Get of a {kind.name.lower()} with another object")


KNOWN = frozenset(_NAMES)
