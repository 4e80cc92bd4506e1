"""Makes a manager's state folder from a backup, all of it or nothing.

Owns the order of steps: the backup's rows go into a folder beside the one in use while they come
in; only when the file has proved whole, each row can be read, the keys open what is sealed, and the
store has loaded it, `install` puts the folder in its place. Before, `discard` leaves no trace.

What a restored cluster is (the reason beside each):
- the same cluster: id, root, keys, tokens and so on are the backup's, so workers trust it and it
  them;
- with one manager, this node, under the id of the manager that wrote the backup: what that node ran
  is adopted if it is the same machine, and run anew if it is not. Other managers' certificates are
  worth nothing any more (their nodes are workers in the store, SwarmKit's rule after
  `--force-new-cluster`: they leave and join again);
- at a revision that the lost state cannot have reached, so that no version means two things:
  REVISIONS_MIN further (etcd's advice for --bump-revision), or as far as the fastest disk could
  have come since, if that is further.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import structlog
from msgspec import structs

from manager.ca import KEY_BYTES, Sealer, objects, write_key
from manager.store import Draft, Store, codec, sealed
from manager.store.engine import Corrupt, Row
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.embedded_restore import StateWriter
from manager.store.tables import BY_CLASS, BY_KIND
from swarm import backup, errors, tls
from swarm.clock import SECOND_NS, Clock
from swarm.files import sync_folder
from swarm.finishing import to_the_end
from swarm.v1 import (
    Kind,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from swarm.vault import Vault

log = structlog.get_logger("restore")

P = ParamSpec("P")
R = TypeVar("R")

STORE_FILE: Final = "store.db"
SEAL_FILE: Final = "seal.key"
SUFFIX: Final = ".restoring"
REVISIONS_MIN: Final = 1_000_000_000
REVISIONS_PER_S: Final = 100_000  # twice what the embedded engine was measured at
_WHAT_NOW: Final = "nothing was changed. Use another backup, or the version that wrote this one"


@dataclass(frozen=True, slots=True)
class Restored:
    """The node's part of a restored cluster."""

    node_id: str
    cluster_id: str
    key_pem: str
    certificate_pem: str
    root_ca_pem: str
    revision: int
    header: backup.Header
    warnings: tuple[str, ...]


