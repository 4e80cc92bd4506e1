"""From what a user types to an object: whole id, then exact name, then a unique id prefix.

Tasks have names as well: SERVICE.SLOT (the slot's newest task) and SERVICE.SLOT.ID, which is what
their containers are called.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from manager.api.problems import nearest
from manager.store import View
from manager.store.tables import BY_KIND
from swarm import errors, states
from swarm.v1 import (
    Cluster,
    Config,
    Kind,
    Message,
    Network,
    Node,
    Secret,
    Service,
    ServiceSpec,
    Stack,
    Task,
    TaskSpec,
    Volume,
)

T = TypeVar("T", bound=Message)

# The kinds that the API serves, with the word for people.
CLASSES: dict[Kind, type[Message]] = {
    Kind.CLUSTER: Cluster,
    Kind.NODE: Node,
    Kind.STACK: Stack,
    Kind.SERVICE: Service,
    Kind.TASK: Task,
    Kind.SECRET: Secret,
    Kind.CONFIG: Config,
    Kind.NETWORK: Network,
    Kind.VOLUME: Volume,
}
_KINDS: dict[type[Message], Kind] = {cls: kind for kind, cls in CLASSES.items()}
_SHOWN_MAX = 5
NEAREST_MAX = 2000


def word(kind: Kind) -> str:
    """The kind as people say it."""
    return kind.name.lower()


def served(kind: Kind) -> type[Message]:
    """The kind's class. Raises Invalid for kinds that the API does not serve."""
    cls = CLASSES.get(kind)
    if cls is None:
        raise errors.Invalid(
            f"kind {kind.name} is not served; ask for one of {', '.join(map(word, CLASSES))}"
        )
    return cls


def find(view: View, cls: type[T], ref: str) -> T:
    """The one object meant. Raises NotFound, or Invalid when several match."""
    kind = _KINDS[cls]
    if kind == Kind.CLUSTER and not ref:
        return _only(view, cls)
    if not ref:
        raise errors.Invalid(f"name the {word(kind)}: give its name or its id")
    found = view.get(cls, ref)
    if found is not None:
        return found
    matches = _named(view, cls, ref) or _prefixed(view, cls, ref)
    if len(matches) > 1:
        raise errors.Invalid(
            f"{word(kind)} {ref} is ambiguous ({len(matches)} matches found): {_list(matches)}; "
            "give more of the id"
        )
    if not matches:
        raise errors.NotFound(f"{word(kind)} {ref} not found{nearest_name(view, cls, ref)}")
    return matches[0]


def nearest_name(view: View, cls: type[Any], ref: str) -> str:
    """`; did you mean x?`, or nothing where no name is near. Not among more than NEAREST_MAX
    objects: comparing takes some microseconds each.
    """
    if cls is Task or view.count(cls) > NEAREST_MAX:
        return ""
    names = {name_of(o) for o in view.all(cls) if not getattr(o, "superseded", False)}
    return nearest(ref, sorted(names))


def name_of(o: Any, view: View | None = None) -> str:
    """The name to show. Nodes without a name of their own go by hostname, tasks by service and
    slot, for which the view is needed.
    """
    if isinstance(o, Task):
        service = view.get(Service, o.service_id) if view is not None else None
        base = service.spec.name if service is not None and service.spec else o.service_id
        return f"{base}.{o.slot or o.node_id}"
    if isinstance(o, Node):
        own = o.spec.name if o.spec else ""
        return own or (o.description.hostname if o.description else "") or o.id
    return o.spec.name if o.spec else cast("str", o.id)


def seen_version(o: Any) -> int:
    """The version that callers know an object by: that of the last change they could see. (Sealing
    its data anew gives it another one in the store.) 0: there is no such object.
    """
    meta = o.meta if o is not None else None
    return (meta.seen_version or meta.version) if meta is not None else 0


def quoted(o: Any) -> str:
    """`service "web"`, for messages."""
    return f'{word(_KINDS[type(o)])} "{name_of(o)}"'


def spec_of(service: Service) -> ServiceSpec:
    """Every stored service has a spec."""
    assert service.spec is not None
    return service.spec


def task_of(spec: ServiceSpec) -> TaskSpec:
    """Every stored spec has a template."""
    return spec.task or TaskSpec()


def _only(view: View, cls: type[T]) -> T:
    for o in view.all(cls):
        return o
    raise errors.NotFound("the store holds no cluster; restore it from a backup")


def _named(view: View, cls: type[T], ref: str) -> list[T]:
    if cls is Task:
        return cast("list[T]", _tasks_named(view, ref))
    if "name" not in BY_KIND[_KINDS[cls]].indexes:
        return []
    return view.by(cls, "name", ref)


def _tasks_named(view: View, ref: str) -> list[Task]:
    """SERVICE.SLOT or SERVICE.SLOT.ID; service names may hold dots themselves."""
    if "." not in ref:
        return []
    head, _, last = ref.rpartition(".")
    task = view.get(Task, last)
    if task is not None and name_of(task, view) == head:
        return [task]
    for service in view.by(Service, "name", head):
        slot: int | str = int(last) if last.isdecimal() else last
        tasks = view.by(Task, "slot", (service.id, slot))
        if tasks:
            return [max(tasks, key=_recency)]
    return []


def _recency(task: Task) -> tuple[bool, int, str]:
    return states.wanted(task.desired_state), task.meta.created_at_ns if task.meta else 0, task.id


def _prefixed(view: View, cls: type[T], ref: str) -> list[T]:
    """Objects whose ids begin so. Earlier versions of secrets and configs count only where nothing
    else is meant.
    """
    matches = [o for o in view.all(cls) if cast("Any", o).id.startswith(ref)]
    current = [o for o in matches if not getattr(o, "superseded", False)]
    matches = current or matches
    return sorted(matches, key=lambda o: cast("str", cast("Any", o).id))


def _list(matches: list[Any]) -> str:
    names = [f"{m.id} ({name_of(m)})" for m in matches[:_SHOWN_MAX]]
    if len(matches) > _SHOWN_MAX:
        names.append(f"and {len(matches) - _SHOWN_MAX} more")
    return ", ".join(names)
