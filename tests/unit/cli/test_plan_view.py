"""How a plan looks: golden captures, wide and narrow, with and without colour."""
# ruff: noqa: RUF001  (the multiplication sign is part of what is shown)

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cli.plan_view import DIFF_LINES_MAX, NODES_MAX, counts, describe, document, view
from cli.settings import Terminal
from cli.table import text_width
from swarm.v1 import (
    ContainerSpec,
    EndpointSpec,
    FieldChange,
    Global,
    Kind,
    NodePlacement,
    PendingPlacement,
    PlannedChange,
    PlanStackResponse,
    PortConfig,
    Replicated,
    ReplicatedJob,
    ServiceMode,
    ServicePlacement,
    ServiceSpec,
    StackChange,
    StackSpec,
    TaskSpec,
)

NO_TERMINAL = Terminal(None, colour=False)


def field(path: str, before: Any = None, after: Any = None) -> FieldChange:
    old, new = (None if value is None else json.dumps(value) for value in (before, after))
    return FieldChange(path=path, before=old, after=new)


def item(
    kind: Kind, name: str, action: str, effect: str = "", *fields: FieldChange, **more: Any
) -> PlannedChange:
    change = StackChange(kind=kind, name=name, id="i", action=action)
    return PlannedChange(change=change, effect=effect, fields=fields, **more)


def on(**nodes: int) -> tuple[NodePlacement, ...]:
    return tuple(NodePlacement(node_id=n, hostname=n, tasks=t) for n, t in nodes.items())


SHORT_OF_MEMORY = (
    "no suitable node (2 of 2 nodes short of memory: need 900 GiB, best free 23 GiB on n2)"
)
PLAN = PlanStackResponse(
    stack_id="s1",
    revision=3,
    version="3.71.16644a611f7f4f81.2c9a0bc0cc1c2c17",
    differs=True,
    settled=True,
    changes=(
        item(Kind.NETWORK, "app_front", "created"),
        item(Kind.SECRET, "app_key", "updated", "replaced", field("data", "0f", "1e")),
        item(
            Kind.CONFIG,
            "app_settings",
            "updated",
            "replaced",
            field("data", "a: 1\nb: 2\nc: 3\n", "a: 1\nb: 3\nc: 3\n"),
        ),
        item(
            Kind.SERVICE,
            "app_web",
            "updated",
            "recreated",
            field("endpoint.ports[81/tcp]", None, {"target_port": 81, "published_port": 8081, "protocol": "tcp"}),
            field("labels[tier]", None, "front"),
            field("task.container.args", ["serve", "--log=info"], ["serve", "--log=debug", "--trace"]),
            field("task.container.env[DEBUG]", None, "1"),
            field("task.container.env[OLD]", "x", None),
            field("task.container.image", "nginx:1.25", "nginx:1.27"),
            field("task.resources.limits.memory_bytes", 512 << 20, 1 << 30),
            placement=ServicePlacement(created=5, stopped=5, nodes=on(n1=3, n2=2)),
        ),
        item(
            Kind.SERVICE,
            "app_db",
            "updated",
            "scaled",
            field("mode.replicated.replicas", 2, 3),
            placement=ServicePlacement(kept=2, created=1, nodes=on(n2=1)),
        ),
        item(Kind.SERVICE, "app_cache", "updated", "kept", field("labels[tier]", "a", "b"),
             placement=ServicePlacement(kept=2)),
        item(
            Kind.SERVICE,
            "app_new",
            "created",
            placement=ServicePlacement(created=2, nodes=on(n1=1, n2=1)),
        ),
        item(
            Kind.SERVICE,
            "app_huge",
            "created",
            placement=ServicePlacement(
                created=1,
                pending=(PendingPlacement(tasks=1, reason=SHORT_OF_MEMORY, never=True),),
            ),
        ),
        item(
            Kind.SERVICE,
            "app_after",
            "created",
            placement=ServicePlacement(waits=("waits until service app_huge has started",)),
        ),
        item(Kind.SERVICE, "app_old", "removed", placement=ServicePlacement(stopped=2)),
        item(Kind.NETWORK, "app_default", "unchanged"),
        item(Kind.VOLUME, "app_data", "unchanged"),
    ),
)  # fmt: skip


def spec(name: str, image: str = "redis:7", **more: Any) -> ServiceSpec:
    return ServiceSpec(name=name, task=TaskSpec(container=ContainerSpec(image=image)), **more)


STACK = StackSpec(
    name="app",
    services=(
        spec(
            "app_new",
            mode=ServiceMode(replicated=Replicated(replicas=2)),
            endpoint=EndpointSpec(ports=(PortConfig(target_port=6379, published_port=6379),)),
        ),
        spec("app_huge"),
    ),
)

