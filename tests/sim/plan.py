"""What happens to a cluster, drawn from the seed before it runs: users' operations and faults.

Each item carries its own numbers, so that leaving one out changes nothing about the others: that is
what makes a failing run shrink.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

# How often each comes, relative to the others.
OPERATIONS = {
    "create": 16,
    "scale": 10,
    "update": 16,
    "tweak": 3,
    "force": 4,
    "rollback": 5,
    "resume": 5,
    "remove": 6,
    "availability": 8,
    "label": 2,
    "node_rm": 2,
    "node_join": 3,
    "job": 8,
}
FAULTS = {
    "agent_crash": 8,
    "agent_stop": 3,
    "agent_pause": 4,
    "machine_off": 5,
    "state_damaged": 2,
    "cut_agent": 6,
    "cut_one_way": 5,
    "manager_crash": 5,
    "manager_stop": 3,
    "manager_pause": 3,
    "cut_manager": 4,
    "cut_from_log": 5,
    "slow_log": 2,
    "disk_full": 1,
    "noise": 6,
    "late": 3,
    "slow_pulls": 3,
    "engine_hangs": 4,
    "engine_restarts": 2,
    "clock": 3,
    "containers_die": 4,
}
HEAL_S = 210.0  # at the end, without faults
FIRST_S = 5.0


@dataclass(frozen=True, slots=True)
class Item:
    """One thing that happens. `lots`: numbers from 0 to 1 for whatever is to be chosen."""

    at_s: float
    kind: str
    lasts_s: float
    lots: tuple[float, ...]

    def lot(self, i: int) -> float:
        return self.lots[i % len(self.lots)]

    def __str__(self) -> str:
        lasts = f" for {self.lasts_s:.0f} s" if self.kind in FAULTS else ""
        return f"{self.at_s:8.3f}  {self.kind}{lasts}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run. `managers` 1: the state is in a file; more: in a log that they share."""

    seed: int
    nodes: int
    managers: int
    seconds: float
    items: tuple[Item, ...]

    def only(self, items: tuple[Item, ...]) -> Plan:
        return replace(self, items=items)

    @property
    def heal_s(self) -> float:
        """When the faults end."""
        return max(0.0, self.seconds - HEAL_S)


def draw(seed: int, *, nodes: int, minutes: float, steps: int = 0) -> Plan:
    """`steps`: so many items; 0: one for each 5 s. With more steps than fit, the run is longer."""
    rng = random.Random(f"plan {seed}")
    seconds = minutes * 60
    if steps:
        seconds = max(seconds, HEAL_S + FIRST_S + steps * 3.0)
    steps = steps or int((seconds - HEAL_S) / 5)
    managers = 1 if seed % 5 < 2 else 3
    items = [_item(rng, FIRST_S * rng.random(), "create") for _ in range(4)]
    span_s = seconds - HEAL_S - FIRST_S
    kinds = OPERATIONS | FAULTS
    for _ in range(max(0, steps - len(items))):
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        items.append(_item(rng, FIRST_S + rng.random() * span_s, kind))
    items.sort(key=lambda i: (i.at_s, i.kind))
    return Plan(seed, nodes, managers, seconds, tuple(items))


def _item(rng: random.Random, at_s: float, kind: str) -> Item:
    # Many short ones, some long.
    lasts_s = min(150.0, rng.expovariate(1 / 20)) + 0.1
    return Item(
        round(at_s, 3), kind, round(lasts_s, 3), tuple(round(rng.random(), 6) for _ in range(12))
    )
