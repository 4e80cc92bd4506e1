"""A backup taken while the manager works, and what a restore makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from manager import main, restore
from manager.api.backup import AT_ONCE_MAX, Backups, Source
from manager.ca import DataKeys, Sealer, data_keys, load_key, objects
from manager.store import Corrupt, Draft, Store, sealed
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.tables import SCHEMAS
from swarm import backup, errors, tls
from swarm.backup import Header, Reader, Row, Writer
from swarm.clock import SECOND_NS, ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import (
    Cluster,
    InitRequest,
    ManagerStatus,
    Node,
    NodeRole,
    NodeSpec,
    Secret,
    SecretSpec,
    Service,
    ServiceSpec,
)
from swarm.vault import Vault

ADDR = "10.0.0.9:2377"


class World:
    """A cluster's store with something in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.store: Store
        self.sealer: Sealer
        self.node_id = ""

    async def open(self) -> None:
        vault = Vault(self.folder / "node.key")
        vault.make()
        new = await main.bootstrap(
            self.folder / "manager",
            InitRequest(store="embedded"),
            vault=vault,
            hostname="h1",
            advertise_addr="10.0.0.1:2377",
            clock=self.clock,
            rng=seeded_rng(1),
        )
        self.node_id = new.node.id
        self.sealer = Sealer(load_key(self.folder / "manager" / restore.SEAL_FILE, vault))
        engine = EmbeddedEngine(self.folder / "manager" / restore.STORE_FILE, self.clock)
        self.store = Store(engine, self.clock, seal=self.sealer)
        await self.store.open()
        await self.store.update(self._fill)

    def _fill(self, draft: Draft) -> None:
        spec = SecretSpec(name="s")
        draft.put(Secret(id="s1", spec=spec, sealed=self.sealer.seal(b"top secret"), digest="d"))
        for number in range(50):
            draft.put(Service(id=f"v{number}", spec=ServiceSpec(name=f"web{number}")))

    def backups(self) -> Backups:
        return Backups(
            self.store, self.clock, Source(self.sealer, self.node_id, "10.0.0.1:2377", "1")
        )

    async def backup(self) -> bytes:
        return b"".join([m.data async for m in self.backups().stream()])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path / "old")
    world.folder.mkdir()
    await world.open()
    yield world
    await world.store.close()


async def restored(
    folder: Path, data: bytes, clock: ManualClock, *, step: int = 1 << 20
) -> restore.Restored:
    work = restore.Restoration(folder / "manager", clock)
    try:
        await work.begin()
        for at in range(0, len(data), step):
            await work.feed(data[at : at + step])
        found = await work.finish(lambda _: ADDR)
        await work.install(Vault(folder / "node.key"))
        return found
    finally:
        await work.discard()


@contextlib.asynccontextmanager
async def opened(folder: Path, clock: ManualClock) -> AsyncIterator[tuple[Store, Sealer]]:
    sealer = Sealer(load_key(folder / "manager" / restore.SEAL_FILE, Vault(folder / "node.key")))
    engine = EmbeddedEngine(folder / "manager" / restore.STORE_FILE, clock)
    store = Store(engine, clock, seal=sealer)
    await store.open()
    try:
        yield store, sealer
    finally:
        await store.close()


def contents(store: Store) -> dict[tuple[str, str], Any]:
    return {(s.kind.name, o.id): o for s in SCHEMAS for o in store.all(s.cls)}  # type: ignore[attr-defined]


async def test_restored_state_is_the_backups_but_for_who_manages(
    world: World, tmp_path: Path
) -> None:
    before = contents(world.store)
    data = await world.backup()
    found = await restored(tmp_path / "new", data, world.clock, step=100)
    assert found.node_id == world.node_id
    async with opened(tmp_path / "new", world.clock) as (store, sealer):
        store.check_invariants()
        after = contents(store)
        assert after.keys() == before.keys()
        changed = {key for key in before if before[key] != after[key]}
        assert changed == {("NODE", world.node_id)}
        node = store.get(Node, world.node_id)
        assert node is not None and node.manager_status is not None
        assert node.manager_status.addr == ADDR
        secret = store.get(Secret, "s1")
        assert secret is not None and sealer.open(secret.sealed) == b"top secret"


