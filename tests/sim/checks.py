"""Safety: what must hold at each step. See rules.py for the rules.

Two witnesses are independent of the code under test: the log's commits, from which a model of all
objects is kept, and the machines' containers. Each commit is judged when it is made, before any
manager hears of it; each container when it begins to run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from manager.store import codec
from manager.store.engine import Fence, Op, Row
from manager.store.engines import embedded
from manager.store.tables import Change, Tables
from swarm import states
from swarm.v1 import (
    Availability,
    Kind,
    ManagerMessage,
    Message,
    Node,
    NodeState,
    Task,
    TaskReport,
    TaskState,
)
from tests.sim.claims import Claims
from tests.sim.host import Box, Host
from tests.sim.log import Commit
from tests.sim.machines import Machines
from tests.sim.rollouts import RollOuts
from tests.sim.tasks import SLOW_S, TaskRules, name_of, state_of

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

# A node is down when its manager has not heard it for three periods of 5 s.
SILENT_S = 12.0
GATHER_S = 3.0  # what may lie between a change and who has not heard of it yet


class Safety:
    """See the module. `over`: nothing is judged any more."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.model = Tables()
        self.over = False
        self.claims = Claims(self)
        self.tasks = TaskRules(self)
        self.rollouts = RollOuts(self)
        self.machines = Machines(self)
        self._bytes: dict[tuple[int, str], tuple[int, bytes]] = {}
        self._leader_fences: list[Fence] = []
        # When a node was last ready, heard, and when it was seen to be not open.
        self.down_s: dict[str, float] = {}
        self.closed_s: dict[str, float] = {}
        self.drained_s: dict[str, float] = {}
        self.removed_s: dict[str, float] = {}
        self._heard_s: dict[tuple[str, str], deque[float]] = {}
        self._batches: dict[tuple[str, str], dict[int, tuple[TaskReport, ...]]] = {}
        self.acked: dict[str, TaskReport] = {}

    def fail(self, rule: str, text: str) -> None:
        if not self.over:
            self.cluster.violate(rule, text)

    @property
    def now_s(self) -> float:
        return self.cluster.loop.now_s

    # -------------------------------------------------------------- commits

    def committed(self, commit: Commit, leader: Fence | None) -> None:
        """The log has it; `leader`: who leads by the log's word."""
        if self.over:
            return
        changes = self._apply(commit.revision, commit.ops)
        led = commit.fence is not None
        for change in changes:
            self._judge(change, led)
        self.claims.check_touched()
        self.tasks.after(commit)
        self.rollouts.after(changes)
        if changes:
            self.cluster.note(f"commit {commit.revision}: {_summary(self.model, changes)}")

    def _apply(self, revision: int, ops: Iterable[Op]) -> list[Change]:
        incoming: list[tuple[Kind, str, Message | None]] = []
        guards: dict[str, int] = {}
        for op in ops:
            if op.value is None:
                self._bytes.pop((op.table, op.id), None)
            else:
                self._bytes[op.table, op.id] = (revision, op.value)
            if op.table == codec.GUARDS:
                guards[op.id] = revision if op.value is not None else 0
            elif op.table == codec.NAMES:
                continue
            elif op.value is None:
                incoming.append((Kind(op.table), op.id, None))
            else:
                row = Row(op.table, op.id, revision, op.value)
                kind, o = codec.decode_row(row, where="the model")
                incoming.append((kind, op.id, o))
        return list(self.model.apply(revision, incoming, guards=guards))

    def _judge(self, change: Change, led: bool) -> None:
        match change.kind:
            case Kind.TASK:
                self.tasks.judge(change.old, change.new, led=led)
                self.claims.task(change.old, change.new)
            case Kind.NODE:
                self._node(change.old, change.new)
            case Kind.SERVICE:
                self.tasks.service(change.old, change.new)

    def _node(self, old: Node | None, new: Node | None) -> None:
        node = new or old
        assert node is not None
        if (new is None or not is_open(new)) and (old is None or is_open(old)):
            self.closed_s[node.id] = self.now_s
        if (new is None or new.revoked) and node.id not in self.removed_s:
            self.removed_s[node.id] = self.now_s
        if any(o and o.spec and o.spec.availability == Availability.DRAIN for o in (old, new)):
            self.drained_s[node.id] = self.now_s
        was = old.status.state if old is not None and old.status else NodeState.DOWN
        now = new.status.state if new is not None and new.status else NodeState.DOWN
        if was == NodeState.READY and now != NodeState.READY:
            self.down_s[node.id] = self.now_s
            if new is not None and old is not None:
                self._silent(old, new)
        self.claims.node(new or old)

    def _silent(self, old: Node, new: Node) -> None:
        """A node is said to be down: its manager may not have heard it lately."""
        if old.status is None or new.status is None or "missed" not in new.status.message:
            return
        for at_s in reversed(self._heard_s.get((new.id, old.status.manager_id), ())):
            ago_s = self.now_s - at_s
            if ago_s < SLOW_S:
                continue  # it came back while the commit was under way
            if ago_s < SILENT_S:
                self.fail("silent-node", f"{new.id[:6]} is down, and was heard {ago_s:.1f} s ago")
            return

    def loaded(self, revision: int, rows: list[Row], unanswered: list[embedded.Results]) -> None:
        """A manager has read its file after a crash: all that was answered must be there, and of a
        transaction that was under way all or nothing.
        """
        if self.over:
            return
        before = self.model.revision
        maybe = [r for group in unanswered for r in group if isinstance(r[1], int)]
        newest = max((r[1] for r in maybe if isinstance(r[1], int)), default=before)
        if revision not in (before, newest):
            self.fail(
                "acked-write",
                f"the file is at revision {revision}, acknowledged was {before}, written {newest}",
            )
            return
        if revision > before:
            for commit, result, time_ns in maybe:
                assert isinstance(result, int)
                self.committed(
                    Commit(result, time_ns, commit.ops, commit.who, commit.fence), commit.fence
                )
        found = {(r.table, r.id): (r.version, r.value) for r in rows}
        if found != self._bytes:
            odd = {k for k in found.keys() | self._bytes.keys()
                   if found.get(k) != self._bytes.get(k)}  # fmt: skip
            self.fail("acked-write", f"rows differ from what was acknowledged: {sorted(odd)[:3]}")

    # -------------------------------------------------------------- what travels

    def told(self, node_id: str, manager: str, message: Any) -> None:
        """An agent hears something."""
        if self.over or not isinstance(message, ManagerMessage):
            return
        if message.assignments is not None:
            self._assigned(node_id, message)
        elif message.statuses is not None:
            sent = self._batches.get((node_id, manager), {}).get(message.statuses.sequence, ())
            for report in sent:
                self._acknowledged(node_id, report)

    def _assigned(self, node_id: str, message: ManagerMessage) -> None:
        assert message.assignments is not None
        node = self.model.get(Node, node_id)
        for assignment in message.assignments.tasks:
            task = assignment.task
            if task is None:
                continue
            if task.node_id != node_id:
                self.fail("wrong-node", f"{node_id[:6]} is told of {name_of(self.model, task)}")
            gone = node is None or node.revoked
            if gone and self.now_s - self.removed_s.get(node_id, self.now_s) > GATHER_S:
                self.fail("to-removed", f"{node_id[:6]} is told of {name_of(self.model, task)}")

    def heard(self, node_id: str, manager: str, message: Any) -> None:
        """A manager hears something."""
        if self.over:
            return
        host = next((m.node_id for m in self.cluster.managers if m.host == manager), "")
        self._heard_s.setdefault((node_id, host), deque(maxlen=16)).append(self.now_s)
        if message.hello is not None:
            self._batches[node_id, manager] = {}
        elif message.statuses is not None:
            kept = self._batches.setdefault((node_id, manager), {})
            kept[message.statuses.sequence] = message.statuses.reports

    def _acknowledged(self, node_id: str, report: TaskReport) -> None:
        task = self.model.get(Task, report.task_id)
        if task is None or task.node_id != node_id or report.status is None:
            return
        if report.removed and task.desired_state == TaskState.REMOVE:
            self.fail("acked-status", f"{name_of(self.model, task)} is gone, and still in the log")
        if not states.ended(state_of(task)) and state_of(task) < report.status.state:
            self.fail(
                "acked-status",
                f"{name_of(self.model, task)} is {state_of(task).name} in the log, "
                f"{report.status.state.name} was acknowledged",
            )

    # -------------------------------------------------------------- containers

    def container_begun(self, host: Host, box: Box) -> None:
        if not self.over:
            self.machines.begun(host, box)

    def container_ended(self, host: Host, box: Box) -> None:
        self.machines.ended(host, box)


