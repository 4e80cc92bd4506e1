"""Planted bugs: the code with one mistake in it, and the rule that is to notice.

    python -m tests.sim.planted [NAME ...]

Each is a small change of the source of one function, made while it runs: the code object is
replaced, so whoever holds the function has it too. A snippet that is not found exactly once says
that the code has changed, and that the mistake has to be planted anew.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from tests.sim.plan import draw
from tests.sim.run import Result, run

SEEDS_MAX = 60


@dataclass(frozen=True, slots=True)
class Bug:
    """`where`: module:function or module:Class.method. `changes`: text and what replaces it.
    `rules`: any of these is to be broken.
    """

    what: str
    where: str
    changes: tuple[tuple[str, str], ...]
    rules: tuple[str, ...]


BUGS: dict[str, Bug] = {
    "predecessor_not_awaited": Bug(
        "a replacement starts beside the task that still stops",
        "manager.control.restart:_predecessors_stop",
        (("    until_ns = made_ns", "    return False\n    until_ns = made_ns"),),
        ("slot-overlap",),
    ),
    "restart_delay_ignored": Bug(
        "a replacement starts before its delay is over",
        "manager.control.restart:promote",
        (("if task.start_after_ns > work.now_ns:", "if task.start_after_ns < 0:"),),
        ("restart-delay",),
    ),
    "one_attempt_too_many": Bug(
        "max_attempts allows one more",
        "manager.control.restart:_replaced",
        (("decided_ns)) < limit", "decided_ns)) < limit + 1"),),
        ("max-attempts",),
    ),
    "parallelism_one_more": Bug(
        "a roll-out takes down one slot more than it may",
        "manager.control.update:_change",
        (("if len(down) >= config.parallelism:", "if len(down) > config.parallelism:"),
         ("        if room <= 0:", "        if room <= -1:")),
        ("budget",),
    ),
    "drained_takes_tasks": Bug(
        "nodes that are drained or paused get new tasks",
        "manager.scheduler.nodeinfo:NodeInfo.open",
        (("node.spec.availability in (Availability.ACTIVE, Availability.UNSPECIFIED)",
          "node.spec.availability in tuple(Availability)"),),
        ("place-open",),
    ),
    "down_takes_tasks": Bug(
        "nodes that are down get new tasks",
        "manager.scheduler.nodeinfo:NodeInfo.open",
        (("and node.status.state == NodeState.READY", "and node.status.state"),),
        ("place-open",),
    ),
    "claim_freed_early": Bug(
        "a task that was told to stop holds its place no more",
        "manager.scheduler.table:NodeTable.sync_task",
        (("and _holds(_state(task)):", "and _holds(_state(task)) and "
          "states.wanted(task.desired_state):"),),
        ("capacity", "host-capacity"),
    ),
    "memory_not_counted": Bug(
        "what tasks claim of the memory is not added up",
        "manager.scheduler.table:NodeTable.take_many",
        (("            info.memory_used += all_ * need.memory\n", ""),),
        ("capacity", "books"),
    ),
    "host_port_twice": Bug(
        "host ports that are taken are not looked at",
        "manager.scheduler.placement:_Work.keep",
        (("for port, protocol, address in need.host_ports:", "for port, protocol, address in ():"),),
        ("capacity", "host-capacity"),
    ),
    "fence_skipped": Bug(
        "the control loop commits whether or not it leads",
        "manager.control.loop:ControlLoop._tick",
        (("commit(draft, fence=self._fence)", "commit(draft)"),),
        ("leader-only",),
    ),
    "precondition_dropped": Bug(
        "a commit does not mind what has changed since it read",
        "manager.store.store:Store._plan",
        (("ops.append(Op(kind, id_, value, expected[kind, id_]))",
          "ops.append(Op(kind, id_, value, None))"),),
        ("legal-states", "desired-grows", "resurrected", "acked-call", "node-fixed", "acked-status",
         "capacity", "books", "defect", "hangs", "not-converged", "report-lost"),
    ),
    "deletes_not_written": Bug(
        "what is deleted stays in the state file",
        "manager.store.engines.embedded:EmbeddedEngine._write",
        (("self._store(list(puts.values()), list(deletes), revision)",
          "self._store(list(puts.values()), [], revision)"),),
        ("acked-write",),
    ),
    "acknowledged_before_commit": Bug(
        "an agent is told that its report is in the log before it is",
        "manager.dispatcher.dispatcher:Dispatcher._take_in",
        (("        session.take(len(reports))\n",
          "        session.take(len(reports))\n        session.taken(len(reports), sequence)\n"
          "        sequence = None\n        session.take(len(reports))\n"),),
        ("acked-status",),
    ),
    "illegal_report_taken": Bug(
        "reports are entered whatever came before",
        "manager.dispatcher.intake:apply_report",
        (("if not may_follow(before, status.state):", "if False:"),),
        ("legal-states",),
    ),
    "removal_not_entered": Bug(
        "that a task is gone from its node is not entered",
        "manager.dispatcher.intake:apply_report",
        (("if report.removed and task.desired_state == TaskState.REMOVE:", "if False:"),),
        ("hangs", "not-converged", "acked-status"),
    ),
    "stop_not_told": Bug(
        "nodes are not told when a task's desired state changes",
        "manager.dispatcher.assignments:key_of",
        (("(task.desired_state, ", "("),),
        ("hangs", "not-converged", "stray", "slot-overlap", "capacity"),
    ),
    "wakes_forgotten": Bug(
        "the control loop forgets when it has to look again",
        "manager.control.controller:Controller.done",
        (("self._set_wake(service_id, tick.wakes.get(service_id, 0))",
          "self._set_wake(service_id, 0)"),),
        ("hangs", "not-converged"),
    ),
    "undo_forgets_claims": Bug(
        "a commit that failed leaves its claims in the node table",
        "manager.control.controller:Controller.undo",
        (("for task_id in tick.touched:", "for task_id in ():"),),
        ("books", "not-converged"),
    ),
    "ended_counts_as_running": Bug(
        "a task's end at its node makes nobody look",
        "manager.control.controller:Controller._observe_step",
        (("            or states.ended(after)\n", ""),),
        ("not-converged", "hangs"),
    ),
    "gang_not_awaited": Bug(
        "a gang begins before all of it are ready",
        "manager.control.jobs:_Step.gang",
        (("if self._counts[Phase.READY] == len(live):", "if self._counts[Phase.READY]:"),),
        ("gang-whole",),
    ),
    "ready_starts": Bug(
        "an agent starts a task that is to wait",
        "agent.task_machine:_advance",
        (("if m.desired < S.RUNNING or not m.equipped:", "if not m.equipped:"),),
        ("not-wanted",),
    ),
    "running_not_adopted": Bug(
        "after a restart of the agent what runs is not known to run",
        "agent.task_machine:_locate",
        (("return replace(m, have=Have.RUNNING, started=found.started)", "return m"),),
        ("runs-twice", "report-lost", "slot-overlap", "host-capacity", "stray", "not-converged",
         "hangs", "defect", "max-attempts"),
    ),
    "desired_goes_back": Bug(
        "an older word of a manager brings a task back",
        "agent.task_machine:_learn",
        (("desired=max(m.desired, desired)", "desired=min(m.desired, desired)"),),
        ("hangs", "not-converged", "stray", "slot-overlap"),
    ),
    "acknowledgement_drops_newer": Bug(
        "an acknowledgement drops reports that came after the batch",
        "agent.outbox:Outbox.acknowledged",
        (("if self._waiting.get(report.task_id) is report:",
          "if self._waiting.get(report.task_id) is not None:"),),
        ("report-lost", "not-converged", "hangs"),
    ),
    "heartbeats_not_heard": Bug(
        "a node that is heard is taken for silent",
        "manager.dispatcher.dispatcher:Dispatcher._hear",
        (("            session.acknowledge_heartbeat(message.heartbeat.sequence)\n",
          "            session.acknowledge_heartbeat(message.heartbeat.sequence)\n"
          "            return\n"),),
        ("silent-node",),
    ),
    "removed_node_not_told": Bug(
        "tasks of a node that was removed stay in the log as they were",
        "manager.control.nodes:follow_nodes",
        (("        if node is None:\n", "        if node is None:\n            continue\n"
          "        if node is None:\n"),),
        ("report-lost", "not-converged", "hangs"),
    ),
}  # fmt: skip


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The bug is in the code meanwhile."""
    bug = BUGS[name]
    function = _function(bug.where)
    before = function.__code__
    function.__code__ = mutated(bug)
    try:
        yield
    finally:
        function.__code__ = before