async def test_backup_is_the_state_at_one_revision_whatever_changes_meanwhile(
    world: World, tmp_path: Path
) -> None:
    stream = world.backups().stream()
    revision = world.store.revision
    parts = [(await anext(stream)).data]

    def change(draft: Draft) -> None:
        draft.delete(Service, "v7")
        draft.put(Service(id="late", spec=ServiceSpec(name="late")))

    await world.store.update(change)
    parts += [m.data async for m in stream]
    found = await restored(tmp_path / "new", b"".join(parts), world.clock)
    assert found.header.revision == revision
    async with opened(tmp_path / "new", world.clock) as (store, _):
        assert store.get(Service, "v7") is not None
        assert store.get(Service, "late") is None


async def test_backups_at_once_are_bounded_and_a_reader_that_leaves_frees_its_place(
    world: World,
) -> None:
    backups = world.backups()
    streams = [backups.stream() for _ in range(AT_ONCE_MAX)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(errors.Exhausted, match="4 backups are being read"):
        await anext(backups.stream())
    for stream in streams:
        await stream.aclose()
    assert await anext(backups.stream())


async def test_backup_holds_no_secret_and_no_private_key_in_clear(world: World) -> None:
    data = await world.backup()
    _, keyring = objects(world.store)
    assert b"top secret" not in data
    assert b"PRIVATE KEY" not in data
    assert keyring.worker_token_secret.encode() not in data


@pytest.mark.parametrize(
    ("passed_s", "further"),
    [(0, 1_000_000_000), (3_600, 1_000_000_000), (30 * 86_400, 30 * 86_400 * 100_000)],
)
async def test_revisions_go_on_above_any_that_the_lost_state_can_have_had(
    world: World, tmp_path: Path, passed_s: int, further: int
) -> None:
    data = await world.backup()
    world.clock.advance(seconds=passed_s)
    found = await restored(tmp_path / "new", data, world.clock)
    assert found.revision == found.header.revision + further + 1  # its own commit
    async with opened(tmp_path / "new", world.clock) as (store, _):
        await store.update(lambda draft: draft.put(Service(id="x", spec=ServiceSpec(name="x"))))
        new, kept = store.get(Service, "x"), store.get(Service, "v1")
        assert (
            new is not None and new.meta is not None and kept is not None and kept.meta is not None
        )
        assert new.meta.version > found.header.revision + further
        assert kept.meta.version <= found.header.revision


async def test_certificate_is_trusted_by_the_cluster_and_for_this_node(
    world: World, tmp_path: Path
) -> None:
    cluster, _ = objects(world.store)
    found = await restored(tmp_path / "new", await world.backup(), world.clock)
    certificate = tls.load_certificates(found.certificate_pem)[0]
    assert tls.issued_by(certificate, tls.load_certificates(cluster.root_ca_pem)[0])
    facts = tls.facts(certificate)
    assert (facts.common_name, facts.unit, facts.organization) == (
        world.node_id,
        tls.OU_MANAGER,
        cluster.id,
    )
    assert facts.not_after_ns > world.clock.now_ns() + 80 * 86_400 * SECOND_NS


async def test_other_managers_are_workers_afterwards(world: World, tmp_path: Path) -> None:
    def add(draft: Draft) -> None:
        spec, status = NodeSpec(role=NodeRole.MANAGER), ManagerStatus(addr="10.0.0.2:2377")
        draft.put(Node(id="m2", spec=spec, manager_status=status))

    await world.store.update(add)
    found = await restored(tmp_path / "new", await world.backup(), world.clock)
    assert found.warnings == (
        "manager m2 is a worker now; on that machine, run `swarmctl swarm leave --force` and join "
        "again",
    )
    async with opened(tmp_path / "new", world.clock) as (store, _):
        other = store.get(Node, "m2")
        assert other is not None and other.spec is not None
        assert other.manager_status is None and other.spec.role == NodeRole.WORKER
        (cluster,) = store.all(Cluster)
        assert cluster.store_engine == "embedded"


# ------------------------------------------------------------------ what is refused


def rewritten(data: bytes, change: Any) -> bytes:
    """The backup with other rows, keys or header, and sound checksums."""
    reader = Reader()
    rows = reader.feed(data)
    header, keys = reader.header, reader.keys
    assert header is not None and keys is not None
    header, keys, rows = change(header, keys, rows)
    writer = Writer()
    return b"".join([writer.begin(header, keys), *writer.rows(rows), writer.end()])


def without(table: int) -> Any:
    def change(header: Header, keys: backup.Keys, rows: list[Row]) -> Any:
        kept = [r for r in rows if r.table != table]
        return structs.replace(header, rows=len(kept)), keys, kept

    return change


def with_first(**fields: Any) -> Any:
    def change(header: Header, keys: backup.Keys, rows: list[Row]) -> Any:
        return header, keys, [structs.replace(rows[0], **fields), *rows[1:]]

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without(1), "holds no cluster"),
        (without(11), "holds no cluster"),
        (with_first(value=b"\x01nonsense"), "row cluster .* cannot be read"),
        (with_first(value=b"\x09later"), "it has format 9, and this version reads format 1"),
        (with_first(version=10**9), "at version 1000000000 cannot be at revision"),
        (with_first(table=99), "of table 99"),
        (lambda h, k, r: (h, backup.Keys(seal_key=b"x" * 32), r), "row keyring .*another key"),
        (lambda h, k, r: (h, backup.Keys(seal_key=b"short"), r), "sealing key has 5 bytes, not 32"),
        (lambda h, k, r: (structs.replace(h, cluster_id="other"), k, r), "header names cluster other"),
        (lambda h, k, r: (structs.replace(h, rows=h.rows + 1), k, [*r, r[-1]]), "row occurs twice"),
        (lambda h, k, r: (h, k, [*r[:-1], structs.replace(r[-1], id=r[0].id)]), "cannot be read"),
    ],
    ids=[
        "no cluster", "no keyring", "unreadable", "newer", "version", "kind", "wrong key", "no key",
        "header", "twice", "other id",
    ],
)  # fmt: skip
async def test_backup_whose_rows_do_not_hold_together_is_refused_and_leaves_nothing(
    world: World, tmp_path: Path, change: Any, says: str
) -> None:
    data = rewritten(await world.backup(), change)
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(errors.Invalid, match=says):
        await restored(new, data, world.clock)
    assert not list(new.iterdir())


