"""Roll-outs whose tasks fail, lose their places or their nodes on the way."""

from __future__ import annotations

import pytest

from swarm.v1 import RestartPolicy, UpdateState
from tests.unit.control.test_rollout import config, images, spec, started, status
from tests.unit.control.world import SECOND

U = UpdateState
SLOW = RestartPolicy(delay_ns=20 * SECOND)


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
