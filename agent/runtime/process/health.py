"""Healthchecks that the agent runs itself: when to probe, and what a row of results means.

The rules are Docker's (moby daemon/health.go): healthy after one success; unhealthy after `retries`
failures in a row; failures in the start period do not count until there was a success; in that
period probes come each start interval. Pure; checks.py waits and probes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarm.v1 import HealthConfig

_NANO = 1_000_000_000
# Docker's defaults.
INTERVAL_S, TIMEOUT_S, START_INTERVAL_S, RETRIES = 30.0, 30.0, 5.0, 3


@dataclass(frozen=True, slots=True)
class Schedule:
    """A healthcheck with its defaults filled in."""

    command: tuple[str, ...]
    interval_s: float
    timeout_s: float
    start_period_s: float
    start_interval_s: float
    retries: int


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of a task's health. `healthy` None: not told yet."""

    healthy: bool | None = None
    failures: int = 0
    succeeded: bool = False  # ever


@dataclass(frozen=True, slots=True)
class Result:
    """One probe's outcome."""

    passed: bool
    output: str


def schedule(config: HealthConfig | None) -> Schedule | None:
    """None: the task has no healthcheck. Raises ValueError for a test that cannot be run."""
    if config is None or not config.test or config.test[0] == "NONE":
        return None
    kind, *words = config.test
    if kind == "CMD-SHELL" and len(words) == 1:
        command: tuple[str, ...] = ("/bin/sh", "-c", words[0])
    elif kind == "CMD" and words:
        command = tuple(words)
    else:
        raise ValueError(
            f"healthcheck test {list(config.test)!r}: write NONE, or CMD and the words of a "
            "command, or CMD-SHELL and one line"
        )
    return Schedule(
        command=command,
        interval_s=config.interval_ns / _NANO or INTERVAL_S,
        timeout_s=config.timeout_ns / _NANO or TIMEOUT_S,
        start_period_s=config.start_period_ns / _NANO,
        start_interval_s=config.start_interval_ns / _NANO or START_INTERVAL_S,
        retries=config.retries or RETRIES,
    )


def step(health: Health, result: Result, plan: Schedule, *, age_s: float) -> Health:
    """The health after one more result, for a task that has run for `age_s`."""
    if result.passed:
        return Health(healthy=True, failures=0, succeeded=True)
    if age_s < plan.start_period_s and not health.succeeded:
        return health
    failures = health.failures + 1
    return replace(
        health, failures=failures, healthy=False if failures >= plan.retries else health.healthy
    )


def pause_s(health: Health, plan: Schedule, *, age_s: float) -> float:
    """How long to wait before the next probe."""
    if age_s < plan.start_period_s and not health.succeeded:
        return min(plan.start_interval_s, plan.interval_s)
    return plan.interval_s