async def test_names_that_two_objects_share_are_refused(world: World, tmp_path: Path) -> None:
    def double(header: Header, keys: backup.Keys, rows: list[Row]) -> Any:
        service = next(r for r in rows if r.id == "v1")
        copy = structs.replace(service, id="w1", value=service.value.replace(b"\xa2v1", b"\xa2w1"))
        return structs.replace(header, rows=header.rows + 1), keys, [*rows, copy]

    with pytest.raises(errors.Invalid):
        await restored(tmp_path / "new", rewritten(await world.backup(), double), world.clock)
    assert not (tmp_path / "new/manager").exists()


async def test_cut_backup_leaves_nothing(world: World, tmp_path: Path) -> None:
    data = await world.backup()
    new = tmp_path / "new"
    new.mkdir()
    for length in range(0, len(data), 997):
        with pytest.raises(backup.Corrupt):
            await restored(new, data[:length], world.clock)
        assert not list(new.iterdir())


async def test_what_a_killed_restore_left_is_in_nobodys_way(world: World, tmp_path: Path) -> None:
    new = tmp_path / "new"
    (new / "manager.restoring").mkdir(parents=True)
    (new / "manager.restoring" / "store.db").write_bytes(b"half")
    await restored(new, await world.backup(), world.clock)
    assert sorted(p.name for p in new.iterdir()) == ["manager", "node.key"]


# ------------------------------------------------------------------ a state that is not whole


