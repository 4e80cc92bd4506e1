"""Docker's JSON as tables, and those of the specs that users write.

Each table says, for one message, which of Docker's fields it has and where each comes from, in
Docker's order (Docker Engine API 1.41 to 1.50). A field that is absent or zero is left out, unless
Docker always writes it. Fields that Docker lacks stand at the end, named in the same style.
cli/docker_json.py builds the objects from them.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Iterable
from typing import Any

from swarm.v1 import GenericResource, Message, PlacementPreference, TmpfsOptions

__all__ = [
    "DRIVER",
    "ENDPOINT_SPEC",
    "GPU",
    "NAMES",
    "PLATFORM",
    "PORT",
    "RESOURCES",
    "SERVICE_SPEC",
    "TASK_SPEC",
    "Convert",
    "Json",
    "Table",
    "convert",
    "each",
    "generic",
    "label",
    "of",
    "table",
]

Json = dict[str, Any]
Convert = Callable[[Any], Any]
# Docker's name, ours, how the value is converted, and whether it is written although it is empty.
Field = tuple[str, str, Convert | None, bool]
Table = tuple[Field, ...]
# Every field name of the tables, gathered while they are made; templates tell a slip by it.
NAMES: set[str] = set()


def table(text: str, **converters: Convert) -> Table:
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
        NAMES.add(name)
        fields.append((name, ours, converters.get(ours), always))
    return tuple(fields)


def convert(message: Message, table: Table) -> Json:
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


def of(table: Table) -> Convert:
    return lambda message: convert(message, table)


def each(table: Table) -> Convert:
    return lambda messages: [convert(message, table) for message in messages]


def label(value: Any) -> str:
    """An enum's name in lower case; unspecified is empty."""
    return "" if value == 0 else str(value.name).lower()


# ------------------------------------------------------------------ specs

DRIVER = table("Name name\nOptions options")
_PRIVILEGES = table(
    """
    CredentialSpec credential_spec !
    SELinuxContext selinux_context !
    Seccomp seccomp
    AppArmor apparmor
    NoNewPrivileges no_new_privileges !
    """,
    credential_spec=of(table("Config config\nFile file\nRegistry registry")),
    selinux_context=of(
        table("Disable disable !\nUser user !\nRole role !\nType type !\nLevel level !")
    ),
    seccomp=of(table("Mode mode\nProfile profile")),
    apparmor=of(table("Mode mode")),
)
NAMES |= {"SizeBytes", "Mode", "Options"}


def _tmpfs(options: TmpfsOptions) -> Json:
    out: Json = {}
    if options.size_bytes:
        out["SizeBytes"] = options.size_bytes
    if options.mode:
        out["Mode"] = options.mode
    if options.options:
        out["Options"] = [list(option.words) for option in options.options]
    return out


