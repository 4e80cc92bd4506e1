"""What one tick of the control loop did, until it is known whether it was committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from manager.control.job_book import Look
from manager.scheduler import Group
from manager.scheduler.ranking import GroupKey, Turn
from manager.scheduler.sleeping import Woken


@dataclass(slots=True)
class Tick:
    """The services looked at, when to look at them again, and the tasks whose claims changed."""

    services: tuple[str, ...] = ()
    unfinished: set[str] = field(default_factory=set)
    wakes: dict[str, int] = field(default_factory=dict)
    # Until when large services rest.
    rests: dict[str, int] = field(default_factory=dict)
    gates: dict[str, set[str]] = field(default_factory=dict)
    # Jobs that were looked at in part: which slots, and what became of them.
    looks: dict[str, Look] = field(default_factory=dict)
    # Services with tasks on their way to other nodes.
    moving: set[str] = field(default_factory=set)
    touched: list[str] = field(default_factory=list)
    placed: int = 0
    created: int = 0
    retried: bool = False
    now_ns: int = 0
    # Groups that have had a turn, who was due or woken for one, and those that found no place, with
    # the table's changes when they were told why.
    tried: list[GroupKey] = field(default_factory=list)
    due: frozenset[GroupKey] = frozenset()
    woken: Woken = field(default_factory=Woken)
    slept: dict[GroupKey, tuple[Group, Turn, int]] = field(default_factory=dict)
    # Groups that were told anew why they wait, and as of which changes of the table.
    refreshed: list[GroupKey] = field(default_factory=list)
    told: int = -1
