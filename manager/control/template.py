"""What a service's spec says to the control loop: its mode, its numbers, and which tasks fit it.

A task refers to the spec it was made from by version. It is out of date when a task made now would
be another one: the task template differs, or the ports that a task itself has to do with. A label
or the number of replicas makes no difference, nor does a change of constraints alone as long as the
task's node satisfies the new ones (as in SwarmKit's orchestrator.IsTaskDirty). Beyond SwarmKit, a
change of the restart policy makes none: the managers carry it out, and the present one counts.
"""

from __future__ import annotations

from enum import Enum

from msgspec import structs

from manager.scheduler import Requirement, requirement_of, unsuitable
from manager.store import View
from swarm.clock import SECOND_NS
from swarm.v1 import (
    Network,
    NetworkAttachment,
    Node,
    RestartPolicy,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    UpdateConfig,
    UpdateState,
)

DEFAULT_RESTART_DELAY_NS = 5 * SECOND_NS
DEFAULT_MONITOR_NS = 5 * SECOND_NS
DEFAULT_STOP_GRACE_NS = 10 * SECOND_NS
UPDATING = frozenset({UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED})
PAUSED = frozenset({UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED})
THROUGH = frozenset({UpdateState.COMPLETED, UpdateState.ROLLBACK_COMPLETED})
ROLLBACK = frozenset(
    {
        UpdateState.ROLLBACK_STARTED,
        UpdateState.ROLLBACK_PAUSED,
        UpdateState.ROLLBACK_COMPLETED,
    }
)
_NO_POLICY = RestartPolicy()
# Absent: one at a time.
_NO_UPDATE = UpdateConfig(parallelism=1)


class Mode(Enum):
    REPLICATED = "replicated"
    GLOBAL = "global"
    REPLICATED_JOB = "replicated-job"
    GLOBAL_JOB = "global-job"

    @property
    def job(self) -> bool:
        """Whether its tasks run to completion."""
        return self in (Mode.REPLICATED_JOB, Mode.GLOBAL_JOB)

    @property
    def per_node(self) -> bool:
        """Whether its slots are nodes."""
        return self in (Mode.GLOBAL, Mode.GLOBAL_JOB)


def mode_of(spec: ServiceSpec | None) -> Mode:
    """Absent: replicated."""
    mode = spec.mode if spec else None
    if mode is None:
        return Mode.REPLICATED
    if mode.global_service is not None:
        return Mode.GLOBAL
    if mode.replicated_job is not None:
        return Mode.REPLICATED_JOB
    return Mode.GLOBAL_JOB if mode.global_job is not None else Mode.REPLICATED


def replicas_of(spec: ServiceSpec | None) -> int:
    """How many slots a replicated service has."""
    replicated = spec.mode.replicated if spec and spec.mode else None
    if replicated is None or replicated.replicas is None:
        return 1
    return replicated.replicas


def job_size(spec: ServiceSpec | None) -> tuple[int, int]:
    """Of a replicated job: how many tasks must complete, and how many may run at once."""
    job = spec.mode.replicated_job if spec and spec.mode else None
    if job is None:
        return 1, 1
    total = job.total_completions
    if total is None:
        total = job.max_concurrent or 1
    return total, job.max_concurrent or total


def restart_policy(spec: ServiceSpec | None) -> RestartPolicy:
    """The template's, or the default: any, after 5 s, for ever."""
    return (spec.task.restart if spec and spec.task else None) or _NO_POLICY


def stop_grace_ns(spec: ServiceSpec | None) -> int:
    """How long a task may take to stop."""
    container = spec.task.container if spec and spec.task else None
    grace = container.stop_grace_period_ns if container else None
    return DEFAULT_STOP_GRACE_NS if grace is None else grace


def update_config(service: Service) -> UpdateConfig:
    """How the present roll-out is done: forward or back."""
    spec, status = service.spec, service.update_status
    if spec is None:
        return _NO_UPDATE
    back = status is not None and status.state in ROLLBACK
    return (spec.rollback if back else spec.update) or _NO_UPDATE


