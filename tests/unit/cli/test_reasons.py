"""Why tasks wait: the account as lines, in one line, as a table."""

from __future__ import annotations

import pytest

from cli.reasons import brief, explain_lines, parts
from swarm.v1 import ExplainTaskResponse, FilterResult

MEMORY = "2 of 5 nodes short of memory: need 64 GiB, best free 32 GiB on n3"
DEVICE = "1 of 5 nodes without a device usb; nodes offer GPUs only"
LABEL = "1 node does not satisfy node.labels.zone in (a, b)"
DRAINED = "1 node drained"


@pytest.mark.parametrize(
    ("text", "lead", "found", "line"),
    [
        ("", "", [], ""),
        ("task: non-zero exit (137)",) * 2 + ([],) + ("task: non-zero exit (137)",),
        (
            f"no suitable node ({MEMORY})",
            "no suitable node",
            [MEMORY],
            f"no suitable node ({MEMORY})",
        ),
        (
            f"no suitable node ({MEMORY}; {DEVICE}; {LABEL}; {DRAINED})",
            "no suitable node",
            [MEMORY, DEVICE, LABEL, DRAINED],
            f"no suitable node ({MEMORY}; 3 more reasons)",
        ),
        (
            f"no suitable node ({LABEL}; {DRAINED})",
            "no suitable node",
            [LABEL, DRAINED],
            f"no suitable node ({LABEL}; 1 more reason)",
        ),
        (
            f"preempted by train; no suitable node ({LABEL}; {DRAINED}); waits",
            "preempted by train; no suitable node",
            [LABEL, DRAINED],
            f"preempted by train; no suitable node ({LABEL}; 1 more reason); waits",
        ),
    ],
)
def test_accounts_are_taken_apart(text: str, lead: str, found: list[str], line: str) -> None:
    assert parts(text) == (lead, found)
    assert brief(text) == line


def test_the_whole_answer_on_a_job_that_waits() -> None:
    answer = ExplainTaskResponse(
        summary="task train.1 waits: no suitable node",
        nodes_total=5,
        nodes_fit=0,
        filters=(
            FilterResult(filter="ready", detail="down", nodes=1, message="1 node down"),
            FilterResult(
                filter="resources",
                detail="gpu_memory",
                nodes=3,
                never_nodes=2,
                needed=80 << 30,
                best=40 << 30,
                best_node="n3",
                message="3 of 5 nodes short of GPU memory: need 80 GiB, best free 40 GiB on n3",
            ),
            FilterResult(
                filter="resources",
                detail="gpu_share",
                nodes=1,
                needed=500_000,
                best=250_000,
                best_node="n4",
                message="1 of 5 nodes short of a GPU to share",
            ),
        ),
        hint="free some",
        queue="ml",
        queue_position=2,
        held_back=("queue ml has 8 of its 8 GPUs in use",),
    )
    assert explain_lines(answer, width=None) == [
        "task train.1 waits: no suitable node",
        "",
        "Queue: ml, 2 jobs come before it",
        "Held back: queue ml has 8 of its 8 GPUs in use",
        "",
        "FILTER                   NODES OUT   NEVER     NEEDED    BEST FREE      REASON",
        "ready (down)             1                                              1 node down",
        "resources (gpu_memory)   3           2         80 GiB    40 GiB on n3   "
        "3 of 5 nodes short of GPU memory: need 80 GiB, best free 40 GiB on n3",
        "resources (gpu_share)    1                     0.5       0.25 on n4     "
        "1 of 5 nodes short of a GPU to share",
        "",
        "0 of 5 nodes fit now; 3 could later, 2 never (not even if empty and ready).",
        "",
        "free some",
    ]
    assert all(len(line) <= 80 for line in explain_lines(answer, width=80))


def test_what_can_never_be_says_so_once() -> None:
    why = "1 of 1 node short of CPU: need 8, best free 4 on n1"
    answer = ExplainTaskResponse(
        summary=f"task web.1 waits: no suitable node ({why}); no node could take it even if empty",
        nodes_total=2,
        never=True,
        filters=(
            FilterResult(
                filter="constraint",
                detail="node.labels.zone in (a, b)",
                nodes=1,
                never_nodes=1,
                message=LABEL,
            ),
            FilterResult(filter="resources", detail="cpu", nodes=1, never_nodes=1, message=why),
        ),
    )
    assert explain_lines(answer, width=None) == [
        "task web.1 waits: no suitable node; no node could take it even if empty",
        "",
        "FILTER            NODES OUT   NEVER     NEEDED    BEST FREE   REASON",
        f"constraint        1           1                               {LABEL}",
        f"resources (cpu)   1           1                               {why}",
        "",
        "0 of 2 nodes fit now, and none could later: not even if it were empty and ready.",
    ]


def test_why_a_placed_task_is_where_it_is() -> None:
    answer = ExplainTaskResponse(
        summary="task web.1 is on node n1: running",
        nodes_total=2,
        nodes_fit=2,
        decision="spread: n1 has the fewest tasks of the service (0)",
    )
    assert explain_lines(answer, width=None) == [
        "task web.1 is on node n1: running",
        "",
        "Placed: spread: n1 has the fewest tasks of the service (0)",
        "",
        "2 of 2 nodes fit now.",
    ]
