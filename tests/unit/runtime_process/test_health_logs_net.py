"""Small pure parts: health, log files, addresses, ports, events, plans."""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.gpus import as_claimed
from agent.runtime.base import Event, EventKind, Failed, Rejected
from agent.runtime.process import plan as process_plan
from agent.runtime.process import ports as process_ports
from agent.runtime.process import state as process_state
from agent.runtime.process.events import Events
from agent.runtime.process.health import Health, Result, Schedule, pause_s, schedule, step
from agent.runtime.process.logs import read
from agent.runtime.process.net import choose_address, choose_subnet
from agent.runtime.process.ports import HostNetworkPorts
from agent.runtime.process.supervisor import LogWriter
from swarm.v1 import (
    Assignment,
    ContainerSpec,
    Driver,
    HealthConfig,
    LogOptions,
    PortConfig,
    Task,
    TaskSpec,
)

GOOD, BAD = Result(True, ""), Result(False, "")


def plan(**fields: float) -> Schedule:
    base = {"interval_s": 10.0, "timeout_s": 5.0, "start_period_s": 0.0, "start_interval_s": 1.0}
    return Schedule(command=("x",), retries=int(fields.pop("retries", 3)), **{**base, **fields})


def after(results: list[Result], schedule: Schedule, age_s: float = 100.0) -> Health:
    health = Health()
    for result in results:
        health = step(health, result, schedule, age_s=age_s)
    return health


@pytest.mark.parametrize(
    ("results", "healthy"),
    [
        ([], None),
        ([GOOD], True),
        ([BAD, BAD], None),
        ([BAD, BAD, BAD], False),
        ([GOOD, BAD, BAD, GOOD, BAD, BAD], True),
        ([GOOD, BAD, BAD, BAD], False),
        ([BAD, BAD, BAD, GOOD], True),
    ],
)
def test_health_is_dockers(results: list[Result], healthy: bool | None) -> None:
    assert after(results, plan()).healthy is healthy


def test_failures_in_the_start_period_do_not_count_until_a_success() -> None:
    early = plan(start_period_s=60.0)
    assert after([BAD] * 9, early, age_s=1.0).healthy is None
    assert after([GOOD, BAD, BAD, BAD], early, age_s=1.0).healthy is False
    assert pause_s(Health(), early, age_s=1.0) == 1.0
    assert pause_s(Health(), early, age_s=61.0) == 10.0
    assert pause_s(after([GOOD], early, age_s=1.0), early, age_s=1.0) == 10.0


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 100)), max_size=40),
    st.integers(1, 5),
    st.floats(0, 50),
)
def test_health_follows_its_rules_whatever_checks_say(
    checks: list[tuple[bool, float]], retries: int, start_period_s: float
) -> None:
    rule = plan(retries=retries, start_period_s=start_period_s)
    health, age_s, row, ever = Health(), 0.0, 0, False
    for passed, after_s in checks:
        age_s += after_s
        health = step(health, Result(passed, ""), rule, age_s=age_s)
        counts = passed or ever or age_s >= start_period_s
        ever = ever or passed
        row = 0 if passed else row + counts
        assert health.failures == row
        if passed:
            assert health.healthy is True, "one success is enough"
        assert (health.healthy is False) <= (row >= retries), "never unhealthy before its time"
        if row >= retries:
            assert health.healthy is False
        assert 0 < pause_s(health, rule, age_s=age_s) <= rule.interval_s


def test_a_schedule_has_dockers_defaults() -> None:
    found = schedule(HealthConfig(test=("CMD-SHELL", "x y")))
    assert found == Schedule(("/bin/sh", "-c", "x y"), 30.0, 30.0, 0.0, 5.0, 3)
    assert schedule(HealthConfig(test=("NONE",))) is None
    assert schedule(None) is None


