"""Mounts in the three ways an engine takes them."""

from __future__ import annotations

from typing import Any

import pytest

from agent.runtime.docker.facts import Facts
from agent.runtime.docker.mounts import Mounts, plan_mounts
from swarm.v1 import BindOptions, Driver, Mount, TmpfsOption, TmpfsOptions, VolumeOptions

NEW = Facts(api=(1, 48))
OLD = Facts(api=(1, 41))


def plan(mount: Mount, facts: Facts = NEW) -> tuple[Mounts, list[str]]:
    problems: list[str] = []
    return plan_mounts((mount,), facts, problems.append), problems


def bind(**options: Any) -> Mount:
    return Mount(type="bind", source="/s", target="/t", bind_options=BindOptions(**options))


BIND = {"Type": "bind", "Source": "/s", "Target": "/t", "ReadOnly": False}
VOLUME = {"Type": "volume", "Source": "v", "Target": "/t", "ReadOnly": False}
AS_MOUNT: dict[str, tuple[Mount, Facts, dict[str, Any]]] = {
    "bind": (Mount(type="bind", source="/s", target="/t"), OLD, BIND),
    "bind_read_only": (
        Mount(type="bind", source="/s", target="/t", read_only=True, consistency="cached"),
        OLD,
        {**BIND, "ReadOnly": True, "Consistency": "cached"},
    ),
    "bind_options": (
        bind(propagation="rslave", non_recursive=True),
        OLD,
        {**BIND, "BindOptions": {"Propagation": "rslave", "NonRecursive": True}},
    ),
    "bind_made": (
        bind(create_mountpoint=True),
        NEW,
        {**BIND, "BindOptions": {"CreateMountpoint": True}},
    ),
    "bind_read_only_kinds": (
        bind(read_only_non_recursive=True, read_only_force_recursive=True),
        NEW,
        {
            **BIND,
            "BindOptions": {"ReadOnlyNonRecursive": True, "ReadOnlyForceRecursive": True},
        },
    ),
    "read_only_was_never_recursive": (bind(read_only_non_recursive=True), OLD, BIND),
    "volume": (Mount(type="volume", source="v", target="/t"), OLD, VOLUME),
    "anonymous_volume": (
        Mount(target="/t"),
        OLD,
        {"Type": "volume", "Target": "/t", "ReadOnly": False},
    ),
    "volume_options": (
        Mount(
            type="volume",
            source="v",
            target="/t",
            volume_options=VolumeOptions(
                no_copy=True,
                labels={"a": "b"},
                driver_config=Driver(name="nfs", options={"o": "1"}),
                subpath="x",
            ),
        ),
        NEW,
        {
            **VOLUME,
            "VolumeOptions": {
                "NoCopy": True,
                "Labels": {"a": "b"},
                "DriverConfig": {"Name": "nfs", "Options": {"o": "1"}},
                "Subpath": "x",
            },
        },
    ),
    "tmpfs": (
        Mount(type="tmpfs", target="/t", tmpfs_options=TmpfsOptions(size_bytes=5, mode=0o700)),
        OLD,
        {
            "Type": "tmpfs",
            "Target": "/t",
            "ReadOnly": False,
            "TmpfsOptions": {"SizeBytes": 5, "Mode": 0o700},
        },
    ),
    "image": (
        Mount(type="image", source="i", target="/t"),
        NEW,
        {"Type": "image", "Source": "i", "Target": "/t", "ReadOnly": False},
    ),
}


@pytest.mark.parametrize(("mount", "facts", "expected"), AS_MOUNT.values(), ids=AS_MOUNT)
def test_mount_as_the_engine_says_it(mount: Mount, facts: Facts, expected: dict[str, Any]) -> None:
    made, problems = plan(mount, facts)
    assert problems == []
    assert made.mounts == [expected]


def test_selinux_and_missing_sources_are_said_as_binds() -> None:
    made, _ = plan(bind(selinux="Z", propagation="rslave"))
    assert made.binds == ["/s:/t:rw,rslave,Z"]
    made, _ = plan(bind(create_mountpoint=True), OLD)
    assert made.binds == ["/s:/t:rw"]


def test_free_tmpfs_options_are_said_as_tmpfs() -> None:
    options = TmpfsOptions(
        size_bytes=5,
        mode=0o1777,
        options=(TmpfsOption(words=("noexec",)), TmpfsOption(words=("uid", "7"))),
    )
    made, _ = plan(Mount(type="tmpfs", target="/t", read_only=True, tmpfs_options=options))
    assert made.tmpfs == {"/t": "noexec,uid=7,ro,size=5,mode=1777"}
    assert made.mounts == []


REFUSED = {
    "relative_target": (Mount(type="bind", source="/s", target="t"), NEW, "absolute path"),
    "relative_source": (Mount(type="bind", source="s", target="/t"), NEW, "absolute path"),
    "npipe": (Mount(type="npipe", source="s", target="/t"), NEW, "Windows"),
    "cluster": (Mount(type="cluster", source="s", target="/t"), NEW, "CSI"),
    "unknown": (Mount(type="nfs", source="s", target="/t"), NEW, "type 'nfs'"),
    "image": (Mount(type="image", source="s", target="/t"), OLD, "1.48"),
    "force_recursive": (bind(read_only_force_recursive=True), OLD, "1.44"),
    "selinux_non_recursive": (bind(selinux="z", non_recursive=True), NEW, "cannot combine"),
    "subpath": (
        Mount(source="v", target="/t", volume_options=VolumeOptions(subpath="x")),
        OLD,
        "1.45",
    ),
}


@pytest.mark.parametrize(("mount", "facts", "reason"), REFUSED.values(), ids=REFUSED)
def test_mount_that_cannot_be_said_is_a_problem(mount: Mount, facts: Facts, reason: str) -> None:
    _, problems = plan(mount, facts)
    assert len(problems) == 1
    assert reason in problems[0]
    assert repr(mount.target) in problems[0]
