"""Moves a cluster's state from the embedded engine to etcd, all of it or nothing.

Nothing serves meanwhile: the manager has closed the state and opens it again on etcd. The state
file stays as it is until etcd has everything and the manager's place says so; what is half written
to etcd by a swarmd that was killed is cleared by the next attempt (engines/etcd_fill.py).
Revisions go on above those of the file, see the engine's `base`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import structlog
from msgspec import structs

from manager.ca import Sealer
from manager.place import ETCD
from manager.store import Row, codec
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_fill import fill
from swarm.clock import Clock
from swarm.v1 import Cluster, Kind

log = structlog.get_logger("manager")


async def to_etcd(
    state: Path, client: EtcdClient, *, prefix: str, sealer: Sealer, clock: Clock
) -> None:
    """Copies the state in the file. Raises Corrupt, Unavailable, Conflict (the prefix is taken)."""
    engine = EmbeddedEngine(state, clock)
    revision, rows = await engine.load()
    try:
        await fill(
            client,
            prefix=prefix,
            rows=_renamed(rows, where=engine.where, sealer=sealer),
            revision=revision,
        )
    finally:
        await engine.close()


def _renamed(rows: Iterable[Row], *, where: str, sealer: Sealer) -> Iterator[Row]:
    """The rows, with a cluster that says which engine it is on."""
    for row in rows:
        if row.table == Kind.CLUSTER:
            _, cluster = codec.decode_row(row, where=where, seal=sealer)
            assert isinstance(cluster, Cluster)
            value = codec.encode(structs.replace(cluster, store_engine=ETCD), sealer)
            row = structs.replace(row, value=value)
        yield row


def forget(state: Path) -> None:
    """Removes the file that the state was moved from: it would only grow old."""
    for name in ("", "-wal", "-shm", ".lock"):
        state.with_name(state.name + name).unlink(missing_ok=True)