def is_open(node: Node) -> bool:
    """Whether a node takes new tasks, as the model has it."""
    ready = node.status is not None and node.status.state == NodeState.READY
    availability = node.spec.availability if node.spec is not None else 0
    return ready and not node.revoked and availability in (0, 1)


def _summary(model: Tables, changes: list[Change]) -> str:
    """A commit in a line."""
    out = []
    for change in changes[:12]:
        o = change.new or change.old
        if isinstance(o, Task):
            if change.new is None:
                out.append(f"{name_of(model, o)} forgotten")
                continue
            word = f"{state_of(o).name.lower()}>{TaskState(o.desired_state).name.lower()}"
            out.append(f"{name_of(model, o)}@{o.node_id[:4]} {word}")
        elif isinstance(o, Node):
            state = change.new.status.state.name.lower() if change.new is not None else "gone"
            out.append(f"node {o.id[:4]} {state}")
        else:
            spec = getattr(o, "spec", None)
            name = getattr(spec, "name", "") or change.id[:6]
            more = ""
            status = getattr(o, "update_status", None)
            if status is not None:
                more = f" {status.state.name.lower()}: {status.message}"
            gone = " gone" if change.new is None else ""
            out.append(f"{change.kind.name.lower()} {name}{more}{gone}")
    if len(changes) > 12:
        out.append(f"and {len(changes) - 12} more")
    return ", ".join(out)
