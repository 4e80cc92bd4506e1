"""The small pure parts: image names, credentials, networks, facts, events, reading inspections, files."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.runtime.base import EventKind, Phase, Rejected, TaskFile
from agent.runtime.docker.engine import Engine, Version
from agent.runtime.docker.facts import Facts, describe, read_facts
from agent.runtime.docker.files import Files
from agent.runtime.docker.images import auth_header, parse_reference
from agent.runtime.docker.inspection import (
    End,
    end_of,
    health_of,
    health_of_status,
    last_output,
    phase_of,
    started_of,
    verdict_of,
)
from agent.runtime.docker.networks import Networks, create_body
from agent.runtime.docker.watch import Watched, Watchlist
from agent.runtime.memory import filesystem, memory_folder
from swarm.v1 import Driver, IpamConfig, IpamOptions, Network, NetworkSpec

# ------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("image", "name", "registry", "tag", "digest", "floating"),
    [
        ("busybox", "busybox", "docker.io", "latest", "", True),
        ("busybox:1.36", "busybox", "docker.io", "1.36", "", False),
        ("me/app:latest", "me/app", "docker.io", "latest", "", True),
        ("h:5000/app", "h:5000/app", "h:5000", "latest", "", True),
        ("localhost/app:2", "localhost/app", "localhost", "2", "", False),
        ("ghcr.io/a/b:v@sha256:ab", "ghcr.io/a/b", "ghcr.io", "", "sha256:ab", False),
    ],
)
def test_references(
    image: str,
    name: str,
    registry: str,
    tag: str,
    digest: str,
    floating: bool,
) -> None:
    found = parse_reference(image)
    assert (found.name, found.registry, found.tag, found.digest) == (name, registry, tag, digest)
    assert found.floating is floating


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_credentials_reach_the_engine_in_the_alphabet_it_reads(encode: Any) -> None:
    data = json.dumps({"username": "ü??>>", "password": "p~~"}).encode()
    header = auth_header(encode(data).decode().rstrip("="))
    assert base64.urlsafe_b64decode(header["X-Registry-Auth"]) == data
    assert auth_header("") == {}


def test_unreadable_credentials_are_refused_without_showing_them() -> None:
    with pytest.raises(Rejected) as caught:
        auth_header("c2VjcmV0")
    assert "c2VjcmV0" not in caught.value.message


# ------------------------------------------------------------------ networks and facts


def test_an_overlay_becomes_a_bridge_with_the_clusters_subnet() -> None:
    network = Network(
        id="abcdefghijklmn",
        spec=NetworkSpec(
            name="app_default",
            labels={"a": "b"},
            driver=Driver(
                name="overlay", options={"encrypted": "", "com.docker.network.driver.mtu": "9"}
            ),
            internal=True,
        ),
        ipam=(IpamConfig(subnet="10.0.1.0/24", gateway="10.0.1.1/24"),),
    )
    made = create_body(network, Facts(), with_subnet=True)
    assert made["Name"] == "app_default.abcdefgh"
    assert made["Driver"] == "bridge"
    assert made["Internal"] is True
    assert made["Options"] == {"com.docker.network.driver.mtu": "9"}
    assert made["Labels"] == {"a": "b", "swarm-py.network.id": "abcdefghijklmn"}
    assert made["IPAM"]["Config"] == [{"Subnet": "10.0.1.0/24", "Gateway": "10.0.1.1"}]
    assert "Config" not in create_body(network, Facts(), with_subnet=False)["IPAM"]


def test_another_driver_and_the_users_ipam_are_kept() -> None:
    network = Network(
        id="n",
        spec=NetworkSpec(
            name="m",
            driver=Driver(name="macvlan", options={"parent": "eth0"}),
            ipv6=True,
            ipam=IpamOptions(
                driver=Driver(name="x", options={"o": "1"}),
                configs=(
                    IpamConfig(
                        subnet="10.9.0.0/24", range="10.9.0.128/25", aux_addresses={"r": "10.9.0.5"}
                    ),
                ),
            ),
        ),
    )
    made = create_body(network, Facts(), with_subnet=True)
    assert (made["Driver"], made["Options"], made["EnableIPv6"]) == (
        "macvlan",
        {"parent": "eth0"},
        True,
    )
    assert made["IPAM"] == {
        "Driver": "x",
        "Options": {"o": "1"},
        "Config": [
            {
                "Subnet": "10.9.0.0/24",
                "IPRange": "10.9.0.128/25",
                "AuxiliaryAddresses": {"r": "10.9.0.5"},
            }
        ],
    }


def test_facts_say_what_is_offered_and_what_is_not_enforced() -> None:
    info = {
        "NCPU": 4,
        "MemTotal": 1000,
        "Runtimes": {"runc": {}, "nvidia": {}},
        "DefaultRuntime": "runc",
        "SecurityOptions": ["name=seccomp,profile=default", "name=apparmor"],
        "Labels": ["zone=a", "flag"],
        "Plugins": {"Network": ["bridge"], "Authorization": None},
        "MemoryLimit": False,
        "OomKillDisable": False,
        "CgroupVersion": "2",
    }
    facts = read_facts(Version("docker", "25.0", (1, 44)), info)
    said = describe(facts)
    assert said.runtimes == ("docker", "nvidia", "runc")
    assert said.resources.cpu_nano == 4_000_000_000
    assert said.engine is not None
    assert (said.engine.name, said.engine.version) == ("docker", "25.0")
    assert said.engine.labels == {"zone": "a", "flag": ""}
    assert [(p.type, p.name) for p in said.engine.plugins] == [("Network", "bridge")]
    assert len(said.warnings) == 1
    assert "memory limits are not enforced" in said.warnings[0]
    assert (facts.nvidia, facts.apparmor, facts.selinux) == (True, True, False)


def test_podman_without_systemd_runs_no_healthchecks() -> None:
    podman = Version("podman", "4.3", (1, 41))
    without = read_facts(podman, {}, systemd=False)
    assert not without.healthchecks
    assert "systemd" in describe(without).warnings[0]
    assert read_facts(podman, {}, systemd=True).healthchecks
    assert read_facts(Version("docker", "25", (1, 44)), {}, systemd=False).healthchecks


# ------------------------------------------------------------------ watchlist


def watched(*, told: bool = True, phase: Phase = Phase.RUNNING) -> tuple[Watchlist, Watched]:
    watchlist = Watchlist()
    entry = watchlist.add(Watched("t1", "c1", phase=phase))
    if told:
        watchlist.tell(entry)
    return watchlist, entry


def taken(watchlist: Watchlist) -> list[tuple[EventKind, int]]:
    out = []
    while (event := watchlist.take()) is not None:
        out.append((event.kind, event.exit_code))
    return out


def test_an_exit_is_told_once_whoever_saw_it() -> None:
    watchlist, entry = watched()
    watchlist.exit(entry, End(3, ""))
    watchlist.exit(entry, End(255, "gone"))
    assert taken(watchlist) == [(EventKind.EXITED, 3)]
    assert entry.end.code == 3


def test_an_exit_that_was_asked_for_is_not_told() -> None:
    watchlist, entry = watched()
    entry.stopping = True
    watchlist.exit(entry, End(143, ""))
    assert taken(watchlist) == []


def test_events_wait_until_the_start_has_returned() -> None:
    watchlist, entry = watched(told=False)
    entry.healthy = False
    watchlist.health(entry, "", healthy=True)
    watchlist.exit(entry, End(1, ""))
    assert taken(watchlist) == []
    watchlist.tell(entry)
    assert taken(watchlist) == [(EventKind.HEALTHY, 0), (EventKind.EXITED, 1)]


def test_health_is_told_when_it_changes_and_not_after_the_end() -> None:
    watchlist, entry = watched()
    entry.healthy = False
    for healthy in (True, True, False, True):
        watchlist.health(entry, "", healthy=healthy)
    # Of one kind only the newest waits.
    assert [kind for kind, _ in taken(watchlist)] == [EventKind.UNHEALTHY, EventKind.HEALTHY]
    watchlist.exit(entry, End(0, ""))
    watchlist.health(entry, "", healthy=False)
    assert taken(watchlist) == [(EventKind.EXITED, 0)]


def test_a_container_that_never_ran_has_no_exit() -> None:
    watchlist, entry = watched(phase=Phase.CREATED)
    watchlist.exit(entry, End(127, ""))
    assert taken(watchlist) == []


def test_events_of_an_older_container_are_not_the_tasks() -> None:
    watchlist, entry = watched()
    label = {"com.docker.swarm.task.id": "t1"}
    assert watchlist.of_container(label, "c1") is entry
    assert watchlist.of_container(label, "c0") is None


def test_a_healthcheck_that_has_never_passed_can_fail() -> None:
    """Not passed yet and failed are different words, though both are not healthy."""
    assert verdict_of(container(Health={"Status": "starting"})) is None
    assert verdict_of(container(Health={"Status": "unhealthy"})) is False
    watchlist, entry = watched()
    entry.healthy = verdict_of(container(Health={"Status": "starting"}))
    watchlist.health(entry, "no", healthy=False)
    assert taken(watchlist) == [(EventKind.UNHEALTHY, 0)]


def test_an_end_is_told_at_once_to_whoever_keeps_its_secrets() -> None:
    ended: list[str] = []
    watchlist = Watchlist(on_end=ended.append)
    entry = watchlist.add(Watched("task", "c1", phase=Phase.RUNNING, told=True))
    watchlist.exit(entry, End(1, ""))
    watchlist.exit(entry, End(1, ""))
    assert ended == ["task"]


# ------------------------------------------------------------------ inspections


def container(**state: Any) -> dict[str, Any]:
    return {
        "Id": "c1",
        "State": {"Status": "running", "Pid": 7, **state},
        "HostConfig": {"NetworkMode": "e2", "Memory": 50 << 20},
        "NetworkSettings": {
            "Networks": {
                "a": {
                    "IPAddress": "10.1.0.2",
                    "IPPrefixLen": 24,
                    "NetworkID": "e1",
                    "Aliases": ["x"],
                },
                "b": {
                    "IPAddress": "10.2.0.2",
                    "IPPrefixLen": 16,
                    "NetworkID": "e2",
                    "Aliases": None,
                },
            },
            "Ports": {
                "80/tcp": [
                    {"HostIp": "0.0.0.0", "HostPort": "8080"},
                    {"HostIp": "::", "HostPort": "8080"},
                ],
                "81/tcp": None,
            },
        },
    }


def test_the_address_is_that_on_the_first_network() -> None:
    started = started_of(container(), {"e1": "n1", "e2": "n2"}.get)  # type: ignore[arg-type]
    assert started.address == "10.2.0.2"
    assert started.container.pid == 7
    assert [(n.network_id, n.addresses) for n in started.networks] == [
        ("n2", ("10.2.0.2/16",)),
        ("n1", ("10.1.0.2/24",)),
    ]
    assert [(p.target_port, p.published_port) for p in started.host_ports] == [(80, 8080)]
    assert started.healthy


def test_on_the_hosts_network_the_address_is_loopback() -> None:
    found = container()
    found["HostConfig"]["NetworkMode"] = "host"
    found["NetworkSettings"]["Networks"] = {"host": {"IPAddress": "", "NetworkID": "e0"}}
    assert started_of(found, lambda _: "").address == "127.0.0.1"


@pytest.mark.parametrize(
    ("status", "expected"),
    [("starting", False), ("healthy", True), ("unhealthy", False), ("none", None)],
)
def test_health_of_an_inspection(status: str, expected: bool | None) -> None:
    assert health_of(container(Health={"Status": status})) is expected


def test_health_of_a_listing_and_the_last_word() -> None:
    assert health_of_status("Up 3 seconds (healthy)") is True
    assert health_of_status("Up 3 seconds (unhealthy)") is False
    assert health_of_status("Up 3 seconds (health: starting)") is None
    log = [{"Output": "a\n", "ExitCode": 1}, {"Output": " no\nanswer ", "ExitCode": 1}]
    assert last_output(container(Health={"Log": log})) == "no answer"
    assert last_output(container(Health={"Log": log, "FailingStreak": 3})) == (
        "3 checks failed: no answer"
    )
    assert last_output(container()) == ""


def test_the_end_says_out_of_memory_only_when_it_was_the_reason() -> None:
    assert end_of(container(ExitCode=137, OOMKilled=True)) == (
        137,
        "out of memory: more than its limit of 50 MiB",
        "oom",
        False,
    )
    assert end_of(container(ExitCode=0, OOMKilled=True)) == End(0)
    assert end_of(container(ExitCode=127, Error="no such file")) == End(127, "no such file")


def test_phases_of_both_dialects() -> None:
    assert phase_of("created") is phase_of("configured") is Phase.CREATED
    assert phase_of("running") is phase_of("paused") is Phase.RUNNING
    assert phase_of("exited") is phase_of("dead") is phase_of("stopped") is Phase.EXITED


# ------------------------------------------------------------------ files


def test_files_are_written_with_mode_and_removed(tmp_path: Path) -> None:
    files = Files("n1", tmp_path)
    uid, gid = os.geteuid(), os.getegid()
    written = files.write(
        "t1",
        [
            TaskFile("/a", b"x", mode=0o440, uid=uid, gid=gid),
            TaskFile("/b", b"y", uid=uid, gid=gid),
        ],
    )
    assert [target for _, target in written] == ["/a", "/b"]
    first = Path(written[0][0])
    assert first.read_bytes() == b"x"
    assert stat.S_IMODE(first.stat().st_mode) == 0o440
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    files.write("t2", [TaskFile("/a", b"x", uid=uid, gid=gid)])
    files.keep(["t2"])
    assert [p.name for p in (tmp_path / "n1").iterdir()] == ["t2"]
    files.remove("t2")
    files.remove("t2")
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_in_memory_secrets_are_refused() -> None:
    with pytest.raises(Rejected, match="tmpfs"):
        Files("n1", None).write("t1", [TaskFile("/a", b"x")])
    assert Files("n1", None).write("t1", []) == ()


def test_the_folder_for_files_is_in_memory() -> None:
    folder = memory_folder()
    assert folder is not None
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    assert filesystem(nearest) in ("tmpfs", "ramfs")
    assert filesystem(Path("/proc")) == "proc"


async def test_agents_that_share_an_engine_make_networks_one_at_a_time_and_leave_no_lock(
    tmp_path: Path,
) -> None:
    """Each agent has a lock file open that another one may just be removing."""
    inside = most = 0

    async def make() -> None:
        nonlocal inside, most
        networks = Networks(Engine(str(tmp_path / "docker.sock")), lock_folder=tmp_path / "locks")
        for _ in range(20):
            async with networks._alone():
                inside += 1
                most = max(most, inside)
                await asyncio.sleep(0)
                inside -= 1

    await asyncio.gather(*(make() for _ in range(4)))
    assert (inside, most) == (0, 1)
    assert list((tmp_path / "locks").iterdir()) == []
