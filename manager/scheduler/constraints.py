"""What conditions look at: the attributes of a node, and the services with tasks on it.

The grammar is swarm/conditions.py's, where it is written down; here stands where a node's values
come from. Conditions are of two sorts. Most are about the node alone: whether they hold changes
with the node only, and `Constraint.matches` says it. Those with `of_tasks` (keys `service.name`,
`service.labels.X`, `stack.name`) are about who else is there and change with each placement: for
them `matches` says only that the node does not speak against it, and the one who places asks
`holds_among` or, service by service, `means`. A task that runs does not have to leave when its
neighbours change.

What a node has of GPUs: model, memory and capability of each GPU that can be had, which one that is
split into instances cannot (the instances can), healthy or not; the count is of the healthy ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from manager.store import STACK_LABEL
from swarm import errors
from swarm.conditions import (
    ENGINE_LABELS,
    NODE_LABELS,
    SERVICE_LABELS,
    Condition,
    Key,
    normal_arch,
    parse_condition,
    parse_key,
    version_of,
)
from swarm.v1 import Gpu, Node, NodeRole, Service

__all__ = [
    "Attribute",
    "Constraint",
    "Neighbour",
    "lenient_constraint",
    "neighbour_of",
    "normal_arch",
    "parse_constraint",
    "parse_spread",
]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What conditions see of a service that has a task on a node."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    # Its stack's name; empty: it is in none.
    stack: str = ""


def neighbour_of(service: Service) -> Neighbour:
    """The service as it is now: a task of an older version counts under the present labels."""
    spec = service.spec
    if spec is None:
        return Neighbour("")
    return Neighbour(spec.name, spec.labels, spec.labels.get(STACK_LABEL, ""))


@dataclass(frozen=True, slots=True)
class Attribute:
    """Something that nodes have values of, such as their zone."""

    key: Key

    def of(self, node: Node) -> str:
        """The node's value in one word, for spreading; "" where it has none, "a+b" for several."""
        found = _values(self.key)(node)
        if len(found) == 1:
            return _word(found[0])
        return "+".join(sorted({_word(value) for value in found}))


@dataclass(frozen=True, slots=True)
class Constraint:
    """One condition on a node. `text` is what the user wrote. Without a condition (a stored text
    that cannot be read) it holds nowhere.
    """

    text: str
    condition: Condition | None
    _values: Callable[[Node], tuple[Any, ...]] = field(
        compare=False, repr=False, default=lambda _: ()
    )

    @property
    def of_tasks(self) -> bool:
        """Whether it depends on which services have tasks on the node."""
        return self.condition is not None and self.condition.key.of_tasks

    @property
    def negated(self) -> bool:
        """Whether it is `!=` or `not in`; with `of_tasks`: whether it keeps away from those that
        it means.
        """
        return self.condition is not None and self.condition.negated

    def matches(self, node: Node) -> bool:
        """Whether the node itself is as it has to be; always, where it depends on tasks."""
        condition = self.condition
        if condition is None:
            return False
        return condition.key.of_tasks or condition.holds(self._values(node))

    def means(self, service: Neighbour) -> bool:
        """With `of_tasks`: whether this is a service that is wanted there, or, where negated, one
        that is not. It holds on a node where any such service has a task, or where none has:
        `any(means(s) for s in services) != negated`.
        """
        condition = self.condition
        if condition is None or not condition.key.of_tasks:
            return False
        key = condition.key
        if key.name == SERVICE_LABELS:
            return condition.test(service.labels.get(key.label, ""))
        return condition.test(service.name if key.name == "service.name" else service.stack)

    def holds_among(self, services: Iterable[Neighbour]) -> bool:
        """With `of_tasks`: whether it holds where tasks of just these services should run."""
        if self.condition is None:
            return False
        return any(self.means(service) for service in services) != self.negated


def parse_constraint(text: str, subject: str = "constraint") -> Constraint:
    """Raises Invalid, with the accepted forms. `subject` is what people call the text."""
    condition = parse_condition(text, subject)
    return Constraint(text=text, condition=condition, _values=_values(condition.key))


def parse_spread(text: str) -> Attribute:
    """What a spread preference spreads over. Raises Invalid, with the accepted forms."""
    about = f"placement preference spread={text!r}"
    return Attribute(parse_key(text.strip(), about, of_tasks=False))


def lenient_constraint(text: str) -> Constraint:
    """As parse_constraint for text that is already stored: what cannot be read matches no node, so
    that one bad object stops one service and not the control loop.
    """
    try:
        return parse_constraint(text)
    except errors.Invalid:
        return Constraint(text=text, condition=None)


# ---------------------------------------------------------------- what nodes have


def _values(key: Key) -> Callable[[Node], tuple[Any, ...]]:
    label = key.label
    if key.name == NODE_LABELS:
        return lambda node: (node.spec.labels.get(label, "") if node.spec else "",)
    if key.name == ENGINE_LABELS:
        return lambda node: (_engine_label(node, label),)
    return _OF_NODE.get(key.name, lambda _: ())


def _word(value: Any) -> str:
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _engine_label(node: Node, label: str) -> str:
    engine = node.description.engine if node.description else None
    return engine.labels.get(label, "") if engine else ""


def _hostname(node: Node) -> str:
    return node.description.hostname if node.description else ""


def _role(node: Node) -> str:
    manager = node.spec is not None and node.spec.role == NodeRole.MANAGER
    return "manager" if manager else "worker"


def _os(node: Node) -> str:
    platform = node.description.platform if node.description else None
    return platform.os if platform else ""


def _arch(node: Node) -> str:
    platform = node.description.platform if node.description else None
    return normal_arch(platform.architecture) if platform else ""


def _gpus(node: Node) -> list[Gpu]:
    """Those that a task could be given if they were healthy and free."""
    gpus = node.description.gpus if node.description else ()
    split = {g.parent_uuid for g in gpus if g.parent_uuid}
    return [g for g in gpus if g.uuid not in split]


_OF_NODE: dict[str, Callable[[Node], tuple[Any, ...]]] = {
    "node.id": lambda node: (node.id,),
    "node.hostname": lambda node: (_hostname(node),),
    "node.ip": lambda node: (node.status.addr if node.status else "",),
    "node.role": lambda node: (_role(node),),
    "node.platform.os": lambda node: (_os(node),),
    "node.platform.arch": lambda node: (_arch(node),),
    "node.runtime": lambda node: node.description.runtimes if node.description else (),
    "node.gpu.model": lambda node: tuple(g.model for g in _gpus(node)),
    "node.gpu.memory": lambda node: tuple(g.memory_bytes for g in _gpus(node)),
    "node.gpu.count": lambda node: (sum(g.healthy for g in _gpus(node)),),
    "node.gpu.capability": lambda node: tuple(
        v for g in _gpus(node) if (v := version_of(g.compute_capability)) is not None
    ),
}
