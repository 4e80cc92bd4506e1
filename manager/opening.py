"""Opens a manager's state, wherever it lies, and brings it there first.

In this order: a folder that says nothing is of the embedded engine, or of a node that is new among
the managers and is let in by them (admission.py); a state that is to move moves (move.py); etcd is
started where it runs beside this manager. What was begun and not finished by a swarmd that was
killed is begun again: each step leaves either the state before it or the one after it.
"""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from msgspec import structs

from manager import move
from manager import place as places
from manager.admission import Managers
from manager.ca import Sealer, load_key, write_key
from manager.place import Place
from manager.restore import SEAL_FILE, STORE_FILE
from manager.store import Corrupt, Engine
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient, access_client
from manager.store.engines.etcd_member import Member, Removed
from swarm import errors, tls
from swarm.clock import Clock
from swarm.rpc import Channel
from swarm.v1 import AdmitRequest, EtcdAccess
from swarm.vault import Vault

log = structlog.get_logger("manager")

MEMBER_FOLDER: Final = "etcd"


@dataclass(frozen=True, slots=True)
class Node:
    """What the node is told to be a manager with. Addresses are host:port."""

    folder: Path
    node_id: str
    listen_addr: str
    advertise_addr: str
    peer_port: int
    key_pem: str
    certificate_pem: str
    root_ca_pem: str
    managers: Callable[[], tuple[str, ...]]
    connect: Callable[[str], Awaitable[Channel]]

    def member(self) -> Member:
        """Its member of etcd, not started."""
        return Member(
            self.folder / MEMBER_FOLDER,
            node_id=self.node_id,
            listen_host=tls.split_address(self.listen_addr)[0],
            peer_host=tls.split_address(self.advertise_addr)[0],
            peer_port=self.peer_port,
        )

    async def start(self, member: Member, peers: Mapping[str, str] | None = None) -> None:
        """Starts it as this node; see Member.start."""
        await member.start(
            key_pem=self.key_pem,
            certificate_pem=self.certificate_pem,
            root_ca_pem=self.root_ca_pem,
            peers=peers or {},
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """A state that can be loaded, and what it was opened with."""

    place: Place
    sealer: Sealer
    engine: Engine
    member: Member | None
    access: EtcdAccess | None


class Removal(errors.SwarmError):
    """The other managers have removed this one."""


async def open_state(node: Node, vault: Vault, clock: Clock) -> Opened:
    """Raises Corrupt, Unavailable, Unsupported (no etcd here), Removal."""
    place = _found(node)
    if place is None:
        place = await _come_in(node, vault)
    member: Member | None = None
    try:
        if place.to:
            place, member = await _move(node, place, vault, clock)
        sealer = Sealer(load_key(node.folder / SEAL_FILE, vault))
        if place.engine == places.EMBEDDED:
            engine: Engine = EmbeddedEngine(node.folder / STORE_FILE, clock)
            return Opened(place, sealer, engine, None, None)
        move.forget(node.folder / STORE_FILE)
        if place.own_member and member is None:
            place, member = await _start_member(node, place, vault)
        access = place.access(vault)
        if member is not None:
            client = EtcdClient([member.endpoint])
        else:
            assert access is not None
            client = access_client(access)
        engine = EtcdEngine(
            client,
            clock=clock,
            writer=node.node_id,
            prefix=place.prefix,
            maintain=member is not None,
        )
        return Opened(place, sealer, engine, member, access)
    except BaseException:
        if member is not None:
            await member.stop()
        raise


def _found(node: Node) -> Place | None:
    """What the folder says; None: this node is new among the managers. Raises Corrupt where a state
    ought to be: a new file in its place would look like a whole one.
    """
    place = places.load(node.folder)
    state = node.folder / STORE_FILE
    there = state.exists() or state.with_name(state.name + "-wal").exists()
    if place is None and there:
        return Place(format=places.FORMAT)
    if place is None and Managers(node.managers, node.advertise_addr, node.connect).others:
        return None
    if (place is None or place.engine == places.EMBEDDED) and not there:
        raise Corrupt(
            f"state file {state} is gone; put it back, or restore a backup with `swarmctl swarm "
            "restore FILE`"
        )
    return place


# ------------------------------------------------------------------ coming in


async def _come_in(node: Node, vault: Vault) -> Place:
    """Is let in by another manager; what it tells is on the disk when this returns. The member is
    not started yet.
    """
    member = node.member()
    managers = Managers(node.managers, node.advertise_addr, node.connect)
    answer = await managers.admit(AdmitRequest(peer_url=member.peer_url))
    node.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_key(node.folder / SEAL_FILE, answer.seal_key, vault)
    place = Place(format=places.FORMAT, engine=places.ETCD, prefix=answer.prefix)
    if answer.etcd is not None:
        place = place.reached_by(answer.etcd, vault)
    places.save(node.folder, place)
    return place


async def _start_member(node: Node, place: Place, vault: Vault) -> tuple[Place, Member]:
    """Starts etcd, and sees to its vote where it has none yet."""
    member = node.member()
    try:
        if place.voter:
            if not member.initialized:
                raise Corrupt(
                    f"{node.folder / MEMBER_FOLDER} does not hold etcd's data any more. Where the "
                    "cluster has other managers, `swarmctl swarm leave --force` here and join "
                    "again; otherwise restore a backup with `swarmctl swarm restore FILE`"
                )
            await node.start(member)
            return place, member
        managers = Managers(node.managers, node.advertise_addr, node.connect)
        request = AdmitRequest(peer_url=member.peer_url, has_data=member.initialized)
        try:
            answer = await managers.admit(request)
        except errors.Conflict:
            if not request.has_data:
                raise
            # It was given up before it had its vote: what it has is of no use.
            shutil.rmtree(node.folder / MEMBER_FOLDER)
            answer = await managers.admit(AdmitRequest(peer_url=member.peer_url))
        await node.start(member, {p.name: p.url for p in answer.peers})
        await managers.enfranchise(member.peer_url)
        place = structs.replace(place, voter=True)
        places.save(node.folder, place)
        return place, member
    except Removed as error:
        await member.stop()
        raise Removal(error.message) from error
    except BaseException:
        await member.stop()
        raise


# ------------------------------------------------------------------ moving


async def _move(
    node: Node, place: Place, vault: Vault, clock: Clock
) -> tuple[Place, Member | None]:
    """Moves the state to etcd. Where it cannot be, a cluster that was there before goes on as it
    was; one that is just being made does not come to be.
    """
    sealer = Sealer(load_key(node.folder / SEAL_FILE, vault))
    member = node.member() if place.own_member else None
    try:
        client = await _target(node, place, member, vault)
        try:
            await move.to_etcd(
                node.folder / STORE_FILE, client, prefix=place.prefix, sealer=sealer, clock=clock
            )
        finally:
            await client.close()
        moved = structs.replace(place, engine=places.ETCD, to="", fresh=False, voter=True)
        places.save(node.folder, moved)
    except BaseException as error:
        if member is not None:
            await member.stop()
        if not isinstance(error, errors.SwarmError) or place.fresh:
            raise
        log.error("state_not_moved", reason=error.message)
        back = structs.replace(
            place, to="", move_failed=error.message, move_failed_at_ns=clock.now_ns()
        )
        places.save(node.folder, back)
        return back, None
    log.info("state_moved", to="etcd")
    return moved, member


async def _target(node: Node, place: Place, member: Member | None, vault: Vault) -> EtcdClient:
    """An etcd that runs and holds nothing under the prefix."""
    if member is None:
        access = place.access(vault)
        assert access is not None
        return access_client(access)
    # Of a move that was not finished: the state is in the embedded store still.
    shutil.rmtree(node.folder / MEMBER_FOLDER, ignore_errors=True)
    await node.start(member)
    return EtcdClient([member.endpoint])
