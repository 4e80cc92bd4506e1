"""Roll-outs whose tasks fail, lose their places or their nodes on the way."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import structs

from manager.control import versions
from swarm.v1 import (
    Availability,
    EndpointSpec,
    NodeState,
    PortConfig,
    RestartPolicy,
    UpdateState,
)
from tests.unit.control.test_rollout import config, images, spec, started, status
from tests.unit.control.world import GLOBAL, SECOND, S, World, make_node, make_spec, state_of

U = UpdateState
SLOW = RestartPolicy(delay_ns=20 * SECOND)
START = config(order="start-first")
HOST_PORT = EndpointSpec(
    ports=(PortConfig(target_port=80, published_port=8080, publish_mode="host"),)
)


@pytest.mark.parametrize("order", ["stop-first", "start-first"])
def test_one_whose_next_attempt_has_yet_to_be_made_is_not_done(order: str) -> None:
    settings = config(order=order, failure_action="continue", deadline_ns=120 * SECOND)
    world, sid = started(2, update=settings, restart=SLOW)
    for node in ("n1", "n2", "n3"):
        world.refusing[node] = "image_missing"
    world.update(sid, spec(2, image="web:2", update=settings, restart=SLOW))
    for _ in range(11):
        world.pass_time(10)
        assert status(world, sid).state == U.UPDATING
        # The other slot is not begun: one is down, or would be, as it is.
        assert images(world, sid) == ["web:1"] * (1 if order == "stop-first" else 2)
    world.pass_time(20)
    said = status(world, sid)
    assert said.state == U.PAUSED
    assert said.message == (
        "update paused: no progress for 2m0s: 1 of 2 replicas of the new version is waiting to be "
        "restarted: image_missing here"
    )


def test_a_place_that_is_lost_while_the_roll_out_is_paused_holds_nobody_up() -> None:
    world, sid = started(2, nodes=2, update=START, endpoint=HOST_PORT)
    world.update(sid, spec(2, image="web:2", update=START, endpoint=HOST_PORT))
    for _ in range(400):
        world.clock.advance(seconds=0.01)
        world.tick()
        pinned = next((t for t in world.live(sid) if t.node_id and state_of(t) < S.ASSIGNED), None)
        if pinned is not None:
            break
        world.agents()
    assert pinned is not None
    paused = structs.replace(status(world, sid), state=U.PAUSED, message="update paused")
    world.put(structs.replace(world.service(sid), update_status=paused))
    world.set_state(pinned.node_id, NodeState.DOWN)
    world.put(make_node("n3"))
    world.pass_time(10)
    assert images(world, sid) == ["web:1", "web:2"]


def test_nothing_is_stopped_for_an_attempt_that_waits_for_its_delay() -> None:
    settings = config(order="start-first", max_failure_ratio=1.0)
    policy = RestartPolicy(delay_ns=20 * SECOND, max_attempts=9)
    more: dict[str, Any] = {"update": settings, "endpoint": HOST_PORT, "restart": policy}
    world, sid = started(3, nodes=4, **more)
    world.failing.add("web:2")
    world.update(sid, spec(3, image="web:2", **more))
    world.pass_time(3)
    (ended,) = [t for t in world.tasks(sid) if state_of(t) == S.FAILED]
    world.set_availability(ended.node_id, Availability.PAUSE)
    world.set_state(ended.node_id, NodeState.DOWN)
    world.pass_time(15)
    # The one place for a second task is gone, and the next attempt is not due.
    assert images(world, sid) == ["web:1"] * 3
    world.failing.discard("web:2")
    world.pass_time(10)
    (first,) = (t for t in world.running(sid) if t.slot == ended.slot)
    assert world.image(first) == "web:2"
    assert (first.crashes, len(first.restarts_ns)) == (1, 1)


def test_a_rollback_by_failure_passes_over_a_version_that_was_never_through() -> None:
    settings = config(failure_action="rollback")
    world, sid = started(3, update=settings)
    for image in ("web:2", "web:3"):
        draft = world.draft()
        later = spec(3, image=image, update=settings)
        versions.put_next(draft, world.service(sid), later, endpoint=None, sealed=b"", status=None)
        world.commit(draft)
        world.failing.add("web:3")
        world.pass_time(1)
    world.pass_time(30)
    said = status(world, sid)
    assert said.state == U.ROLLBACK_COMPLETED
    assert images(world, sid) == ["web:1"] * 3


def test_slots_that_go_with_their_nodes_do_not_hide_the_progress_of_the_others() -> None:
    settings = config(deadline_ns=60 * SECOND)
    world = World(6)
    sid = world.create(make_spec(mode=GLOBAL, update=settings))
    world.settle()
    nodes = world.frozen = {f"n{i}" for i in range(1, 7)}
    world.update(sid, make_spec(mode=GLOBAL, update=settings, image="web:2"))
    for done in range(1, 7):
        world.settle()
        # Each takes longer than half of the deadline.
        world.clock.advance(seconds=40)
        world.tick()
        (coming,) = (t for t in world.live(sid) if state_of(t) < S.RUNNING)
        world.frozen = nodes - {coming.node_id}
        world.settle()
        world.frozen = nodes
        new = [t for t in world.running(sid) if world.image(t) == "web:2"]
        assert status(world, sid).state == U.UPDATING
        if done == 3:
            for task in new:
                world.remove_node(task.node_id)
    world.pass_time(5)
    assert status(world, sid).state == U.COMPLETED
    assert len(world.running(sid)) == 3


def test_a_node_that_comes_back_after_an_update_is_no_reason_to_roll_it_back() -> None:
    settings = config(failure_action="rollback")
    world = World(3)
    sid = world.create(make_spec(mode=GLOBAL, update=settings))
    world.settle()
    world.set_state("n3", NodeState.DOWN)
    world.update(sid, make_spec(mode=GLOBAL, update=settings, image="web:2"))
    world.pass_time(20)
    assert status(world, sid).state == U.COMPLETED
    world.refusing["n3"] = "disk_full"
    world.set_state("n3", NodeState.READY)
    world.pass_time(20)
    assert status(world, sid).state == U.COMPLETED
    assert images(world, sid) == ["web:2"] * 2
    assert not world.status(sid).converged
    world.refusing.clear()
    world.pass_time(60)
    assert images(world, sid) == ["web:2"] * 3


@pytest.mark.parametrize("why", ["refused", "lost"])
def test_stop_first_waits_for_the_old_task_whatever_becomes_of_the_first_new_one(why: str) -> None:
    world, sid = started(1, nodes=3)
    (old,) = world.running(sid)
    world.frozen = {old.node_id}
    world.set_availability(old.node_id, Availability.PAUSE)
    world.update(sid, spec(1, image="web:2"))
    world.tick()
    (first,) = (t for t in world.live(sid) if state_of(t) == S.ASSIGNED)
    assert first.node_id != old.node_id
    if why == "lost":
        world.set_state(first.node_id, NodeState.DOWN)
    else:
        world.refusing[first.node_id] = "disk_full"
        world.agents({first.node_id})
        world.agents({first.node_id})
    world.pass_time(5)
    (second,) = world.live(sid)
    assert second.id != first.id
    assert (state_of(second), second.desired_state) == (S.READY, S.READY)
    world.frozen = set()
    world.pass_time(2)
    assert images(world, sid) == ["web:2"]