async def started(world: World, certificate_pem: str = "") -> None:
    found = await world_settings(world, certificate_pem)
    manager = main.Manager(
        found, world.clock, seeded_rng(2), vault=Vault(world.folder / "node.key")
    )
    await manager.start()
    await manager.stop()


async def world_settings(world: World, certificate_pem: str) -> main.Settings:
    root, key = tls.new_root(now_ns=world.clock.now_ns(), cluster_id="other")
    mine = tls.new_key_pem()
    return main.Settings(
        state_dir=world.folder / "manager",
        node_id=world.node_id,
        listen_addr="127.0.0.1:2",
        advertise_addr="127.0.0.1:1",
        key_pem=mine,
        certificate_pem=certificate_pem
        or tls.sign(
            tls.load_csr(tls.csr_pem(mine)),
            root_pem=root,
            root_key_pem=key,
            common_name=world.node_id,
            unit=tls.OU_MANAGER,
            organization="other",
            now_ns=world.clock.now_ns(),
            lifetime_ns=10**15,
        ),
        version="1",
    )


async def test_manager_without_its_state_file_does_not_begin_anew(world: World) -> None:
    await world.store.close()
    (world.folder / "manager/store.db").rename(world.folder / "elsewhere")
    with pytest.raises(Corrupt, match=r"store\.db is gone; .*swarm restore"):
        await started(world)
    assert not (world.folder / "manager/store.db").exists()


async def test_manager_without_its_sealing_key_does_not_make_another(world: World) -> None:
    await world.store.close()
    (world.folder / "manager/seal.key").unlink()
    with pytest.raises(errors.Invalid, match=r"seal\.key is gone"):
        await started(world)
    assert not (world.folder / "manager/seal.key").exists()


async def test_manager_refuses_the_state_of_another_cluster(world: World) -> None:
    await world.store.close()
    with pytest.raises(Corrupt, match="and this node is in cluster other"):
        await started(world)


async def test_manager_refuses_a_state_without_a_cluster(world: World) -> None:
    def empty(draft: Draft) -> None:
        for o in objects(draft):
            draft.delete(type(o), o.id)

    await world.store.update(empty)
    await world.store.close()
    with pytest.raises(Corrupt, match="holds no cluster"):
        await started(world)


# ---------------------------------------------------------------- data keys


async def test_backup_between_two_steps_of_a_rotation_opens_whole(
    world: World, tmp_path: Path
) -> None:
    """Some of it sealed with the sealing key, as earlier versions did, some with either key."""
    keys = DataKeys(world.store, world.clock, world.sealer)
    await keys.settle()
    await world.store.update(data_keys.begin)

    def fill(draft: Draft) -> None:
        for name, data in (
            ("new", world.sealer.seal_data(b"new")),
            ("old", world.sealer.seal(b"old")),
        ):
            draft.put(Secret(id=name, spec=SecretSpec(name=name), sealed=data))

    await world.store.update(fill)
    found = {s.id: sealed.key_id(s.sealed) for s in world.store.all(Secret)}
    assert found == {"s1": 1, "new": 2, "old": 0}
    await restored(tmp_path / "new", await world.backup(), world.clock)
    async with opened(tmp_path / "new", world.clock) as (store, sealer):
        await DataKeys(store, world.clock, sealer).settle()
        opened_now = {s.id: sealer.open(s.sealed) for s in store.all(Secret)}
        assert opened_now == {"s1": b"top secret", "new": b"new", "old": b"old"}
        assert {sealed.key_id(s.sealed) for s in store.all(Secret)} == {2}


async def test_backup_whose_keyring_lacks_a_key_is_refused_with_the_object(
    world: World, tmp_path: Path
) -> None:
    await DataKeys(world.store, world.clock, world.sealer).settle()

    def lose(draft: Draft) -> None:
        _, keyring = objects(draft)
        draft.put(structs.replace(keyring, data_keys=()))

    await world.store.update(lose)
    with pytest.raises(backup.Corrupt, match=r"secret s1: .*needs data key 1"):
        await restored(tmp_path / "new", await world.backup(), world.clock)
