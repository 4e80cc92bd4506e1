"""The node's description out of those of its runtimes."""

from __future__ import annotations

from pathlib import Path

from agent.description import About, describe, pids_of_host
from agent.runtime.base import Description
from swarm.v1 import EngineDescription, Gpu, Resources

ABOUT = About("host", "1.2", data_path_addr="10.0.0.1", data_path_port=7946)
DOCKER = Description(
    ("docker", "runc"),
    Resources(cpu_nano=4, memory_bytes=10),
    EngineDescription(name="docker", version="20", labels={"a": "1"}),
    ("no swap limit",),
)
PROCESS = Description(("process",), Resources(cpu_nano=4, memory_bytes=12), warnings=("no root",))


def test_amounts_of_one_machine_are_not_added_up() -> None:
    resources = describe(ABOUT, [DOCKER, PROCESS]).resources
    assert resources == Resources(cpu_nano=4, memory_bytes=12)


def test_processes_are_the_machines_limit(tmp_path: Path) -> None:
    assert pids_of_host() > 0
    assert pids_of_host(tmp_path) == 0, "a kernel that does not say is no limit"
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/pid_max").write_text("32768\n")
    (tmp_path / "sys/kernel/threads-max").write_text("1000\n")
    assert pids_of_host(tmp_path) == 1000
    resources = describe(About("h", "1", pids=7), [DOCKER]).resources
    assert resources is not None
    assert resources.pids == 7


def test_first_runtime_is_the_default() -> None:
    assert describe(ABOUT, [DOCKER, PROCESS]).runtimes == ("docker", "runc", "process")
    assert describe(ABOUT, [PROCESS, DOCKER]).runtimes[0] == "process"


def test_gpus_are_the_machines_and_not_a_runtimes() -> None:
    assert describe(ABOUT, [], gpus=(Gpu(uuid="GPU-1"),)).gpus == (Gpu(uuid="GPU-1"),)


def test_node_without_runtime_describes_itself() -> None:
    description = describe(ABOUT, [])
    assert description.hostname == "host"
    assert description.runtimes == ()
    assert (description.data_path_addr, description.data_path_port) == ("10.0.0.1", 7946)
    assert description.platform is not None
    assert description.platform.os == "linux"


def test_each_warning_is_told_once_and_the_agents_first() -> None:
    description = describe(ABOUT, [DOCKER, PROCESS, PROCESS], warnings=("port taken",))
    assert description.warnings == ("port taken", "no swap limit", "no root")


def test_labels_of_the_command_line_go_over_the_engines() -> None:
    about = About("host", "1", engine_labels={"a": "2", "b": "3"})
    engine = describe(about, [DOCKER]).engine
    assert engine is not None
    assert engine.labels == {"a": "2", "b": "3"}
    engine = describe(about, [PROCESS]).engine
    assert engine is not None
    assert engine.labels == {"a": "2", "b": "3"}
