"""Whose node is it: which nodes this manager answers for, and which of them are down.

The store names for each node the manager that holds its session, or held the last one
(NodeStatus.manager_id). That manager alone judges whether the node is silent, and enters it as down
only while the store still names it. When an agent has moved, the log says so to its old manager,
which forgets the node and ends what is left of its own session. The leader stands in for managers
that are not there (orphans.py).

A manager that is out of touch with the log does not know whose its nodes are: it ends its sessions,
takes none, and judges nobody. Back in touch it begins as after a start.

Invariants: a node that is READY in the store and this manager's has a deadline here or is told
lost; nothing is entered for a session that has ended before the commit. Used by dispatcher.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Container, Mapping

import structlog

from manager.dispatcher.balance import REBALANCE_EVERY_S, Balance, targets
from manager.dispatcher.intake import Intake, came_up, went_down
from manager.dispatcher.liveness import MISSED_MAX, Liveness, period_s
from manager.dispatcher.metrics import HEARTBEAT_PERIOD, HEARTBEATS_MISSED
from manager.dispatcher.orphans import Orphans
from manager.dispatcher.session import Session
from manager.store import Store
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import Cluster, Goodbye, Node, NodeState, NodeStatus

log = structlog.get_logger("dispatcher")

# After the manager's start agents first have to find it again.
START_GRACE_S = 5.0
# While managers run, agents of one that dies are with another one sooner, once they have noticed.
MOVE_GRACE_S = 1.0
CALM_S = 10.0  # from when this manager is in touch: until then others may be starting as well
# Silent nodes are looked for this often; adds at most as much to the time a lost node is noticed.
LIVENESS_CHECK_S = 0.2
# A look this late means that the manager stood still; then the silence was its own.
LATE_S = 0.5


class Custody:
    """See the module. `run` until cancelled."""

    def __init__(
        self,
        store: Store,
        intake: Intake,
        clock: Clock,
        *,
        node_id: str,
        sessions: Mapping[str, Session],
        busy: Callable[[], Container[str]],
    ) -> None:
        """`sessions`: the registry, by node; kept up by others. `busy`: nodes that streams are open
        to, which are not sent to other managers.
        """
        self._store = store
        self._intake = intake
        self._clock = clock
        self._node_id = node_id
        self._sessions = sessions
        self._busy = busy
        self._liveness = Liveness()
        self._orphans = Orphans()
        self._balance = Balance()
        self._weigh_s = 0.0
        self._leading = False
        self._was_in_touch = True
        self._grace_until_s = 0.0  # nobody is down before: see _stood_still
        self._calm_s = 0.0

    async def run(self) -> None:
        self._calm_s = _now_s() + CALM_S
        self._expect_own()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_silence())
            group.create_task(self._watch_presence())

    def lead(self, leading: bool) -> None:
        """Whether this manager leads, and so stands in for those that are not there."""
        self._leading = leading
        self._look()

    def check_in_touch(self) -> None:
        """Raises Unavailable while this manager is cut off from the others."""
        if not self._store.engine.in_touch:
            raise errors.Unavailable(
                "this manager does not reach the others, so what it knows may be old; use another "
                "manager, or look at its network and its etcd"
            )

    # -------------------------------------------------------------- sessions

    def enter(self, session: Session) -> None:
        """Has the store say that the node's session is here, and what the agent says of it."""
        if session.leaving:
            return

        written = False

        def change(node: Node, now_ns: int) -> Node:
            nonlocal written
            # By now the agent may be gone, and with another manager.
            written = self._live(node.id) is session
            if not written:
                return node
            return came_up(
                node,
                now_ns,
                description=session.description,
                addr=session.addr,
                manager_id=self._node_id,
                session_id=session.id,
            )

        def done() -> None:
            if written:
                session.entered = True
                self.settle(session.node_id)

        self._intake.node(session.node_id, change, done)

    def heard(self, session: Session) -> None:
        """The agent has said something."""
        # The period may have grown since it was told.
        wait_s = MISSED_MAX * max(session.period_s, self.period_s())
        self._liveness.expect(session.node_id, max(_now_s() + wait_s, self._grace_until_s))

    def left(self, node_id: str) -> None:
        """The node leaves the cluster. Its own word, so it counts whoever holds it."""
        self._liveness.forget(node_id)
        self._intake.node(
            node_id, lambda node, now_ns: went_down(node, now_ns, "the node left the cluster")
        )
        log.info("node_left", node_id=node_id)

    def settle(self, node_id: str) -> None:
        """Does what follows from what the store says of the node now: to be called after each
        change of it. What it said in between does not matter.
        """
        node = self._store.get(Node, node_id)
        session = self._sessions.get(node_id)
        if node is None or node.revoked:
            self._liveness.forget(node_id)
            self._orphans.forget(node_id)
            if session is not None:
                session.end(Goodbye(reason="removed"))
            return
        self._orphans.consider(node, self._deadline_of_orphan(node))
        status = node.status or NodeStatus()
        if status.manager_id != self._node_id:
            if session is None or session.entered:
                self._liveness.forget(node_id)
            # One that is not entered yet came later than what the store says, or will find its end
            # in the store.
            if session is not None and session.entered and not session.ended:
                log.info("node_moved", node_id=node_id, manager_id=status.manager_id)
                session.end(Goodbye(reason="moved"))
        elif self._live(node_id) is None:
            if status.state != NodeState.READY:
                self._liveness.forget(node_id)
            elif self._was_in_touch and not self._liveness.knows(node_id):
                self._liveness.expect(node_id, _now_s() + MISSED_MAX * self.period_s())
        elif session is not None and session.entered and status.state != NodeState.READY:
            self.enter(session)  # somebody took this manager for gone

    # -------------------------------------------------------------- silence

    def period_s(self) -> float:
        """How often agents are to be heard."""
        return self._period_for(len(self._sessions))

    def _period_for(self, sessions: int) -> float:
        cluster = next(iter(self._store.all(Cluster)), None)
        configured_ns = cluster.spec.heartbeat_period_ns if cluster and cluster.spec else 0
        period = period_s(sessions, configured_ns)
        HEARTBEAT_PERIOD.set(period)
        return period

    def _deadline_after_start(self, nodes: int = 0) -> float:
        period = self._period_for(max(nodes, len(self._sessions)))
        return _now_s() + MISSED_MAX * period + START_GRACE_S

    def _deadline_of_orphan(self, node: Node, nodes: int = 0) -> float:
        held = node.status is not None and node.status.manager_id != ""
        if not held or _now_s() < self._calm_s:
            return self._deadline_after_start(nodes)
        period = self._period_for(max(nodes, len(self._sessions)))
        return _now_s() + MISSED_MAX * period + MOVE_GRACE_S

    def _expect_own(self) -> None:
        """This manager's nodes that were ready when it ended, or lost touch, get their time to come
        back.
        """
        mine = [
            n.id
            for n in self._store.all(Node)
            if n.status
            and n.status.state == NodeState.READY
            and n.status.manager_id == self._node_id
        ]
        deadline_s = self._deadline_after_start(len(mine))
        for node_id in mine:
            if self._live(node_id) is None:
                self._liveness.expect(node_id, deadline_s)

    def _live(self, node_id: str) -> Session | None:
        """The node's session, if there is one that has not ended."""
        session = self._sessions.get(node_id)
        return session if session is not None and not session.ended else None

    async def _watch_silence(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun_s, begun_ns = loop.time(), self._clock.now_ns()
            await asyncio.sleep(LIVENESS_CHECK_S)
            late_s = loop.time() - begun_s - LIVENESS_CHECK_S
            # A machine that is suspended stops the loop's time as well.
            away_s = (self._clock.now_ns() - begun_ns) / SECOND_NS - LIVENESS_CHECK_S
            if max(late_s, away_s) > LATE_S:
                self._stood_still(late_s, away_s)
            in_touch = self._store.engine.in_touch
            if in_touch != self._was_in_touch:
                self._touch(in_touch=in_touch)
            if in_touch:
                self._judge(loop.time())

    def _judge(self, now_s: float) -> None:
        for node_id in self._liveness.expired(now_s):
            self._lose(node_id)
        for node_id in self._orphans.expired(now_s):
            self._lose_orphan(node_id)
        self._rebalance(now_s)

    def _stood_still(self, late_s: float, away_s: float) -> None:
        """Nobody was heard because nobody listened. Agents that were without an answer for longer
        may have left, and have to find the manager again as after its start.

        `away_s` is by the wall clock, which may just have been set: it grants that time once, and
        moves nothing.
        """
        log.warning("manager_stood_still", late_s=round(late_s, 1), away_s=round(away_s, 1))
        period = self.period_s()
        left = max(late_s, away_s) > period
        back_s = MISSED_MAX * period + START_GRACE_S if left else 0.0
        # What agents had sent before they left is heard only now, and must not shorten it.
        self._grace_until_s = _now_s() + back_s
        for deadlines in (self._liveness, self._orphans):
            deadlines.postpone(max(0.0, late_s), at_least_s=self._grace_until_s)

    def _touch(self, *, in_touch: bool) -> None:
        """The log is reached again, or not any more."""
        self._was_in_touch = in_touch
        if in_touch:
            log.info("manager_in_touch")
            self._calm_s = _now_s() + CALM_S
            self._expect_own()
        else:
            log.warning("manager_out_of_touch", sessions=len(self._sessions))
            self._liveness.clear()
            for session in self._sessions.values():
                session.end(Goodbye(reason="out of touch"))
        self._look()

    def _lose(self, node_id: str) -> None:
        HEARTBEATS_MISSED.inc()
        log.warning("node_down", node_id=node_id, missed=MISSED_MAX)

        def change(node: Node, now_ns: int) -> Node:
            mine = node.status is not None and node.status.manager_id == self._node_id
            if not mine or not self._liveness.silent(node_id):
                return node  # it came back: here, or elsewhere
            return went_down(node, now_ns, f"{MISSED_MAX} heartbeats were missed")

        self._intake.node(node_id, change)
        session = self._sessions.get(node_id)
        if session is not None:
            session.end(Goodbye(reason="silent"))

    # -------------------------------------------------------------- other managers

    async def _watch_presence(self) -> None:
        engine = self._store.engine
        known = engine.present()
        while True:
            self._look()
            known = await engine.present_changed(known)

    def _look(self) -> None:
        """Who leads, or which managers are there, has changed."""
        if not self._leading or not self._store.engine.in_touch:
            self._orphans.stop()
            return
        nodes = list(self._store.all(Node))
        present = self._store.engine.present() | {self._node_id}
        share = len(nodes) // len(present)
        self._orphans.look(present, nodes, lambda node: self._deadline_of_orphan(node, share))

    def _lose_orphan(self, node_id: str) -> None:
        node = self._store.get(Node, node_id)
        judged = node.status.manager_id if node is not None and node.status else ""
        if self._live(node_id) is not None:
            self._orphans.forget(node_id)  # it is here, and about to be entered
            self.settle(node_id)
            return
        log.warning("node_down", node_id=node_id, manager_id=judged)
        message = "its manager is gone, and it came to no other" if judged else "it did not come"

        def change(node: Node, now_ns: int) -> Node:
            now_at = (node.status or NodeStatus()).manager_id
            if now_at != judged or not self._orphans.lost(node_id):
                return node  # it came back, or its manager did
            return went_down(node, now_ns, message)

        self._intake.node(node_id, change)

    def _rebalance(self, now_s: float) -> None:
        """Sends some agents to other managers, where this one has held too many for long."""
        if now_s < self._weigh_s:
            return
        self._weigh_s = now_s + REBALANCE_EVERY_S
        present = self._store.engine.present()
        if len(present) < 2 or self._node_id not in present:
            return
        held = Counter(dict.fromkeys(sorted(present), 0))
        for node in self._store.all(Node):
            status = node.status
            if status and status.state == NodeState.READY and status.manager_id in present:
                held[status.manager_id] += 1
        held[self._node_id] = sum(not s.ended for s in self._sessions.values())
        surplus = self._balance.surplus(held, self._node_id, now_s)
        if not surplus:
            return
        busy = self._busy()
        # Those that came last go first: who has stayed long is left alone.
        entered = [s.node_id for s in self._sessions.values() if s.entered and not s.ended]
        free = [n for n in reversed(entered) if n not in busy]
        going = self._balance.movable(free, now_s)[:surplus]
        for node_id, manager in zip(going, targets(held, self._node_id, len(going)), strict=True):
            other = self._store.get(Node, manager)
            addr = other.manager_status.addr if other and other.manager_status else ""
            self._balance.moved(node_id, now_s)
            self._sessions[node_id].end(Goodbye(reason="rebalance", manager=addr))
        if going:
            log.info("sessions_sent_away", count=len(going), held=dict(held))


def _now_s() -> float:
    """The event loop's time, on which deadlines are."""
    return asyncio.get_running_loop().time()
