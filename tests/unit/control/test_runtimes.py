"""Runtimes that do not answer, or take no new tasks, on nodes that are up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.control import Controller
from manager.control.slots import ENGINE_GRACE_NS
from manager.dispatcher.intake import ENGINE_UNRESPONSIVE, came_up, went_down
from manager.scheduler import NodeTable, account, explain
from swarm import states
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    JobSpec,
    Node,
    NodeState,
    RuntimeProblem,
    Service,
    Task,
    UpdateConfig,
)
from tests.unit.control.world import GLOBAL, SECOND, S, World, job, make_spec, state_of

GRACE_S = ENGINE_GRACE_NS / SECOND


def say(world: World, node_id: str, *problems: RuntimeProblem) -> None:
    """What the node tells of its runtimes, as the dispatcher enters it."""
    node = world.node(node_id)
    assert node.description is not None
    description = structs.replace(node.description, runtime_problems=problems)
    world.put(
        came_up(
            node,
            world.clock.now_ns(),
            description=description,
            addr="10.0.0.1",
            manager_id="m",
            session_id=str(world.clock.now_ns()),
        )
    )


def hang(world: World, *node_ids: str, runtimes: tuple[str, ...] = ("docker",)) -> None:
    """The engine hangs: its tasks run on, and nobody hears of them."""
    for node_id in node_ids:
        world.frozen.add(node_id)
        # The node's clock is wrong.
        problem = RuntimeProblem(
            runtimes=runtimes,
            message="docker does not answer: timed out",
            since_ns=7,
            cause=ENGINE_UNRESPONSIVE,
        )
        say(world, node_id, problem)


def answer(world: World, *node_ids: str) -> None:
    for node_id in node_ids:
        world.frozen.discard(node_id)
        say(world, node_id)


def fill(world: World, node_id: str) -> None:
    full = RuntimeProblem(
        runtimes=("docker", "process"), message="no space is left", cause="disk_full"
    )
    say(world, node_id, full)


def on(world: World, sid: str, node_id: str) -> list[Task]:
    return [t for t in world.live(sid) if t.node_id == node_id]


def new_leader(world: World, seed: int = 5) -> None:
    world.controller = Controller(seeded_rng(seed))
    world.controller.reset(world.tables)


# ---------------------------------------------------------------- placing


def test_a_node_takes_no_new_tasks_of_a_runtime_that_does_not_answer() -> None:
    world = World(2)
    hang(world, "n1")
    docker = world.create(make_spec("web", replicas=4))
    process = world.create(make_spec("host", replicas=4, runtime="process"))
    world.settle()
    assert {t.node_id for t in world.live(docker)} == {"n2"}
    assert {t.node_id for t in world.live(process)} == {"n1", "n2"}, "its others go on"


def test_what_runs_where_the_disk_is_full_runs_on_and_nothing_new_comes() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=4))
    world.settle()
    before = {t.id for t in world.running(sid)}
    fill(world, "n1")
    world.pass_time(300, step=20)
    assert {t.id for t in world.running(sid)} == before
    world.scale(sid, 8)
    world.settle()
    assert len(on(world, sid, "n1")) == 2
    assert len(on(world, sid, "n2")) == 6
    say(world, "n1")
    world.scale(sid, 10)
    world.settle()
    assert len(on(world, sid, "n1")) == 4


def test_why_a_task_waits_names_the_runtime_and_what_is_wrong_with_it() -> None:
    world = World(2)
    hang(world, "n1")
    fill(world, "n2")
    sid = world.create(make_spec())
    world.settle()
    (task,) = world.live(sid)
    assert task.status is not None
    assert task.status.err == (
        "no suitable node (1 node takes no new tasks now (docker does not answer: timed out); "
        "1 node takes no new tasks now (docker: no space is left))"
    )
    found = explain(NodeTable.build(world.tables), world.tables, task)
    assert [(f.filter, f.nodes, f.never_nodes) for f in found.filters] == [
        ("runtime", 1, 0),
        ("runtime", 1, 0),
    ]
    assert not found.never
    assert found.hint == "see what is wrong with the runtime on these nodes, or join another node"
    assert not world.status(sid).stuck
    answer(world, "n1")
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n1"], "who waits hears of it"


def test_any_runtime_that_would_do_is_enough() -> None:
    world = World(1)
    node = world.node("n1")
    assert node.description is not None
    world.put(
        structs.replace(
            node,
            description=structs.replace(node.description, runtimes=("docker", "podman", "process")),
        )
    )
    hang(world, "n1")
    table = NodeTable.build(world.tables)
    for runtime, fits in (("", 1), ("docker", 0), ("podman", 1), ("process", 1)):
        need = table.requirement_of_spec(make_spec(runtime=runtime))
        assert account(table, need, "s").nodes_fit == fits, runtime


# ---------------------------------------------------------------- the grace


def test_tasks_are_not_lost_at_once() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=3))
    world.settle()
    before = {t.id for t in world.running(sid)}
    hang(world, "n1")
    world.pass_time(GRACE_S - 1, step=10)
    assert {t.id for t in world.live(sid)} == before
    status = world.status(sid)
    assert not status.stuck
    assert status.reasons == (
        "1 of 3 replicas runs where the runtime does not answer (n1); others take over in 1s",
    )
    answer(world, "n1")
    world.pass_time(300, step=20)
    assert {t.id for t in world.live(sid)} == before
    assert world.status(sid).converged


def test_after_the_grace_others_take_over_and_the_old_ones_stop_when_it_is_back() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=3))
    world.settle()
    (old,) = on(world, sid, "n1")
    hang(world, "n1")
    world.pass_time(GRACE_S + 10, step=5)
    assert len(world.running(sid)) == 3
    assert not on(world, sid, "n1")
    kept = world.tables.get(Task, old.id)
    assert kept is not None and (state_of(kept), kept.desired_state) == (S.RUNNING, S.SHUTDOWN)
    assert kept.stop_message
    assert world.status(sid).converged, "nobody waits for what cannot stop"
    others = {t.id for t in world.running(sid)}
    answer(world, "n1")
    world.pass_time(10)
    assert {t.id for t in world.running(sid)} == others
    kept = world.tables.get(Task, old.id)
    assert kept is not None and state_of(kept) == S.SHUTDOWN


def test_a_new_leader_goes_on_with_the_grace() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    hang(world, "n1")
    world.pass_time(GRACE_S - 10, step=10)
    new_leader(world)
    world.pass_time(8, step=1)
    assert len(on(world, sid, "n1")) == 1
    world.pass_time(5, step=1)
    assert not on(world, sid, "n1")


def test_what_the_node_says_besides_does_not_begin_the_grace_anew() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    for _ in range(13):
        hang(world, "n1")
        world.pass_time(10, step=10)
    assert not on(world, sid, "n1")


def test_tasks_of_other_runtimes_stay() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2, runtime="process"))
    world.settle()
    before = {t.id for t in world.running(sid)}
    hang(world, "n1")
    world.pass_time(GRACE_S + 60, step=20)
    assert {t.id for t in world.running(sid)} == before
    assert world.status(sid).converged


def test_in_a_global_service_there_is_no_elsewhere_so_its_tasks_run_on() -> None:
    world = World(2)
    sid = world.create(make_spec(mode=GLOBAL))
    world.settle()
    before = {t.id for t in world.running(sid)}
    hang(world, "n1")
    world.pass_time(GRACE_S + 60, step=20)
    assert {t.id for t in world.live(sid)} == before
    assert world.status(sid).reasons == (
        "1 of 2 tasks runs where the runtime does not answer (n1)",
    )
    answer(world, "n1")
    world.pass_time(10)
    assert {t.id for t in world.running(sid)} == before


def test_a_job_s_task_is_tried_again_elsewhere() -> None:
    world = World(2)
    sid = world.create(structs.replace(make_spec(mode=job(2)), job=JobSpec()))
    world.settle()
    hang(world, "n1")
    world.pass_time(GRACE_S + 10, step=5)
    assert [t.node_id for t in world.running(sid)] == ["n2", "n2"]
    assert all(not t.restarts_ns for t in world.running(sid)), "that was no failure"


# ---------------------------------------------------------------- with more


def test_a_node_that_goes_down_meanwhile_is_down() -> None:
    world = World(2)
    sid = world.create(make_spec(replicas=2))
    world.settle()
    hang(world, "n1")
    world.pass_time(10)
    world.put(went_down(world.node("n1"), world.clock.now_ns(), "silent"))
    world.settle()
    assert [t.node_id for t in world.running(sid)] == ["n2", "n2"], "at once"
    hang(world, "n1")  # back, and its engine hangs still
    world.settle()
    assert len(world.live(sid)) == 2
    answer(world, "n1")
    world.settle()
    assert len([t for t in world.tasks(sid) if not states.ended(state_of(t))]) == 2


def test_a_service_is_removed_though_an_engine_hangs() -> None:
    world = World(2)
    for spec in (make_spec("web", replicas=2), make_spec("batch", mode=job(2))):
        world.create(spec)
    world.settle()
    hang(world, "n1")
    world.pass_time(5)
    world.remove("s-web")
    world.remove("s-batch")
    world.pass_time(60, step=10)
    assert world.status("s-web").stopping == 1, "it may answer in a moment"
    world.pass_time(60, step=10)
    assert not list(world.tables.all(Service))
    answer(world, "n1")
    world.settle()
    assert not list(world.tables.all(Task))


def test_a_roll_out_does_not_wait_for_an_engine_that_hangs() -> None:
    world = World(3)
    config = UpdateConfig(parallelism=1)
    sid = world.create(make_spec(replicas=3, update=config))
    world.settle()
    hang(world, "n1")
    world.pass_time(GRACE_S + 5, step=10)
    world.update(sid, make_spec(replicas=3, image="web:2", update=config))
    world.pass_time(60, step=1)
    assert [world.image(t) for t in world.running(sid)] == ["web:2"] * 3
    assert all(t.node_id != "n1" for t in world.running(sid))


def test_draining_a_node_whose_engine_hangs_moves_its_tasks() -> None:
    world = World(3)
    sid = world.create(make_spec(replicas=3))
    world.settle()
    hang(world, "n1")
    world.set_availability("n1", Availability.DRAIN)
    world.pass_time(20)
    assert len(world.running(sid)) == 3
    assert not on(world, sid, "n1")


# ---------------------------------------------------------------- whatever happens

EVENTS = st.tuples(
    st.sampled_from(
        ["hang", "answer", "down", "up", "fill", "leader", "crash", "update", "scale", "remove"]
    ),
    st.integers(1, 4),
    st.sampled_from([0.2, 3, 40, 130]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=12), st.sampled_from(["", "start-first"]))
def test_whatever_happens_no_slot_is_doubled_in_the_end_and_none_is_empty(
    events: list[tuple[str, int, float]], order: str
) -> None:
    world = World(4)
    config = UpdateConfig(parallelism=2, order=order)
    sid = world.create(make_spec(replicas=4, update=config))
    world.settle()
    images = 1
    for seed, (event, number, seconds) in enumerate(events):
        node_id = f"n{number}"
        node = world.tables.get(Node, node_id)
        if event == "leader":
            new_leader(world, 100 + seed)
        elif event == "scale":
            world.scale(sid, number)
        elif event == "update":
            images += 1
            spec = world.service(sid).spec
            assert spec is not None and spec.task is not None
            assert spec.task.container is not None
            container = structs.replace(spec.task.container, image=f"web:{images}")
            task_spec = structs.replace(spec.task, container=container)
            world.update(sid, structs.replace(spec, task=task_spec))
        elif event == "crash":
            for task in world.running(sid)[:1]:
                if task.node_id not in world.frozen:
                    world.report(task, S.FAILED, err="no")
        elif node is None:
            continue
        elif event == "hang":
            hang(world, node_id)
        elif event in ("answer", "up"):
            answer(world, node_id)
        elif event == "fill":
            fill(world, node_id)
            world.frozen.discard(node_id)
        elif event == "down":
            world.put(went_down(node, world.clock.now_ns(), "silent"))
        elif node.status and node.status.state == NodeState.DOWN and world.tables.count(Node) > 1:
            world.remove_node(node_id)
        world.pass_time(seconds, step=max(0.5, seconds / 8))
        slots = [t.slot for t in world.live(sid) if state_of(t) == S.RUNNING]
        assert order or len(slots) == len(set(slots))
    for node in list(world.tables.all(Node)):
        answer(world, node.id)
    world.pass_time(800, step=20)
    alive = [t for t in world.tasks(sid) if not states.ended(state_of(t))]
    spec = world.service(sid).spec
    assert spec is not None and spec.mode is not None and spec.mode.replicated is not None
    replicas = spec.mode.replicated.replicas or 0
    assert sorted(t.slot for t in alive) == sorted({t.slot for t in alive})
    assert len(world.running(sid)) == len(alive) == replicas
    world.controller.check_invariants(world.tables)
