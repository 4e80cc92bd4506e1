"""One bridge per cluster network and engine.

A network is found by its label, never by its name alone, and used by its id: another program's
network of the same name is not ours. Several agents may share one engine (a cluster on one machine)
and then share the bridge, for two bridges cannot have one subnet. Looking and making is one step:
under a lock per network in this process, and under a lock on a file between agents, for the engine
takes two networks of one name when they come at the same moment, and then refuses to start what is
on them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from agent.runtime.base import DISK_FULL, ENGINE_FAILED, UNSUPPORTED, Failed, Rejected, cause_of
from agent.runtime.docker.causes import no_room
from agent.runtime.docker.engine import Engine, Refusal, filters
from agent.runtime.docker.facts import Facts
from swarm.v1 import IpamConfig, Network, NetworkSpec

log = structlog.get_logger("docker")

LABEL_NETWORK = "swarm-py.network.id"
LOCK_PAUSE_S = 0.01
_ID_SHOWN = 8  # enough to tell networks of one name apart
# Overlay needs Swarm's own control plane; on one host its place is taken by a bridge.
_BRIDGED = ("", "overlay", "bridge", "default")
_OVERLAY_OPTIONS = ("encrypted", "com.docker.network.driver.overlay.")


def engine_name(network: Network) -> str:
    """What the engine calls it: the cluster's name, with part of the id for uniqueness."""
    name = network.spec.name if network.spec else "network"
    return f"{name}.{network.id[:_ID_SHOWN]}"


def create_body(network: Network, facts: Facts, *, with_subnet: bool) -> dict[str, Any]:
    """The body of POST /networks/create. Pure."""
    spec = network.spec or NetworkSpec()
    driver = spec.driver.name if spec.driver else ""
    options = dict(spec.driver.options) if spec.driver else {}
    if driver in _BRIDGED:
        driver = "bridge"
        # These speak of traffic between hosts, which a bridge does not carry.
        options = {k: v for k, v in options.items() if not k.startswith(_OVERLAY_OPTIONS)}
    body: dict[str, Any] = {
        "Name": engine_name(network),
        "CheckDuplicate": True,
        "Driver": driver,
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "EnableIPv6": spec.ipv6,
        "Options": options,
        "Labels": {**spec.labels, LABEL_NETWORK: network.id},
    }
    if spec.ipv4 is False and facts.api >= (1, 47):
        body["EnableIPv4"] = False
    configs = network.ipam or (spec.ipam.configs if spec.ipam else ())
    ipam_driver = spec.ipam.driver if spec.ipam else None
    ipam: dict[str, Any] = {"Driver": ipam_driver.name if ipam_driver else "default"}
    if ipam_driver and ipam_driver.options:
        ipam["Options"] = dict(ipam_driver.options)
    if with_subnet and configs:
        ipam["Config"] = [_ipam(config) for config in configs]
    body["IPAM"] = ipam
    return body


def _ipam(config: IpamConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "Subnet": config.subnet,
        "IPRange": config.range,
        "Gateway": config.gateway.partition("/")[0],
        "AuxiliaryAddresses": dict(config.aux_addresses),
    }
    return {key: value for key, value in out.items() if value}


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


