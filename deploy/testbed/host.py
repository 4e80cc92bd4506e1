"""One test host: network, mount and UTS namespaces held open by one process, in which a Docker
Engine and a swarmd of its own run.

The holder keeps the namespaces, not a mount below /run/netns: when the host's last process is gone,
the kernel removes its interfaces, mounts and firewall rules, even after a crash of whoever made it.
Commands enter with nsenter on the holder; `ip netns exec` would hide the cgroup mounts. /run is a
fresh tmpfs, so that daemons keep their default paths, and names resolve to nothing at once, so that
a pull from a registry that cannot be reached fails in milliseconds.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.testbed import processes
from deploy.testbed.processes import Process, TestbedError, run, spawn

if TYPE_CHECKING:
    from deploy.testbed.bed import Bed

HOLDER_TIMEOUT_S = 10.0
DOCKERD_TIMEOUT_S = 60.0
SWARMD_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
DIRECTIONS = ("both", "in", "out")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Runs in the new namespaces. $1: the host's folder, $2: its name. What daemons expect below /run
# is made anew; the rest of the file system is the machine's.
_SETUP = """
set -e
mount --make-rprivate / && mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/lock /run/docker
hostname "$2"
resolv=$(readlink -m /etc/resolv.conf)
mkdir -p "$(dirname "$resolv")"
[ -e "$resolv" ] || : >"$resolv"
mount --bind "$1/resolv.conf" "$resolv"
mount --bind "$1/hosts" /etc/hosts
echo ready
exec sleep infinity
"""


@dataclass(slots=True)
class Record:
    """What a host is made of, as written to the bed's state file."""

    holder: Process | None = None
    daemons: dict[str, Process] = field(default_factory=dict)
    docker_args: tuple[str, ...] = ()
    swarmd_args: tuple[str, ...] = ()
    cut: str = ""


