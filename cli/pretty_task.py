"""`task inspect --pretty`: where a task is, what became of it, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping

from cli.pretty_lines import label_lines, line
from cli.tasks import current_state, host_ports, image_of, shown_image, task_name, why
from cli.times import rfc3339
from swarm.states import label
from swarm.v1 import GetResponse, Meta, Task

__all__ = ["describe_task"]

_WIDTH = 20


def describe_task(answer: GetResponse, nodes: Mapping[str, str], now_ns: int) -> str:
    """A task; `nodes`: names by id."""
    task = answer.object.task if answer.object else None
    assert task is not None
    spec = answer.revision.spec if answer.revision else None
    service = spec.name if spec is not None else task.service_id
    meta = task.meta or Meta()
    lines = [
        line("ID", task.id, width=_WIDTH),
        line("Name", task_name(task, service), width=_WIDTH),
        *label_lines(task.labels),
        line("Service", f"{service} ({task.service_id})", width=_WIDTH),
        line("Spec version", task.spec_version, width=_WIDTH),
    ]
    if image := image_of(spec):
        lines.append(line("Image", shown_image(image, whole=True), width=_WIDTH))
    if task.node_id:
        name = nodes.get(task.node_id, "")
        node = f"{name} ({task.node_id})" if name else task.node_id
        lines.append(line("Node", node, width=_WIDTH))
    lines.append(line("Created", rfc3339(meta.created_at_ns), width=_WIDTH))
    lines.append(line("Desired state", label(task.desired_state).capitalize(), width=_WIDTH))
    lines.append(line("Current state", current_state(task, now_ns), width=_WIDTH))
    return "\n".join([*lines, *_ending(task), *_attempts(task)])


def _ending(task: Task) -> list[str]:
    """What its status says beyond the state."""
    lines = []
    status = task.status
    if error := why(task):
        lines.append(line("Error", error, width=_WIDTH))
    if status is not None and status.cause:
        lines.append(line("Cause", status.cause.replace("_", " "), width=_WIDTH))
    container = status.container if status is not None else None
    if container is not None:
        if container.container_id:
            lines.append(line("Container", container.container_id, width=_WIDTH))
        if container.exit_code is not None:
            lines.append(line("Exit code", container.exit_code, width=_WIDTH))
    if ports := task.host_ports or (status.ports if status is not None else ()):
        lines.append(line("Ports", host_ports(ports), width=_WIDTH))
    if task.assigned_gpus:
        lines.append(line("GPUs", ", ".join(task.assigned_gpus), width=_WIDTH))
    return lines


def _attempts(task: Task) -> list[str]:
    lines = []
    if task.crashes:
        lines.append(line("Crashes before it", f"{task.crashes} in a row", width=_WIDTH))
    if task.start_after_ns:
        lines.append(line("Not before", rfc3339(task.start_after_ns), width=_WIDTH))
    return lines
