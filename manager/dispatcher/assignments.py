"""What one node has to be told: its tasks with all it takes to run them.

A `Ledger` remembers what a session was sent; `full` and `changed` compare that with the store and
give the difference. It is level-triggered: whatever was missed meanwhile, the next comparison sends
what is true then. Costs are proportional to the tasks named as changed.

A task stays assigned until its object is deleted, also after it has ended: the node keeps what is
left of it for its logs. Secrets go out only while a task that uses them has not ended.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import structlog
from msgspec import structs

from manager.ca import Sealer
from manager.store import View
from swarm import errors
from swarm.states import ended
from swarm.v1 import (
    Assignment,
    Assignments,
    Config,
    ConfigData,
    ContainerSpec,
    Network,
    Node,
    PortConfig,
    Secret,
    SecretData,
    Service,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
)

log = structlog.get_logger("dispatcher")

# What a node has to hear of again when it changes; of what it reported itself it has not.
Key = tuple[object, ...]

_NOTHING = Assignments()


def key_of(task: Task) -> Key:
    """What of a task the node is told and may change; all else is settled when it is placed."""
    return (task.desired_state, task.spec_version, task.assigned_generic, task.assigned_gpus)


def is_active(task: Task) -> bool:
    """Whether it may still need its secrets and configs."""
    state = task.status.state if task.status else TaskState.NEW
    return not ended(state) and task.desired_state < TaskState.SHUTDOWN


def concerns_node(old: Task | None, new: Task | None) -> bool:
    """Whether a node has to be told of a change of one of its tasks."""
    if old is None or new is None or old.node_id != new.node_id:
        return True
    if only_reported(old, new):
        return False
    if assigned(old, new.node_id) != assigned(new, new.node_id):
        return True
    return is_active(old) != is_active(new) or key_of(old) != key_of(new)


def only_reported(old: Task, new: Task) -> bool:
    """Whether the task goes on at its node, which has told so: most changes are of this kind."""
    before, after = old.status, new.status
    return (
        before is not None
        and after is not None
        and before.state >= TaskState.ASSIGNED
        and not ended(after.state)
        and key_of(old) == key_of(new)
    )


def only_ended(old: Task, new: Task) -> bool:
    """Whether the task has ended at its node, which has told so."""
    before, after = old.status, new.status
    return (
        before is not None
        and after is not None
        and before.state >= TaskState.ASSIGNED
        and not ended(before.state)
        and ended(after.state)
        and after.state < TaskState.ORPHANED
        and old.node_id == new.node_id
        and key_of(old) == key_of(new)
    )


def assigned(task: Task | None, node_id: str) -> bool:
    """Whether the task is this node's. A task of a global service that waits for room on its node
    names the node already, and is not its own before it is placed; one given up is not any more.
    """
    if task is None or task.node_id != node_id:
        return False
    state = task.status.state if task.status else TaskState.ASSIGNED
    return TaskState.ASSIGNED <= state < TaskState.ORPHANED


@dataclass(frozen=True, slots=True)
class _Needs:
    """Ids of what a task uses."""

    secrets: frozenset[str] = frozenset()
    configs: frozenset[str] = frozenset()
    networks: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Users:
    """Who uses one kind of thing: so that the first user brings it and the last one takes it."""

    by_id: dict[str, set[str]] = field(default_factory=dict)
    # Since the last message.
    added: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)

    def change(self, task_id: str, before: frozenset[str], after: frozenset[str]) -> None:
        for id_ in after - before:
            users = self.by_id.setdefault(id_, set())
            if not users:
                self.added.add(id_)
                self.removed.discard(id_)
            users.add(task_id)
        for id_ in before - after:
            users = self.by_id[id_]
            users.discard(task_id)
            if not users:
                del self.by_id[id_]
                self.added.discard(id_)
                self.removed.add(id_)

    def take(self) -> tuple[list[str], tuple[str, ...]]:
        added, removed = sorted(self.added), tuple(sorted(self.removed))
        self.added, self.removed = set(), set()
        return added, removed


class Ledger:
    """What one session's agent knows."""

    def __init__(self, node_id: str, sealer: Sealer) -> None:
        self.node_id = node_id
        self._sealer = sealer
        self._sequence = 0
        self._sent: dict[str, tuple[Key, _Needs]] = {}
        self._secrets, self._configs, self._networks = _Users(), _Users(), _Users()

    def full(self, view: View) -> Assignments:
        """The first message: all tasks of the node."""
        errors.invariant(self._sequence == 0, "a session begins once")
        tasks = view.by(Task, "node", self.node_id)
        message = self._compare(view, sorted(t.id for t in tasks))
        return structs.replace(self._numbered(message), full=True)

    def changed(
        self,
        view: View,
        task_ids: Iterable[str],
        network_ids: Iterable[str] = (),
        *,
        ingress: Assignments = _NOTHING,
    ) -> Assignments | None:
        """The next message after changes of these, with what `ingress` says of published services;
        None: the agent need not hear of them.
        """
        for network_id in network_ids:
            if network_id in self._networks.by_id:
                self._networks.added.add(network_id)
        message = structs.replace(
            self._compare(view, sorted(task_ids)),
            ingress=ingress.ingress,
            removed_ingress=ingress.removed_ingress,
            packed_ingress=ingress.packed_ingress,
        )
        return None if message == _NOTHING else self._numbered(message)

    def uses(self, task_id: str) -> bool:
        """Whether the agent holds anything for the task that it needs only while it runs."""
        sent = self._sent.get(task_id)
        return sent is None or bool(sent[1].secrets or sent[1].configs)

    def known(self) -> set[str]:
        """The tasks that the agent holds for this session."""
        return set(self._sent)

    def _numbered(self, message: Assignments) -> Assignments:
        self._sequence += 1
        return structs.replace(message, sequence=self._sequence)

    def _compare(self, view: View, task_ids: list[str]) -> Assignments:
        """What the agent does not know of these, without a number."""
        tasks: list[Assignment] = []
        removed: list[str] = []
        for task_id in task_ids:
            task = view.get(Task, task_id)
            before = self._sent.get(task_id)
            if task is None or not assigned(task, self.node_id):
                if before is not None:
                    self._use(task_id, before[1], _Needs())
                    del self._sent[task_id]
                    removed.append(task_id)
                continue
            key = key_of(task)
            revision = revision_of(view, task)
            spec = revision.spec.task if revision and revision.spec else None
            needs = _needs(view, task, spec)
            self._use(task_id, before[1] if before else _Needs(), needs)
            self._sent[task_id] = (key, needs)
            if before is None or before[0] != key:
                tasks.append(self._assignment(view, task, revision))
        new_secrets, old_secrets = self._secrets.take()
        new_configs, old_configs = self._configs.take()
        new_networks, old_networks = self._networks.take()
        return Assignments(
            tasks=tuple(tasks),
            removed_tasks=tuple(removed),
            secrets=self._open_secrets(view, new_secrets),
            removed_secrets=old_secrets,
            configs=_configs(view, new_configs),
            removed_configs=old_configs,
            networks=tuple(n for i in new_networks if (n := view.get(Network, i)) is not None),
            removed_networks=old_networks,
        )

    def _use(self, task_id: str, before: _Needs, after: _Needs) -> None:
        if before == after:
            return
        self._secrets.change(task_id, before.secrets, after.secrets)
        self._configs.change(task_id, before.configs, after.configs)
        self._networks.change(task_id, before.networks, after.networks)

    def _open_secrets(self, view: View, ids: list[str]) -> tuple[SecretData, ...]:
        out = []
        for secret_id in ids:
            secret = view.get(Secret, secret_id)
            if secret is None or secret.spec is None:
                continue  # the agent rejects the task and says why
            try:
                data = self._sealer.open(secret.sealed)
            except errors.SwarmError as error:
                log.error("secret_not_opened", secret_id=secret_id, reason=error.message)
                continue
            spec = secret.spec
            out.append(
                SecretData(id=secret_id, name=spec.name, data=data, templating=spec.templating)
            )
        return tuple(out)

    def _assignment(self, view: View, task: Task, revision: ServiceRevision | None) -> Assignment:
        service = view.get(Service, task.service_id)
        spec = revision.spec if revision else None
        name = spec.name if spec else ""
        return Assignment(
            task=task,
            service_name=name,
            spec=spec.task if spec else None,
            service_labels=spec.labels if spec else {},
            ports=_ports(service, spec),
            name=f"{name}.{task.slot or task.node_id}.{task.id}",
            registry_auth=self._registry_auth(revision),
            node_name=_node_name(view.get(Node, self.node_id)),
        )

    def _registry_auth(self, revision: ServiceRevision | None) -> str:
        if revision is None or not revision.sealed_registry_auth:
            return ""
        try:
            return self._sealer.open(revision.sealed_registry_auth).decode()
        except (errors.SwarmError, UnicodeDecodeError) as error:
            log.error("registry_auth_not_opened", service_id=revision.service_id, reason=str(error))
            return ""