_MOUNT = table(
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
    bind_options=of(
        table(
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
    volume_options=of(
        table(
            "NoCopy no_copy\nLabels labels\nDriverConfig driver_config\nSubpath subpath",
            driver_config=of(DRIVER),
        )
    ),
    tmpfs_options=_tmpfs,
)
_FILE = table("Name name !\nUID uid !\nGID gid !\nMode mode !")
_CONTAINER = table(
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
    privileges=of(_PRIVILEGES),
    mounts=each(_MOUNT),
    healthcheck=of(
        table(
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
    dns=of(table("Nameservers nameservers\nSearch search\nOptions options")),
    secrets=each(
        table("File file\nSecretID secret_id !\nSecretName secret_name !", file=of(_FILE))
    ),
    configs=each(
        table("File file\nConfigID config_id !\nConfigName config_name !", file=of(_FILE))
    ),
    ulimits=each(table("Name name !\nHard hard !\nSoft soft !")),
    devices=each(table("PathOnHost source\nPathInContainer target\nCgroupPermissions permissions")),
)


def generic(resources: Iterable[GenericResource]) -> list[Json]:
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


NAMES |= {"NamedResourceSpec", "DiscreteResourceSpec", "Kind", "Value"}
_DEVICE_REQUEST = table(
    """
    Driver driver
    Count count
    DeviceIDs device_ids
    Capabilities capabilities
    Options options
    """
)
RESOURCES = table(
    """
    NanoCPUs cpu_nano
    MemoryBytes memory_bytes
    Pids pids
    GenericResources generic
    Devices devices
    """,
    generic=generic,
    devices=each(_DEVICE_REQUEST),
)
GPU = table(
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
    Driver driver
    DriverVersion driver_version
    CDIName cdi_name
    PCIAddress pci_address
    MIGProfile mig_profile
    ECCErrors ecc_errors
    Links links
    Processes processes
    """,
    links=each(table("UUID uuid\nProximity proximity\nNVLinks nvlinks !", proximity=label)),
    processes=each(table("PID pid\nName name\nMemoryBytes memory_bytes")),
)
PLATFORM = table("Architecture architecture\nOS os")
NAMES |= {"Spread", "SpreadDescriptor", "Affinity", "Condition", "Weight"}


def _preference(preference: PlacementPreference) -> dict[str, Any]:
    """Docker has spreads only."""
    if preference.affinity:
        weight = preference.weight or 1
        return {"Affinity": {"Condition": preference.affinity, "Weight": weight}}
    return {"Spread": {"SpreadDescriptor": preference.spread}}


_PLACEMENT = table(
    """
    Constraints constraints
    Preferences preferences
    MaxReplicas max_replicas
    Platforms platforms
    Strategy strategy
    """,
    preferences=lambda preferences: [_preference(each) for each in preferences],
    platforms=each(PLATFORM),
)
TASK_SPEC = table(
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
    container=of(_CONTAINER),
    resources=of(
        table(
            """
            Limits limits
            Reservations reservations
            SwapBytes swap_bytes
            MemorySwappiness memory_swappiness
            """,
            limits=of(RESOURCES),
            reservations=of(RESOURCES),
        )
    ),
    restart=of(
        table(
            """
            Condition condition
            Delay delay_ns
            MaxAttempts max_attempts
            Window window_ns
            MaxDelay max_delay_ns
            """
        )
    ),
    placement=of(_PLACEMENT),
    networks=each(
        table(
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
    log_driver=of(DRIVER),
)
NAMES |= {"Replicated", "Global", "ReplicatedJob", "GlobalJob"}
_MODE = table(
    """
    Replicated replicated
    Global global_service
    ReplicatedJob replicated_job
    GlobalJob global_job
    """,
    replicated=of(table("Replicas replicas")),
    global_service=of(()),
    replicated_job=of(table("MaxConcurrent max_concurrent\nTotalCompletions total_completions")),
    global_job=of(()),
)
_UPDATE_CONFIG = table(
    """
    Parallelism parallelism !
    Delay delay_ns
    FailureAction failure_action
    Monitor monitor_ns
    MaxFailureRatio max_failure_ratio !
    Order order
    Deadline deadline_ns
    """
)
PORT = table(
    """
    Name name
    Protocol protocol
    TargetPort target_port
    PublishedPort published_port
    PublishMode publish_mode
    HostIP host_ip
    """
)
ENDPOINT_SPEC = table("Mode mode\nPorts ports", ports=each(PORT))
SERVICE_SPEC = table(
    """
    Name name !
    Labels labels !
    TaskTemplate task !
    Mode mode !
    UpdateConfig update
    RollbackConfig rollback
    EndpointSpec endpoint
    DependsOn depends_on
    Priority priority
    Job job
    """,
    task=of(TASK_SPEC),
    mode=of(_MODE),
    update=of(_UPDATE_CONFIG),
    rollback=of(_UPDATE_CONFIG),
    endpoint=of(ENDPOINT_SPEC),
    depends_on=each(
        table("Service service\nCondition condition\nRequired required !\nRestart restart !")
    ),
    job=of(table("Queue queue\nGang gang\nTimeout timeout_ns\nKeep keep_ns\nCancelled cancelled")),
)
