"""Objects of the contract in Docker's JSON: the shapes that `inspect`, `--format` and templates
show.

The specs come from cli/docker_tables.py; here stand the objects around them. `KNOWN` holds every
field name, so that templates can tell a slip from an absent value.
"""

from __future__ import annotations

from cli.docker_tables import (
    DRIVER,
    ENDPOINT_SPEC,
    GPU,
    NAMES,
    PLATFORM,
    PORT,
    RESOURCES,
    SERVICE_SPEC,
    TASK_SPEC,
    Json,
    convert,
    each,
    generic,
    label,
    of,
    table,
)
from cli.times import rfc3339
from swarm.errors import Internal, invariant
from swarm.v1 import (
    Cluster,
    Config,
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

# ------------------------------------------------------------------ objects

NAMES |= {"ID", "Version", "Index", "CreatedAt", "UpdatedAt", "Spec", "PreviousSpec"}


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


_UPDATE_STATUS = table(
    """
    State state
    StartedAt started_at_ns
    CompletedAt completed_at_ns
    Message message
    NextBatchAt next_batch_at_ns
    PauseAfter pause_after
    AwaitsResume awaits_resume
    ResumedAt resumed_at_ns
    StoppedFirst stopped_first
    StoppedFirstReason stopped_first_reason
    """,
    state=label,
    started_at_ns=_time,
    completed_at_ns=_time,
    next_batch_at_ns=_time,
    resumed_at_ns=_time,
)
_ENDPOINT = table(
    "Spec spec !\nPorts ports\nVirtualIPs virtual_ips",
    spec=of(ENDPOINT_SPEC),
    ports=each(PORT),
    virtual_ips=each(table("NetworkID network_id\nAddr addr")),
)
_REBALANCE_STATUS = table(
    """
    Running running !
    StartedAt started_at_ns
    EndedAt ended_at_ns
    Moved moved !
    Message message
    NodeID node_id
    """,
    started_at_ns=_time,
    ended_at_ns=_time,
)
_SERVICE = table(
    """
    Spec spec !
    Endpoint endpoint !
    UpdateStatus update_status
    RebalanceStatus rebalance_status
    """,
    spec=of(SERVICE_SPEC),
    endpoint=of(_ENDPOINT),
    update_status=of(_UPDATE_STATUS),
    rebalance_status=of(_REBALANCE_STATUS),
)
# Docker's JobStatus has the number of the iteration alone.
_JOB_STATUS = table(
    """
    State state
    QueuedAt queued_at_ns
    StartedAt started_at_ns
    EndedAt ended_at_ns
    Message message
    ExitCode exit_code
    Completed completed
    Failed failed
    TimedOut timed_out
    """,
    state=label,
    queued_at_ns=_time,
    started_at_ns=_time,
    ended_at_ns=_time,
)
NAMES |= {"ServiceStatus", "RunningTasks", "DesiredTasks", "CompletedTasks"}
NAMES |= {"JobStatus", "JobIteration", "PendingDelete"}


def service_spec(spec: Message) -> Json:
    """A ServiceSpec."""
    return convert(spec, SERVICE_SPEC)


def service(answer: GetResponse | Service) -> Json:
    """A Service; from a Get also its previous spec and its status."""
    found = answer if isinstance(answer, Service) else _held(answer).service
    assert found is not None
    out = _head(found.id, found.meta) | convert(found, _SERVICE)
    out["Endpoint"] = out["Endpoint"] or {"Spec": {}}
    if isinstance(answer, GetResponse):
        if answer.revision is not None and answer.revision.spec is not None:
            out["PreviousSpec"] = service_spec(answer.revision.spec)
        if answer.service_status is not None:
            out["ServiceStatus"] = _status(answer.service_status)
    mode = found.spec.mode if found.spec else None
    if mode and (mode.replicated_job or mode.global_job):
        out["JobStatus"] = {"JobIteration": {"Index": found.job_iteration}}
        status = found.job_status
        if status is not None and status.iteration == found.job_iteration:
            out["JobStatus"] |= convert(status, _JOB_STATUS)
    if found.pending_delete:
        out["PendingDelete"] = True
    return out


def _status(status: ServiceStatus) -> Json:
    return {
        "RunningTasks": status.running,
        "DesiredTasks": status.desired,
        "CompletedTasks": status.completed,
    }


_TASK_STATUS = table(
    """
    Timestamp timestamp_ns
    State state
    Message message
    Err err
    Cause cause
    ContainerStatus container
    PortStatus ports !
    """,
    timestamp_ns=_time,
    state=label,
    container=of(table("ContainerID container_id\nPID pid !\nExitCode exit_code")),
    ports=lambda ports: {"Ports": [convert(port, PORT) for port in ports]} if ports else {},
)
_TASK = table(
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
    StopCause stop_cause
    StopMessage stop_message
    Crashes crashes
    StartAfter start_after_ns
    """,
    start_after_ns=_time,
    status=of(_TASK_STATUS),
    desired_state=label,
    stop_cause=label,
    assigned_generic=generic,
    networks=lambda attachments: [
        {"Network": {"ID": a.network_id}, "Addresses": list(a.addresses)} for a in attachments
    ],
    host_ports=each(PORT),
)
NAMES |= {"Network", "Addresses"}


def task(answer: GetResponse | Task) -> Json:
    """A Task; from a Get with the spec it runs."""
    found = answer if isinstance(answer, Task) else _held(answer).task
    assert found is not None
    out = _head(found.id, found.meta)
    if isinstance(answer, GetResponse) and answer.revision and answer.revision.spec:
        template = answer.revision.spec.task
        out["Spec"] = convert(template, TASK_SPEC) if template else {}
    return out | convert(found, _TASK)


_NODE = table(
    """
    Spec spec !
    Description description !
    Status status !
    ManagerStatus manager_status
    Revoked revoked
    """,
    spec=of(
        table(
            "Name name\nLabels labels !\nRole role\nAvailability availability",
            role=label,
            availability=label,
        )
    ),
    description=of(
        table(
            """
            Hostname hostname
            Platform platform
            Resources resources
            Engine engine
            Runtimes runtimes
            AgentVersion agent_version
            EtcdVersion etcd_version
            DataPathAddr data_path_addr
            DataPathPort data_path_port
            Warnings warnings
            GPUs gpus
            RuntimeProblems runtime_problems
            """,
            platform=of(PLATFORM),
            resources=of(RESOURCES),
            engine=of(
                table(
                    "EngineVersion version\nEngineName name\nLabels labels\nPlugins plugins",
                    plugins=each(table("Type type\nName name")),
                )
            ),
            gpus=each(GPU),
            runtime_problems=each(
                table(
                    "Runtimes runtimes !\nCause cause\nMessage message\nSince since_ns",
                    since_ns=_time,
                )
            ),
        )
    ),
    status=of(
        table(
            "State state\nMessage message\nAddr addr\nSince since_ns", state=label, since_ns=_time
        )
    ),
    manager_status=of(
        table(
            "Leader leader\nReachability reachability\nAddr addr\nEngineVersion engine_version",
            reachability=label,
        )
    ),
)


def node(found: Node) -> Json:
    """A Node."""
    out = _head(found.id, found.meta) | convert(found, _NODE)
    if found.certificate_expires_at_ns:
        out["CertificateExpiresAt"] = rfc3339(found.certificate_expires_at_ns)
    return out


NAMES |= {"CertificateExpiresAt", "TLSInfo"}
_NAMED = "Name name !\nLabels labels !\n"
_SECRET_SPEC = table(
    _NAMED + "Driver driver\nTemplating templating",
    driver=of(DRIVER),
    templating=of(DRIVER),
)
_CONFIG_SPEC = table(_NAMED + "Data data\nTemplating templating", templating=of(DRIVER))
_VOLUME_SPEC = table(_NAMED + "Driver driver", driver=of(DRIVER))


def secret(found: Secret) -> Json:
    """A Secret, without its data."""
    return _head(found.id, found.meta) | {
        "Spec": convert(found.spec, _SECRET_SPEC) if found.spec else {}
    }


def config(found: Config) -> Json:
    """A Config; its data in base64."""
    return _head(found.id, found.meta) | {
        "Spec": convert(found.spec, _CONFIG_SPEC) if found.spec else {}
    }


def volume(found: Volume) -> Json:
    """A Volume."""
    return _head(found.id, found.meta) | {
        "Spec": convert(found.spec, _VOLUME_SPEC) if found.spec else {}
    }


_IPAM = table(
    "Subnet subnet\nIPRange range\nGateway gateway\nAuxiliaryAddresses aux_addresses",
)
NAMES |= {"Name", "Id", "Created", "Scope", "Driver", "EnableIPv4", "EnableIPv6", "IPAM"}
NAMES |= {"Config", "Internal", "Attachable", "Ingress", "ConfigFrom", "ConfigOnly", "Containers"}
NAMES |= {"Peers"}


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
            "Config": [convert(c, _IPAM) for c in found.ipam or asked],
        },
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "Ingress": spec.ingress,
        "ConfigFrom": {"Network": spec.config_from},
        "ConfigOnly": spec.config_only,
        "Options": dict(sorted(state.options.items())) if state and state.options else None,
        "Labels": dict(sorted(spec.labels.items())),
    }


NAMES |= {"Orchestration", "TaskHistoryRetentionLimit", "Raft", "Dispatcher", "HeartbeatPeriod"}
NAMES |= {"CAConfig", "NodeCertExpiry", "ForceRotate", "TaskDefaults", "EncryptionConfig"}
NAMES |= {"DataKeyLifetime", "DataKeyForceRotate"}
NAMES |= {"AutoLockManagers", "TrustRoot", "RootRotationInProgress", "DefaultAddrPool"}
NAMES |= {"SubnetSize", "DataPathPort", "StoreEngine", "ExternalCAs", "LogDriver"}
_RAFT = table(
    """
    SnapshotInterval snapshot_interval
    KeepOldSnapshots keep_old_snapshots
    LogEntriesForSlowFollowers log_entries_for_slow_followers
    ElectionTick election_tick !
    HeartbeatTick heartbeat_tick !
    """
)
NAMES |= {"Scheduling", "Strategy", "GPUPolicy", "Queues", "Rebalance", "Quiet"}
_SCHEDULING = table(
    """
    Strategy strategy
    GPUPolicy gpu_policy
    Queues queues
    Rebalance rebalance
    """,
    queues=each(
        table(
            """
            Name name !
            Weight weight
            NanoCPUs cpu_nano
            MemoryBytes memory_bytes
            NanoGPUs gpu_nano
            Tasks tasks
            """
        )
    ),
    rebalance=of(table("Quiet quiet_ns")),
)
_EXTERNAL_CA = table("Protocol protocol\nURL url\nOptions options\nCACert ca_cert")


def cluster(found: Cluster) -> Json:
    """The Cluster."""
    spec = found.spec
    assert spec is not None
    ca: Json = {"NodeCertExpiry": spec.node_cert_expiry_ns}
    if spec.external_cas:
        ca["ExternalCAs"] = [convert(item, _EXTERNAL_CA) for item in spec.external_cas]
    if spec.ca_force_rotate:
        ca["ForceRotate"] = spec.ca_force_rotate
    encryption: Json = {"AutoLockManagers": spec.autolock_managers}
    if spec.data_key_lifetime_ns:
        encryption["DataKeyLifetime"] = spec.data_key_lifetime_ns
    if spec.data_key_force_rotate:
        encryption["DataKeyForceRotate"] = spec.data_key_force_rotate
    defaults = spec.default_log_driver
    return _head(found.id, found.meta) | {
        "Spec": {
            "Name": spec.name or "default",
            "Labels": dict(sorted(spec.labels.items())),
            "Orchestration": {"TaskHistoryRetentionLimit": spec.task_history_limit},
            "Raft": convert(spec.raft, _RAFT) if spec.raft else {},
            "Dispatcher": {"HeartbeatPeriod": spec.heartbeat_period_ns},
            "CAConfig": ca,
            "TaskDefaults": {"LogDriver": convert(defaults, DRIVER)} if defaults else {},
            "EncryptionConfig": encryption,
            "Scheduling": convert(spec.scheduling, _SCHEDULING) if spec.scheduling else {},
        },
        "TLSInfo": {"TrustRoot": found.root_ca_pem},
        "RootRotationInProgress": found.root_rotation_in_progress,
        "DefaultAddrPool": list(found.default_addr_pool) or None,
        "SubnetSize": found.subnet_size,
        "DataPathPort": found.data_path_port,
        "StoreEngine": found.store_engine,
    }


_NETWORK_SPEC = table(
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
    driver=of(DRIVER),
    ipam=of(table("Driver driver\nConfigs configs", driver=of(DRIVER), configs=each(_IPAM))),
)
_STACK_SPEC = table(
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
    services=each(SERVICE_SPEC),
    networks=each(_NETWORK_SPEC),
    secrets=each(_SECRET_SPEC),
    configs=each(_CONFIG_SPEC),
    volumes=each(_VOLUME_SPEC),
)
NAMES.add("Revision")


def stack(found: Stack) -> Json:
    """A Stack; Docker has no such object."""
    return _head(found.id, found.meta) | {
        "Spec": convert(found.spec, _STACK_SPEC) if found.spec else {},
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


KNOWN = frozenset(NAMES)
