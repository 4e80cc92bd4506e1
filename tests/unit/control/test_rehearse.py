"""The rehearsal against the loop itself: what it says becomes true, and what it is asked of stays as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

from msgspec import structs

from manager.control import rehearse
from manager.store import Draft
from swarm.ids import seeded_rng
from swarm.v1 import (
    Availability,
    Dependency,
    EndpointSpec,
    NodeState,
    Placement,
    PortConfig,
    Service,
    ServicePlacement,
    ServiceRevision,
    Task,
    UpdateConfig,
    UpdateState,
)
from tests.unit.control.world import (
    CPU,
    GIB,
    GLOBAL,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)


def draft_with(world: World, *objects: Any) -> Draft:
    draft = world.draft()
    for o in objects:
        draft.put(o)
    return draft


def new_service(name: str = "web", **fields: Any) -> tuple[Service, ServiceRevision]:
    spec = make_spec(name, **fields)
    service = Service(id=f"s-{name}", spec=spec, spec_version=1, task_version=1)
    revision = ServiceRevision(id=f"s-{name}.1", service_id=service.id, spec_version=1, spec=spec)
    return service, revision


def next_version(world: World, service_id: str, **fields: Any) -> tuple[Service, ServiceRevision]:
    old = world.service(service_id)
    assert old.spec is not None
    spec = make_spec(old.spec.name, **fields)
    number = old.spec_version + 1
    service = structs.replace(
        old,
        spec=spec,
        spec_version=number,
        previous_spec_version=old.spec_version,
        task_version=number,
        update_status=None,
    )
    revision = ServiceRevision(
        id=f"{service_id}.{number}", service_id=service_id, spec_version=number, spec=spec
    )
    return service, revision


def placement(world: World, draft: Draft, service_id: str = "s-web") -> ServicePlacement:
    found = rehearse(draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=[service_id])
    assert found.settled
    return found.placement(service_id)


def where(found: ServicePlacement) -> dict[str, int]:
    return {n.hostname: n.tasks for n in found.nodes}


def test_new_tasks_are_spread_and_the_view_stays_as_it_was():
    world = World(3)
    draft = draft_with(world, *new_service(replicas=4))
    before = draft.changes()
    found = placement(world, draft)
    assert (found.kept, found.created, found.stopped) == (0, 4, 0)
    assert list(where(found).items()) == [("n1", 2), ("n2", 1), ("n3", 1)]
    assert draft.changes() == before
    assert not list(draft.all(Task))


def test_tasks_without_room_stay_pending_with_the_reason_and_whether_any_node_could():
    world = World(2)
    draft = draft_with(
        world,
        *new_service("web", replicas=4, memory=5 * GIB),
        *new_service("big", replicas=1, memory=100 * GIB),
    )
    found = rehearse(
        draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-web", "s-big"]
    )
    web, big = found.placement("s-web"), found.placement("s-big")
    assert where(web) == {"n1": 1, "n2": 1}
    assert [(p.tasks, p.never) for p in web.pending] == [(2, False)]
    assert "short of memory" in web.pending[0].reason
    assert [(p.tasks, p.never) for p in big.pending] == [(1, True)]


def test_scaling_keeps_what_runs():
    world = World(3)
    world.create(make_spec(replicas=2))
    world.settle()
    service = world.service("s-web")
    spec = make_spec(replicas=3)
    draft = draft_with(world, structs.replace(service, spec=spec))
    found = placement(world, draft)
    assert (found.kept, found.created, found.stopped) == (2, 1, 0)
    assert where(found) == {"n3": 1}


def test_a_roll_out_is_gone_through_to_its_end_whatever_its_delays():
    world = World(3)
    world.create(make_spec(replicas=6))
    world.settle()
    update = UpdateConfig(parallelism=1, delay_ns=600 * SECOND, monitor_ns=60 * SECOND)
    draft = draft_with(
        world, *next_version(world, "s-web", replicas=6, image="web:2", update=update)
    )
    found = rehearse(draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-web"])
    assert found.settled
    web = found.placement("s-web")
    assert (web.kept, web.created, web.stopped) == (0, 6, 6)
    assert where(web) == {"n1": 2, "n2": 2, "n3": 2}


def test_a_job_that_runs_anew_stops_nothing():
    world = World(1)
    world.create(make_spec(mode=job(2)))
    world.settle()
    for task in world.running("s-web"):
        world.report(task, S.COMPLETE)
    world.settle()
    service, revision = next_version(world, "s-web", image="web:2", mode=job(2))
    again = structs.replace(service, job_iteration=1)
    found = placement(world, draft_with(world, again, revision))
    assert (found.kept, found.created, found.stopped) == (0, 2, 0)


def test_a_removed_service_gives_its_room_to_who_waits_for_it():
    world = World(1)
    world.create(make_spec("old", replicas=1, cpu=4 * CPU))
    world.settle()
    world.create(make_spec("late", replicas=1, cpu=4 * CPU))
    world.settle()
    assert not world.running("s-late")
    draft = draft_with(
        world,
        structs.replace(world.service("s-old"), pending_delete=True),
        *new_service("web", replicas=1, cpu=4 * CPU),
    )
    found = rehearse(
        draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-old", "s-web"]
    )
    assert found.placement("s-old") == ServicePlacement(stopped=1)
    assert found.placement("s-late").kept == 1
    # Who has waited longer comes first.
    assert found.placement("s-web").pending[0].tasks == 1


def test_nodes_that_are_down_or_drained_take_nothing():
    world = World(3)
    world.set_state("n1", NodeState.DOWN)
    world.set_availability("n2", Availability.DRAIN)
    found = placement(world, draft_with(world, *new_service(replicas=2)))
    assert where(found) == {"n3": 2}


def test_gates_open_as_tasks_come_to_run_and_those_that_do_not_are_told():
    world = World(2)
    chain = [
        new_service("db", replicas=2),
        new_service(
            "web",
            replicas=2,
            depends_on=(Dependency(service="db", condition="service_healthy", required=True),),
        ),
        new_service("batch", mode=job(2)),
        new_service(
            "after",
            depends_on=(
                Dependency(
                    service="batch", condition="service_completed_successfully", required=True
                ),
            ),
        ),
        new_service("stuck", replicas=1, memory=100 * GIB),
        new_service(
            "behind",
            depends_on=(Dependency(service="stuck", condition="service_started", required=True),),
        ),
    ]
    draft = draft_with(world, *(o for pair in chain for o in pair))
    ids = [service.id for service, _ in chain]
    found = rehearse(draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=ids)
    assert found.settled
    assert found.placement("s-web").created == 2
    assert found.placement("s-batch").created == 2
    assert found.placement("s-after").created == 1
    behind = found.placement("s-behind")
    assert behind.created == 0
    assert len(behind.waits) == 1 and "stuck" in behind.waits[0]
    assert found.placement("s-web").waits == ()


def test_a_global_service_comes_to_each_node_that_fits():
    world = World(3)
    world.label("n2", zone="a")
    draft = draft_with(
        world,
        *new_service(mode=GLOBAL, placement=Placement(constraints=("node.labels.zone == a",))),
    )
    assert where(placement(world, draft)) == {"n2": 1}


def test_a_roll_out_of_very_many_tasks_is_played_in_larger_steps():
    world = World(0)
    for i in range(20):
        world.put(make_node(f"n{i}", cpu=1000 * CPU, memory=1000 * GIB))
    world.create(make_spec(replicas=2_000))
    world.settle()
    draft = draft_with(world, *next_version(world, "s-web", replicas=2_000, image="web:2"))
    found = placement(world, draft)
    assert (found.created, found.stopped) == (2_000, 2_000)
    assert set(where(found).values()) == {100}


def test_what_is_under_way_elsewhere_goes_on():
    world = World(2)
    world.create(make_spec("other", replicas=4, update=UpdateConfig(parallelism=1)))
    world.settle()
    world.update("s-other", make_spec("other", replicas=4, image="other:2"))
    world.tick()
    found = rehearse(
        draft_with(world, *new_service()),
        now_ns=world.clock.now_ns(),
        rng=seeded_rng(2),
        services=["s-web"],
    )
    assert found.settled
    other = found.placement("s-other")
    # The first new task was there before.
    assert (other.kept, other.created, other.stopped) == (1, 3, 3)


def test_two_rehearsals_of_the_same_change_agree_though_their_ids_differ():
    world = World(4)
    pairs = [new_service(name, replicas=3) for name in ("c", "a", "b")]
    outcomes = []
    for seed, suffix in ((1, "x"), (2, "a")):
        renamed = [
            (
                structs.replace(s, id=f"{suffix}{i}{s.id}"),
                structs.replace(r, id=f"{suffix}{i}{s.id}.1", service_id=f"{suffix}{i}{s.id}"),
            )
            for i, (s, r) in enumerate(pairs if seed == 1 else reversed(pairs))
        ]
        draft = draft_with(world, *(o for pair in renamed for o in pair))
        found = rehearse(
            draft,
            now_ns=world.clock.now_ns(),
            rng=seeded_rng(seed),
            services=[s.id for s, _ in renamed],
        )
        outcomes.append({s.spec.name: found.placement(s.id) for s, _ in renamed if s.spec})
    assert outcomes[0] == outcomes[1]


def test_the_loop_does_what_the_rehearsal_said():
    world = World(3)
    world.create(make_spec("a", replicas=5))
    world.create(make_spec("b", replicas=2, cpu=CPU))
    world.settle()
    old = {t.id for t in world.tables.all(Task)}
    change = [
        *next_version(world, "s-a", replicas=4, image="a:2", update=UpdateConfig(parallelism=2)),
        *next_version(
            world,
            "s-b",
            replicas=3,
            image="b:2",
            update=UpdateConfig(order="start-first", parallelism=1),
        ),
        *new_service("c", replicas=2),
    ]
    ids = ["s-a", "s-b", "s-c"]
    found = rehearse(
        draft_with(world, *change), now_ns=world.clock.now_ns(), rng=seeded_rng(9), services=ids
    )
    assert found.settled
    world.put(*change)
    world.pass_time(10)
    for service_id in ids:
        status = world.service(service_id).update_status
        assert status is None or status.state == UpdateState.COMPLETED
        said = found.placement(service_id)
        made = [t for t in world.running(service_id) if t.id not in old]
        assert said.created == len(made)
        assert where(said) == Counter(t.node_id for t in made)
        assert all(state_of(t) == S.RUNNING for t in made)


def test_tasks_that_a_gate_holds_say_so():
    world = World(2)
    world.create(make_spec("filler", mode=GLOBAL, memory=GIB))
    world.create(make_spec("db", replicas=1))
    gate = (Dependency(service="db", condition="service_started", required=True),)
    world.create(make_spec("web", replicas=1, depends_on=gate))
    world.settle()
    # Nothing of db runs any more, nor can it come back as long as the fillers run.
    draft = draft_with(
        world,
        *next_version(world, "s-db", replicas=1, image="db:2", memory=8 * GIB),
        structs.replace(world.service("s-web"), spec=make_spec("web", replicas=3, depends_on=gate)),
    )
    found = rehearse(
        draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-db", "s-web"]
    )
    assert found.settled
    web = found.placement("s-web")
    assert web.kept == 1
    waiting = [p.reason for p in web.pending] + list(web.waits)
    assert waiting and all("db" in text for text in waiting)
    assert not any(p.never for p in web.pending)


def test_an_update_that_no_node_can_take_is_foreseen_to_fail():
    world = World(2)
    world.create(make_spec("web", replicas=2))
    world.settle()
    draft = draft_with(world, *next_version(world, "s-web", replicas=2, memory=100 * GIB))
    found = rehearse(draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-web"])
    said = found.placement("s-web")
    assert (said.kept, said.created, found.settled) == (2, 0, True)
    (failure,) = said.waits
    assert failure.startswith(
        "update paused: no progress for 30s: the new version can never be placed: "
    )


def test_an_update_that_would_be_rolled_back_is_foreseen():
    world = World(2)
    back = UpdateConfig(parallelism=1, failure_action="rollback")
    world.create(make_spec("web", replicas=2, update=back))
    world.settle()
    draft = draft_with(
        world, *next_version(world, "s-web", replicas=2, memory=100 * GIB, update=back)
    )
    found = rehearse(draft, now_ns=world.clock.now_ns(), rng=seeded_rng(2), services=["s-web"])
    said = found.placement("s-web")
    assert (said.kept, said.created) == (2, 0)
    assert said.waits == ("the update would be rolled back, for it would find no place in time",)


def test_slots_that_have_to_stop_first_are_foreseen() -> None:
    world = World(3)
    port = PortConfig(target_port=80, published_port=8000, publish_mode="host")
    update = UpdateConfig(parallelism=0, order="start-first")
    endpoint = EndpointSpec(ports=(port,))
    fields: dict[str, Any] = {"mode": GLOBAL, "endpoint": endpoint, "update": update}
    sid = world.create(make_spec("edge", **fields))
    world.settle()
    draft = draft_with(world, *next_version(world, sid, image="edge:2", **fields))
    found = placement(world, draft, sid)
    assert (found.kept, found.created, found.stopped) == (0, 3, 3)
    assert not found.pending and not found.waits
