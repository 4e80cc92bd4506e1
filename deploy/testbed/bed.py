"""The bed: a bridge with test hosts on it, and the file that remembers them.

Everything that must be removed again is written to the state file before it is made, so `Bed.open`
after a crash, even of the machine, can bring the bed down. Two beds on one machine differ in name;
bridge, links, subnet, cgroup and folder follow from it or are chosen free.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deploy.testbed import images as image_files
from deploy.testbed.host import Host, Record, dumps, missing_tools
from deploy.testbed.processes import Process, TestbedError, cgroup_folders, run

TOOLS = ("ip", "unshare", "nsenter", "mount", "iptables", "nft", "dockerd", "docker", "busybox")
HOSTS_MAX = 100
# Beds that name no subnet take the first of 10.77.0.0/24 … 10.77.255.0/24 that nothing uses.
POOL = ipaddress.IPv4Network("10.77.0.0/16")


def default_root() -> Path:
    """Where beds keep their folders; short, for a socket's path holds 107 bytes."""
    return Path(os.environ.get("SWARM_TESTBED_ROOT", str(Path(tempfile.gettempdir()) / "swbed")))


def trouble() -> str:
    """Why no bed can be made here; empty: it can."""
    if os.geteuid() != 0:
        return "the test bed needs root: it makes network namespaces and runs Docker Engines"
    missing = missing_tools(TOOLS)
    if missing:
        return f"the test bed needs {', '.join(missing)}; `bash deploy/test-tools.sh` installs them"
    try:
        run(["unshare", "--net", "--mount", "--uts", "true"])
    except TestbedError as error:
        return f"the test bed needs to make namespaces: {error}"
    return ""


def sweep(prefix: str) -> None:
    """Brings down the beds `<prefix><pid>` whose process is gone: what crashed runs left."""
    for state in sorted(default_root().glob(f"{prefix}*/state.json")):
        pid = state.parent.name.removeprefix(prefix)
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            Bed.open(state.parent.name, create=False).down()