class Host:
    """A test host. Made by `Bed.host`; all methods block until done."""

    def __init__(self, bed: Bed, index: int, record: Record) -> None:
        self._bed = bed
        self.index = index
        self.record = record
        self.name = f"h{index}"
        self.folder = bed.folder / self.name
        self.address = bed.address(index)
        # Paths that are also valid outside of the host.
        self.docker_socket = self.folder / "docker.sock"
        self.swarm_socket = self.folder / "swarmd.sock"
        self.state_dir = self.folder / "state"
        self.link = f"{bed.mark}h{index}"
        # What daemons that are started from now on see beside `environment`; not in the state file.
        self.extra_environment: dict[str, str] = {}

    # -------------------------------------------------------------- life

    def up(self) -> None:
        """Makes the namespaces and the link to the bridge; nothing happens if they stand."""
        if self.record.holder is not None and self.record.holder.alive():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1\n")
        (self.folder / "hosts").write_text(self._bed.hosts_file(self.name))
        with (self.folder / "holder.log").open("ab") as said:
            holder = subprocess.Popen(
                [
                    *("unshare", "--net", "--mount", "--uts", "--propagation", "private"),
                    *("sh", "-c", _SETUP, "sh", str(self.folder), self.name),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
        self.record.holder = processes.identify(holder.pid)
        self._bed.save()
        assert holder.stdout is not None
        with holder.stdout as answer:
            if answer.readline() != b"ready\n":
                raise TestbedError(
                    f"{self.name}: namespaces cannot be made: "
                    f"{(self.folder / 'holder.log').read_text().strip() or 'see dmesg'}; root is "
                    "needed"
                )
        holder.returncode = 0
        processes.enter_cgroup(holder.pid, f"{self._cgroup}/host")
        self._connect(holder.pid)

    def _connect(self, pid: int) -> None:
        run(
            [
                "ip",
                "link",
                "add",
                self.link,
                "type",
                "veth",
                *("peer", "name", "eth0", "netns"),
                str(pid),
            ]
        )
        run(["ip", "link", "set", self.link, "master", self._bed.bridge, "up"])
        inside = self._enter()
        prefix = self._bed.subnet.prefixlen
        run([*inside, "ip", "addr", "add", f"{self.address}/{prefix}", "dev", "eth0"])
        run([*inside, "ip", "link", "set", "eth0", "up"])
        run([*inside, "ip", "link", "set", "lo", "up"])
        run([*inside, "ip", "route", "add", "default", "via", self._bed.gateway])

    def down(self) -> None:
        """Ends all that runs on the host and removes it; also what a crash left behind."""
        identities: list[tuple[str, str]] = []
        holder = self.record.holder
        if holder is not None and holder.alive():
            identities = [(kind, processes.namespace(holder.pid, kind)) for kind in ("mnt", "net")]
        for process in self.record.daemons.values():
            if process.alive():
                mount = processes.namespace(process.pid, "mnt")
                identities.append(("mnt", mount))
        own = processes.namespace(os.getpid(), "mnt")
        processes.kill_all(self._cgroup, {i for i in identities if i[1] not in ("", own)})
        if holder is not None:
            holder.wait(0)
        run(["ip", "link", "del", self.link], check=False)
        self.record.holder = None
        self.record.daemons.clear()
        self.record.cut = ""
        run(["rm", "-rf", "--one-file-system", self.folder])

    @property
    def running(self) -> bool:
        return self.record.holder is not None and self.record.holder.alive()

    @property
    def _cgroup(self) -> str:
        return f"{self._bed.cgroup}/{self.name}"

    # -------------------------------------------------------------- commands

    def _enter(self) -> list[str]:
        holder = self.record.holder
        if holder is None or not holder.alive():
            raise TestbedError(f"{self.name} is not up")
        return ["nsenter", f"--target={holder.pid}", "--net", "--mount", "--uts"]

    def run(
        self,
        *argv: str | Path,
        check: bool = True,
        stdin: bytes | None = None,
        timeout_s: float = 60.0,
    ) -> str:
        """Runs a command on the host; its standard output."""
        return run([*self._enter(), *argv], check=check, stdin=stdin, timeout_s=timeout_s)

    def command(self, *argv: str | Path) -> list[str]:
        """The words that run a command on the host."""
        return [*self._enter(), *(str(word) for word in argv)]

    def spawn(self, name: str, *argv: str | Path) -> Process:
        """Starts a process of this name on the host, with its log in <name>.log; stopped with
        `stop` or with the host.
        """
        running = self.record.daemons.get(name)
        if running is not None and running.alive():
            raise TestbedError(f"{name} already runs on {self.name} (pid {running.pid})")
        # The shell puts itself into the host's cgroup first, so that nothing escapes `down`.
        homes = [
            str(home / self._cgroup / "host/cgroup.procs") for home in processes.cgroup_homes()
        ]
        script = "".join(f'echo $$ >"{path}" && ' for path in homes) + 'exec "$@"'
        words = ["sh", "-c", script, "sh", *self._enter(), *argv]
        process = spawn(words, output=self.folder / f"{name}.log", env=self.environment())
        self.record.daemons[name] = process
        self._bed.save()
        return process

    def environment(self) -> dict[str, str]:
        """What the host's daemons see; nothing of the caller's proxies or credentials."""
        own = Path(sys.executable).parent
        common = {"PATH": f"{own}:{_PATH}", "HOME": "/root", "LANG": "C.UTF-8"}
        return {**common, **self.extra_environment}

    def log(self, name: str) -> str:
        """What a daemon has said so far."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def alive(self, name: str) -> bool:
        """Whether the named daemon runs."""
        process = self.record.daemons.get(name)
        return process is not None and process.alive()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a signal to a daemon; after SIGKILL it is gone when this returns."""
        process = self._daemon(name)
        process.signal(number)
        if number == signal.SIGKILL and not process.wait(processes.KILL_TIMEOUT_S):
            raise TestbedError(f"{name} on {self.name} does not end after SIGKILL")

    def stop(self, name: str) -> None:
        """Ends a daemon as a service manager would."""
        self._daemon(name).end(grace_s=STOP_TIMEOUT_S)

    def _daemon(self, name: str) -> Process:
        process = self.record.daemons.get(name)
        if process is None:
            known = ", ".join(self.record.daemons) or "none"
            raise TestbedError(f"{self.name} runs no {name}; known: {known}")
        return process

    # -------------------------------------------------------------- docker

    def start_docker(self, *args: str, wait: bool = True) -> None:
        """Starts the host's Docker Engine, again with the arguments of the first time if none are
        given.
        """
        self.up()
        if self.alive("dockerd"):
            return
        if args:
            self.record.docker_args = args
        self._forget_dead_containerd()
        (self.folder / "docker.pid").unlink(missing_ok=True)
        (self.folder / "daemon.json").write_text("{}\n")  # the machine's own has no say here
        self.spawn(
            "dockerd",
            "dockerd",
            *("--config-file", self.folder / "daemon.json"),
            *("--data-root", self.folder / "docker"),
            *("--pidfile", self.folder / "docker.pid"),
            *("--host", f"unix://{self.docker_socket}"),
            *("--cgroup-parent", f"/{self._cgroup}/docker"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),
            *("--insecure-registry", str(self._bed.subnet)),
            *self.record.docker_args,
        )
        if wait:
            self.wait_docker()

    def _forget_dead_containerd(self) -> None:
        """dockerd takes a killed containerd that process 1 has not waited for yet as running, and
        then waits for its socket in vain; removing the pid file makes it start another.
        """
        assert self.record.holder is not None
        root = Path(f"/proc/{self.record.holder.pid}/root")
        path = root / "run/docker/containerd/containerd.pid"
        if path.exists() and not processes.runs(int(path.read_text())):
            path.unlink()

    def wait_docker(self) -> None:
        """Returns once the engine answers."""
        if not processes.poll(
            lambda: not self.alive("dockerd") or _http_ok(self.docker_socket, "/_ping"),
            DOCKERD_TIMEOUT_S,
        ) or not self.alive("dockerd"):
            last = self.log("dockerd").strip().splitlines()[-3:]
            raise TestbedError(f"dockerd on {self.name} does not answer: {' / '.join(last)}")

    def docker(self, *args: str, check: bool = True, stdin: bytes | None = None) -> str:
        """Runs the docker command against the host's engine."""
        return run(
            ["docker", "--host", f"unix://{self.docker_socket}", *args], check=check, stdin=stdin
        )

    # -------------------------------------------------------------- swarmd

    def start_swarmd(self, *args: str, wait: bool = True) -> None:
        """Starts the host's swarmd, again with the first time's arguments if none are given."""
        self.up()
        if self.alive("swarmd"):
            return
        if args:
            self.record.swarmd_args = args
        self.swarm_socket.unlink(missing_ok=True)  # a dying daemon may still take connections
        self.spawn(
            "swarmd",
            Path(sys.executable).parent / "swarmd",
            *("--state-dir", self.state_dir),
            *("--socket", self.swarm_socket),
            *("--docker-socket", self.docker_socket),
            *("--hostname", self.name),
            *self.record.swarmd_args,
        )
        if wait:
            self.wait_swarmd()

    def wait_swarmd(self) -> None:
        """Returns once swarmd answers."""
        if not processes.poll(
            lambda: not self.alive("swarmd") or _accepts(self.swarm_socket), SWARMD_TIMEOUT_S
        ) or not self.alive("swarmd"):
            last = self.log("swarmd").strip().splitlines()[-3:]
            raise TestbedError(f"swarmd on {self.name} does not answer: {' / '.join(last)}")

    def swarmctl(self, *args: str, check: bool = True, timeout_s: float = 120.0) -> str:
        """Runs swarmctl against the host's swarmd, on the host."""
        command = Path(sys.executable).parent / "swarmctl"
        socket_url = f"unix://{self.swarm_socket}"
        return self.run(command, "--host", socket_url, *args, check=check, timeout_s=timeout_s)

    # -------------------------------------------------------------- network

    def cut(self, direction: str = "both", peers: Sequence[Host] = ()) -> None:
        """Cuts the host off: `both` pulls the cable; `in` drops what it receives, `out` what it
        sends. With `peers`, from these hosts only. Nothing is answered with a reset.
        """
        if direction not in DIRECTIONS:
            raise TestbedError(f"direction {direction!r}: name one of {', '.join(DIRECTIONS)}")
        if self.record.cut:
            self.heal()
        if direction == "both" and not peers:
            run(["ip", "link", "set", self.link, "down"])
            self.record.cut = "both"
        else:
            self.run("nft", "-f", "-", stdin=_drops(direction, [p.address for p in peers]).encode())
            self.record.cut = "some" if direction == "both" else direction
        self._bed.save()

    def heal(self) -> None:
        """Undoes `cut`."""
        if self.record.cut == "both":
            run(["ip", "link", "set", self.link, "up"])
        elif self.record.cut:
            self.run("nft", "delete", "table", "inet", "cut")
        self.record.cut = ""
        self._bed.save()

    def describe(self) -> dict[str, Any]:
        """The host for `status`."""
        return {
            "name": self.name,
            "address": self.address,
            "up": self.running,
            "cut": self.record.cut,
            "daemons": {
                name: {"pid": process.pid, "alive": process.alive()}
                for name, process in sorted(self.record.daemons.items())
            },
            "docker_socket": str(self.docker_socket),
            "swarm_socket": str(self.swarm_socket),
        }


def _drops(direction: str, addresses: Sequence[str]) -> str:
    """nft's rules that drop what comes from or goes to these addresses; none: all."""
    named = f"{{ {', '.join(addresses)} }}"
    chains = []
    for way, hook, interface, address in (
        ("in", "prerouting", "iifname", "saddr"),
        ("out", "postrouting", "oifname", "daddr"),
    ):
        if direction in (way, "both"):
            which = f"ip {address} {named} " if addresses else ""
            chains.append(
                f"chain {way}going {{\ntype filter hook {hook} priority -310\n"
                f'{interface} "eth0" {which}drop\n}}\n'
            )
    return f"table inet cut {{\n{''.join(chains)}}}\n"


def missing_tools(needed: Sequence[str]) -> list[str]:
    """Which of these commands are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [tool for tool in needed if shutil.which(tool, path=path) is None]


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def _http_ok(path: Path, target: str) -> bool:
    """Whether a GET over the unix socket is answered with 200."""
    connection = http.client.HTTPConnection("localhost", timeout=5)
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5)
        connection.sock.connect(str(path))
        connection.request("GET", target)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def dumps(value: object) -> str:
    """JSON as the state file and `status` have it."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
