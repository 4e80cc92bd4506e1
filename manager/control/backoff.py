"""Crash loops: what counts as a crash, and how long the slot's next attempt waits.

The first two crashes in a row wait for the policy's delay, as in Docker: one is an accident, two
may be a dependency that is just starting. From the third on the delay doubles, to at most
`max_delay`, and up to a fifth of it is added by lot, so that replicas that fail together are not
started together for ever. An attempt that has run well for a while ends the row, and so does
another template.

The row stands in the tasks (Task.crashes, start_after_ns), and how long a task ran is told by
managers' clocks alone (running_since_ns, meta.updated_at_ns): a new leader goes on, whatever the
task history keeps and whatever nodes take the time to be.
"""

from __future__ import annotations

from manager.control.template import (
    DEFAULT_RESTART_DELAY_NS,
    monitor_ns,
    state_of,
    update_config,
)
from swarm import ids, states
from swarm.clock import SECOND_NS
from swarm.v1 import HealthConfig, RestartPolicy, Service, Task

WELL_NS = 60 * SECOND_NS  # who has run for so long has not crashed at its start
MAX_DELAY_NS = 300 * SECOND_NS  # where the policy says nothing
GROWS_FROM = 3  # crashes in a row, see above
JITTER = 0.2  # of a delay that has grown, at most, on top of it
_DOUBLINGS_MAX = 40  # beyond any delay; keeps the numbers small
# Docker's defaults of a healthcheck.
_INTERVAL_NS = 30 * SECOND_NS
_TIMEOUT_NS = 30 * SECOND_NS
_RETRIES = 3


def delay_ns(policy: RestartPolicy, crashes: int, rng: ids.Rng | None = None) -> int:
    """How long the attempt after so many crashes in a row waits; with the lot's share where there
    is an `rng`.
    """
    delay_ns = DEFAULT_RESTART_DELAY_NS if policy.delay_ns is None else policy.delay_ns
    most_ns = MAX_DELAY_NS if policy.max_delay_ns is None else policy.max_delay_ns
    if crashes < GROWS_FROM or most_ns <= delay_ns:
        return delay_ns
    doublings = min(crashes - GROWS_FROM + 1, _DOUBLINGS_MAX)
    grown_ns = min(max(delay_ns, SECOND_NS) << doublings, most_ns)
    return grown_ns + (int(grown_ns * JITTER * rng.random()) if rng is not None else 0)


def waited_ns(policy: RestartPolicy, crashes: int) -> int:
    """At most how long that attempt has waited."""
    plain_ns = delay_ns(policy, crashes)
    return plain_ns + int(plain_ns * JITTER) if crashes >= GROWS_FROM else plain_ns


def starting_ns(task: Task, at_ns: int, *, due_ns: int = 0) -> int:
    """How long it took to get the task to run since it was made and due; for one that has never
    run, or not yet: until `at_ns`.
    """
    made_ns = task.meta.created_at_ns if task.meta is not None else at_ns
    return max(0, (task.running_since_ns or at_ns) - max(made_ns, due_ns))


def crashes_after(service: Service, task: Task, now_ns: int) -> int:
    """How many attempts in a row have crashed with this one, which has ended by itself."""
    return 0 if ran_well(service, task, now_ns) else task.crashes + 1


def crashes_kept(service: Service, task: Task, now_ns: int) -> int:
    """How many attempts in a row had crashed before this one, unless it has run well since: what is
    carried over to a task that replaces it for another reason.
    """
    return 0 if ran_well(service, task, now_ns) else task.crashes


def ran_well(service: Service, task: Task, now_ns: int) -> bool:
    """Whether the task has run, or ran until it ended, for long enough to have proved itself. It
    ended when a manager heard of it; what is written to a task afterwards is written at once.
    """
    if not task.running_since_ns:
        return False
    until_ns = now_ns
    if states.ended(state_of(task)) and task.meta is not None:
        until_ns = task.meta.updated_at_ns
    return until_ns - task.running_since_ns >= max(WELL_NS, proves_itself_ns(service))


def proves_itself_ns(service: Service) -> int:
    """How long after its start a task at the latest has failed if it fails at once: the time it is
    watched, and before it that in which a healthcheck may still fail.
    """
    watched_ns = monitor_ns(update_config(service))
    check = healthcheck(service)
    if check is None:
        return watched_ns
    try_ns = (check.interval_ns or _INTERVAL_NS) + (check.timeout_ns or _TIMEOUT_NS)
    return watched_ns + check.start_period_ns + try_ns * (check.retries or _RETRIES)


def healthcheck(service: Service) -> HealthConfig | None:
    """The healthcheck in the service's spec, unless it is switched off."""
    container = service.spec.task.container if service.spec and service.spec.task else None
    check = container.healthcheck if container else None
    return check if check is not None and check.test and check.test[0] != "NONE" else None
