"""Places that are kept for somebody: of those who preempt, and of the first job that is blocked.

A hold belongs to one waiting group: so many tasks on these nodes, once what was to leave there has
left. Who comes later in order may use such a node only as far as the owner still fits beside, or
for a task that ends in time. Holds are memory alone; a new leader finds them anew.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from manager.scheduler import Group, NodeTable, barred
from manager.scheduler.backfill import UNKNOWN_NS, Spot, all_fit, ghosts
from manager.scheduler.ranking import GroupKey, Place, Terms, Turn
from manager.store import View


@dataclass(slots=True)
class Hold:
    """`at_ns`: when the owner is to have its place at the latest."""

    turn: Turn
    group: Group  # its requirement, and one task that its others are like
    spots: dict[str, Spot] = field(default_factory=dict)
    at_ns: int = UNKNOWN_NS
    # Made by stopping others, not by waiting for them.
    preempts: bool = False
    # Of those before it in its slots: nobody of the same priority may have the place, whoever waits
    # longer.
    own: bool = False

    @property
    def tasks(self) -> int:
        """For how many tasks a place is kept."""
        return sum(spot.tasks for spot in self.spots.values())

    def stand_ins(self, node_id: str) -> Group:
        """Tasks of the owner to be, on a node."""
        name = "/".join(str(part) for part in (*self.turn.key, node_id))
        return Group(
            service_id=self.group.service_id,
            spec_version=self.group.spec_version,
            requirement=self.group.requirement,
            tasks=ghosts(name, self.group.tasks[0], self.spots[node_id].tasks),
            node_id=node_id,
        )

    def binds(self, turn: Turn) -> bool:
        """Whether the group of the turn comes after the owner. Of two jobs of the same priority the
        owner goes first whatever their queues hold by now: what was promised stays so.
        """
        if turn.key == self.turn.key:
            return False
        mine, theirs = _rank(self.turn), _rank(turn)
        if mine != theirs or mine[1] or self.own:
            return mine <= theirs
        return self.turn.place < turn.place

    def in_time(self, terms: Terms, grace_ns: int, now_ns: int) -> bool:
        """Whether a task with these terms ends before the owner is to have its place."""
        if not terms.timeout_ns or self.at_ns == UNKNOWN_NS:
            return False
        return now_ns + terms.timeout_ns + grace_ns <= self.at_ns


def _rank(turn: Turn) -> tuple[int, bool]:
    """Sorts turns roughly: highest priority first, services before jobs."""
    return (-turn.terms.priority, turn.terms.job)


class Holds:
    """All holds, by owner and by node."""

    def __init__(self) -> None:
        self._of: dict[GroupKey, Hold] = {}
        self._on: dict[str, dict[GroupKey, Hold]] = {}
        # By priority and whether the owner is a job, in order of turns.
        self._order: dict[tuple[int, bool], list[tuple[Place, Hold]]] = {}
        # Grows whenever somebody may use what was kept before.
        self.freed = 0
        # Owner -> nodes of which it has given up what was kept for it there, without a place.
        self.released: dict[GroupKey, set[str]] = {}

    def get(self, key: GroupKey) -> Hold | None:
        """What is kept for a group."""
        return self._of.get(key)

    def all(self) -> Iterable[Hold]:
        """Every hold."""
        return self._of.values()

    def put(self, hold: Hold) -> None:
        """A new or changed hold; one without spots goes."""
        key = hold.turn.key
        earlier = self.released.pop(key, set())
        self.drop(key)
        given_up = earlier | (self.released.pop(key, set()) - hold.spots.keys())
        if given_up:
            self.released[key] = given_up
        if not hold.spots:
            return
        self._enter(hold)
        for node_id in hold.spots:
            self._on.setdefault(node_id, {})[hold.turn.key] = hold

    def _enter(self, hold: Hold) -> None:
        if self._of.get(hold.turn.key) is not hold:
            self._of[hold.turn.key] = hold
            insort(self._order.setdefault(_rank(hold.turn), []), (hold.turn.place, hold))

    def drop(self, key: GroupKey) -> None:
        """Nothing is kept for the group any more."""
        hold = self._of.pop(key, None)
        if hold is None:
            return
        self.freed += 1
        order = self._order[_rank(hold.turn)]
        del order[bisect_left(order, (hold.turn.place,))]
        if not order:
            del self._order[_rank(hold.turn)]
        for node_id in list(hold.spots):
            self._leave(hold, node_id)
            self._release(hold, node_id)

    def add(self, hold: Hold, node_id: str, leaving: frozenset[str]) -> None:
        """One task more on a node."""
        before = hold.spots.get(node_id, Spot(0))
        hold.spots[node_id] = Spot(before.tasks + 1, before.leaving | leaving)
        self._enter(hold)
        self._on.setdefault(node_id, {})[hold.turn.key] = hold

    def used(self, key: GroupKey, node_id: str, tasks: int) -> None:
        """The owner has got places: first those on the node, otherwise some are not needed."""
        hold = self._of.get(key)
        if hold is None:
            return
        order = sorted(hold.spots, key=lambda n: (n != node_id, n))
        for spot_id in order:
            if not tasks:
                break
            spot = hold.spots[spot_id]
            taken = min(tasks, spot.tasks)
            tasks -= taken
            if spot_id != node_id:
                self._release(hold, spot_id)
            if taken == spot.tasks:
                self._leave(hold, spot_id)
            else:
                hold.spots[spot_id] = Spot(spot.tasks - taken, spot.leaving)
        self.freed += 1
        if not hold.spots:
            self.drop(key)

    def _leave(self, hold: Hold, node_id: str) -> None:
        del hold.spots[node_id]
        del self._on[node_id][hold.turn.key]
        if not self._on[node_id]:
            del self._on[node_id]

    def _release(self, hold: Hold, node_id: str) -> None:
        self.released.setdefault(hold.turn.key, set()).add(node_id)

    def on(self, node_id: str) -> list[Hold]:
        """Those that keep something of a node, in order."""
        return sorted(self._on.get(node_id, {}).values(), key=lambda h: h.turn.place)

    def binding(self, turn: Turn, grace_ns: int, now_ns: int) -> frozenset[str]:
        """The nodes that the group of the turn may not simply use."""
        found: set[str] = set()
        mine = _rank(turn)
        for rank, order in self._order.items():
            if rank > mine:
                continue
            # Of services of one priority those that come first go first, whoever has a hold.
            alike = rank == mine and not mine[1]
            end = bisect_left(order, (turn.place,)) if alike else len(order)
            for i, (_, hold) in enumerate(order):
                if (i >= end and not hold.own) or self._gives_way(hold, turn):
                    continue
                if hold.turn.key != turn.key and not hold.in_time(turn.terms, grace_ns, now_ns):
                    found.update(hold.spots)
        return frozenset(found)

    def _gives_way(self, hold: Hold, turn: Turn) -> bool:
        """A reservation is worked out without regard to places that others have stopped tasks for.
        Of two jobs of one priority that would wait for each other, the latter goes first.
        """
        own = self._of.get(turn.key)
        return (
            own is not None
            and own.preempts
            and not hold.preempts
            and turn.terms.job
            and _rank(hold.turn) == _rank(turn)
        )

    def room_beside(
        self, table: NodeTable, view: View, now_ns: int, node_id: str, turn: Turn
    ) -> bool:
        """Whether those before the turn find their place on the node as the table is now."""
        owners = [h for h in self.on(node_id) if h.binds(turn) and not self._gives_way(h, turn)]
        pairs = [(h.spots[node_id], h.stand_ins(node_id)) for h in owners]
        return all_fit(table, view, now_ns, node_id, pairs)

    def check(self, table: NodeTable, view: View, now_ns: int, hold: Hold) -> bool:
        """Gives up the spots of a hold that will not do any more; True: all will do."""
        fine = True
        for node_id in sorted(hold.spots):
            info = table.nodes.get(node_id)
            if (
                info is None
                or barred(info.node, hold.group.requirement) is not None
                or not all_fit(
                    table, view, now_ns, node_id, [(hold.spots[node_id], hold.stand_ins(node_id))]
                )
            ):
                fine = False
                self._leave(hold, node_id)
                self._release(hold, node_id)
                self.freed += 1
        if not hold.spots:
            self.drop(hold.turn.key)
        return fine