@given(
    st.lists(st.binary(max_size=40).filter(lambda b: b"\n" not in b), max_size=60),
    st.integers(-1, 70),
    st.integers(50, 500),
    st.integers(1, 50),
)
def test_what_is_written_is_read_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], tail: int, size: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    writer = LogWriter(str(folder), file_bytes_max=size, files_max=10_000, tty=False)
    data = b"".join(line + b"\n" for line in lines)
    for start in range(0, len(data), cut):
        writer.feed(b"o", data[start : start + cut])
    writer.close()

    async def collect() -> list[bytes]:
        return [x.data async for x in read(folder, "t", LogOptions(tail=tail), lambda: True)]

    kept = len(lines) if tail < 0 else min(tail, len(lines))
    assert asyncio.run(collect()) == lines[len(lines) - kept :]


async def test_streams_times_and_torn_lines(tmp_path: Path) -> None:
    (tmp_path / "00000003").write_bytes(b"10 o a\n20 e b\ngarbage\n30 o c\n40 o torn")

    async def lines(**options: object) -> list[bytes]:
        wanted = LogOptions(**{"tail": -1, **options})  # type: ignore[arg-type]  # checked by the struct
        return [x.data async for x in read(tmp_path, "t", wanted, lambda: True)]

    assert await lines() == [b"a", b"b", b"c"]
    assert await lines(stderr=True) == [b"b"]
    assert await lines(since_ns=20) == [b"b", b"c"]
    assert await lines(until_ns=20) == [b"a", b"b"]
    assert await lines(tail=1, stdout=True) == [b"c"]


def test_old_files_go_and_long_lines_are_cut(tmp_path: Path) -> None:
    writer = LogWriter(str(tmp_path), file_bytes_max=1000, files_max=2, tty=True)
    for number in range(200):
        writer.feed(b"o", b"line %d\r\n" % number)
    writer.feed(b"e", b"x" * 40_000)
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert b"\r" not in files[0].read_bytes()
    assert all(len(line) < 16_500 for line in files[1].read_bytes().splitlines())


def test_a_subnet_avoids_what_is_taken_and_stays_in_the_pool() -> None:
    pool = ipaddress.IPv4Network("10.0.0.0/22")
    taken: list[ipaddress.IPv4Network] = []
    for _ in range(4):
        subnet = choose_subnet(pool, taken, "node")
        assert subnet is not None and subnet.subnet_of(pool)
        assert not any(subnet.overlaps(other) for other in taken)
        taken.append(subnet)
    assert choose_subnet(pool, taken, "node") is None
    assert choose_subnet(pool, [ipaddress.IPv4Network("10.0.0.0/8")], "node") is None


def test_addresses_are_given_in_turn_and_never_twice() -> None:
    subnet = ipaddress.IPv4Network("10.0.0.0/29")
    assert choose_address(subnet, set()) == "10.0.0.2"
    assert choose_address(subnet, {"10.0.0.3"}, "10.0.0.2") == "10.0.0.4"
    assert choose_address(subnet, set(), "10.0.0.6") == "10.0.0.2"
    assert choose_address(subnet, {f"10.0.0.{n}" for n in range(2, 7)}) is None


def test_ports_of_a_shared_network_are_distinct_and_come_back() -> None:
    ports = HostNetworkPorts("127.0.0.1", 5)
    wanted = [PortConfig(target_port=80), PortConfig(target_port=53, protocol="udp")]
    first, _ = ports.take("t1", wanted)
    second, _ = ports.take("t2", wanted)
    assert len({*first.values(), *second.values()}) == 4
    assert all(process_ports.FIRST <= p <= process_ports.LAST for p in first.values())
    host = PortConfig(target_port=1, published_port=first[80], publish_mode="host")
    with pytest.raises(Failed, match="task t1"):
        ports.take("t3", [host])
    ports.release("t1")
    assert ports.take("t3", [host])[0] == {1: first[80]}


