"""The members of an etcd cluster, as any one of them tells: who is one, who comes, who goes."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Final

import grpc
from etcd3aio import _protobuf as pb

from swarm import errors

CALL_S: Final = 5.0
ADD_S: Final = 20.0  # how long an addition is tried
ADD_RETRY_S: Final = 0.5
PROMOTE_S: Final = 60.0  # how long a learner may take to catch up
PROMOTE_RETRY_S: Final = 0.2
# The package types its own names alone.
_rpc: Any = vars(pb)["rpc_pb2"]
_grpc: Any = vars(pb)["rpc_pb2_grpc"]
_ACTIVE_PEER: Final = re.compile(
    r'^etcd_network_active_peers\{[^}]*Remote="([0-9a-f]+)"[^}]*\} (\S+)$', re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Peer:
    """One member as the cluster knows it. `id` is etcd's."""

    id: int
    name: str  # the node's id; empty until it has started for the first time
    url: str
    learner: bool


class Members:
    """Who is a member, through any member's client socket."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        # It outlives restarts of etcd, after which gRPC would wait for up to two minutes.
        options = [
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channel = grpc.aio.insecure_channel(endpoint, options=options)
        self._cluster: Any = _grpc.ClusterStub(self._channel)
        self._kv: Any = pb.KVStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def list(self) -> tuple[Peer, ...]:
        """All members, by name. Raises Unavailable without a quorum."""
        return _peers(await self._list())

    async def _list(self) -> Any:
        # etcd 3.4 answers from what this member has applied so far, which may lag behind; the
        # linearizable read waits until it has applied all that was agreed on.
        read = pb.RangeRequest(key=b"\0", keys_only=True)
        await self._call(self._kv.Range(read, timeout=CALL_S))
        request = _rpc.MemberListRequest()
        return await self._call(self._cluster.MemberList(request, timeout=CALL_S))

    async def add(self, url: str) -> tuple[Peer, ...]:
        """Adds a member that does not vote yet; all members, the new one without a name. One that
        is there already is not added again. Raises Unavailable, Exhausted (a learner at a time).
        """
        request = _rpc.MemberAddRequest(peerURLs=[url], isLearner=True)
        until_s = asyncio.get_running_loop().time() + ADD_S
        while True:
            try:
                known = await self.list()
                if any(p.url == url for p in known):
                    return known
                return _peers(await self._call(self._cluster.MemberAdd(request, timeout=CALL_S)))
            except errors.Unavailable:
                # etcd takes a member only while all others have been connected for 5 s.
                if asyncio.get_running_loop().time() > until_s:
                    raise
                await asyncio.sleep(ADD_RETRY_S)

    async def promote(self, url: str) -> None:
        """Makes a learner a voter once it has caught up. Raises TimedOut when it does not."""
        try:
            async with asyncio.timeout(PROMOTE_S):
                while True:
                    peer = next((p for p in await self.list() if p.url == url), None)
                    if peer is None:
                        raise errors.NotFound(f"no etcd member is at {url}")
                    if not peer.learner:
                        return
                    try:
                        request = _rpc.MemberPromoteRequest(ID=peer.id)
                        await self._call(self._cluster.MemberPromote(request, timeout=CALL_S))
                        return
                    except errors.Unavailable:
                        await asyncio.sleep(PROMOTE_RETRY_S)
        except TimeoutError:
            raise errors.TimedOut(
                f"the etcd member at {url} has not caught up within {PROMOTE_S:g} s; it does not "
                "vote yet"
            ) from None

    async def remove(self, url: str) -> None:
        """Takes a member away; one that is not there is no error. Raises Unavailable when too few
        of the others are up to agree.
        """
        peer = next((p for p in await self.list() if p.url == url), None)
        if peer is None:
            return
        request = _rpc.MemberRemoveRequest(ID=peer.id)
        await self._call(self._cluster.MemberRemove(request, timeout=CALL_S))

    async def all_healthy(self) -> bool:
        """Whether every other member is up and connected to this one, and they agree on what is
        written: then one of them can be restarted and the rest still make a quorum. Members that do
        not vote yet count too, for they are about to.
        """
        try:
            answer = await self._list()
            connected = await self._connected()
        except (errors.Unavailable, OSError, TimeoutError):
            return False
        others = {p.id for p in _peers(answer)} - {answer.header.member_id}
        return others <= connected

    async def _connected(self) -> set[int]:
        """Members to which the raft streams are up. etcd tells it in its metrics alone."""
        async with asyncio.timeout(CALL_S):
            reader, writer = await asyncio.open_unix_connection(
                self._endpoint.removeprefix("unix:")
            )
            try:
                writer.write(b"GET /metrics HTTP/1.0\r\nHost: etcd\r\n\r\n")
                text = (await reader.read()).decode(errors="replace")
            finally:
                writer.close()
        return {int(m[1], 16) for m in _ACTIVE_PEER.finditer(text) if float(m[2]) > 0}

    async def _call(self, call: Any) -> Any:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            details = error.details() or error.code().name
            if "too many learner" in details:
                raise errors.Exhausted(
                    f"another manager is being added just now ({details}); try again in a moment"
                ) from error
            raise errors.Unavailable(
                f"etcd's members cannot be listed or changed: {details}"
            ) from error


def _peers(answer: Any) -> tuple[Peer, ...]:
    return tuple(
        sorted(
            (Peer(m.ID, m.name, next(iter(m.peerURLs), ""), m.isLearner) for m in answer.members),
            key=lambda p: (p.name, p.id),
        )
    )
