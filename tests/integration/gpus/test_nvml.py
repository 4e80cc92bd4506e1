"""The real NVML binding on a machine of eight GPUs that a text file plays."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from agent.gpus import Gpus
from swarm.clock import SystemClock
from swarm.v1 import Gpu, GpuProximity
from tests.fakes.nvml import GIB, Machine, build, uuid
from tests.fakes.waiting import until

DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-in, loaded: whoever asks for libnvidia-ml.so.1 by name from now on gets it."""
    return ctypes.CDLL(str(build(tmp_path_factory.mktemp("nvml")) / "libnvidia-ml.so.1"))


@pytest.fixture
def machine(library: ctypes.CDLL, tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "machine")
    os.environ["FAKE_NVML"] = str(made.file)
    yield made
    del os.environ["FAKE_NVML"]


class Watch:
    """A running Gpus, and how often it said that something changed."""

    def __init__(self, gpus: Gpus) -> None:
        self.gpus = gpus
        self.changes = 0
        gpus.on_change = self._changed

    def _changed(self) -> None:
        self.changes += 1

    def one(self, name: str) -> Gpu:
        return next(g for g in self.gpus.gpus if g.uuid == name)

    async def until(self, condition: Callable[[], object]) -> None:
        await until(condition, timeout_s=DEADLINE_S, what=lambda: str(self.gpus.gpus))


