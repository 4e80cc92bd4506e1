"""What an agent's report may change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from manager.dispatcher.intake import apply_report, came_up, went_down
from manager.store import Draft, Tables
from swarm.states import LEGAL, may_follow
from swarm.v1 import (
    ContainerStatus,
    NetworkAttachment,
    Node,
    NodeDescription,
    NodeState,
    NodeStatus,
    PortConfig,
    RuntimeProblem,
    Task,
    TaskReport,
    TaskState,
    TaskStatus,
)
from tests.unit.dispatcher.tables import NOW_NS, task, view

S = TaskState


def report(state: TaskState, *, later_ns: int = 1, task_id: str = "a") -> TaskReport:
    return TaskReport(
        task_id=task_id, status=TaskStatus(state=state, timestamp_ns=NOW_NS + later_ns)
    )


def stored(draft: Draft) -> Task:
    found = draft.get(Task, "a")
    assert found is not None
    return found


def state(draft: Draft) -> TaskState:
    status = stored(draft).status
    assert status is not None
    return status.state


@pytest.mark.parametrize("before", sorted(LEGAL))
@pytest.mark.parametrize("after", sorted(LEGAL))
def test_only_legal_transitions_are_entered(before: TaskState, after: TaskState) -> None:
    draft = view(task("a", state=before))
    apply_report(draft, "n", report(after))
    assert state(draft) == (after if may_follow(before, after) else before)


def test_other_nodes_task_is_not_touched() -> None:
    draft = view(task("a", node_id="m"))
    assert apply_report(draft, "n", report(S.FAILED)) == "unknown"
    assert state(draft) == S.ASSIGNED


def test_unknown_task_is_not_made() -> None:
    draft = view()
    assert apply_report(draft, "n", report(S.RUNNING)) == "unknown"
    assert draft.count(Task) == 0


@pytest.mark.parametrize("desired", [S.RUNNING, S.SHUTDOWN])
def test_removed_counts_only_where_it_was_desired(desired: TaskState) -> None:
    removed = structs.replace(report(S.SHUTDOWN), removed=True)
    draft = view(task("a", desired=desired))
    apply_report(draft, "n", removed)
    assert draft.get(Task, "a") is not None
    draft = view(task("a", desired=S.REMOVE))
    assert apply_report(draft, "n", removed) == "removed"
    assert draft.get(Task, "a") is None


def test_same_report_twice_changes_nothing_the_second_time() -> None:
    draft = view(task("a"))
    assert apply_report(draft, "n", report(S.RUNNING)) == "applied"
    assert apply_report(draft, "n", report(S.RUNNING)) == "same"


def test_newer_facts_of_the_same_state_are_entered_older_ones_not() -> None:
    draft = view(task("a", state=S.RUNNING))
    status = TaskStatus(
        state=S.RUNNING, timestamp_ns=NOW_NS + 5, container=ContainerStatus(container_id="c")
    )
    assert apply_report(draft, "n", TaskReport(task_id="a", status=status)) == "applied"
    assert apply_report(draft, "n", report(S.RUNNING, later_ns=1)) == "illegal"
    assert stored(draft).status == status


def test_addresses_are_filled_in_and_the_rest_of_an_attachment_kept() -> None:
    attached = NetworkAttachment(network_id="net", aliases=("web",))
    draft = view(structs.replace(task("a"), networks=(attached,)))
    told = NetworkAttachment(network_id="net", addresses=("10.0.0.2/24",))
    port = PortConfig(target_port=80, published_port=49153, publish_mode="host")
    apply_report(
        draft, "n", structs.replace(report(S.RUNNING), networks=(told,), host_ports=(port,))
    )
    assert stored(draft).networks == (structs.replace(attached, addresses=("10.0.0.2/24",)),)
    assert stored(draft).host_ports == (port,)
    apply_report(draft, "n", report(S.FAILED, later_ns=2))
    assert stored(draft).host_ports == (port,)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(LEGAL)), st.integers(0, 50), st.booleans())),
    st.sampled_from([S.RUNNING, S.REMOVE]),
)
def test_states_only_grow_whatever_is_reported(
    reports: list[tuple[TaskState, int, bool]], desired: TaskState
) -> None:
    draft = view(task("a", desired=desired))
    for reported, later_ns, removed in reports:
        before = draft.get(Task, "a")
        if before is None:
            return
        message = structs.replace(report(reported, later_ns=later_ns), removed=removed)
        apply_report(draft, "n", message)
        after = draft.get(Task, "a")
        if after is None:
            assert removed and desired == S.REMOVE
        else:
            assert before.status is not None and after.status is not None
            assert may_follow(before.status.state, after.status.state)


def test_node_that_comes_up_again_keeps_its_time_and_loses_its_message() -> None:
    down = Node(
        id="n",
        description=NodeDescription(hostname="old"),
        status=NodeStatus(state=NodeState.DOWN, message="missed", addr="1.2.3.4", since_ns=1),
    )
    up = came_up(
        down,
        50,
        description=NodeDescription(hostname="new"),
        addr="",
        manager_id="m",
        session_id="s1",
    )
    assert up.status == NodeStatus(
        state=NodeState.READY, addr="1.2.3.4", since_ns=50, manager_id="m", session_id="s1"
    )
    assert up.description == NodeDescription(hostname="new")
    again = came_up(up, 90, description=None, addr="5.6.7.8", manager_id="k", session_id="s2")
    assert again.status == NodeStatus(
        state=NodeState.READY, addr="5.6.7.8", since_ns=50, manager_id="k", session_id="s2"
    )
    assert again.description == up.description


def test_first_reason_for_being_down_stays() -> None:
    node = Node(id="n", status=NodeStatus(state=NodeState.READY, since_ns=1))
    left = went_down(node, 5, "left")
    assert went_down(left, 9, "missed") == left
    assert left.status == NodeStatus(state=NodeState.DOWN, message="left", since_ns=5)


def test_since_when_a_runtime_does_not_answer_is_on_managers_clocks_and_stays() -> None:
    def said(*causes: str) -> NodeDescription:
        problems = (
            RuntimeProblem(runtimes=("docker",), message="no", since_ns=1, cause=c) for c in causes
        )
        return NodeDescription(hostname="n", runtime_problems=tuple(problems))

    def heard(node: Node, at_ns: int, description: NodeDescription | None) -> Node:
        return came_up(
            node, at_ns, description=description, addr="", manager_id="m", session_id="s"
        )

    def since(node: Node) -> dict[str, int]:
        assert node.status is not None
        return node.status.unresponsive_since_ns

    node = heard(Node(id="n"), 10, said("disk_full"))
    assert since(node) == {}
    node = heard(node, 20, said("disk_full", "engine_unresponsive"))
    node = heard(node, 30, said("engine_unresponsive"))
    node = heard(went_down(node, 35, "silent"), 40, None)
    assert since(node) == {"docker": 20}
    assert since(heard(node, 50, said())) == {}


@pytest.mark.parametrize(
    ("earlier_s", "outcome"), [(0, "applied"), (1, "illegal"), (299, "illegal"), (3600, "applied")]
)
def test_a_node_whose_clock_was_set_back_is_heard_all_the_same(
    earlier_s: int, outcome: str
) -> None:
    """A report that is a little older comes late from a session with another manager."""
    second = 1_000_000_000
    tables = Tables()
    draft = Draft(tables, now_ns=5)
    at_ns = 10**18
    before = TaskStatus(state=TaskState.RUNNING, timestamp_ns=at_ns)
    draft.put(Task(id="t", node_id="n", status=before))
    later = TaskStatus(
        state=TaskState.RUNNING, timestamp_ns=at_ns - earlier_s * second, message="new"
    )
    assert apply_report(draft, "n", TaskReport(task_id="t", status=later)) == outcome


def test_when_a_task_first_ran_is_on_a_manager_s_clock() -> None:
    draft = Draft(Tables(), now_ns=5)
    draft.put(Task(id="t", node_id="n", status=TaskStatus(state=TaskState.PREPARING)))
    for now_ns, state in ((6, TaskState.STARTING), (7, TaskState.RUNNING), (9, TaskState.FAILED)):
        draft = Draft(_applied(draft), now_ns=now_ns)
        status = TaskStatus(state=state, timestamp_ns=10**18)
        assert apply_report(draft, "n", TaskReport(task_id="t", status=status)) == "applied"
        task = draft.get(Task, "t")
        assert task is not None
        assert task.running_since_ns == (7 if now_ns >= 7 else 0)


def _applied(draft: Draft) -> Tables:
    tables = Tables()
    tables.apply(1, [(c.kind, c.id, c.new) for c in draft.changes()])
    return tables
