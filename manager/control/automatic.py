"""The rebalance that nobody asks for: SchedulingConfig.rebalance.

Once nodes and services have not changed for `quiet_ns`, services are looked at in order of their
names, and the first with a move that makes something better is told to rebalance, as the API would.
When it is done, the next is looked for; a pass over all services in which none had to move ends it
until something changes. Only one service is rebalanced at a time, those that people asked for
included. Passes are few: an affinity to other services' tasks can follow these around for ever.

Nothing here is durable: a new leader waits for `quiet_ns` anew; a service that is being rebalanced
goes on by itself.
"""

from __future__ import annotations

from msgspec import structs

from manager.control.rebalance import can_move, plan_moves
from manager.scheduler import NodeTable
from manager.store import Change, Draft, View
from swarm.clock import SECOND_NS
from swarm.v1 import Cluster, Kind, RebalanceConfig, RebalanceStatus, Service

QUIET_NS = 300 * SECOND_NS  # where the config says nothing
PASSES_MAX = 3
# How many nodes one tick looks at, at least one service: some 20 ms. Then others have their turn.
LOOKS_MAX = 5_000
_TURN_NS = 50_000_000


class Automatic:
    """What is remembered of it between ticks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins anew: it has been quiet since the next tick."""
        # When the next tick is due for its sake; 0: at once; None: never.
        self.wake_ns: int | None = 0
        self._on = False  # as of the last tick
        # Services that are being rebalanced, whoever asked for it.
        self._at_work: set[str] = set()
        self._stirred = True
        self._since_ns = 0
        self._left: list[str] | None = None  # services not looked at in this pass, last first
        self._passes = 0
        self._moved = False  # in this pass
        self._begun = ""

    # -------------------------------------------------------------- taking in changes

    def note(self, service: Service) -> None:
        """Takes a service of a view that is begun with."""
        if service.rebalance_status is not None and service.rebalance_status.running:
            self._at_work.add(service.id)

    def observe(self, change: Change) -> None:
        """Takes a committed change."""
        if change.kind == Kind.CLUSTER:
            self.wake_ns = 0
        elif change.kind == Kind.SERVICE:
            old, new = change.old, change.new
            if old is None or new is None or old.spec_version != new.spec_version:
                self.stir()
            self._at_work.discard(change.id)
            if new is not None:
                self.note(new)
            if self._on and not self._at_work:
                self.wake_ns = 0

    def stir(self) -> None:
        """Something has changed that placing tasks depends on, so it is not quiet."""
        self._stirred = True
        self._left = None
        self._passes = 0
        if self._on:
            self.wake_ns = 0

    # -------------------------------------------------------------- one tick

    def step(self, draft: Draft, table: NodeTable) -> str:
        """Tells at most one service to rebalance; its id."""
        now_ns = draft.now_ns
        self._begun = ""
        config = _config(draft)
        self.wake_ns = None
        self._on = config is not None
        if config is None:
            return ""
        if self._stirred:
            self._stirred = False
            self._since_ns = now_ns
        due_ns = self._since_ns + (config.quiet_ns or QUIET_NS)
        if now_ns < due_ns:
            self.wake_ns = due_ns
        elif not self._at_work:
            self._begun = self._next(draft, table)
        if self._begun:
            service = draft.get(Service, self._begun)
            assert service is not None
            status = RebalanceStatus(running=True, started_at_ns=now_ns)
            draft.put(structs.replace(service, rebalance_status=status))
            self._moved = True
        return self._begun

    def _next(self, draft: Draft, table: NodeTable) -> str:
        """The next service with something to move; empty: none now."""
        if self._left is None:
            if self._passes and (not self._moved or self._passes >= PASSES_MAX):
                return ""
            self._passes += 1
            self._moved = False
            services = (s for s in draft.all(Service) if can_move(s) and not s.pending_delete)
            by_name = sorted(services, key=lambda s: (s.spec.name if s.spec else "", s.id))
            self._left = [s.id for s in reversed(by_name)]
        looks = LOOKS_MAX
        while self._left and looks > 0:
            service_id = self._left.pop()
            looks -= max(1, len(table.nodes))
            if plan_moves(draft, table, (service_id,), now_ns=draft.now_ns, limit=1):
                return service_id
        if not self._left:
            self._left = None
        if self._left or self._moved:
            self.wake_ns = draft.now_ns + _TURN_NS
        return ""

    def undo(self) -> None:
        """The tick's draft came to nothing."""
        if self._begun:
            self._left = [*(self._left or []), self._begun]
            self._begun = ""


def _config(view: View) -> RebalanceConfig | None:
    for cluster in view.all(Cluster):
        if cluster.spec is not None and cluster.spec.scheduling is not None:
            return cluster.spec.scheduling.rebalance
    return None
