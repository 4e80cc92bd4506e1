"""Large services rest between two looks."""

from __future__ import annotations

from manager.control.controller import Controller
from manager.control.pace import REST_NS_MAX, SHARE, SMALL, TASK_NS, Rests, rest_ns
from manager.store import Draft, Tables
from swarm.clock import SECOND_NS
from swarm.ids import seeded_rng
from swarm.v1 import (
    ContainerSpec,
    Replicated,
    Service,
    ServiceMode,
    ServiceRevision,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)

NOW_NS = 1_700_000_000 * SECOND_NS


def running(replicas: int, *, at_ns: int) -> Draft:
    """A service all of whose tasks run, where no node is."""
    draft = Draft(Tables(), now_ns=at_ns)
    spec = ServiceSpec(
        name="web",
        task=TaskSpec(container=ContainerSpec(image="web:1")),
        mode=ServiceMode(replicated=Replicated(replicas=replicas)),
    )
    draft.put(Service(id="s", spec=spec, spec_version=1))
    draft.put(ServiceRevision(id="s.1", service_id="s", spec_version=1, spec=spec))
    for i in range(replicas):
        draft.put(
            Task(
                id=f"t{i:05d}",
                service_id="s",
                spec_version=1,
                slot=i + 1,
                desired_state=TaskState.RUNNING,
                status=TaskStatus(state=TaskState.PENDING, err="no node"),
            )
        )
    return draft


def looked_at(replicas: int) -> Controller:
    """A controller that has just looked at the service, whose tasks have changed since."""
    controller = Controller(seeded_rng(1))
    draft = running(replicas, at_ns=NOW_NS)
    controller.reset(draft)
    assert controller.tick(draft).services == ("s",)
    controller.done()
    controller.dirty.add("s")
    return controller


def test_large_service_is_looked_at_again_when_it_has_rested() -> None:
    replicas = 2 * SMALL
    controller = looked_at(replicas)
    rested_ns = NOW_NS + rest_ns(replicas)
    assert not controller.has_work(rested_ns - 1)
    assert controller.next_wake_ns() == rested_ns
    assert controller.tick(running(replicas, at_ns=rested_ns - 1)).services == ()
    controller.done()
    assert controller.dirty == {"s"}, "what has changed is not forgotten"
    assert controller.has_work(rested_ns)
    assert controller.tick(running(replicas, at_ns=rested_ns)).services == ("s",)


def test_small_service_does_not_rest() -> None:
    controller = looked_at(SMALL - 1)
    assert controller.has_work(NOW_NS)
    assert controller.tick(running(SMALL - 1, at_ns=NOW_NS)).services == ("s",)


def test_new_leader_rests_nothing() -> None:
    controller = looked_at(2 * SMALL)
    controller.reset(running(2 * SMALL, at_ns=NOW_NS))
    assert controller.has_work(NOW_NS)


def test_rest_is_a_share_of_what_a_look_costs_and_has_an_end() -> None:
    assert rest_ns(SMALL) == (SHARE - 1) * TASK_NS * SMALL
    assert rest_ns(10**6) == REST_NS_MAX


def test_service_that_need_not_rest_any_more_does_not() -> None:
    rests = Rests()
    rests.begin("s", NOW_NS)
    assert not rests.over("s", NOW_NS - 1)
    rests.begin("s", 0)
    assert rests.over("s", NOW_NS - 1)
    assert rests.next_ns(["s"]) is None