def monitor_ns(config: UpdateConfig) -> int:
    """How long a new task is watched."""
    return DEFAULT_MONITOR_NS if config.monitor_ns is None else config.monitor_ns


def state_of(task: Task) -> TaskState:
    """The observed state."""
    return task.status.state if task.status else TaskState.NEW


def spec_of_version(view: View, service: Service, version: int) -> ServiceSpec | None:
    """The spec of a version; None when it is not kept any more."""
    if version == service.spec_version:
        return service.spec
    revision = view.get(ServiceRevision, f"{service.id}.{version}")
    return revision.spec if revision else None


class Templates:
    """Which tasks of one service fit its present spec; remembers the answer for each version.

    For one service object, for one tick.
    """

    def __init__(self, view: View, service: Service) -> None:
        self._view = view
        self._service = service
        self._same: dict[int, bool] = {}
        self._placement_only: dict[int, bool] = {}
        self._need: Requirement | None = None  # worked out when it is asked for

    def up_to_date(self, task: Task) -> bool:
        """Whether a task made now would be the same."""
        version = task.spec_version
        if version == self._service.spec_version:
            return True
        same = self._same.get(version)
        if same is None:
            same = self._same[version] = self._compare(version)
        if same or not self._placement_only[version]:
            return same
        node = self._view.get(Node, task.node_id) if task.node_id else None
        if self._need is None:
            self._need = requirement_of(self._service.spec)
        return node is not None and unsuitable(node, self._need) is None

    def _compare(self, version: int) -> bool:
        now = self._service.spec
        then = spec_of_version(self._view, self._service, version)
        self._placement_only[version] = False
        if now is None or then is None or _task_ports(now) != _task_ports(then):
            return False
        if _of_task(now) == _of_task(then):
            return True
        self._placement_only[version] = _constraints_only(_of_task(now), _of_task(then))
        return False


def needs_new_tasks(before: ServiceSpec, after: ServiceSpec) -> bool:
    """Whether tasks of the one spec do not fit the other: their template changed, or the ports that
    they were started with. Constraints count; whether they matter, each task's node says.
    (SwarmKit replaces tasks for any change of ports; a new published port for an unchanged target
    needs none, as nodes balance to the target.)
    """
    return _of_task(before) != _of_task(after) or _task_ports(before) != _task_ports(after)


def _of_task(spec: ServiceSpec) -> TaskSpec | None:
    """What of the template a task is made of."""
    task = spec.task
    return structs.replace(task, restart=None) if task is not None and task.restart else task


def _constraints_only(now: TaskSpec | None, then: TaskSpec | None) -> bool:
    """Whether two templates differ in constraints and preferences alone."""
    if now is None or then is None:
        return False
    if structs.replace(now, placement=None) != structs.replace(then, placement=None):
        return False
    limits = {p.max_replicas if p else 0 for p in (now.placement, then.placement)}
    return len(limits) == 1


def _task_ports(spec: ServiceSpec) -> frozenset[tuple[str, int, int, str]]:
    """What of the published ports a task itself has to do with: nodes balance to the target port,
    so another published port needs no new task unless the task publishes it itself.
    """
    return frozenset(
        (p.protocol or "tcp", p.target_port, p.published_port, f"host {p.host_ip}")
        if p.publish_mode == "host"
        else (p.protocol or "tcp", p.target_port, 0, "ingress")
        for p in (spec.endpoint.ports if spec.endpoint else ())
    )


def attachments(view: View, spec: ServiceSpec | None) -> tuple[NetworkAttachment, ...]:
    """The networks of a task of this spec, by id, with the service's name among the aliases."""
    out = []
    for wanted in spec.task.networks if spec and spec.task else ():
        network_id = wanted.target
        if view.get(Network, network_id) is None:
            named = view.by(Network, "name", wanted.target)
            network_id = named[0].id if named else wanted.target
        names = dict.fromkeys((spec.name if spec else "", *wanted.aliases))
        out.append(NetworkAttachment(network_id=network_id, aliases=tuple(n for n in names if n)))
    return tuple(out)