WIDE = """\
+ network app_front
~ secret app_key       new content
~ config app_settings  new content
    ~ content:
        @@ -1,3 +1,3 @@
         a: 1
        -b: 2
        +b: 3
         c: 3
~ service app_web      recreated: its tasks are replaced
    ~ image: nginx:1.25 -> nginx:1.27
    ~ command: serve --log=info -> serve --log=debug --trace
    + environment.DEBUG: 1
    - environment.OLD: x
    + ports: 8081->81/tcp
    ~ deploy.resources.limits.memory: 512M -> 1G
    + deploy.labels.tier: front
    tasks: 5 start on n1 ×3, n2 ×2; 5 stop
~ service app_db       scaled: no running task is replaced
    ~ deploy.replicas: 2 -> 3
    tasks: 1 starts on n2; 2 stay
~ service app_cache    kept: no task is touched
    ~ deploy.labels.tier: a -> b
+ service app_new      redis:7, 2 replicas, *:6379->6379/tcp
    tasks: 2 start on n1, n2
+ service app_huge     redis:7, 1 replica
    ! 1 stays without a node, and no node could ever take it: no suitable node (2 of 2 nodes short of memory: need 900 GiB, best free 23 GiB on n2)
+ service app_after
    ! waits until service app_huge has started
- service app_old      2 tasks stopped

4 to create, 5 to change, 1 to remove, 2 unchanged, 1 task without a node; plan 3.71.16644a611f7f4f81.2c9a0bc0cc1c2c17
"""

NARROW = """\
+ network app_front
~ secret app_key       new content
~ config app_settings  new content
    ~ content:
        @@ -1,3 +1,3 @@
         a: 1
        -b: 2
        +b: 3
         c: 3
~ service app_web
    recreated: its tasks are replaced
    ~ image: nginx:1.25 -> nginx:1.27
    ~ command:
        - serve --log=info
        + serve --log=debug --trace
    + environment.DEBUG: 1
    - environment.OLD: x
    + ports: 8081->81/tcp
    ~ deploy.resources.limits.memory: 512M -> 1G
    + deploy.labels.tier: front
    tasks: 5 start on n1 ×3, n2 ×2; 5 stop
~ service app_db
    scaled: no running task is replaced
    ~ deploy.replicas: 2 -> 3
    tasks: 1 starts on n2; 2 stay
~ service app_cache    kept: no task is touched
    ~ deploy.labels.tier: a -> b
+ service app_new
    redis:7, 2 replicas, *:6379->6379/tcp
    tasks: 2 start on n1, n2
+ service app_huge     redis:7, 1 replica
    ! 1 stays without a node, and no node could
      ever take it: no suitable node (2 of 2 nodes
      short of memory: need 900 GiB, best free 23
      GiB on n2)
+ service app_after
    ! waits until service app_huge has started
- service app_old      2 tasks stopped

4 to create, 5 to change, 1 to remove, 2
unchanged, 1 task without a node; plan
3.71.16644a611f7f4f81.2c9a0bc0cc1c2c17
"""


def shown(plan: PlanStackResponse = PLAN, terminal: Terminal = NO_TERMINAL) -> str:
    return "\n".join(view(plan, name="app", spec=STACK, terminal=terminal)) + "\n"


def test_a_plan_without_a_terminal() -> None:
    assert shown() == WIDE


def test_a_plan_on_a_narrow_terminal_wraps_and_loses_nothing() -> None:
    assert shown(terminal=Terminal(50, colour=False)) == NARROW


def test_colour_only_repeats_what_the_signs_say() -> None:
    coloured = shown(terminal=Terminal(50, colour=True))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == NARROW
    lines = coloured.splitlines()
    assert lines[0] == "\x1b[32m\x1b[1m+ network app_front\x1b[0m"
    assert "\x1b[31m        -b: 2\x1b[0m" in lines
    assert "\x1b[33m    ~ deploy.replicas: 2 -> 3\x1b[0m" in lines


