"""`service inspect --pretty`: how a service is updated, rolled back and restarted, and how far the
present update is.
"""

from __future__ import annotations

from cli.pretty_lines import line
from cli.times import rfc3339
from swarm.quantities import format_duration
from swarm.v1 import RestartPolicy, Service, UpdateConfig, UpdateState

__all__ = ["config_lines", "restart_lines", "status_lines"]

_OVER = (UpdateState.COMPLETED, UpdateState.ROLLBACK_COMPLETED)


def status_lines(service: Service) -> list[str]:
    """Where the last update stands; nothing if there was none."""
    status = service.update_status
    if status is None:
        return []
    lines = ["UpdateStatus:", line("State", status.state.name.lower(), indent=1)]
    lines.append(line("Started", rfc3339(status.started_at_ns), indent=1))
    if status.resumed_at_ns:
        lines.append(line("Resumed", rfc3339(status.resumed_at_ns), indent=1))
    if status.completed_at_ns:
        lines.append(line("Completed", rfc3339(status.completed_at_ns), indent=1))
    lines.append(line("Message", status.message, indent=1))
    if status.next_batch_at_ns:
        lines.append(line("Next batch", rfc3339(status.next_batch_at_ns), indent=1))
    if status.pause_after and status.state not in _OVER:
        lines.append(line("Pause after", status.pause_after, indent=1))
    if status.stopped_first:
        why = f" ({status.stopped_first_reason})" if status.stopped_first_reason else ""
        lines.append(line("Stopped first", f"{status.stopped_first}{why}", indent=1))
    if status.awaits_resume:
        name = service.spec.name if service.spec else service.id
        lines.append(
            line(
                "To go on",
                f"swarmctl service resume {name}, or back: swarmctl service rollback {name}",
                indent=1,
            )
        )
    return lines


def config_lines(title: str, config: UpdateConfig | None) -> list[str]:
    """What `--update-*` and `--rollback-*` set."""
    if config is None:
        return []
    lines = [f"{title}:", line("Parallelism", config.parallelism, width=20, indent=1)]
    if config.delay_ns:
        lines.append(line("Delay", format_duration(config.delay_ns), width=20, indent=1))
    lines.append(line("On failure", config.failure_action or "pause", width=20, indent=1))
    if config.monitor_ns is not None:
        period = format_duration(config.monitor_ns)
        lines.append(line("Monitoring Period", period, width=20, indent=1))
    ratio = f"{config.max_failure_ratio:g}"
    lines.append(line("Max failure ratio", ratio, width=20, indent=1))
    lines.append(line("Update order", config.order or "stop-first", width=20, indent=1))
    if config.deadline_ns is not None:
        deadline = format_duration(config.deadline_ns) if config.deadline_ns else "never"
        lines.append(line("Deadline", deadline, width=20, indent=1))
    return lines


def restart_lines(policy: RestartPolicy) -> list[str]:
    """What `--restart-*` sets."""
    lines = ["RestartPolicy:", line("Condition", policy.condition or "any", indent=1)]
    if policy.delay_ns is not None:
        lines.append(line("Delay", format_duration(policy.delay_ns), indent=1))
    if policy.max_delay_ns is not None:
        lines.append(line("Max delay", format_duration(policy.max_delay_ns), indent=1))
    if policy.max_attempts:
        lines.append(line("Max attempts", policy.max_attempts, indent=1))
    if policy.window_ns:
        lines.append(line("Window", format_duration(policy.window_ns), indent=1))
    return lines