class Bed:
    """Test hosts on one bridge. Not safe for two processes at once."""

    def __init__(self, name: str, folder: Path, bridge: str, subnet: ipaddress.IPv4Network) -> None:
        self.name = name
        self.folder = folder
        self.bridge = bridge
        self.subnet = subnet
        self.mark = f"sw{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        self.cgroup = f"swbed-{name}"
        self.gateway = str(subnet[-2])
        self._hosts: dict[int, Host] = {}

    # -------------------------------------------------------------- open and close

    @classmethod
    def open(
        cls,
        name: str = "bed",
        *,
        root: Path | None = None,
        subnet: str = "",
        bridge: str = "",
        create: bool = True,
    ) -> Bed:
        """The bed of this name; made if there is none. The subnet is a /24, chosen free if not
        given.
        """
        if not name.replace("-", "").isalnum() or len(name) > 20:
            raise TestbedError(f"bed name {name!r}: 1 to 20 letters, digits and dashes")
        root = root or default_root()
        folder = root / name
        state = folder / "state.json"
        if state.exists():
            return cls._load(folder, name, state)
        if not create:
            raise TestbedError(f"there is no bed {name!r} below {root}; make one with `up`")
        if problem := trouble():
            raise TestbedError(problem)
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / "lock"):
            chosen = ipaddress.IPv4Network(subnet) if subnet else _free_subnet(root)
            mark = hashlib.sha256(name.encode()).hexdigest()[:6]
            bed = cls(name, folder, bridge or f"sw{mark}br", chosen)
            folder.mkdir()
            bed.save()
        bed._make_bridge()
        return bed

    @classmethod
    def _load(cls, folder: Path, name: str, state: Path) -> Bed:
        try:
            kept = json.loads(state.read_text())
            bed = cls(name, folder, kept["bridge"], ipaddress.IPv4Network(kept["subnet"]))
            for index, host in kept["hosts"].items():
                holder = host["holder"]
                record = Record(
                    holder=Process(*holder) if holder else None,
                    daemons={n: Process(*p) for n, p in host["daemons"].items()},
                    docker_args=tuple(host["docker_args"]),
                    swarmd_args=tuple(host["swarmd_args"]),
                    cut=host["cut"],
                )
                bed._hosts[int(index)] = Host(bed, int(index), record)
        except (KeyError, TypeError, ValueError) as error:
            raise TestbedError(
                f"{state} cannot be read ({error!r}); end what runs in cgroup swbed-{name} and "
                f"remove {folder}"
            ) from None
        bed._make_bridge()
        return bed

    def save(self) -> None:
        """Writes the state file, whole or not at all."""
        kept = {
            "bridge": self.bridge,
            "subnet": str(self.subnet),
            "hosts": {
                str(index): {
                    "holder": _pair(host.record.holder),
                    "daemons": {n: _pair(p) for n, p in host.record.daemons.items()},
                    "docker_args": host.record.docker_args,
                    "swarmd_args": host.record.swarmd_args,
                    "cut": host.record.cut,
                }
                for index, host in self._hosts.items()
            },
        }
        temporary = self.folder / "state.json.new"
        temporary.write_text(dumps(kept))
        temporary.replace(self.folder / "state.json")

    def _make_bridge(self) -> None:
        if not Path(f"/sys/class/net/{self.bridge}").exists():
            run(["ip", "link", "add", self.bridge, "type", "bridge"])
            run(
                ["ip", "addr", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", self.bridge]
            )
            run(["ip", "link", "set", self.bridge, "up"])
        rule = ["FORWARD", "-i", self.bridge, "-o", self.bridge, "-j", "ACCEPT"]
        # Where bridged frames pass through iptables, a machine with Docker on it drops forwarded
        # ones by default.
        try:
            run(["iptables", "--wait", "-C", *rule])
        except TestbedError:
            run(["iptables", "--wait", "-I", *rule])

    def down(self) -> None:
        """Removes all hosts, the bridge, the rules and the folder. May be called again."""
        for host in self._hosts.values():
            host.down()
        self._hosts.clear()
        for folder in cgroup_folders(self.cgroup):
            folder.rmdir()
        run(["ip", "link", "del", self.bridge], check=False)
        rule = ["FORWARD", "-i", self.bridge, "-o", self.bridge, "-j", "ACCEPT"]
        with contextlib.suppress(TestbedError):  # until there is none
            while True:
                run(["iptables", "--wait", "-D", *rule])
        run(["rm", "-rf", "--one-file-system", self.folder])
        with contextlib.suppress(OSError):  # other beds
            (self.folder.parent / "lock").unlink()
            self.folder.parent.rmdir()

    # -------------------------------------------------------------- hosts

    def host(self, index: int) -> Host:
        """Host 1, 2, …: its namespaces are made when first asked for; no daemon is started."""
        if not 1 <= index <= HOSTS_MAX:
            raise TestbedError(f"host {index}: hosts are numbered from 1 to {HOSTS_MAX}")
        if index not in self._hosts:
            self._hosts[index] = Host(self, index, Record())
            self.save()
        host = self._hosts[index]
        host.up()
        return host

    def hosts(self) -> tuple[Host, ...]:
        """The hosts there are, in order."""
        return tuple(self._hosts[index] for index in sorted(self._hosts))

    def docker_hosts(self, count: int, *, images: bool = True) -> tuple[Host, ...]:
        """The first `count` hosts with an engine each, started together, and with the test images
        in them.
        """
        hosts = tuple(self.host(index) for index in range(1, count + 1))
        fresh = [host for host in hosts if not host.alive("dockerd")]
        for host in fresh:
            host.start_docker(wait=False)
        for host in fresh:
            host.wait_docker()
        if images:
            for host in hosts:
                image_files.provide(host)
        return hosts

    def address(self, index: int) -> str:
        return str(self.subnet[index])

    def hosts_file(self, own: str) -> str:
        """/etc/hosts on the host of this name."""
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {own}"]
        lines += [f"{self.address(index)} h{index}" for index in range(1, HOSTS_MAX + 1)]
        return "\n".join(lines) + "\n"


def _pair(process: Process | None) -> tuple[int, int] | None:
    return (process.pid, process.start_tick) if process is not None else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _free_subnet(root: Path) -> ipaddress.IPv4Network:
    """The first /24 of the pool that neither a route of this machine nor another bed uses."""
    taken: list[ipaddress.IPv4Network] = []
    for route in json.loads(run(["ip", "-j", "-4", "route", "show", "table", "all"])):
        with contextlib.suppress(ValueError):
            taken.append(ipaddress.IPv4Network(route["dst"], strict=False))
    for state in root.glob("*/state.json"):
        with contextlib.suppress(KeyError, ValueError):
            taken.append(ipaddress.IPv4Network(json.loads(state.read_text())["subnet"]))
    taken = [network for network in taken if network.subnet_of(POOL) or POOL.subnet_of(network)]
    for subnet in POOL.subnets(new_prefix=24):
        if not any(subnet.overlaps(network) for network in taken):
            return subnet
    raise TestbedError(f"all of {POOL} is in use; name a free subnet with --subnet")