@pytest.mark.parametrize("width", [40, 64, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for line in shown(terminal=Terminal(width, colour=False)).splitlines():
        assert text_width(line) <= width, line


def test_a_plan_without_differences_is_one_line() -> None:
    plan = PlanStackResponse(version="v", changes=(item(Kind.NETWORK, "a", "unchanged"),))
    assert shown(plan) == "No differences: stack app stays as it is; plan v\n"


def test_an_unfinished_rehearsal_is_told() -> None:
    plan = PlanStackResponse(
        version="v", differs=True, changes=(item(Kind.NETWORK, "a", "created"),)
    )
    assert "the rehearsal was ended before the cluster came to rest" in shown(plan)


def test_many_nodes_are_summed_up() -> None:
    nodes = on(**{f"n{i:02}": 2 for i in range(NODES_MAX + 3)})
    placed = ServicePlacement(created=26, nodes=nodes)
    plan = PlanStackResponse(
        version="v", differs=True, settled=True, changes=(item(Kind.SERVICE, "a", "created", placement=placed),)
    )  # fmt: skip
    text = shown(plan)
    assert "n09 ×2 and 6 on 3 more nodes" in text and "n10" not in text


def test_several_reasons_stand_below_each_other() -> None:
    why = "no suitable node (2 of 3 nodes short of CPU: need 8, best free 4 on n1; 1 node drained)"
    placed = ServicePlacement(
        created=2, pending=(PendingPlacement(tasks=2, reason=why, never=True),)
    )
    created = item(Kind.SERVICE, "a", "created", placement=placed)
    text = shown(PlanStackResponse(version="v", differs=True, settled=True, changes=(created,)))
    assert (
        "    ! 2 stay without a node, and no node could ever take them:\n"
        "        - 2 of 3 nodes short of CPU: need 8, best free 4 on n1\n"
        "        - 1 node drained\n"
    ) in text


def test_a_long_text_s_difference_is_cut_and_says_so() -> None:
    old = "\n".join(f"line {i}" for i in range(300))
    new = "\n".join(f"other {i}" for i in range(300))
    plan = PlanStackResponse(
        version="v", differs=True, settled=True, changes=(item(Kind.CONFIG, "c", "updated", "replaced", field("data", old, new)),)
    )  # fmt: skip
    lines = shown(plan).splitlines()
    assert len(lines) < DIFF_LINES_MAX + 10
    assert any(re.fullmatch(r" +… \d+ more lines", line) for line in lines)


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    changed = item(
        Kind.SERVICE,
        "a",
        "updated",
        "recreated",
        field("task.container.env[X]", "\x1b[2Jx", "a\nb\x07"),
        field("task.container.env[Y]", None, "\x1b]0;title\x07"),
    )
    text = shown(PlanStackResponse(version="v", differs=True, settled=True, changes=(changed,)))
    assert "\x1b" not in text and "\x07" not in text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (spec("a"), "redis:7, 1 replica"),
        (spec("a", "reg:5000/x:1@sha256:" + "a" * 64), "reg:5000/x:1, 1 replica"),
        (spec("a", mode=ServiceMode(global_service=Global())), "redis:7, global"),
        (
            spec("a", mode=ServiceMode(replicated_job=ReplicatedJob(total_completions=4))),
            "redis:7, job of 4",
        ),
        (
            ServiceSpec(
                task=TaskSpec(container=ContainerSpec(args=("sleep", "9")), runtime="process")
            ),
            "process sleep 9, 1 replica",
        ),
        (
            spec(
                "a",
                endpoint=EndpointSpec(
                    ports=(
                        PortConfig(target_port=80),
                        PortConfig(target_port=53, published_port=53, protocol="udp", publish_mode="host"),
                    )
                ),
            ),
            "redis:7, 1 replica, *:?->80/tcp, *:53->53/udp on its nodes",
        ),
    ],
)  # fmt: skip
def test_a_new_service_in_one_line(given: ServiceSpec, text: str) -> None:
    assert describe(given) == text


def test_counts_leave_out_what_did_not_happen() -> None:
    assert counts(item.change for item in PLAN.changes if item.change) == (
        "4 created, 5 updated, 1 removed"
    )
    assert counts(()) == ""


def test_a_plan_for_machines_is_whole() -> None:
    found = document(PLAN, name="app")
    assert (found["Version"], found["Differs"], found["Settled"]) == (PLAN.version, True, True)
    assert [change["Name"] for change in found["Changes"]][-2:] == ["app_default", "app_data"]
    web = found["Changes"][3]
    assert (web["Kind"], web["Action"], web["Effect"]) == ("service", "updated", "recreated")
    image = next(f for f in web["Fields"] if f["Key"] == "image")
    assert image == {
        "Path": "task.container.image",
        "Key": "image",
        "Before": "nginx:1.25",
        "After": "nginx:1.27",
    }
    assert web["Placement"] == {
        "Kept": 0,
        "Created": 5,
        "Stopped": 5,
        "Nodes": [
            {"NodeID": "n1", "Hostname": "n1", "Tasks": 3},
            {"NodeID": "n2", "Hostname": "n2", "Tasks": 2},
        ],
        "Pending": [],
        "Waits": [],
    }
    assert found["Changes"][0]["Placement"] is None
    json.dumps(found)