def revision_of(view: View, task: Task) -> ServiceRevision | None:
    """The spec that a task runs."""
    return view.get(ServiceRevision, f"{task.service_id}.{task.spec_version}")


def _needs(view: View, task: Task, spec: TaskSpec | None) -> _Needs:
    """What the task uses now. Networks stay until it is gone: the node has to take them down."""
    targets = {n.target for n in spec.networks} if spec else set()
    networks = {n.network_id for n in task.networks}
    for target in targets:
        if view.get(Network, target) is not None:
            networks.add(target)
        else:
            networks.update(n.id for n in view.by(Network, "name", target))
    if not is_active(task):
        return _Needs(networks=frozenset(networks))
    container = (spec and spec.container) or ContainerSpec()
    return _Needs(
        secrets=frozenset(r.secret_id for r in container.secrets),
        configs=frozenset(
            [
                *(r.config_id for r in container.configs),
                *_credential_configs(container),
            ]
        ),
        networks=frozenset(networks),
    )


def _credential_configs(container: ContainerSpec) -> list[str]:
    privileges = container.privileges
    spec = privileges.credential_spec if privileges else None
    return [spec.config] if spec and spec.config else []


def _configs(view: View, ids: list[str]) -> tuple[ConfigData, ...]:
    out = []
    for config_id in ids:
        config = view.get(Config, config_id)
        if config is not None and config.spec is not None:
            spec = config.spec
            out.append(
                ConfigData(id=config_id, name=spec.name, data=spec.data, templating=spec.templating)
            )
    return tuple(out)


def _ports(service: Service | None, spec: ServiceSpec | None) -> tuple[PortConfig, ...]:
    """The ports of the task's own spec; published ones that the cluster chose filled in."""
    wanted = spec.endpoint.ports if spec and spec.endpoint else ()
    given = service.endpoint.ports if service and service.endpoint else ()
    chosen = {_port_key(p): p.published_port for p in given}
    return tuple(
        p
        if p.published_port or p.publish_mode == "host"
        else structs.replace(p, published_port=chosen.get(_port_key(p), 0))
        for p in wanted
    )


def _port_key(port: PortConfig) -> tuple[int, str, str]:
    return (port.target_port, port.protocol or "tcp", port.publish_mode or "ingress")


def _node_name(node: Node | None) -> str:
    if node is None:
        return ""
    if node.spec and node.spec.name:
        return node.spec.name
    return node.description.hostname if node.description else ""
