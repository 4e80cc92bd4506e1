"""Liveness: what has come about some minutes after the faults have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manager.control import service_status
from manager.control.tally import Tally
from manager.control.template import UPDATING, mode_of
from swarm import states
from swarm.clock import SECOND_NS
from swarm.v1 import JobState, Node, NodeState, Service, Task, TaskState
from tests.sim.checks import is_open
from tests.sim.host import BEHAVIOURS
from tests.sim.tasks import name_of, state_of

if TYPE_CHECKING:
    from tests.sim.cluster import Cluster

# Images of which a service may go on failing, or only now and then run.
RESTLESS = frozenset({"crash", "flaky", "sick", "quit", "away", "missing", "slow", "jobfail"})
REPORT_S = 10.0  # from the end of a container until the log has it, at most


def judge(cluster: Cluster) -> None:
    """The end of a run; the first that does not hold is the violation."""
    if cluster.leader() is None:
        cluster.violate("no-leader", "no manager leads")
        return
    _nodes(cluster)
    _strays(cluster)
    _services(cluster)


def _nodes(cluster: Cluster) -> None:
    model = cluster.safety.model
    for agent in cluster.agents:
        node = model.get(Node, agent.node_id)
        if node is None or node.revoked or agent.removed:
            continue
        if agent.session is None or not agent.session.connected:
            why = agent.session.problem if agent.session else "it has no process"
            cluster.violate("node-lost", f"{agent.host_name} has no session: {why}")
        elif node.status is None or node.status.state != NodeState.READY:
            cluster.violate("node-lost", f"{agent.host_name} has a session, and is not ready")


def _services(cluster: Cluster) -> None:
    model = cluster.safety.model
    now_ns = cluster.clock.now_ns()
    for service in sorted(model.all(Service), key=lambda s: s.id):
        spec = service.spec
        assert spec is not None
        if service.pending_delete:
            left = [name_of(model, t) for t in model.by(Task, "service", service.id)]
            cluster.violate("hangs", f"{spec.name} is not removed yet: {', '.join(left)[:300]}")
            return
        job = service.job_status
        if job is not None and job.state in (JobState.COMPLETE, JobState.FAILED):
            continue
        status = service_status(model, service, now_ns, None, Tally.of(model, service, None))
        if status.converged or status.stuck:
            continue
        image = spec.task.container.image if spec.task and spec.task.container else ""
        behaviours = {image.rpartition("-")[2]} | _behaviours(cluster, service)
        restless = bool(behaviours & RESTLESS & BEHAVIOURS.keys())
        waiting = [
            t for t in model.by(Task, "service", service.id)
            if state_of(t) < TaskState.ASSIGNED and states.wanted(t.desired_state)
        ]  # fmt: skip
        explained = bool(waiting) and all(t.status and t.status.err for t in waiting)
        update = service.update_status
        if update is not None and update.state in UPDATING:
            since_ns = max(update.started_at_ns, update.resumed_at_ns, update.progress_at_ns)
            old = now_ns - since_ns > 180 * SECOND_NS
            if old and not restless and not explained:
                cluster.violate("hangs", f"{spec.name}: {update.message}; {status.reasons}")
            continue
        if restless or explained or _keeps_old(cluster, service):
            continue
        if not status.reasons:
            cluster.violate("not-converged", f"{spec.name} is not converged and says no reason")
        elif update is None or (
            "PAUSED" not in update.state.name and update.state.name != "ROLLBACK_COMPLETED"
        ):
            cluster.violate("not-converged", f"{spec.name}: {'; '.join(status.reasons)[:400]}")


def _keeps_old(cluster: Cluster, service: Service) -> bool:
    """A node that takes no new tasks keeps the old one, where each node has its own."""
    if not mode_of(service.spec).per_node:
        return False
    return any(
        n is not None and not is_open(n)
        for n in (cluster.safety.model.get(Node, a.node_id) for a in cluster.agents)
    )


def _behaviours(cluster: Cluster, service: Service) -> set[str]:
    found = set()
    for agent in cluster.agents:
        for box in agent.engine.boxes.values():
            task = box.work.assignment.task
            if task is not None and task.service_id == service.id:
                found.add(box.behaviour)
    return found


def _strays(cluster: Cluster) -> None:
    """What runs is what is wanted, and what the log says runs does."""
    model = cluster.safety.model
    running: set[str] = set()
    for agent in cluster.agents:
        for box in agent.engine.running():
            running.add(box.work.task_id)
            task = model.get(Task, box.work.task_id)
            if task is None:
                cluster.violate(
                    "stray", f"{box.work.task_id} runs on {agent.host_name}, and is not in the log"
                )
    for task in sorted(model.all(Task), key=lambda t: t.id):
        if state_of(task) == TaskState.RUNNING and states.wanted(task.desired_state):
            since_s = cluster.safety.machines.ended_s.get(task.id, 0.0)
            if task.id not in running and cluster.loop.now_s - since_s > REPORT_S:
                cluster.violate(
                    "report-lost", f"{name_of(model, task)} is running in the log, and does not"
                )
