"""The backup of a cluster: its state at one revision, as the bytes of a file (swarm/backup.py).

Online: the tables are frozen first (some milliseconds), then encoded piece by piece while the
manager works on; a slow reader holds the frozen tables in memory and nothing else up. Every kind is
taken, the Keyring with the root's key as well, and beside the rows the key that secrets are sealed
with. So whoever can read a backup that no passphrase seals has all of the cluster's secrets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from manager.ca import Sealer, objects
from manager.store import Store
from manager.store.codec import encode
from manager.store.tables import SCHEMAS, Frozen
from swarm import errors
from swarm.backup import Header, Keys, Row, Writer
from swarm.clock import Clock
from swarm.v1 import BackupResponse

MESSAGE_BYTES_MAX: Final = 1 << 20
# Each holds a frozen state; more would let callers that do not read fill the memory.
AT_ONCE_MAX: Final = 4


@dataclass(frozen=True, slots=True)
class Source:
    """What a backup takes from outside the store. `addr` is host:port."""

    sealer: Sealer
    node_id: str
    addr: str
    version: str


class Backups:
    """The backups that are being read."""

    def __init__(self, store: Store, clock: Clock, source: Source) -> None:
        self._store = store
        self._clock = clock
        self._source = source
        self._open = 0

    async def stream(self) -> AsyncGenerator[BackupResponse, None]:
        """The file in messages. Raises Exhausted."""
        if self._open >= AT_ONCE_MAX:
            raise errors.Exhausted(
                f"{AT_ONCE_MAX} backups are being read from this manager, the most at once; try "
                "again when one is done"
            )
        self._open += 1
        try:
            async for data in pieces(
                self._store.freeze(), self._source, self._store.engine.name, self._clock.now_ns()
            ):
                for at in range(0, len(data), MESSAGE_BYTES_MAX):
                    yield BackupResponse(data=data[at : at + MESSAGE_BYTES_MAX])
        finally:
            self._open -= 1


async def pieces(
    frozen: Frozen, source: Source, engine: str, now_ns: int
) -> AsyncGenerator[bytes, None]:
    """The file's bytes. Between two pieces other work gets its turn."""
    cluster, _ = objects(frozen)
    counts = {s.kind.name.lower(): frozen.count(s.cls) for s in SCHEMAS if frozen.count(s.cls)}
    writer = Writer()
    yield writer.begin(
        Header(
            cluster_id=cluster.id,
            node_id=source.node_id,
            revision=frozen.revision,
            time_ns=now_ns,
            engine=engine,
            version=source.version,
            cluster_name=cluster.spec.name if cluster.spec is not None else "",
            addr=source.addr,
            counts=counts,
            rows=sum(counts.values()),
        ),
        Keys(seal_key=source.sealer.key),
    )
    for piece in writer.rows(_rows(frozen, source.sealer)):
        yield piece
        await asyncio.sleep(0)
    yield writer.end()


def _rows(frozen: Frozen, sealer: Sealer) -> Iterator[Row]:
    """By table, then id: the same state gives the same rows."""
    for schema in SCHEMAS:
        found: list[Any] = sorted(frozen.all(schema.cls), key=_id)
        for o in found:
            yield Row(int(schema.kind), o.id, o.meta.version, encode(o, sealer))


def _id(o: Any) -> str:
    id_: str = o.id
    return id_
