"""Rows, keys and the page of `swarmctl top`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cli.table import text_width
from cli.usage.keys import Keys, State, press
from cli.usage.meter import ClusterFigures, Figures, Flow, NodeFigures, ServiceFigures, TaskFigures
from cli.usage.page import Look, page
from cli.usage.rows import VIEWS, arranged, bytes_size, human_size, records

MIB = 1 << 20


def task(number: int, **more: Any) -> TaskFigures:
    settings: dict[str, Any] = {
        "id": f"t{number}",
        "name": f"web.{number}",
        "service": "web",
        "node_id": "n1",
        "node": "alpha",
        "cpu_percent": float(number),
        "memory_bytes": number * MIB,
        "memory_limit_bytes": 1024 * MIB,
        "network": Flow(1230, 4, 100.0, 0.0),
        "disk": Flow(),
        "pids": 3,
        "gpu_percent": None,
        "gpus": (),
        **more,
    }
    return TaskFigures(**settings)


def figures(*tasks: TaskFigures, problems: tuple[str, ...] = (), gpus: int = 0) -> Figures:
    cluster = ClusterFigures(
        nodes=3,
        nodes_measured=2,
        tasks=len(tasks),
        services=1,
        cpus_used=3.2,
        cpus=16,
        cpus_reserved=8.0,
        memory_bytes=12 << 30,
        memory_total_bytes=64 << 30,
        memory_reserved_bytes=20 << 30,
        gpu_percent=23.0 if gpus else None,
        gpus=gpus,
        gpus_held=gpus and 1,
    )
    nodes = (
        NodeFigures("n1", "alpha", True, "Ready", 50.0, 8, 6 << 30, 32 << 30, 1 << 30, 4 << 30),
        NodeFigures("n3", "gamma", False, "Down"),
    )
    service = ServiceFigures("web", 2, 3, len(tasks), 3.0, MIB, Flow(), Flow(), 6, None, 0)
    return Figures(cluster, nodes, (service,), tasks, problems)


def drawn(
    state: State, given: Figures, rows: int = 24, columns: int = 80, **look: Any
) -> list[str]:
    shown = arranged(state.view, given, sort=state.sort, reverse=state.reverse, only=state.only)
    settings: dict[str, Any] = {"colour": False, "clock": "14:03:22", "interval": "1s", **look}
    return page(state, given, shown, Look(rows, columns, **settings))


def test_a_page_of_24_lines_of_80() -> None:
    lines = drawn(
        State("tasks"), figures(task(1), task(2), problems=("node gamma is down",), gpus=4)
    )
    assert [line.rstrip() for line in lines[:9]] == [
        "3 nodes (2 measured), 1 service, 2 running tasks              every 1s  14:03:22",
        "CPU [||||||                          ]  20%  3.2 of 16 CPUs, 8 reserved",
        "Mem [||||||                          ]  19%  12GiB of 64GiB, 20GiB reserved",
        "GPU [|||||||                         ]  23%  4 GPUs, 1 held",
        "! node gamma is down",
        "",
        "NAME   NODE    CPU %▼   MEM USAGE / LIMIT   MEM %          NET I/O   GPU %",
        "web.2  alpha    2.00%         2MiB / 1GiB   0.20%      1.23kB / 4B       -",
        "web.1  alpha    1.00%         1MiB / 1GiB   0.10%      1.23kB / 4B       -",
    ]
    assert len(lines) == 24
    assert lines[-1].startswith("q quit  h help  n nodes  s services  t tasks  <> sort")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["", "filter", "sort", "help"])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(24, 80), (10, 50), (50, 200), (16, 60), (15, 40), (5, 20), (3, 10), (2, 5), (1, 1)],
)
def test_a_page_fits_any_terminal(view: str, mode: str, rows: int, columns: int) -> None:
    tasks = [task(n, name=f"a_very_long_stack_and_service_name.{n}") for n in range(200)]
    given = figures(*tasks, problems=("word " * 60, "no measurement comes from gamma"), gpus=8)
    lines = drawn(State(view, mode=mode), given, rows, columns, notice="nobody answers")
    assert len(lines) <= rows
    assert max(map(text_width, lines)) <= columns
    if view == "tasks" and not mode and rows >= 5 and columns >= 20:
        assert any("199.00%" in line for line in lines), "the busiest task is seen"


def test_two_hundred_tasks_on_ten_lines_of_fifty_scroll_to_the_last() -> None:
    given = figures(*(task(n) for n in range(1, 201)))
    state = State("tasks", sorts={"tasks": 0})
    assert "web.1 " in drawn(state, given, 10, 50)[2]
    for key, first in [
        ("end", 193),
        ("page up", 186),
        ("home", 0),
        ("down", 1),
        ("j", 2),
        ("k", 1),
    ]:
        state = press(state, key, rows=200, page=7)
        assert state.first == first, key
    state = press(state, "G", rows=200, page=7)
    lines = drawn(state, given, 10, 50)
    assert lines[8].startswith("web.200 ")
    assert all(
        "CPU" in line or "web" in line or number in (0, 9) for number, line in enumerate(lines)
    )


def test_what_is_not_known_stands_last_in_either_direction() -> None:
    given = figures(task(1, cpu_percent=None), task(2), task(3))
    for reverse, order in [(False, ["t3", "t2", "t1"]), (True, ["t2", "t3", "t1"])]:
        rows = arranged(VIEWS["tasks"], given, sort=2, reverse=reverse)
        assert [row.id for row in rows if isinstance(row, TaskFigures)] == order
    nodes = arranged(VIEWS["nodes"], given, sort=VIEWS["nodes"].column("cpu"), reverse=True)
    assert [row.name for row in nodes if isinstance(row, NodeFigures)] == ["alpha", "gamma"]
    line = drawn(State("nodes"), given)[6]
    assert line.split() == ["gamma", "Down", "-", "-", "-", "-", "-", "-"]


def test_names_sort_upwards_with_numbers_as_numbers() -> None:
    given = figures(task(10), task(9), task(2, name="db.2"))
    rows = arranged(VIEWS["tasks"], given, sort=0, reverse=False)
    assert [row.name for row in rows if isinstance(row, TaskFigures)] == ["db.2", "web.9", "web.10"]


def test_keys_are_found_in_whatever_pieces_they_come() -> None:
    data = b"n\x1b[A\x1bOB\x1b[5~/w\xc3\xa9\x7f\r\x01\x1b[1;5Cq\x1b"
    names = ["n", "up", "down", "page up", "/", "w", "é", "backspace", "enter", "q"]
    for step in (1, 2, 3, len(data)):
        keys = Keys()
        found = []
        for start in range(0, len(data), step):
            found += keys.feed(data[start : start + step])
        assert found == names, step
        assert keys.waiting and keys.rest() == ["escape"] and not keys.waiting
    assert Keys().feed(b"\x1b\x1b") == ["escape"]


def typed(state: State, keys: str, rows: int = 100) -> State:
    for key in keys.split():
        state = press(state, key, rows=rows, page=10)
    return state


def test_keys_change_the_view_the_order_and_the_filter() -> None:
    state = State("tasks")
    assert state.sort == 2
    assert typed(state, ">").sort == 3 and typed(state, "<").sort == 1
    assert typed(state, "< < <").sort == len(state.view.columns) - 1
    assert typed(state, "o 1").sort == 0 and typed(state, "o 1").mode == ""
    assert typed(state, "o right right").sort == 4
    assert typed(state, "o escape") == state
    assert typed(state, "n").view_name == "nodes"
    assert typed(state, "> n t").sort == 3, "each view keeps its own"
    assert typed(state, "r").reverse and not typed(state, "r r").reverse
    filtering = typed(state, "/ w e q")
    assert (filtering.only, filtering.mode, filtering.ended) == ("weq", "filter", False)
    assert typed(filtering, "backspace enter").only == "we"
    assert typed(filtering, "enter escape").only == ""
    assert typed(filtering, "escape").only == ""
    assert typed(state, "h").mode == "help" and typed(state, "h j").mode == ""
    assert typed(state, "p").paused and typed(state, "q").ended
    assert typed(state, "i").view.columns[5].title == "NET I/O /s"


def test_the_filter_shows_what_contains_it() -> None:
    given = figures(task(1), task(2, name="db.1", node="beta"))
    state = State("tasks", only="BETA")
    lines = drawn(state, given)
    assert sum("beta" in line for line in lines) == 1 and not any("web" in line for line in lines)
    assert lines[-1].startswith("Filter: BETA  q quit")
    assert "no tasks with 'nope'" in drawn(replace(state, only="nope"), given)[5]


def test_a_long_name_keeps_its_number() -> None:
    given = figures(*(task(n, name=f"a_very_long_stack_and_service_name.{n}") for n in range(20)))
    assert drawn(State("tasks"), given, 10, 50)[2].startswith("a_very_long_…rvice_name.19  alpha")


def test_control_characters_in_names_do_not_reach_the_terminal() -> None:
    lines = drawn(State("tasks"), figures(task(1, name="a\x1b[2Jb"), problems=("x\x1b]0;y\x07",)))
    assert "\x1b" not in "".join(lines) and any("a?[2Jb" in line for line in lines)


@pytest.mark.parametrize(
    ("count", "memory", "transfer"),
    [
        (0, "0B", "0B"),
        (999, "999B", "999B"),
        (1023, "1023B", "1.02kB"),
        (1024, "1KiB", "1.02kB"),
        (11_010_048, "10.5MiB", "11MB"),
        (1_048_575, "1MiB", "1.05MB"),
        (5 << 40, "5TiB", "5.5TB"),
    ],
)
def test_amounts_are_written_as_docker_s(count: int, memory: str, transfer: str) -> None:
    assert (bytes_size(count), human_size(count)) == (memory, transfer)


def test_records_hold_the_texts_and_the_numbers() -> None:
    (row,) = records(VIEWS["tasks"], [task(7)])
    assert row["CPUPerc"] == "7.00%" and row["MemUsage"] == "7MiB / 1GiB"
    assert row["NetIO"] == "1.23kB / 4B" and row["NetRate"] == "100B / 0B"
    assert row["BlockIO"] == "-" and row["Raw"]["CpuPercent"] == 7.0
    assert row["Raw"]["Network"]["InBytes"] == 1230