def test_one_target_at_two_host_ports_is_rejected() -> None:
    both = [
        PortConfig(target_port=1, published_port=p, publish_mode="host") for p in (23_001, 23_002)
    ]
    with pytest.raises(Rejected, match="has one"):
        HostNetworkPorts("127.0.0.1", 0).take("t", both)


async def test_events_keep_the_newest_health_and_never_lose_an_exit() -> None:
    events = Events()
    events.put(Event("a", EventKind.HEALTHY))
    events.put(Event("a", EventKind.UNHEALTHY))
    events.put(Event("b", EventKind.HEALTHY))
    events.put(Event("b", EventKind.EXITED, 3))
    events.close()
    assert [(e.task_id, e.kind) async for e in events.stream()] == [
        ("a", EventKind.UNHEALTHY),
        ("b", EventKind.EXITED),
    ]


def assignment(container: ContainerSpec, spec: TaskSpec | None = None) -> Assignment:
    return Assignment(
        task=Task(id="t", slot=2, assigned_gpus=("GPU-1", "GPU-2")),
        service_name="web",
        spec=spec or TaskSpec(container=container),
        name="web.2.t",
    )


def test_the_environment_names_ports_and_devices() -> None:
    env = process_plan.environment(
        assignment(ContainerSpec(env=("A=1=2", "PATH", "PORT=9"))),
        process_plan.Ports("127.0.0.2", {80: 20_001, 81: 20_002}),
        home="/h",
        files="",
        gpus=as_claimed(("GPU-1", "GPU-2")),
    )
    assert env["A"] == "1=2" and "PATH" not in env and env["PORT"] == "9"
    assert (env["SWARM_PORT_80"], env["SWARM_PORT_81"]) == ("20001", "20002")
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-1,GPU-2"


@pytest.mark.parametrize(
    ("text", "number"),
    [("", 15), ("SIGINT", 2), ("int", 2), ("9", 9), ("SIGRTMIN+3", 37), ("RTMIN", 34)],
)
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert process_plan.parse_signal(text) == number


@pytest.mark.parametrize("text", ["SIGNOPE", "0", "99", "INT+1"])
def test_unknown_signals_are_rejected(text: str) -> None:
    with pytest.raises(Rejected, match="signal"):
        process_plan.parse_signal(text)


def test_log_bounds_come_from_the_driver() -> None:
    def bounds(**driver: object) -> tuple[int, int] | None:
        return process_plan.log_bounds(TaskSpec(log_driver=Driver(**driver)))  # type: ignore[arg-type]  # checked by the struct

    assert bounds(name="none") is None
    assert bounds(name="json-file", options={"max-size": "1m", "max-file": "3"}) == (1 << 20, 3)
    assert process_plan.log_bounds(TaskSpec()) == (10 << 20, 5)


def test_a_record_survives_the_disk_and_a_torn_one_counts_as_none(tmp_path: Path) -> None:
    record = process_state.Record(
        task_id="t",
        port_map={80: 20_000},
        host_ports=(PortConfig(target_port=80),),
        health=HealthConfig(test=("NONE",)),
        credentials={"uid": None, "capabilities": 1 << 40},
    )
    process_state.save_record(tmp_path, record)
    assert process_state.load_record(tmp_path) == record
    whole = (tmp_path / "task.json").read_bytes()
    (tmp_path / "task.json").write_bytes(whole[:-3])
    assert process_state.load_record(tmp_path) is None


def test_a_log_that_finds_no_room_for_its_next_file_goes_on_in_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    writer = LogWriter(str(folder), file_bytes_max=1000, files_max=2, tty=False)
    folder.rename(tmp_path / "away")  # files can be written, and no new one be made
    for _ in range(100):
        writer.feed(b"o", b"x" * 99 + b"\n")
    (tmp_path / "away").rename(folder)
    assert (folder / "00000001").read_bytes().count(b"\n") == 100
    writer.feed(b"o", b"x" * 990 + b"\n")
    writer.close()
    assert [path.name for path in folder.iterdir() if path.name != "00000001"]
