"""The network of isolated tasks: one bridge per node, one veth pair and address per task, a way
out.

Owns the bridge `sw<hash of node id>`, its subnet (chosen once from a pool, kept in a file), the
host ends of veth pairs, and one nft table that masquerades what leaves the subnet. The host end
disappears with the task's network namespace; the bridge and the table are removed with the last
task. Blocking netlink calls (1.5 ms each task) run on one thread, so that they are also one after
the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import ipaddress
import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from swarm import errors
from swarm.files import write_private

DEFAULT_POOL = "10.211.0.0/16"
SUBNET_PREFIX = 24  # 253 tasks a node
COMMAND_TIMEOUT_S = 10.0
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
R = TypeVar("R")
Net4 = ipaddress.IPv4Network


@dataclass(frozen=True, slots=True)
class Lease:
    """A task's place on the bridge."""

    address: str
    prefix: int
    gateway: str


def mark(text: str, length: int) -> str:
    """A short name for something with a long id; interface names have at most 15 characters."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def choose_subnet(pool: Net4, taken: list[Net4], node_id: str) -> Net4 | None:
    """A free subnet of the pool: begins to look at a place told by the node's id, so that it stays
    the same on a machine that does not change. None: the pool is used up.
    """
    prefix = max(SUBNET_PREFIX, pool.prefixlen)
    count = 1 << (prefix - pool.prefixlen)
    start = int(mark(node_id, 8), 16) % count
    for step in range(count):
        number = (start + step) % count
        base = int(pool.network_address) + (number << (32 - prefix))
        subnet = Net4((base, prefix))
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    return None


def choose_address(subnet: Net4, taken: set[str], after: str = "") -> str | None:
    """The next free address after the one given last, so that addresses are reused late."""
    first, last = int(subnet.network_address) + 2, int(subnet.broadcast_address) - 1
    size = last - first + 1
    start = int(ipaddress.IPv4Address(after)) + 1 - first if after else 0
    for step in range(size):
        address = str(ipaddress.IPv4Address(first + (start + step) % size))
        if address not in taken:
            return address
    return None


class Bridge:
    """The node's bridge and who has which address."""

    def __init__(self, node_id: str, state: Path, pool: str) -> None:
        self.name = f"sw{mark(node_id, 10)}"
        self.warnings: tuple[str, ...] = ()
        self._table = f"swarm_{mark(node_id, 10)}"
        self._node_id = node_id
        self._file = state / "subnet"
        self._pool = Net4(pool)
        self._leases: dict[str, str] = {}  # task id -> address
        self._last = ""
        self._subnet: Net4 | None = None
        self._up = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="process-net")
        self._changing = asyncio.Lock()

    def adopt(self, task_id: str, address: str) -> None:
        """A task that was found running has this address."""
        self._leases[task_id] = address

    async def lease(self, task_id: str) -> Lease:
        """An address for a task, and the bridge up. Raises Exhausted, Unavailable."""
        async with self._changing:
            if not self._up:
                await self._run(self._bring_up)
                self._up = True
            subnet = self._subnet
            assert subnet is not None
            address = choose_address(subnet, set(self._leases.values()), self._last)
            if address is None:
                raise errors.Exhausted(
                    f"all {subnet.num_addresses - 3} addresses of {subnet} are in use by tasks of "
                    "this node; place fewer here, or use the host's network"
                )
            self._leases[task_id] = self._last = address
            return self.leased(task_id)

    def leased(self, task_id: str) -> Lease:
        """The address that the task was given."""
        assert self._subnet is not None
        gateway = str(self._subnet.network_address + 1)
        return Lease(self._leases[task_id], self._subnet.prefixlen, gateway)

    async def attach(self, task_id: str, pid: int) -> None:
        """Gives the network namespace of a process its eth0, joined to the bridge."""
        await self._run(functools.partial(self._plug, task_id, pid))

    async def release(self, task_id: str) -> None:
        """The task is gone; with the last one the bridge goes too. Nothing happens the second
        time.
        """
        async with self._changing:
            if self._leases.pop(task_id, None) is None:
                return
            await self._run(functools.partial(self._unplug, task_id))
            if not self._leases:
                await self._run(self._tear_down)
                self._up = False

    async def sweep(self) -> None:
        """Removes what a former agent left, if no task needs it."""
        async with self._changing:
            if not self._leases and self._file.exists():
                await self._run(self._tear_down)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    async def _run(self, fn: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, fn)
        except (OSError, _netlink_error()) as error:
            raise errors.Unavailable(f"network of tasks: {error}") from error

    # ---------------------------------------------------------------- on the thread

    def _bring_up(self) -> None:
        from pyroute2 import IPRoute  # 60 ms, only where tasks have networks of their own

        with IPRoute() as route:
            found = route.link_lookup(ifname=self.name)
            mine = found[0] if found else None
            taken = [
                Net4((value, message["dst_len"]))
                for message in route.get_routes(family=2)
                for key, value in message["attrs"]
                if key == "RTA_DST" and _attribute(message, "RTA_OIF") != mine
            ]
            subnet = self._remembered() or choose_subnet(self._pool, taken, self._node_id)
            if subnet is None:
                raise errors.Exhausted(f"no free /{SUBNET_PREFIX} is left in {self._pool}")
            write_private(self._file, f"{subnet}\n".encode())
            self._subnet = subnet
            gateway = str(subnet.network_address + 1)
            if mine is None:
                route.link("add", ifname=self.name, kind="bridge")
                mine = route.link_lookup(ifname=self.name)[0]
            with contextlib.suppress(_netlink_error()):  # it has the address already
                route.addr("add", index=mine, address=gateway, prefixlen=subnet.prefixlen)
            route.link("set", index=mine, state="up")
        self.warnings = tuple(self._open_way_out(subnet))

    def _remembered(self) -> Net4 | None:
        try:
            subnet = Net4(self._file.read_text().strip())
        except (FileNotFoundError, ValueError):
            return None
        return subnet if subnet.subnet_of(self._pool) else None

    def _open_way_out(self, subnet: Net4) -> list[str]:
        problems = []
        try:
            if _FORWARD.read_text().strip() != "1":
                _FORWARD.write_text("1")
        except OSError as error:
            problems.append(f"IP forwarding cannot be switched on ({error.strerror})")
        try:
            _nft(self._rules(subnet))
        except (OSError, errors.Unavailable, subprocess.TimeoutExpired) as error:
            problems.append(f"nft: {error}")
        try:
            self._pass_firewall()
        except (OSError, errors.Unavailable, subprocess.TimeoutExpired) as error:
            problems.append(f"iptables: {error}")
        return [f"tasks cannot reach networks outside this host: {p}" for p in problems]

    def _pass_firewall(self) -> None:
        """Lets the bridge's traffic through where forwarding is denied by default, as Docker sets
        it up: a table of our own cannot allow what another denies.
        """
        if shutil.which("iptables") is None:
            return
        policy = _command(["iptables", "-w", "-S", "FORWARD"]).split("\n", 1)[0]
        if policy != "-P FORWARD ACCEPT":
            self._close_firewall()
            for rule in self._firewall():
                _command(["iptables", "-w", "-I", *rule])

    def _close_firewall(self) -> None:
        if shutil.which("iptables") is None:
            return
        for rule in self._firewall():
            with contextlib.suppress(errors.Unavailable, subprocess.TimeoutExpired):
                _command(["iptables", "-w", "-D", *rule])

    def _firewall(self) -> tuple[list[str], ...]:
        answers = ["-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"]
        return (
            ["FORWARD", "-i", self.name, "-j", "ACCEPT"],
            ["FORWARD", "-o", self.name, *answers, "-j", "ACCEPT"],
        )

    def _rules(self, subnet: Net4) -> list[dict[str, Any]]:
        """The whole table; deleted first, so that it is the same after every restart."""
        table = {"family": "ip", "name": self._table}
        source = {"payload": {"protocol": "ip", "field": "saddr"}}
        range_ = {"prefix": {"addr": str(subnet.network_address), "len": subnet.prefixlen}}
        chain = {
            "family": "ip",
            "table": self._table,
            "name": "postrouting",
            "type": "nat",
            "hook": "postrouting",
            "prio": 100,
            "policy": "accept",
        }
        rule = {
            "family": "ip",
            "table": self._table,
            "chain": "postrouting",
            "expr": [
                {"match": {"op": "==", "left": source, "right": range_}},
                {"match": {"op": "!=", "left": {"meta": {"key": "oifname"}}, "right": self.name}},
                {"masquerade": None},
            ],
        }
        return [
            {"add": {"table": table}},
            {"delete": {"table": table}},
            {"add": {"table": table}},
            {"add": {"chain": chain}},
            {"add": {"rule": rule}},
        ]

    def _plug(self, task_id: str, pid: int) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            name = f"sv{mark(task_id, 12)}"
            peer = {"ifname": "eth0", "net_ns_pid": pid}
            route.link("add", ifname=name, kind="veth", peer=peer)
            bridge = route.link_lookup(ifname=self.name)[0]
            end = route.link_lookup(ifname=name)[0]
            route.link("set", index=end, master=bridge, state="up")

    def _unplug(self, task_id: str) -> None:
        """The pair goes with its namespace; this is for a namespace that something still holds."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            for end in route.link_lookup(ifname=f"sv{mark(task_id, 12)}"):
                with contextlib.suppress(_netlink_error()):
                    route.link("del", index=end)

    def _tear_down(self) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as route:
            for bridge in route.link_lookup(ifname=self.name):
                route.link("del", index=bridge)
        table = {"family": "ip", "name": self._table}
        with contextlib.suppress(OSError, errors.Unavailable, subprocess.TimeoutExpired):
            _nft([{"add": {"table": table}}, {"delete": {"table": table}}])
        self._close_firewall()
        self._file.unlink(missing_ok=True)


def _attribute(message: Any, name: str) -> Any:
    return next((value for key, value in message["attrs"] if key == name), None)


def _netlink_error() -> type[Exception]:
    from pyroute2.netlink.exceptions import NetlinkError

    return NetlinkError  # type: ignore[no-any-return]  # pyroute2 has no types here


def _nft(commands: list[dict[str, Any]]) -> None:
    """One transaction. Raises Unavailable with nft's own words."""
    _command(["nft", "-j", "-f", "-"], json.dumps({"nftables": commands}))


def _command(words: list[str], given: str = "") -> str:
    """A program's answer. Raises Unavailable with its own words when it fails."""
    done = subprocess.run(
        words, input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise errors.Unavailable(lines[0] if lines else f"{words[0]} ended with {done.returncode}")
    return done.stdout
