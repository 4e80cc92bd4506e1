"""The test bed itself: hosts are apart, can be cut and healed, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.testbed import WEB, Bed, Host, TestbedError, sweep, trouble
from deploy.testbed.processes import cgroup_folders, run

pytestmark = [pytest.mark.docker, pytest.mark.root]


def leftovers(mark: str) -> list[str]:
    """What of a bed can still be found on the machine."""
    links = [line for line in run(["ip", "-br", "link"]).splitlines() if mark in line]
    rules = [line for line in run(["iptables", "--wait", "-S"]).splitlines() if mark in line]
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if mark in line]
    return [*links, *rules, *mounts]


def processes(folder: Path) -> list[str]:
    """Command lines that name the bed's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in words:
                found.append(words)
    return found


def get(host: Host, port: int, *, timeout_s: float = 1.0) -> str:
    with urllib.request.urlopen(f"http://{host.address}:{port}/", timeout=timeout_s) as answer:
        return str(answer.read().decode().strip())


@pytest.fixture(scope="module")
def pair(bed: Bed) -> tuple[Host, Host]:
    first, second = bed.docker_hosts(2)
    return first, second


@pytest.fixture
def web(pair: tuple[Host, Host]) -> Iterator[tuple[Host, int]]:
    """A port of the second host on which a container answers."""
    host = pair[1]
    name = f"bed-web-{os.getpid()}"
    host.docker("run", "-d", "--name", name, "-p", "8099:80", WEB)
    deadline = time.monotonic() + 20
    while True:
        try:
            get(host, 8099)
            break
        except OSError:
            assert time.monotonic() < deadline
    yield host, 8099
    host.docker("rm", "-f", name)


def test_hosts_have_their_own_name_address_and_run_folder(pair: tuple[Host, Host]) -> None:
    first, second = pair
    assert first.run("hostname").strip() == "h1"
    assert first.address in first.run("ip", "-4", "addr")
    assert first.address not in second.run("ip", "-4", "addr")
    first.run("touch", "/run/only-here")
    assert not Path("/run/only-here").exists()
    assert "only-here" not in second.run("ls", "/run")


def test_containers_are_reached_from_outside_and_from_other_hosts(
    pair: tuple[Host, Host], web: tuple[Host, int]
) -> None:
    host, port = web
    answer = get(host, port)
    assert len(answer) == 12  # the container's hostname
    url = f"http://{host.name}:{port}/"
    assert pair[0].run("busybox", "wget", "-qO-", url).strip() == answer


@pytest.mark.parametrize("direction", ["both", "in", "out"])
def test_a_host_that_is_cut_off_is_silent_until_it_is_healed(
    web: tuple[Host, int], direction: str
) -> None:
    host, port = web
    host.cut(direction)
    try:
        with pytest.raises(OSError):
            get(host, port, timeout_s=0.5)
    finally:
        host.heal()
    assert get(host, port, timeout_s=5)


def received(host: Host) -> int:
    """Packets that reached the host's link; /sys would show another namespace's."""
    found = json.loads(host.run("ip", "-j", "-s", "link", "show", "eth0"))
    return int(found[0]["stats64"]["rx"]["packets"])


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_one_way_cut_lets_the_other_way_through(pair: tuple[Host, Host], direction: str) -> None:
    first, second = pair
    sender, receiver = (second, first) if direction == "in" else (first, second)
    sender.run("sh", "-c", f"busybox nc -w 1 {receiver.address} 9 </dev/null", check=False)
    second.cut(direction)
    try:
        before = received(receiver)
        sender.run("sh", "-c", f"busybox nc -w 1 {receiver.address} 9 </dev/null", check=False)
        assert received(receiver) > before
    finally:
        second.heal()


@pytest.mark.parametrize("direction", ["both", "in", "out"])
def test_a_cut_from_some_hosts_leaves_the_others(
    bed: Bed, web: tuple[Host, int], direction: str
) -> None:
    host, port = web
    near, far = bed.host(7), bed.host(8)
    url = ("curl", "-s", "-m", "1", f"http://{host.address}:{port}/")
    host.cut(direction, peers=[far])
    try:
        assert near.run(*url)
        assert not far.run(*url, check=False)
    finally:
        host.heal()
    assert far.run(*url)


def test_unknown_names_are_errors_that_say_what_there_is(pair: tuple[Host, Host]) -> None:
    with pytest.raises(TestbedError, match="both, in, out"):
        pair[0].cut("sideways")
    with pytest.raises(TestbedError, match="runs no nosuch; known: .*dockerd"):
        pair[0].kill("nosuch")
    with pytest.raises(TestbedError, match="ended with 3: nope"):
        pair[0].run("sh", "-c", "echo nope >&2; exit 3")


def test_a_bed_leaves_nothing_behind() -> None:
    made = Bed.open(f"once-{os.getpid()}")
    try:
        host = made.docker_hosts(1)[0]
        host.docker("run", "-d", "-p", "80:80", WEB)
        host.cut("in")
        assert leftovers(made.mark)
        assert processes(made.folder)
    finally:
        made.down()
    assert leftovers(made.mark) == []
    assert processes(made.folder) == []
    assert cgroup_folders(made.cgroup) == []
    assert not made.folder.exists()
    made.down()


def test_two_beds_do_not_meet() -> None:
    beds = [Bed.open(f"{name}-{os.getpid()}") for name in ("left", "right")]
    try:
        hosts = [bed.host(1) for bed in beds]
        assert len({host.address for host in hosts}) == 2
        assert len({bed.bridge for bed in beds}) == 2
    finally:
        for bed in beds:
            bed.down()


def test_what_a_crashed_run_left_is_swept() -> None:
    script = (
        "import os, time\n"
        "from deploy.testbed import Bed\n"
        "bed = Bed.open(f'crashed-{os.getpid()}')\n"
        "bed.docker_hosts(1, images=False)\n"
        "print(bed.mark, bed.folder, flush=True)\n"
        "time.sleep(600)\n"
    )
    crashed = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert crashed.stdout is not None
        with crashed.stdout as said:
            mark, folder = said.readline().split()
    finally:
        crashed.send_signal(signal.SIGKILL)
        crashed.wait()
    assert processes(Path(folder)), "daemons outlive whoever started them"
    sweep("crashed-")
    assert leftovers(mark) == []
    assert processes(Path(folder)) == []


def test_the_command_line_does_the_same() -> None:
    name = f"cli-{os.getpid()}"

    def testbed(*words: str, check: bool = True) -> str:
        return run([sys.executable, "-m", "deploy.testbed", "--name", name, *words], check=check)

    try:
        assert "10.77." in testbed("up", "2", "--no-docker")
        assert testbed("exec", "2", "--", "hostname").strip() == "h2"
        testbed("cut", "2", "--direction", "in")
        assert '"cut": "in"' in testbed("status")
        testbed("heal", "2")
        assert '"cut": "in"' not in testbed("status")
        testbed("start", "1", "dockerd")
        testbed("kill", "1", "dockerd")
        assert '"alive": false' in testbed("status")
        with pytest.raises(TestbedError, match="there is no signal"):
            testbed("kill", "1", "dockerd", "--signal", "NOPE")
    finally:
        testbed("down")
    with pytest.raises(TestbedError, match="there is no bed"):
        testbed("status")


def test_the_reason_why_no_bed_can_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trouble() == ""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in trouble()
