"""A plan for people: what a deploy would create, change and remove, and where tasks would land.

`view` gives the lines; it decides nothing and prints nothing. Every object that would change has
one line that begins with its sign (`+` created, `~` changed, `-` removed), below it what changes
field by field in compose's words (cli/plan_words.py), and what becomes of its tasks. Unchanged
objects are a number in the last line. Colour repeats what the signs say, so nothing is lost without
it.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from cli import reasons
from cli.plan_words import Field, fields, value
from cli.services import mode_name, published_ports
from cli.settings import Terminal
from cli.table import text_width, wrapped
from cli.tasks import shown_image
from swarm.v1 import (
    Kind,
    NodePlacement,
    PlannedChange,
    PlanStackResponse,
    PortConfig,
    ServicePlacement,
    ServiceSpec,
    StackChange,
    StackSpec,
)

__all__ = ["counts", "document", "field_lines", "view"]

SIGNS = {"created": "+", "updated": "~", "removed": "-"}
_COLOURS = {"+": "green", "~": "yellow", "-": "red", "!": "red"}
_EFFECTS = {
    "recreated": "recreated: its tasks are replaced",
    "scaled": "scaled: no running task is replaced",
    "kept": "kept: no task is touched",
    "replaced": "new content",
}
NODES_MAX = 10  # named in one line; all of them are in --format json
NAME_WIDTH_MAX = 40  # columns, up to which what follows names is aligned
DIFF_CONTEXT = 2  # lines around a change in a text
DIFF_LINES_MAX = 60  # of one text
_INDENT = "    "


def view(
    plan: PlanStackResponse, *, name: str, spec: StackSpec | None, terminal: Terminal
) -> list[str]:
    """The lines for a plan of the stack `name`. `spec` is what is asked for, where known: created
    services are described from it.
    """
    if not plan.differs:
        return [f"No differences: stack {name} stays as it is; {_version(plan)}"]
    paint = _Painter(terminal)
    changed = [item for item in plan.changes if _action(item) in SIGNS]
    lines: list[str] = []
    width = max((len(_title(item)) for item in changed), default=0)
    specs = {service.name: service for service in spec.services} if spec is not None else {}
    for item in changed:
        lines += _object(item, specs, min(width, NAME_WIDTH_MAX), name, paint)
    lines.append("")
    if not plan.settled:
        lines += paint.wrap(
            "! the rehearsal was ended before the cluster came to rest: where tasks land is known "
            "only so far",
            "!",
            indent="",
        )
    lines += paint.wrap(f"{_summary(plan)}; {_version(plan)}", bold=True, indent="")
    return lines


def counts(changes: Iterable[StackChange]) -> str:
    """ "2 created, 1 updated": the actions with their numbers, unchanged ones left out."""
    number = dict.fromkeys(SIGNS, 0)
    for change in changes:
        if change.action in number:
            number[change.action] += 1
    return ", ".join(f"{n} {action}" for action, n in number.items() if n)


def _action(item: PlannedChange) -> str:
    return item.change.action if item.change is not None else ""


def _summary(plan: PlanStackResponse) -> str:
    number = dict.fromkeys((*SIGNS, "unchanged"), 0)
    for item in plan.changes:
        number[_action(item)] = number.get(_action(item), 0) + 1
    text = (
        f"{number['created']} to create, {number['updated']} to change, "
        f"{number['removed']} to remove, {number['unchanged']} unchanged"
    )
    pending = sum(
        p.tasks for item in plan.changes if item.placement for p in item.placement.pending
    )
    if pending:
        text += f", {pending} {_tasks(pending)} without a node"
    return text


def _version(plan: PlanStackResponse) -> str:
    return f"plan {plan.version}"


def _title(item: PlannedChange) -> str:
    change = item.change
    return f"{change.kind.name.lower()} {change.name}" if change is not None else ""


# ------------------------------------------------------------------ one object


def _object(
    item: PlannedChange,
    specs: dict[str, ServiceSpec],
    width: int,
    stack: str,
    paint: _Painter,
) -> Iterator[str]:
    change = item.change
    assert change is not None
    sign = SIGNS[change.action]
    note = _EFFECTS.get(item.effect, item.effect)
    if change.action == "created" and change.kind is Kind.SERVICE and change.name in specs:
        note = describe(specs[change.name])
    if change.action == "removed" and item.placement is not None:
        note = f"{item.placement.stopped} {_tasks(item.placement.stopped)} stopped"
    yield from paint.heading(sign, _title(item), note, width)
    for field in fields(change.kind, item.fields, stack=stack):
        yield from _field(field, paint)
    if item.placement is not None and change.action != "removed":
        yield from _placement(item.placement, paint, created=change.action == "created")


def describe(spec: ServiceSpec) -> str:
    """A new service in one line: "nginx:1.27, 3 replicas, *:80->8080/tcp"."""
    container = spec.task.container if spec.task else None
    runtime = spec.task.runtime if spec.task else ""
    image = shown_image(container.image, whole=False) if container and container.image else ""
    if not image:
        words = (*container.command, *container.args) if container else ()
        image = f"{runtime or 'process'} {textwrap.shorten(' '.join(words), 40, placeholder=' …')}"
    parts = [image.strip(), _replicas(spec)]
    ports = spec.endpoint.ports if spec.endpoint else ()
    if ports:
        parts.append(_ports(ports))
    return ", ".join(filter(None, parts))


def _replicas(spec: ServiceSpec) -> str:
    mode = spec.mode
    number: int | None = 1
    if mode is not None and mode.replicated is not None:
        number = 1 if mode.replicated.replicas is None else mode.replicated.replicas
    elif mode is not None and mode.replicated_job is not None:
        job = mode.replicated_job
        number = job.total_completions if job.total_completions is not None else job.max_concurrent
        return f"job of {1 if number is None else number}"
    elif mode is not None:
        return mode_name(mode)
    return "1 replica" if number == 1 else f"{number} replicas"


def _ports(ports: Sequence[PortConfig]) -> str:
    """As lists show them; ports on the nodes themselves and those that the cluster picks too."""
    mesh = published_ports(ports)
    other = [
        f"{port.host_ip or '*'}:{port.published_port or '?'}->{port.target_port}"
        f"/{port.protocol or 'tcp'}{' on its nodes' if port.publish_mode == 'host' else ''}"
        for port in ports
        if not port.published_port or port.publish_mode == "host"
    ]
    return ", ".join(filter(None, (mesh, *other)))


# ------------------------------------------------------------------ one field


def field_lines(found: Iterable[Field], terminal: Terminal) -> Iterator[str]:
    """Fields as a plan shows them, indented."""
    paint = _Painter(terminal)
    for field in found:
        yield from _field(field, paint)


def _field(field: Field, paint: _Painter) -> Iterator[str]:
    if field.before is None:
        sign, text = "+", field.after or ""
    elif field.after is None:
        sign, text = "-", field.before
    else:
        sign, text = "~", f"{field.before} -> {field.after}"
    if "\n" in text:
        yield from paint.wrap(f"{sign} {field.key}:", sign)
        yield from _diff(field, paint)
        return
    line = f"{sign} {field.key}: {text}"
    if sign == "~" and not paint.fits(line):
        # Below each other, so that the eye finds what differs.
        yield from paint.wrap(f"{sign} {field.key}:", sign)
        yield from paint.wrap(f"- {field.before}", "-", indent=_INDENT * 2)
        yield from paint.wrap(f"+ {field.after}", "+", indent=_INDENT * 2)
        return
    yield from paint.wrap(line, sign)


def _diff(field: Field, paint: _Painter) -> Iterator[str]:
    """A long text as a unified diff; lines are not wrapped, as their spaces count."""
    before, after = (field.before or "").splitlines(), (field.after or "").splitlines()
    lines = list(difflib.unified_diff(before, after, n=DIFF_CONTEXT, lineterm=""))[2:]
    if not lines:
        lines = ["  (only line ends differ)"]
    for line in lines[:DIFF_LINES_MAX]:
        yield paint.line(_INDENT * 2 + _printable(line), line[:1])
    if len(lines) > DIFF_LINES_MAX:
        yield f"{_INDENT * 2}… {len(lines) - DIFF_LINES_MAX} more lines"


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


# ------------------------------------------------------------------ placement


def _placement(placement: ServicePlacement, paint: _Painter, *, created: bool) -> Iterator[str]:
    waiting = sum(pending.tasks for pending in placement.pending)
    placed = placement.created - waiting
    parts = []
    if placed > 0:
        where = _where(placement.nodes)
        verb = "start" if placed != 1 else "starts"
        parts.append(f"{placed} {verb}{f' on {where}' if where else ''}")
    if placement.stopped:
        parts.append(f"{placement.stopped} {'stop' if placement.stopped != 1 else 'stops'}")
    if placement.kept and parts:
        parts.append(f"{placement.kept} {'stay' if placement.kept != 1 else 'stays'}")
    if parts:
        yield from paint.wrap(f"tasks: {'; '.join(parts)}")
    elif created and not waiting and not placement.waits:
        yield from paint.wrap("tasks: none")
    for pending in placement.pending:
        stay = "stay" if pending.tasks != 1 else "stays"
        them = "them" if pending.tasks != 1 else "it"
        never = f", and no node could ever take {them}" if pending.never else ""
        head = f"! {pending.tasks} {stay} without a node{never}:"
        _, why = reasons.parts(pending.reason)
        if len(why) < 2:
            yield from paint.wrap(f"{head} {pending.reason}", "!")
            continue
        yield from paint.wrap(head, "!")
        for reason in why:
            yield from paint.wrap(f"- {reason}", "!", indent=_INDENT * 2)
    for wait in placement.waits:
        yield from paint.wrap(f"! {wait}", "!")


def _where(nodes: Sequence[NodePlacement]) -> str:
    """Nodes with the number of tasks of each where it is not one, the first ones by name."""
    text = ", ".join(
        f"{node.hostname or node.node_id}"
        + (f" \N{MULTIPLICATION SIGN}{node.tasks}" if node.tasks != 1 else "")
        for node in nodes[:NODES_MAX]
    )
    more = len(nodes) - NODES_MAX
    if more <= 0:
        return text
    rest = sum(node.tasks for node in nodes[NODES_MAX:])
    return f"{text} and {rest} on {more} more {'node' if more == 1 else 'nodes'}"


def _tasks(number: int) -> str:
    return "task" if number == 1 else "tasks"


# ------------------------------------------------------------------ lines


class _Painter:
    """Wraps and colours for one terminal; without one, lines are as long as they are."""

    def __init__(self, terminal: Terminal) -> None:
        self._width = terminal.width
        self._colour = terminal.colour

    def line(self, text: str, sign: str = "", *, bold: bool = False) -> str:
        if not self._colour:
            return text
        return click.style(text, fg=_COLOURS.get(sign), bold=bold or None)

    def heading(self, sign: str, title: str, note: str, width: int) -> Iterator[str]:
        text = f"{sign} {title}"
        if not note:
            yield self.line(text, sign, bold=True)
            return
        gap = " " * (max(width - len(title), 0) + 2)
        if self._width is None or text_width(text + gap + note) <= self._width:
            yield self.line(text, sign, bold=True) + self.line(gap + note)
            return
        yield self.line(text, sign, bold=True)
        yield from self.wrap(note)

    def fits(self, text: str) -> bool:
        return self._width is None or text_width(_INDENT + text) <= self._width

    def wrap(
        self, text: str, sign: str = "", *, indent: str = _INDENT, bold: bool = False
    ) -> Iterator[str]:
        """The text on as many lines as it needs; those after the first stand under its words."""
        hanging = "  " if sign else ""
        for line in wrapped(indent + _printable(text), self._width, hanging=hanging):
            yield self.line(line, sign, bold=bold)


# ------------------------------------------------------------------ for machines

KNOWN = frozenset(
    (
        *("Stack", "StackID", "Revision", "Version", "Differs", "Settled", "Changes", "Warnings"),
        *("Kind", "Name", "ID", "Action", "Effect", "Fields", "Placement"),
        *("Path", "Key", "Before", "After"),
        *("Kept", "Created", "Stopped", "Nodes", "Pending", "Waits"),
        *("NodeID", "Hostname", "Tasks", "Reason", "Never"),
    )
)


def document(plan: PlanStackResponse, *, name: str) -> dict[str, Any]:
    """The plan as JSON, in the style of Docker's objects."""
    return {
        "Stack": name,
        "StackID": plan.stack_id,
        "Revision": plan.revision,
        "Version": plan.version,
        "Differs": plan.differs,
        "Settled": plan.settled,
        "Changes": [_change(item, name) for item in plan.changes],
        "Warnings": list(plan.warnings),
    }


def _change(item: PlannedChange, stack: str) -> dict[str, Any]:
    change = item.change or StackChange()
    found: dict[str, Any] = {
        "Kind": change.kind.name.lower(),
        "Name": change.name,
        "ID": change.id,
        "Action": change.action,
        "Effect": item.effect,
        "Fields": [
            {
                # The manager's path and what compose calls it; null: not set.
                "Path": one.path,
                "Key": next((f.key for f in fields(change.kind, (one,), stack=stack)), one.path),
                "Before": value(one.before),
                "After": value(one.after),
            }
            for one in item.fields
        ],
    }
    placement = item.placement
    found["Placement"] = None
    if placement is not None:
        found["Placement"] = {
            "Kept": placement.kept,
            "Created": placement.created,
            "Stopped": placement.stopped,
            "Nodes": [
                {"NodeID": n.node_id, "Hostname": n.hostname, "Tasks": n.tasks}
                for n in placement.nodes
            ],
            "Pending": [
                {"Tasks": p.tasks, "Reason": p.reason, "Never": p.never} for p in placement.pending
            ],
            "Waits": list(placement.waits),
        }
    return found
