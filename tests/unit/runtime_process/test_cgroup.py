"""Both kinds of cgroups on folders that look like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.runtime.process import cgroup as process_cgroup
from agent.runtime.process.cgroup import V1, V2, Limits, detect

LIMITS = Limits(
    cpu_nano=100_000_000,
    memory_bytes=50 << 20,
    pids=20,
    cpuset="0",
    cpu_shares=512,
    memory_reservation_bytes=10 << 20,
)
V2_FILES = {
    "cpu.max": "max 100000",
    "cpu.weight": "100",
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.low": "0",
    "memory.current": "3000",
    "memory.stat": "anon 1\ninactive_file 1000\n",
    "memory.events": "low 0\noom 1\noom_kill 2\n",
    "pids.max": "max",
    "pids.current": "4",
    "cpuset.cpus": "",
    "cpu.stat": "usage_usec 17\nuser_usec 9\n",
    "cgroup.procs": "",
}
V1_FILES = {
    "cpu": {"cpu.cfs_period_us": "", "cpu.cfs_quota_us": "", "cpu.shares": ""},
    "cpuacct": {"cpuacct.usage": "17000"},
    "memory": {
        "memory.limit_in_bytes": "",
        "memory.soft_limit_in_bytes": "",
        "memory.usage_in_bytes": "3000",
        "memory.stat": "cache 1\ntotal_inactive_file 1000\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    },
    "pids": {"pids.max": "", "pids.current": "4"},
    "cpuset": {"cpuset.cpus": "", "cpuset.mems": ""},
}


def fill(folder: Path, files: dict[str, str]) -> None:
    """What the kernel puts in a new group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def v2(tmp_path: Path) -> Path:
    for folder in (tmp_path, tmp_path / "swarm", tmp_path / "swarm/n1"):
        fill(folder, {"cgroup.controllers": "cpu memory", "cgroup.subtree_control": ""})
    # The fake keeps what was written last; the kernel keeps the set.
    fill(tmp_path / "swarm/n1/t1", V2_FILES)
    return tmp_path


@pytest.fixture
def v1(tmp_path: Path) -> Path:
    for controller, files in V1_FILES.items():
        fill(tmp_path / controller, {"cgroup.procs": ""})
        for part in ("", "swarm", "swarm/n1", "swarm/n1/t1"):
            if controller == "cpuset":
                fill(
                    tmp_path / controller / part,
                    {**files, "cpuset.cpus": "0-1", "cpuset.mems": "0"},
                )
        fill(tmp_path / controller / "swarm/n1/t1", {"cgroup.procs": "", **files})
    return tmp_path


def test_version_two_writes_its_own_files(v2: Path) -> None:
    groups = V2(v2, v2 / "swarm/n1", ())
    paths = groups.create("t1", LIMITS)
    folder = v2 / "swarm/n1/t1"
    assert paths == (folder / "cgroup.procs",)
    assert {name: (folder / name).read_text() for name in V2_FILES if name[-5:] != ".stat"} == {
        "cpu.max": "10000 100000",
        "cpu.weight": "20",
        "memory.max": str(50 << 20),
        "memory.swap.max": str(50 << 20),
        "memory.low": str(10 << 20),
        "memory.current": "3000",
        "memory.events": V2_FILES["memory.events"],
        "pids.max": "20",
        "pids.current": "4",
        "cpuset.cpus": "0",
        "cgroup.procs": "",
    }


def test_version_one_writes_its_own_files(v1: Path) -> None:
    groups = detect(v1, "swarm", "n1")
    assert isinstance(groups, V1) and groups.missing == ()
    paths = groups.create("t1", LIMITS)
    assert len(paths) == 5

    def text(controller: str, name: str) -> str:
        return (v1 / controller / "swarm/n1/t1" / name).read_text()

    assert text("cpu", "cpu.cfs_quota_us") == "10000"
    assert text("cpu", "cpu.cfs_period_us") == "100000"
    assert text("cpu", "cpu.shares") == "512"
    assert text("memory", "memory.limit_in_bytes") == str(50 << 20)
    assert text("memory", "memory.soft_limit_in_bytes") == str(10 << 20)
    assert text("pids", "pids.max") == "20"
    assert text("cpuset", "cpuset.cpus") == "0"