@contextlib.asynccontextmanager
async def watching(**options: object) -> AsyncIterator[Watch]:
    watch = Watch(Gpus(clock=SystemClock(), **{"scan_s": 0.1, **options}))  # type: ignore[arg-type]
    task = asyncio.create_task(watch.gpus.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            await watch.gpus.looked.wait()
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_every_gpu_is_described(machine: Machine) -> None:
    machine.add("process 2 1 3000000000")
    async with watching() as watch:
        gpus = watch.gpus.gpus
        assert [g.uuid for g in gpus] == [uuid(i) for i in range(8)]
        gpu = gpus[2]
        assert (gpu.index, gpu.model, gpu.memory_bytes) == (2, "NVIDIA A100-SXM4-80GB", 80 * GIB)
        assert (gpu.compute_capability, gpu.numa_node, gpu.pci_address) == (
            "8.0",
            0,
            "1f00:12:00.0",
        )
        assert gpus[6].numa_node == 1
        assert (gpu.healthy, gpu.driver, gpu.driver_version) == (True, "nvidia", "580.65.06")
        (process,) = gpu.processes
        name = Path("/proc/1/comm").read_text().strip()
        assert (process.pid, process.name, process.memory_bytes) == (1, name, 3 * GIB)
        assert [d.nodes for d in watch.gpus.devices][3] == ("/dev/nvidia3",)


async def test_loads_are_looked_at_more_often_while_somebody_wants_them(machine: Machine) -> None:
    async with watching(scan_s=60.0) as watch:
        load = watch.gpus.loads()[1]
        assert (load.uuid, load.index, load.percent) == (uuid(1), 1, 10)
        assert (load.memory_bytes, load.memory_total_bytes) == (GIB, 80 * GIB)
        machine.set(1, busy=77)
        await watch.until(lambda: watch.gpus.loads()[1].percent == 77)


async def test_links_and_proximity_are_those_of_the_board(machine: Machine) -> None:
    async with watching() as watch:
        gpus = watch.gpus.gpus
        assert gpus[0].nvlink_peers == (uuid(1), uuid(3))
        assert {link.uuid: link.nvlinks for link in gpus[0].links}[uuid(1)] == 1
        # Behind a switch every one reaches every other by all its links.
        assert gpus[5].nvlink_peers == (uuid(4), uuid(6), uuid(7))
        assert {link.nvlinks for link in gpus[5].links} == {0, 6}
        near = {link.uuid: link.proximity for link in gpus[0].links}
        assert (near[uuid(1)], near[uuid(2)], near[uuid(5)]) == (
            GpuProximity.ONE_SWITCH,
            GpuProximity.HOST_BRIDGE,
            GpuProximity.SYSTEM,
        )


async def test_instances_are_gpus_of_their_own(machine: Machine) -> None:
    for n in range(2):
        machine.add(f"mig 1 {n} MIG-{n} {n + 3} 0 {10 * GIB} 1g.10gb")
    async with watching() as watch:
        assert len(watch.gpus.gpus) == 10
        part = watch.one("MIG-1")
        assert (part.parent_uuid, part.mig_profile, part.memory_bytes) == (
            uuid(1),
            "1g.10gb",
            10 * GIB,
        )
        assert part.model == "NVIDIA A100-SXM4-80GB MIG 1g.10gb"
        machine.xid(1, 79, instance=4)
        await watch.until(lambda: not watch.one("MIG-1").healthy)
        assert watch.one("MIG-0").healthy and watch.one(uuid(1)).healthy
        # A partition that is gone is no fault.
        machine.extra["added"] = []
        machine.write()
        await watch.until(lambda: len(watch.gpus.gpus) == 8)
        assert all(g.healthy for g in watch.gpus.gpus)


async def test_an_xid_takes_one_gpu_out_at_once(machine: Machine) -> None:
    async with watching(scan_s=600.0) as watch:  # so that it is the event that tells
        machine.xid(3, 31)  # a program's own mistake
        machine.xid(4, 79)
        await watch.until(lambda: not watch.one(uuid(4)).healthy)
        assert [g.uuid for g in watch.gpus.gpus if not g.healthy] == [uuid(4)]
        assert watch.one(uuid(4)).health_message.startswith("XID 79 (fallen off the bus)")


@pytest.mark.parametrize(
    ("bad", "good", "why"),
    [
        ({"lost": 1}, {"lost": 0}, "does not answer"),
        ({"lost": 2}, {"lost": 0}, "does not answer"),
        ({"recovery": 1}, {"recovery": 0}, "asks for a reset of the GPU"),
        ({"recovery": 2}, {"recovery": 0}, "asks for a reboot of the node"),
        ({"ecc": 3}, {"ecc": 0}, "3 uncorrectable memory errors"),
        ({"remap_failed": 1}, {"remap_failed": 0}, "exchanged"),
    ],
    ids=str,
)
async def test_a_gpu_goes_and_comes_back(
    machine: Machine, bad: dict[str, int], good: dict[str, int], why: str
) -> None:
    async with watching() as watch:
        machine.set(6, **bad)
        await watch.until(lambda: not watch.one(uuid(6)).healthy)
        assert why in watch.one(uuid(6)).health_message
        assert watch.one(uuid(6)).model == "NVIDIA A100-SXM4-80GB"
        assert sum(g.healthy for g in watch.gpus.gpus) == 7
        machine.set(6, **good)
        await watch.until(lambda: watch.one(uuid(6)).healthy)
        assert watch.one(uuid(6)).health_message == ""


async def test_a_gpu_that_is_lost_from_the_start_is_told_and_then_known(machine: Machine) -> None:
    machine.set(5, lost=2)
    async with watching() as watch:
        (sick,) = (g for g in watch.gpus.gpus if not g.healthy)
        assert sick.index == 5
        machine.set(5, lost=0)
        await watch.until(lambda: any(g.uuid == uuid(5) and g.healthy for g in watch.gpus.gpus))
        assert len(watch.gpus.gpus) == 8


async def test_a_gpu_that_is_listed_no_more_stays_and_is_not_healthy(machine: Machine) -> None:
    async with watching() as watch:
        fields = dict(machine.fields)
        machine.fields = {k: v for k, v in fields.items() if k[0] != 7}
        machine.write()
        await watch.until(lambda: not watch.one(uuid(7)).healthy)
        assert len(watch.gpus.gpus) == 8
        machine.fields = fields
        machine.write()
        await watch.until(lambda: watch.one(uuid(7)).healthy)


async def test_a_driver_that_is_taken_away_comes_back_without_faults(machine: Machine) -> None:
    async with watching() as watch:
        machine.xid(0, 79)
        await watch.until(lambda: not watch.one(uuid(0)).healthy)
        machine.load(driver=False)
        await watch.until(lambda: not any(g.healthy for g in watch.gpus.gpus))
        assert watch.one(uuid(1)).health_message == "its driver does not answer"
        machine.load(driver=True)
        await watch.until(lambda: all(g.healthy for g in watch.gpus.gpus))


async def test_events_are_heard_after_the_driver_was_loaded_anew(machine: Machine) -> None:
    async with watching() as watch:
        machine.load(driver=False)
        await watch.until(lambda: not watch.one(uuid(0)).healthy)
        machine.load(driver=True)
        await watch.until(lambda: watch.one(uuid(0)).healthy)
        machine.xid(2, 79)
        await watch.until(lambda: not watch.one(uuid(2)).healthy)


async def test_without_a_driver_there_is_nothing_and_no_noise(
    machine: Machine, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.load(driver=False)
    async with watching() as watch:
        assert (watch.gpus.gpus, watch.gpus.problem) == ((), "")
        assert not watch.gpus.hand_over(()).uuids
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


async def test_nothing_is_said_while_nothing_changes(machine: Machine) -> None:
    async with watching() as watch:
        before = watch.changes
        machine.set(1, busy=77, used=5 * GIB)  # is for metrics
        await watch.until(lambda: value("swarm_gpu_utilization_ratio", 1) == 0.77)
        assert watch.changes == before


def value(name: str, index: int) -> float | None:
    return REGISTRY.get_sample_value(name, {"gpu": uuid(index), "index": str(index)})


async def test_use_and_health_are_metrics(machine: Machine) -> None:
    machine.set(4, recovery=1)
    async with watching():
        assert value("swarm_gpu_memory_used_bytes", 3) == 3 * GIB
        assert value("swarm_gpu_memory_bytes", 3) == 80 * GIB
        assert value("swarm_gpu_utilization_ratio", 3) == 0.3
        assert (value("swarm_gpu_healthy", 3), value("swarm_gpu_healthy", 4)) == (1, 0)
    assert value("swarm_gpu_healthy", 3) is None


async def test_the_inventory_adds_to_what_is_found_and_is_read_again(
    machine: Machine, tmp_path: Path
) -> None:
    file = tmp_path / "gpus.yml"

    def write(text: str) -> None:
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").replace(file)

    declared = [
        {"uuid": uuid(0), "cdi": "nvidia.com/gpu=0"},
        {"uuid": "AMD-1", "cdi": "amd.com/gpu=1"},
    ]
    write(json.dumps({"gpus": declared}))
    async with watching(inventory=file) as watch:
        assert len(watch.gpus.gpus) == 9
        assert watch.one("AMD-1").index == 8  # 1, its place in the file, is the driver's
        assert watch.gpus.hand_over((uuid(0), uuid(1), "AMD-1")).cdi == (
            "nvidia.com/gpu=0",
            "amd.com/gpu=1",
        )
        write('{"gpus": [{}, {}]}')
        await watch.until(lambda: "gpus[0]: uuid is missing (and 1 more)" in watch.gpus.problem)
        assert len(watch.gpus.gpus) == 9
        write("gpus: [{uuid: AMD-1, driver: none, devices: [/dev/kfd], healthy: false}]")
        await watch.until(lambda: not watch.one("AMD-1").healthy)
        assert watch.gpus.problem == ""
        write("{discovery: none, gpus: []}")
        await watch.until(lambda: watch.gpus.problem == "" and watch.gpus.gpus == ())


async def test_a_wrong_inventory_is_told_and_read_again_once_it_is_right(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yml"
    file.write_text("gpus: [{}]")
    async with watching(inventory=file, discovery=False) as watch:
        assert "gpus.yml: gpus[0]: uuid is missing" in watch.gpus.problem
        file.with_suffix(".new").write_text("gpus: [{uuid: AMD-1}]")
        file.with_suffix(".new").replace(file)
        await watch.until(lambda: watch.gpus.problem == "" and watch.gpus.gpus)


async def test_until_the_first_look_the_last_table_holds(machine: Machine, tmp_path: Path) -> None:
    cache = tmp_path / "worker" / "gpus.json"
    async with watching(cache=cache) as watch:
        known = watch.gpus.gpus
    later = Gpus(clock=SystemClock(), cache=cache)
    assert later.gpus == known
    # Not all may be known yet, so an unknown one is the driver's to judge.
    assert later.hand_over(("GPU-new",)).uuids == ("GPU-new",)
    cache.write_text("{")
    assert Gpus(clock=SystemClock(), cache=cache).gpus == ()
    machine.load(driver=False)
    async with watching(cache=cache) as watch:
        assert watch.gpus.gpus == ()
    assert not cache.exists()
