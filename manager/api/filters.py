"""Docker's list filters: which keys each kind has, and what they mean.

Values of one key are alternatives, several keys must all match, labels must all match. `name` and
`id` match a prefix. A key that a kind does not have is refused with those it has, never ignored.
Beyond Docker's, `superseded=true` shows the earlier versions of secrets and configs, which are
hidden otherwise.
Filters of tasks by service, node and stack label are looked up in the store's indexes, so that
`stack ps` and what polls like it cost what they return, not what the cluster holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from manager.api.lookup import find, name_of, spec_of, task_of, word
from manager.api.problems import nearest
from manager.api.references import users
from manager.api.validate import mode_name
from manager.control import up_to_date
from manager.store import STACK_LABEL, View
from swarm import errors, states
from swarm.v1 import (
    Filter,
    Kind,
    Network,
    Node,
    NodeRole,
    Service,
    Task,
    TaskState,
)

Test = Callable[[Any], bool]
# Given the view and the values, what an object must satisfy.
Maker = Callable[[View, Sequence[str]], Test]


def merge(filters: Iterable[Filter]) -> dict[str, tuple[str, ...]]:
    """Values by key; a key given twice counts once with all its values."""
    out: dict[str, tuple[str, ...]] = {}
    for f in filters:
        out[f.key] = out.get(f.key, ()) + f.values
    return out


def compile_filters(view: View, kind: Kind, filters: Iterable[Filter]) -> Test:
    """One test for an object of the kind. Raises Invalid for a key or value the kind does not have,
    NotFound for a service or node that does not exist.
    """
    makers = ACCEPTED[kind]
    tests: list[Test] = []
    wanted = merge(filters)
    if "superseded" in makers and not wanted.get("superseded"):
        tests.append(_is_current)
    for key, values in wanted.items():
        maker = makers.get(key)
        if maker is None:
            raise errors.Invalid(
                f"invalid filter {key!r} for {word(kind)}s; accepted are "
                f"{', '.join(makers)}{nearest(key, makers)}"
            )
        if values:
            tests.append(maker(view, values))
    return lambda o: all(test(o) for test in tests)


def candidates(view: View, kind: Kind, cls: type[Any], filters: Iterable[Filter]) -> Iterable[Any]:
    """Objects among which all that match are; fewer than all of the kind where an index helps."""
    wanted = merge(filters)
    stacks = [
        value.partition("=")[2]
        for value in wanted.get("label", ())
        if value.startswith(f"{STACK_LABEL}=")
    ]
    if kind == Kind.TASK:
        return _task_candidates(view, wanted, stacks)
    if stacks and kind in (Kind.SERVICE, Kind.SECRET, Kind.CONFIG, Kind.NETWORK, Kind.VOLUME):
        return view.by(cls, "stack", stacks[0])
    return view.all(cls)


def _task_candidates(
    view: View, wanted: dict[str, tuple[str, ...]], stacks: list[str]
) -> Iterable[Task]:
    if wanted.get("service"):
        services = {find(view, Service, ref).id for ref in wanted["service"]}
        return [t for s in sorted(services) for t in view.by(Task, "service", s)]
    if wanted.get("node"):
        nodes = {find(view, Node, ref).id for ref in wanted["node"]}
        return [t for n in sorted(nodes) for t in view.by(Task, "node", n)]
    if stacks:
        return [
            t for s in view.by(Service, "stack", stacks[0]) for t in view.by(Task, "service", s.id)
        ]
    return view.all(Task)


# ---------------------------------------------------------------- the tests


def _id(_: View, values: Sequence[str]) -> Test:
    return lambda o: any(o.id.startswith(v) for v in values)


def _name(view: View, values: Sequence[str]) -> Test:
    return lambda o: any(name_of(o, view).startswith(v) for v in values)


def _names(view: View, values: Sequence[str]) -> Test:
    return lambda o: name_of(o, view) in values


def _label(labels_of: Callable[[View, Any], dict[str, str]]) -> Maker:
    def make(view: View, values: Sequence[str]) -> Test:
        wanted = [(k, sep, v) for k, sep, v in (value.partition("=") for value in values)]

        def test(o: Any) -> bool:
            labels = labels_of(view, o)
            return all(k in labels and (not sep or labels[k] == v) for k, sep, v in wanted)

        return test

    return make


def _choice(key: str, accepted: Sequence[str], value_of: Callable[[Any], str]) -> Maker:
    """A key with a closed set of values."""

    def make(_: View, values: Sequence[str]) -> Test:
        for value in values:
            if value not in accepted:
                raise errors.Invalid(
                    f"invalid {key} {value!r}; accepted are {', '.join(accepted)}"
                    f"{nearest(value, accepted)}"
                )
        return lambda o: value_of(o) in values

    return make


def spec_labels(_: View, o: Any) -> dict[str, str]:
    """The labels a user gave the object."""
    labels: dict[str, str] = o.spec.labels if o.spec else {}
    return labels


def task_labels(view: View, task: Task) -> dict[str, str]:
    """A task's own labels over those of its service and its container."""
    service = view.get(Service, task.service_id)
    if service is None:
        return task.labels
    spec = spec_of(service)
    container = task_of(spec).container
    return {**(container.labels if container else {}), **spec.labels, **task.labels}