def test_version_one_denies_devices_where_it_has_the_controller(v1: Path) -> None:
    denied = Limits(denied_devices=("c 195:1 rwm",))
    without = detect(v1, "swarm", "n1")
    assert without is not None and not without.denies_devices
    assert len(without.create("t1", denied)) == 5
    fill(v1 / "devices", {"cgroup.procs": ""})
    fill(v1 / "devices/swarm/n1/t1", {"cgroup.procs": "", "devices.deny": ""})
    groups = detect(v1, "swarm", "n1")
    assert groups is not None and groups.denies_devices and groups.missing == ()
    assert len(groups.create("t1", denied)) == 6
    assert (v1 / "devices/swarm/n1/t1/devices.deny").read_text() == "c 195:1 rwm"
    # No group where nothing is to be denied.
    fill(v1 / "cpuset/swarm/n1/t2", {"cpuset.cpus": "0", "cpuset.mems": "0"})
    groups.create("t2", Limits())
    assert not (v1 / "devices/swarm/n1/t2").exists()


def test_both_tell_usage_and_kills_alike(
    v1: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("v2")
    fill(root / "swarm/n1/t1", {**V2_FILES, "memory.max": str(50 << 20)})
    two = V2(root, root / "swarm/n1", ())
    one = detect(v1, "swarm", "n1")
    assert one is not None
    (v1 / "memory/swarm/n1/t1/memory.limit_in_bytes").write_text(str(50 << 20))
    assert one.usage("t1") == two.usage("t1")
    assert one.usage("t1").memory_bytes == 2000 and one.usage("t1").cpu_total_ns == 17_000
    assert one.oom_kills("t1") == two.oom_kills("t1") == 2
    assert one.oom_kills("none") == 0


def test_controllers_that_cannot_be_enabled_are_missing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "swarm", tmp_path / "swarm/n1"):
        fill(folder, {"cgroup.controllers": "", "cgroup.subtree_control": ""})
    groups = detect(tmp_path, "swarm", "n1")
    assert isinstance(groups, V2)
    # The last one written stands for the set in this fake.
    assert "cpu" in groups.missing and "memory" in groups.missing


def test_no_cgroups_are_told_from_an_empty_folder(tmp_path: Path) -> None:
    assert detect(tmp_path, "swarm", "n1") is None


def test_a_refused_limit_names_the_file(v2: Path) -> None:
    (v2 / "swarm/n1/t1/memory.max").unlink()
    with pytest.raises(OSError, match="memory.max"):
        V2(v2, v2 / "swarm/n1", ()).create("t1", LIMITS)


def test_unlimited_swap_and_none_are_spelled_as_the_kernel_does(v2: Path) -> None:
    groups = V2(v2, v2 / "swarm/n1", ())
    path = v2 / "swarm/n1/t1/memory.swap.max"
    for swap, text in ((-1, "max"), (50 << 20, "0")):
        path.write_text("")
        groups.create("t1", Limits(memory_bytes=50 << 20, memory_swap_bytes=swap))
        assert path.read_text() == text


def test_groups_are_removed_with_what_the_task_made_in_them(tmp_path: Path) -> None:
    (tmp_path / "swarm/n1/t1/child/deep").mkdir(parents=True)
    groups = V2(tmp_path, tmp_path / "swarm/n1", ())
    assert groups.destroy("t1")
    assert groups.destroy("t1")
    groups.destroy_node()
    assert not (tmp_path / "swarm").exists()


def test_block_devices_are_summed_up(tmp_path: Path) -> None:
    v1 = tmp_path / "v1"
    v1.write_text("8:0 Read 100\n8:0 Write 7\n8:0 Sync 1\n8:16 Read 11\n8:16 Write 0\nTotal 118\n")
    assert process_cgroup._blocks_v1(v1) == {"read_bytes": 111, "written_bytes": 7}
    v2 = tmp_path / "v2"
    v2.write_text("8:0 rbytes=100 wbytes=7 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=11\n")
    assert process_cgroup._blocks_v2(v2) == {"read_bytes": 111, "written_bytes": 7}
    for missing in (process_cgroup._blocks_v1(None), process_cgroup._blocks_v2(tmp_path / "no")):
        assert missing == {}
