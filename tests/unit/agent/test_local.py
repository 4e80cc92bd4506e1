"""What a manager is told that would leave."""

from __future__ import annotations

import pytest

from agent.local import why_not_leave
from agent.managing import Standing


@pytest.mark.parametrize(
    ("reachable", "total", "said"),
    [
        (3, 3, "it is demoted first, which leaves 2 managers out of 2"),
        (2, 2, "it is demoted first, which leaves 1 managers out of 1"),
        (4, 5, "it is demoted first, which leaves 3 managers out of 4"),
        (2, 3, "Removing this node leaves 1 managers out of 2. Without a Raft quorum"),
        (1, 2, "Removing this node leaves 0 managers out of 1. Without a Raft quorum"),
        (3, 5, "Removing this node leaves 2 managers out of 4. Without a Raft quorum"),
    ],
)
def test_a_manager_that_would_leave_hears_what_is_left(
    reachable: int, total: int, said: str
) -> None:
    told = why_not_leave(Standing(reachable, total, in_touch=True), alone=False)
    assert said in told
    assert ("--force-new-cluster" in told) == ("Without a Raft quorum" in said)


def test_the_last_manager_hears_that_all_is_lost_with_it() -> None:
    told = why_not_leave(Standing(1, 1, in_touch=True), alone=True)
    assert told.endswith(
        "Removing the last manager erases all current state of the swarm. Use `--force` to ignore "
        "this message."
    )


def test_a_manager_that_knows_nothing_of_the_others_promises_nothing() -> None:
    assert "Doing so may lose the consensus" in why_not_leave(None, alone=False)