def _engine_labels(_: View, node: Node) -> dict[str, str]:
    engine = node.description.engine if node.description else None
    return engine.labels if engine else {}


def _task_service(view: View, values: Sequence[str]) -> Test:
    ids = {find(view, Service, v).id for v in values}
    return lambda task: task.service_id in ids


def _task_node(view: View, values: Sequence[str]) -> Test:
    ids = {find(view, Node, v).id for v in values}
    return lambda task: task.node_id in ids


def _up_to_date(view: View, values: Sequence[str]) -> Test:
    wanted = {_boolean("_up-to-date", v) for v in values}

    def test(task: Task) -> bool:
        service = view.get(Service, task.service_id)
        return (service is not None and up_to_date(view, service, task)) in wanted

    return test


def _dangling(view: View, values: Sequence[str]) -> Test:
    wanted = {_boolean("dangling", v) for v in values}
    return lambda network: (not users(view, network.id)) in wanted


def _is_current(o: Any) -> bool:
    """Earlier versions of secrets and configs are shown to those who ask for them."""
    return not o.superseded


def _superseded(_: View, values: Sequence[str]) -> Test:
    wanted = {_boolean("superseded", v) for v in values}
    return lambda o: o.superseded in wanted


def _boolean(key: str, text: str) -> bool:
    if text.lower() in ("1", "true"):
        return True
    if text.lower() in ("0", "false"):
        return False
    raise errors.Invalid(f"invalid {key} {text!r}; accepted are true and false")


def _runtime_of(o: Any) -> str:
    if isinstance(o, Service):
        return task_of(spec_of(o)).docker_runtime or "container"
    return "container"


def _driver_of(network: Network) -> str:
    if network.driver_state is not None and network.driver_state.name:
        return network.driver_state.name
    return (network.spec.driver.name if network.spec and network.spec.driver else "") or "overlay"


def _service_mode(service: Service) -> str:
    spec = spec_of(service)
    return mode_name(spec.mode) if spec.mode else "replicated"


def _role(node: Node) -> str:
    return "manager" if node.spec and node.spec.role == NodeRole.MANAGER else "worker"


_DESIRED = ("running", "shutdown", "accepted", "ready", "complete", "remove")
_NAMED: dict[str, Maker] = {"id": _id, "name": _name, "label": _label(spec_labels)}
ACCEPTED: dict[Kind, dict[str, Maker]] = {
    Kind.NODE: {
        "id": _id,
        "name": _name,
        "label": _label(_engine_labels),
        "node.label": _label(spec_labels),
        "role": _choice("role", ("manager", "worker"), _role),
        # Docker's other membership, pending, does not exist here: a node joins in one step.
        "membership": _choice("membership", ("accepted", "pending"), lambda _: "accepted"),
    },
    Kind.SERVICE: {
        **_NAMED,
        "mode": _choice(
            "mode", ("replicated", "global", "replicated-job", "global-job"), _service_mode
        ),
        "runtime": _choice("runtime", ("container", "plugin"), _runtime_of),
    },
    Kind.TASK: {
        "id": _id,
        "name": _name,
        "label": _label(task_labels),
        "service": _task_service,
        "node": _task_node,
        "desired-state": _choice(
            "desired-state",
            _DESIRED,
            lambda t: states.label(t.desired_state or TaskState.RUNNING),
        ),
        "runtime": _choice("runtime", ("container", "plugin"), _runtime_of),
        "_up-to-date": _up_to_date,
    },
    Kind.SECRET: {**_NAMED, "names": _names, "superseded": _superseded},
    Kind.CONFIG: {**_NAMED, "names": _names, "superseded": _superseded},
    Kind.NETWORK: {
        **_NAMED,
        "driver": lambda _, values: lambda o: _driver_of(o) in values,
        "scope": _choice("scope", ("swarm", "local"), lambda _: "swarm"),
        # Networks that every engine has are not the cluster's, so all of ours are custom.
        "type": _choice("type", ("custom", "builtin"), lambda _: "custom"),
        "dangling": _dangling,
    },
    Kind.VOLUME: {**_NAMED},
    Kind.STACK: {"id": _id, "name": _name},
    Kind.CLUSTER: {"id": _id, "name": _name},
}
