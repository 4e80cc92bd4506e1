"""How a service's tasks are restarted, and how its changes are rolled out and back.

Docker's schema refuses keys that it does not know below `deploy`. What Docker lacks (deadlines, the
longest delay between restarts) may also be said by an `x-` key of the service, so that one file
serves both.
"""

from __future__ import annotations

import re

from msgspec import structs

from cli.compose.around import deep
from cli.compose.at import At
from swarm.v1 import RestartPolicy, UpdateConfig

CONDITIONS = ("none", "on-failure", "any")
# What old files and `docker run` write, and what it means here.
_RESTARTS = {"no": "none", "always": "any", "unless-stopped": "any", "on-failure": "on-failure"}
_COUNT = re.compile(r"[0-9]{1,9}")


def restart_policy(at: At) -> RestartPolicy | None:
    """deploy.restart_policy, else the service's `restart`; and the longest delay, which may stand
    apart from them.
    """
    found = _policy(at)
    most = _apart(at, ("deploy", "restart_policy", "max_delay"), "x-restart-max-delay")
    if most is None:
        return found
    return structs.replace(found or RestartPolicy(), max_delay_ns=most.duration())


def _policy(at: At) -> RestartPolicy | None:
    policy, restart = deep(at, "deploy", "restart_policy"), at.set_at("restart")
    mode = deep(at, "deploy", "mode")
    is_job = mode is not None and str(mode.node.value).endswith("-job")
    if policy is None:
        given = _restart(restart) if restart is not None else None
        if is_job and restart is not None and given is not None and given.condition == "any":
            restart.fail("a job ends, it is not started for ever", 'write "no" or on-failure')
        return given
    if restart is not None:
        _restart(restart)
        restart.warn("not used: deploy.restart_policy stands beside it")
    condition, delay = policy.set_at("condition"), policy.set_at("delay")
    attempts, window = policy.set_at("max_attempts"), policy.set_at("window")
    if is_job and condition is not None and condition.node.value == "any":
        condition.fail("a job ends, it is not started for ever", "write none or on-failure")
    return RestartPolicy(
        condition=_condition(condition) if condition is not None else "",
        delay_ns=delay.duration() if delay is not None else None,
        max_attempts=attempts.integer(least=0) if attempts is not None else None,
        window_ns=window.duration() if window is not None else None,
    )


def _condition(at: At) -> str:
    text = at.node.value
    if isinstance(text, str) and text not in CONDITIONS and text in _RESTARTS:
        at.fail(
            f'"{text}" is a word of `restart`, not of restart_policy',
            f"write condition: {_RESTARTS[text]}",
        )
        return ""
    return at.choice(CONDITIONS)


def _restart(at: At) -> RestartPolicy | None:
    value = at.node.value
    if value is False:  # an unquoted `no` of a YAML 1.1 tool
        return RestartPolicy(condition="none")
    if isinstance(value, str):
        word, colon, number = value.partition(":")
        if word in _RESTARTS and (not colon or (word == "on-failure" and _COUNT.fullmatch(number))):
            return RestartPolicy(
                condition=_RESTARTS[word], max_attempts=int(number) if colon else None
            )
    at.fail(
        f"must be no, always, on-failure, on-failure:N or unless-stopped, not {at.shown()}",
        "or write deploy.restart_policy",
    )
    return None


def update_config(service: At, key: str, *, is_job: bool) -> UpdateConfig | None:
    """How changes, or rollbacks, are rolled out; None where the file does not say."""
    config = deep(service, "deploy", key)
    own = f"x-{key.removesuffix('_config')}-deadline"
    for given in (config, service.set_at(own)) if is_job else ():
        if given is not None:
            given.fail("a job is not updated in steps", "remove it")
    deadline = _apart(service, ("deploy", key, "deadline"), own)
    found = _config(config, key) if config is not None else None
    if deadline is None:
        return found
    # As where nothing is said: one at a time.
    return structs.replace(found or UpdateConfig(parallelism=1), deadline_ns=deadline.duration())


def _apart(service: At, path: tuple[str, ...], own: str) -> At | None:
    """A value that Docker does not know: at its place, or as a key of the service's that Docker
    leaves alone. The two must not both be there.
    """
    found, apart = deep(service, *path), service.set_at(own)
    if found is not None and apart is not None:
        place = ".".join(path)
        apart.fail(f"it says the same as {place}, which is given too", "remove one of them")
    return found or apart


def _config(at: At, key: str) -> UpdateConfig:
    actions = ("pause", "continue", "rollback") if key == "update_config" else ("pause", "continue")
    parallelism, delay = at.set_at("parallelism"), at.set_at("delay")
    action, monitor = at.set_at("failure_action"), at.set_at("monitor")
    ratio, order = at.set_at("max_failure_ratio"), at.set_at("order")
    return UpdateConfig(
        parallelism=parallelism.integer(least=0) if parallelism is not None else 1,
        delay_ns=delay.duration() if delay is not None else 0,
        failure_action=action.choice(actions) if action is not None else "",
        monitor_ns=monitor.duration() if monitor is not None else None,
        max_failure_ratio=ratio.number(most=1.0) if ratio is not None else 0.0,
        order=order.choice(("stop-first", "start-first")) if order is not None else "",
    )