@dataclass(slots=True)
class Restoration:
    """One restore into `folder`, which is a manager's state folder to be. `begin`, `feed` as often
    as needed, `finish`, `install`; `discard` at the end in any case.
    """

    folder: Path
    clock: Clock
    _reader: backup.Reader = field(default_factory=backup.Reader)
    _writer: StateWriter | None = None
    _key: bytes = field(default=b"", repr=False)
    # One thread, so that what a cancelled call has begun ends before it is cleaned up.
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="restore")
    )

    @property
    def _making(self) -> Path:
        return self.folder.with_name(self.folder.name + SUFFIX)

    @property
    def taken(self) -> int:
        """Bytes of the backup so far."""
        return self._reader.taken

    @property
    def header(self) -> backup.Header | None:
        return self._reader.header

    async def begin(self) -> None:
        """Raises Unavailable when the folder cannot be written."""
        await self.discard()  # of one that was killed
        try:
            self._making.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise errors.Unavailable(
                f"{self._making} cannot be made: {error.strerror or error}"
            ) from None
        await self._in_thread(self._open)

    def _open(self) -> None:
        self._writer = StateWriter(self._making / STORE_FILE, self.clock)

    async def feed(self, data: bytes) -> None:
        """Takes the next bytes. Raises Corrupt, Unavailable."""
        writer = self._writer
        assert writer is not None
        found = self._reader.feed(data)
        if found:
            await self._in_thread(lambda: writer.add(self._checked(found)))

    def _checked(self, found: Sequence[backup.Row]) -> list[Row]:
        header, sealer = self._reader.header, self._sealer()
        assert header is not None
        rows = []
        for piece in found:
            row = Row(piece.table, piece.id, piece.version, piece.value)
            if row.table not in BY_KIND or not 0 < row.version <= header.revision:
                raise backup.Corrupt(
                    f"the backup is damaged: row {row.id!r} of table {row.table} at version "
                    f"{row.version} cannot be at revision {header.revision}; {_WHAT_NOW}"
                )
            try:
                kind, o = codec.decode_row(row, where="the backup", seal=sealer)
            except Corrupt as error:
                raise backup.Corrupt(f"{error.message}; {_WHAT_NOW}") from None
            except errors.Internal as error:
                raise backup.Corrupt(
                    f"the backup is damaged: row {BY_KIND[Kind(row.table)].kind.name.lower()} "
                    f"{row.id!r}: {error.message}; {_WHAT_NOW}"
                ) from None
            if kind in codec.SEALED:
                row = structs.replace(row, value=codec.encode(o, sealer))
            rows.append(row)
            if BY_KIND[kind].unique_name and o.spec is not None:  # type: ignore[attr-defined]
                name = codec.name_row(kind, o.spec.name)  # type: ignore[attr-defined]
                rows.append(Row(codec.NAMES, name, row.version, codec.encode_owner(row.id)))
        return rows

    def _sealer(self) -> Sealer:
        keys = self._reader.keys
        assert keys is not None  # they come before the rows
        if len(keys.seal_key) != KEY_BYTES:
            raise backup.Corrupt(
                f"the backup is damaged: its sealing key has {len(keys.seal_key)} bytes, not "
                f"{KEY_BYTES}; {_WHAT_NOW}"
            )
        return Sealer(keys.seal_key)

    async def finish(self, advertise: Callable[[backup.Header], str]) -> Restored:
        """All of the backup has come. `advertise` gives the host:port others reach this manager at.

        Raises Corrupt, Internal (a key does not fit), Unavailable.
        """
        writer = self._writer
        assert writer is not None
        header = self._reader.finish()
        keys = self._reader.keys
        assert keys is not None
        addr = advertise(header)
        passed_s = max(0, self.clock.now_ns() - header.time_ns) // SECOND_NS
        revision = header.revision + max(REVISIONS_MIN, passed_s * REVISIONS_PER_S)
        await self._in_thread(writer.finish, revision)
        self._key, sealer = keys.seal_key, self._sealer()
        engine = EmbeddedEngine(self._making / STORE_FILE, self.clock)
        store = Store(engine, self.clock, seal=sealer)
        try:
            await store.open()
            return await self._make_ours(store, header, sealer, addr)
        except (Corrupt, errors.Internal) as error:
            raise backup.Corrupt(f"the backup is damaged: {error.message}; {_WHAT_NOW}") from None
        finally:
            await store.close()

    async def _make_ours(
        self, store: Store, header: backup.Header, sealer: Sealer, addr: str
    ) -> Restored:
        cluster, keyring = objects(store)
        if cluster.id != header.cluster_id:
            raise Corrupt(
                f"its header names cluster {header.cluster_id}, its rows name {cluster.id}"
            )
        check_sealed(store, sealer)
        key_pem = tls.new_key_pem()
        now_ns = self.clock.now_ns()
        expiry_ns = cluster.spec.node_cert_expiry_ns if cluster.spec is not None else 0
        certificate_pem = tls.sign(
            tls.load_csr(tls.csr_pem(key_pem)),
            root_pem=tls.split_pem(cluster.root_ca_pem)[0],
            cross_pem=cluster.root_cross_pem,
            root_key_pem=keyring.root_ca_key_pem,
            common_name=header.node_id,
            unit=tls.OU_MANAGER,
            organization=cluster.id,
            now_ns=now_ns,
            lifetime_ns=expiry_ns,
        )
        demoted: list[str] = []

        def change(draft: Draft) -> None:
            demoted[:] = only_manager(
                draft,
                header.node_id,
                addr,
                engine=EmbeddedEngine.name,
                expires_at_ns=now_ns + expiry_ns,
            )

        await store.update(change)
        warnings = tuple(
            f"manager {name} is a worker now; on that machine, run `swarmctl swarm leave --force` "
            "and join again"
            for name in demoted
        )
        return Restored(
            node_id=header.node_id,
            cluster_id=cluster.id,
            key_pem=key_pem,
            certificate_pem=certificate_pem,
            root_ca_pem=cluster.root_ca_pem,
            revision=store.revision,
            header=header,
            warnings=warnings,
        )

    async def install(self, vault: Vault) -> None:
        """Puts the new folder in its place, where there is none any more; its key sealed with the
        node's own. Raises OSError.
        """
        errors.invariant(not self.folder.exists(), f"{self.folder} is in the way")
        vault.make()
        write_key(self._making / SEAL_FILE, self._key, vault)
        self._making.rename(self.folder)
        sync_folder(self.folder.parent)

    async def discard(self) -> None:
        """Removes what was not installed, however often it is cancelled. May be repeated."""
        await to_the_end(self._discard())

    async def _discard(self) -> None:
        await self._in_thread(self._clean)
        self._thread.shutdown()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="restore")

    def _clean(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        if self._making.exists():
            shutil.rmtree(self._making)

    async def _in_thread(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(fn, *args, **kwargs))


def only_manager(
    draft: Draft, node_id: str, addr: str, *, engine: str, expires_at_ns: int = 0
) -> list[str]:
    """Makes this node the one manager; the names of those that no longer are. `expires_at_ns`: of
    the certificate that it gets; 0: it keeps its own.
    """
    demoted = []
    for node in sorted(draft.all(Node), key=lambda n: n.id):
        if node.id == node_id:
            continue
        spec = node.spec or NodeSpec()
        if node.manager_status is None and spec.role != NodeRole.MANAGER:
            continue
        draft.put(
            structs.replace(
                node, spec=structs.replace(spec, role=NodeRole.WORKER), manager_status=None
            )
        )
        demoted.append((node.description and node.description.hostname) or node.id)
    node = draft.get(Node, node_id) or Node(
        id=node_id,
        description=NodeDescription(),
        status=NodeStatus(state=NodeState.UNKNOWN, since_ns=draft.now_ns),
    )
    draft.put(
        structs.replace(
            node,
            spec=structs.replace(node.spec or NodeSpec(), role=NodeRole.MANAGER),
            manager_status=ManagerStatus(
                leader=True, reachability=Reachability.REACHABLE, addr=addr
            ),
            certificate_expires_at_ns=expires_at_ns or node.certificate_expires_at_ns,
            revoked=False,
        )
    )
    cluster, keyring = objects(draft)
    draft.put(structs.replace(cluster, store_engine=engine))
    # The unlock key may have been changed since the backup: it counts once it was given out anew.
    if keyring.unlock_key:
        draft.put(structs.replace(keyring, unlock_key_received=False, previous_unlock_key=""))
    return demoted


def check_sealed(store: Store, sealer: Sealer) -> None:
    """Raises Internal, which names the first object that its keys do not open."""
    sealer.follow(store)
    for cls in sealed.CLASSES:
        found: list[Any] = sorted(store.all(cls), key=lambda o: o.id)
        for o in found:
            try:
                for data in sealed.parts(o):
                    sealer.open(data)
            except errors.Internal as error:
                kind = BY_CLASS[cls].kind.name.lower()
                raise errors.Internal(f"{kind} {o.id}: {error.message}") from None
