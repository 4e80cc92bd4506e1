"""Where tasks run: `deploy.placement`, and the platform of the image.

Names of services of the same file become those that they have in the stack, here as everywhere.
Beyond the specification: conditions have the operators of swarm/conditions.py, a preference may be
an affinity with a weight, and there is a strategy. They stand where Docker's own keys do, so that a
file says everything about placement in one place.
"""

from __future__ import annotations

import re

from cli.compose import keys
from cli.compose.around import Surroundings, deep
from cli.compose.at import At
from swarm import errors
from swarm.conditions import parse_condition, parse_key
from swarm.v1 import Placement, PlacementPreference, Platform

STRATEGIES = ("spread", "binpack")
WEIGHT_MAX = 100
_PLATFORM = re.compile(r"[a-z0-9]+(/[a-z0-9_]+(/[a-z0-9]+)?)?")


def placement(at: At, around: Surroundings) -> Placement:
    """Constraints, preferences, the strategy and the most replicas of a node; and the platform of
    the image.
    """
    found = deep(at, "deploy", "placement")
    constraints_at = found.set_at("constraints") if found is not None else None
    preferences_at = found.set_at("preferences") if found is not None else None
    strategy_at = found.set_at("strategy") if found is not None else None
    most = found.set_at("max_replicas_per_node") if found is not None else None
    constraints: list[str] = []
    if constraints_at is not None and constraints_at.is_list('- "node.role == worker"'):
        for each in constraints_at.elements():
            if text := _condition(each, "constraint", around):
                constraints.append(text)
    preferences: list[PlacementPreference] = []
    if preferences_at is not None and preferences_at.is_list("- spread: node.labels.zone"):
        for each in preferences_at.elements():
            preference = _preference(each, around)
            if preference is not None:
                preferences.append(preference)
    return Placement(
        constraints=tuple(constraints),
        preferences=tuple(preferences),
        max_replicas=most.integer(least=0) if most is not None else 0,
        platforms=_platforms(at),
        strategy=strategy_at.choice(STRATEGIES) if strategy_at is not None else "",
    )


def _preference(at: At, around: Surroundings) -> PlacementPreference | None:
    if not at.check_keys(keys.PREFERENCE, context="deploy.placement.preferences"):
        return None
    spread, affinity, weight = at.set_at("spread"), at.set_at("affinity"), at.set_at("weight")
    if spread is not None and affinity is not None:
        at.fail_key("affinity", "spread and affinity exclude each other", "write two preferences")
        return None
    if affinity is not None:
        number = _weight(weight) if weight is not None else 1
        condition = _condition(affinity, "affinity", around)
        return PlacementPreference(affinity=condition, weight=number) if condition else None
    if spread is None:
        at.lacks("spread", "write - spread: node.labels.zone, or - affinity: node.labels.a == b")
        return None
    if weight is not None:
        weight.fail("only an affinity has a weight", "preferences count in their order")
    text = spread.text(empty=False)
    try:
        if text:
            parse_key(text.strip(), f"spread {text!r}", of_tasks=False)
    except errors.Invalid as error:
        _report(spread, error)
        return None
    return PlacementPreference(spread=text) if text else None


def _condition(at: At, subject: str, around: Surroundings) -> str:
    """The condition, with the stack's names; empty: it cannot be read, which is reported."""
    text = at.text(empty=False)
    try:
        found = parse_condition(text, subject) if text else None
    except errors.Invalid as error:
        _report(at, error)
        return ""
    if found is None or found.key.name != "service.name" or found.operator == "=~":
        return text
    names = [around.full(v) if v in around.services else v for v in found.values]
    if tuple(names) == found.values:
        return text
    value = f"({', '.join(names)})" if found.operator.endswith("in") else names[0]
    return f"{found.key} {found.operator} {value}"


def _report(at: At, error: errors.Invalid) -> None:
    message, _, hint = error.message.partition("; ")
    if "(" in at.text() and ")" not in at.text():
        hint = "if it stands between [ and ], put quotes around it: YAML ends it at the comma"
    at.fail(message, hint)


def _weight(at: At) -> int:
    number = at.integer(least=-WEIGHT_MAX, most=WEIGHT_MAX)
    if number == 0 and at.node.value in (0, "0"):
        at.fail("a weight of 0 says nothing", "write 1 to 100, or -100 to -1 to avoid such nodes")
    return number or 1


def _platforms(at: At) -> tuple[Platform, ...]:
    found = at.set_at("platform")
    if found is None:
        return ()
    os, _, rest = found.text().partition("/")
    architecture = rest.partition("/")[0]
    if not _PLATFORM.fullmatch(found.text()):
        found.fail(f"{found.shown()} is not a platform", "write linux/amd64 or linux/arm64")
        return ()
    return (Platform(os=os, architecture=architecture),)