class Networks:
    """The cluster's networks on one engine."""

    def __init__(self, engine: Engine, *, lock_folder: Path) -> None:
        """`lock_folder` is the same for all agents of this machine's user."""
        self._engine = engine
        mark = hashlib.sha256(os.path.realpath(engine.socket).encode()).hexdigest()[:16]
        self._lock_path = lock_folder / f"engine-{mark}.lock"
        self._ids: dict[str, str] = {}  # cluster's id -> engine's id
        # Engine's id or name -> cluster's id. Podman tells of a container's networks by name.
        self._ours: dict[str, str] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def ensure(self, network: Network, facts: Facts) -> str:
        """The engine's id of the network, made if there is none. Raises Rejected, Failed."""
        known = self._ids.get(network.id)
        if known is not None:
            return known
        async with self._lock(network.id):
            known = self._ids.get(network.id)
            if known is None:
                async with self._alone():
                    known = await self._find(network.id) or await self._create(network, facts)
                self._ids[network.id] = known
                self._ours[known] = self._ours[engine_name(network)] = network.id
            return known

    def forget_all(self) -> None:
        """The engine lacks one of them; the next `ensure` of each looks again."""
        self._ids.clear()

    def cluster_id(self, engine_id: str) -> str:
        """The cluster's id of one of the engine's networks; empty: not ours."""
        return self._ours.get(engine_id, "")

    async def load(self) -> None:
        """Learns which of the cluster's networks the engine has."""
        listed = await self._engine.call(
            "network_list", "GET", "networks", params=filters(label=LABEL_NETWORK)
        )
        self._ids, self._ours = {}, {}
        for entry in sorted(listed or (), key=lambda e: str(e["Id"])):
            network_id = str(entry["Labels"][LABEL_NETWORK])
            self._ids.setdefault(network_id, str(entry["Id"]))
            self._ours[str(entry["Id"])] = self._ours[str(entry["Name"])] = network_id

    async def release(self, network_id: str) -> None:
        """Removes it unless somebody on this engine still uses it. Raises Failed."""
        async with self._lock(network_id):
            self._ids.pop(network_id, None)
            self._ours = {k: v for k, v in self._ours.items() if v != network_id}
            for entry in await self._list(network_id):
                await self._delete(str(entry["Id"]), str(entry["Name"]))
        self._locks.pop(network_id, None)

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Keeps other agents on the same engine from making networks meanwhile. Held for as long
        as two or three calls take; an agent that dies lets go of it.
        """
        handle = await self._acquire()
        try:
            yield
        finally:
            # Only whoever holds it may remove it; others see that theirs is no longer the file.
            self._lock_path.unlink(missing_ok=True)
            os.close(handle)

    async def _acquire(self) -> int:
        """The lock file, locked."""
        while True:
            handle = self._open_lock()
            try:
                while not _try_lock(handle):
                    await asyncio.sleep(LOCK_PAUSE_S)
                if _is_at(handle, self._lock_path):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def _open_lock(self) -> int:
        try:
            self._lock_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise Failed(
                f"networks cannot be made without the lock file: {error}", cause=cause_of(error)
            ) from None

    def _lock(self, network_id: str) -> asyncio.Lock:
        return self._locks.setdefault(network_id, asyncio.Lock())

    async def _list(self, network_id: str) -> list[dict[str, Any]]:
        listed = await self._engine.call(
            "network_list",
            "GET",
            "networks",
            params=filters(label=f"{LABEL_NETWORK}={network_id}"),
        )
        return sorted(listed or (), key=lambda entry: str(entry["Id"]))

    async def _find(self, network_id: str) -> str | None:
        found = await self._list(network_id)
        return str(found[0]["Id"]) if found else None

    async def _create(self, network: Network, facts: Facts) -> str:
        spec = network.spec or NetworkSpec()
        chosen_by_user = bool(spec.ipam and spec.ipam.configs)
        try:
            made = await self._post(create_body(network, facts, with_subnet=True))
        except Refusal as refusal:
            if refusal.status == 409 and (found := await self._find(network.id)):
                return found  # another agent was faster
            if "overlaps" not in refusal.message or chosen_by_user or not network.ipam:
                raise _trouble(spec.name, refusal) from None
            # The subnet that the cluster chose means nothing beyond this bridge yet.
            log.warning("subnet_taken", network=spec.name, subnet=network.ipam[0].subnet)
            try:
                made = await self._post(create_body(network, facts, with_subnet=False))
            except Refusal as second:
                raise _trouble(spec.name, second) from None
        return made

    async def _post(self, body: dict[str, Any]) -> str:
        answer = await self._engine.call("network_create", "POST", "networks/create", body=body)
        return str(answer["Id"])

    async def _delete(self, engine_id: str, name: str) -> None:
        try:
            await self._engine.call("network_remove", "DELETE", f"networks/{engine_id}")
        except Refusal as refusal:
            if refusal.status == 404:
                return
            if refusal.status in (403, 409):  # in use, by another agent or by hand
                log.info("network_kept", network=name, reason=refusal.message)
                return
            raise Failed(f"network {name!r} cannot be removed: {refusal.message}") from None


def _trouble(name: str, refusal: Refusal) -> Rejected | Failed:
    text = f"network {name!r} cannot be made on this node: {refusal.message}"
    if refusal.status in (400, 404):
        return Rejected(text, cause=UNSUPPORTED)
    return Failed(text, cause=DISK_FULL if no_room(refusal.message) else ENGINE_FAILED)