def mutated(bug: Bug) -> Any:
    """The function's code with the bug in it. Raises LookupError where the source has changed."""
    function = _function(bug.where)
    given = inspect.getsource(function)
    source = textwrap.dedent(given)
    margin = " " * (len(given) - len(given.lstrip()))
    for change in bug.changes:
        old, new = (_moved(text, margin) for text in change)
        if source.count(old) != 1:
            raise LookupError(f"{bug.where} holds {source.count(old)} times: {old!r}")
        source = source.replace(old, new)
    lines = source.splitlines(keepends=True)
    while lines[0].lstrip().startswith("@"):  # a property: its function is replaced
        del lines[0]
    module = importlib.import_module(bug.where.partition(":")[0])
    made: dict[str, Any] = {}
    code = compile(
        "from __future__ import annotations\n" + "".join(lines), module.__file__ or "", "exec"
    )
    exec(code, dict(vars(module)), made)
    found = next(v for k, v in made.items() if isinstance(v, FunctionType))
    errors_of = found.__code__.co_freevars, function.__code__.co_freevars
    if errors_of[0] != errors_of[1]:
        raise LookupError(f"{bug.where} has other free variables: {errors_of}")
    return found.__code__


def _moved(text: str, margin: str) -> str:
    """A snippet as it stands in a method's source that was moved to the left."""
    return "".join(line.removeprefix(margin) for line in text.splitlines(keepends=True))


def _function(where: str) -> FunctionType:
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    assert isinstance(found, FunctionType), where
    return found


def search(name: str, *, seeds_max: int = SEEDS_MAX) -> tuple[int, Result] | None:
    """Looks for a seed that finds the bug; how many it took."""
    rules = BUGS[name].rules
    with planted(name):
        for seed in range(1, seeds_max + 1):
            result = run(draw(seed, nodes=20, minutes=10))
            if result.violation is not None and result.violation.rule in rules:
                return seed, result
            if result.violation is not None:
                print(f"  {name}: seed {seed} broke another rule: {str(result.violation)[:200]}")
    return None


def main(names: list[str]) -> int:
    missed = 0
    for name in names or sorted(BUGS):
        begun_s = time.process_time()
        found = search(name)
        spent_s = time.process_time() - begun_s
        if found is None:
            missed += 1
            print(f"{name}: MISSED by {SEEDS_MAX} seeds, {spent_s:.0f} s", flush=True)
        else:
            seeds, result = found
            assert result.violation is not None
            print(
                f"{name}: {result.violation.rule} with seed {seeds}, {spent_s:.1f} s CPU: "
                f"{result.violation.text[:110]}",
                flush=True,
            )
    print(f"planted={len(names or BUGS)} found={len(names or BUGS) - missed} missed={missed}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
