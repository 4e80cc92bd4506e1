"""Data keys: made, used, replaced and dropped, whatever is stopped between two steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from manager.ca import DataKeys, Sealer, data_keys, objects
from manager.store import Draft, Op, Stale, Store, sealed
from manager.store.engine import Fence
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import SECOND_NS, ManualClock
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    Keyring,
    Secret,
    SecretSpec,
    ServiceRevision,
    StackRevision,
)
from tests.fakes.waiting import until

KEY = b"k" * 32
DAY_S = 86_400
CONTENT = {f"s{i:02}": f"top secret {i}".encode() for i in range(12)}


class Stopped(Exception):
    """The process ended."""


class Mortal(MemoryEngine):
    """Ends the process after so many commits: before the last one counts, or once it does."""

    left: int | None = None
    after = False

    async def commit(
        self, ops: Sequence[Op], requires: Sequence[Op], fence: Fence | None, who: str = ""
    ) -> int:
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and not self.after:
                raise Stopped
        revision = await super().commit(ops, requires, fence, who)
        if self.left is not None and self.left < 0:
            raise Stopped
        return revision


class World:
    """A cluster that seals."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.engine = Mortal(self.clock)
        self.sealer = Sealer(KEY)
        self.store = Store(self.engine, self.clock, seal=self.sealer)
        self.keys = DataKeys(self.store, self.clock, self.sealer)

    async def fill(self) -> None:
        """As an earlier version left it: all of it sealed with the sealing key."""
        await self.store.open()

        def put(draft: Draft) -> None:
            draft.put(Cluster(id="c", spec=ClusterSpec(name="default")))
            draft.put(Keyring(id="c"))
            for id_, data in CONTENT.items():
                spec = SecretSpec(name=id_)
                digest = self.sealer.digest(data)
                draft.put(Secret(id=id_, spec=spec, sealed=self.sealer.seal(data), digest=digest))
            auth = self.sealer.seal(b"auth")
            draft.put(ServiceRevision(id="svc.1", service_id="svc", sealed_registry_auth=auth))
            draft.put(ServiceRevision(id="svc.2", service_id="svc"))
            auths = {"web": self.sealer.seal(b"auth"), "db": self.sealer.seal(b"other")}
            draft.put(StackRevision(id="st.1", stack_id="st", sealed_registry_auths=auths))

        await self.store.update(put)

    @property
    def ring(self) -> list[int]:
        return [k.id for k in objects(self.store)[1].data_keys]

    def used(self) -> set[int]:
        return {i for c in sealed.CLASSES for i in sealed.key_ids(self.store.all(c))}

    def check_opens(self) -> None:
        """A manager that starts now reads everything."""
        sealer = Sealer(KEY)
        sealer.follow(self.store)
        for id_, data in CONTENT.items():
            secret = self.store.get(Secret, id_)
            assert secret is not None
            assert sealer.open(secret.sealed) == data
            assert secret.digest == sealer.digest(data)
        revision = self.store.get(ServiceRevision, "svc.1")
        assert revision is not None
        assert sealer.open(revision.sealed_registry_auth) == b"auth"
        stack = self.store.get(StackRevision, "st.1")
        assert stack is not None
        opened = {n: sealer.open(d) for n, d in stack.sealed_registry_auths.items()}
        assert opened == {"web": b"auth", "db": b"other"}

    async def settings(self, **changes: int) -> None:
        def change(draft: Draft) -> None:
            cluster, _ = objects(draft)
            assert cluster.spec is not None
            draft.put(structs.replace(cluster, spec=structs.replace(cluster.spec, **changes)))

        await self.store.update(change)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.fill()
    yield made
    await made.store.close()


async def test_what_the_sealing_key_sealed_is_sealed_with_the_first_data_key(world: World) -> None:
    assert world.used() == {0}
    await world.keys.settle()
    assert (world.ring, world.used()) == ([1], {1})
    world.check_opens()


async def test_settling_twice_is_as_once(world: World) -> None:
    await world.keys.settle()
    revision = world.store.revision
    await world.keys.settle()
    assert world.store.revision == revision


async def test_key_that_is_asked_for_replaces_the_old_one(world: World) -> None:
    await world.keys.settle()
    before = objects(world.store)[1].data_keys
    await world.store.update(data_keys.begin)
    assert world.ring == [1, 2]
    assert sealed.key_id(world.sealer.seal_data(b"x")) == 2
    world.check_opens()
    await world.keys.settle()
    assert (world.ring, world.used()) == ([2], {2})
    assert objects(world.store)[1].data_keys[0].key != before[0].key
    world.check_opens()


@pytest.mark.parametrize(("lifetime_s", "lives_s"), [(0, 90 * DAY_S), (DAY_S, DAY_S)])
async def test_key_is_replaced_when_it_has_lived_its_time(
    world: World, lifetime_s: int, lives_s: int
) -> None:
    await world.settings(data_key_lifetime_ns=lifetime_s * SECOND_NS)
    await world.keys.settle()
    world.clock.advance(seconds=lives_s - 1)
    await world.keys.settle()
    assert world.ring == [1]
    world.clock.advance(seconds=1)
    await world.keys.settle()
    assert (world.ring, world.used()) == ([2], {2})


async def test_running_makes_a_key_and_follows_the_settings(world: World) -> None:
    running = asyncio.ensure_future(world.keys.run())
    await until(lambda: world.ring == [1] and world.used() == {1})
    world.clock.advance(seconds=2 * DAY_S)
    await world.settings(data_key_lifetime_ns=DAY_S * SECOND_NS)
    await until(lambda: world.ring == [2] and world.used() == {2})
    await world.store.update(data_keys.begin)
    await until(lambda: world.ring == [3] and world.used() == {3})
    world.check_opens()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_sealing_anew_is_no_change_that_anybody_sees(world: World) -> None:
    before = world.store.get(Secret, "s01")
    world.clock.advance(seconds=5)
    await world.keys.settle()
    await world.store.update(data_keys.begin)
    await world.keys.settle()
    after = world.store.get(Secret, "s01")
    assert before is not None and after is not None
    assert before.meta is not None and after.meta is not None
    assert after.sealed != before.sealed
    assert after.meta.version > before.meta.version
    assert after.meta.seen_version == before.meta.version
    assert after.meta.updated_at_ns == before.meta.updated_at_ns
    assert structs.replace(after, meta=before.meta, sealed=before.sealed) == before
    world.clock.advance(seconds=5)
    changed = structs.replace(after, spec=SecretSpec(name="s01", labels={"a": "b"}))
    await world.store.update(lambda d: d.put(changed))
    seen = world.store.get(Secret, "s01")
    assert seen is not None and seen.meta is not None
    assert seen.meta.seen_version == 0
    assert seen.meta.updated_at_ns > after.meta.updated_at_ns


async def test_transactions_are_bounded(world: World) -> None:
    def put(draft: Draft) -> None:
        for i in range(250):
            sealed_ = world.sealer.seal(b"x")
            draft.put(Secret(id=f"t{i}", spec=SecretSpec(name=f"t{i}"), sealed=sealed_))
        for i in range(4):
            sealed_ = world.sealer.seal(bytes(200_000))
            draft.put(Secret(id=f"u{i}", spec=SecretSpec(name=f"u{i}"), sealed=sealed_))

    await world.store.update(put)
    with world.store.watch(("all",)) as watch:
        await world.keys.settle()
        batches = []
        while watch.pending:
            batches.append(await anext(watch))
    sizes = [[len(c.new.sealed) for c in b.changes if isinstance(c.new, Secret)] for b in batches]
    assert sum(len(s) for s in sizes) == 250 + 4 + len(CONTENT)
    assert all(len(s) <= data_keys.BATCH_OBJECTS for s in sizes)
    assert all(sum(s) <= data_keys.BATCH_BYTES for s in sizes)


async def test_damaged_secret_stays_with_its_key_and_holds_nothing_up(world: World) -> None:
    await world.keys.settle()
    secret = world.store.get(Secret, "s03")
    assert secret is not None
    torn = structs.replace(secret, sealed=secret.sealed[:-1])
    await world.store.update(lambda d: d.put(torn))
    await world.store.update(data_keys.begin)
    await world.keys.settle()
    assert (world.ring, world.used()) == ([1, 2], {1, 2})
    fresh = structs.replace(torn, meta=None, sealed=world.sealer.seal_data(CONTENT["s03"]))
    await world.store.update(lambda d: d.put(fresh))
    await world.keys.settle()
    assert (world.ring, world.used()) == ([2], {2})
    world.check_opens()


async def test_too_many_keys_at_once_are_refused(world: World) -> None:
    for _ in range(data_keys.KEYS_MAX):
        await world.store.update(data_keys.begin)
    with pytest.raises(errors.Conflict, match="16 data keys are in use"):
        await world.store.update(data_keys.begin)
    await world.keys.settle()
    assert world.ring == [data_keys.KEYS_MAX]
    world.check_opens()


# ---------------------------------------------------------------- writers beside it


async def test_what_was_sealed_before_a_new_key_is_refused_after_it(world: World) -> None:
    """Else it would come in behind the back of whoever drops the key."""
    await world.keys.settle()
    draft = world.store.draft()
    data = world.sealer.seal_data(b"late")
    draft.put(Secret(id="late", spec=SecretSpec(name="late"), sealed=data))
    await world.store.update(data_keys.begin)
    with pytest.raises(Stale):
        await world.store.commit(draft)
    await world.keys.settle()
    with pytest.raises(Stale, match="data key 1, which is being dropped"):
        world.store.draft().put(Secret(id="late", spec=SecretSpec(name="late"), sealed=data))


async def test_copies_are_taken_until_a_key_retires_and_then_refused(world: World) -> None:
    await world.keys.settle()
    old = world.store.get(ServiceRevision, "svc.1")
    assert old is not None
    await world.store.update(data_keys.begin)

    def copy(draft: Draft, id_: str) -> None:
        auth = old.sealed_registry_auth
        draft.put(ServiceRevision(id=id_, service_id="svc", sealed_registry_auth=auth))

    await world.store.update(lambda d: copy(d, "svc.3"))  # key 1 is there still
    late = world.store.draft()
    copy(late, "svc.4")
    await world.store.update(data_keys._retire)
    with pytest.raises(Stale):
        await world.store.commit(late)
    with pytest.raises(Stale, match="being dropped"):
        copy(world.store.draft(), "svc.5")
    await world.keys.settle()
    assert (world.ring, world.used()) == ([2], {2})
    world.check_opens()


async def test_changes_of_other_things_do_not_rely_on_the_keyring(world: World) -> None:
    await world.keys.settle()
    secret = world.store.get(Secret, "s01")
    assert secret is not None
    draft = world.store.draft()
    draft.put(structs.replace(secret, spec=SecretSpec(name="s01", labels={"a": "b"})))
    await world.store.update(data_keys.begin)
    await world.store.commit(draft)


@settings(max_examples=60, deadline=None)
@given(st.data())
async def test_whatever_ends_between_two_steps_and_goes_on_opens_everything(
    data: st.DataObject,
) -> None:
    """A manager ends at any commit, before or after it counts; another one goes on."""
    world = World()
    await world.fill()
    for _ in range(data.draw(st.integers(1, 5))):
        match data.draw(st.sampled_from(("ask", "wait", "settle", "write"))):
            case "ask" if len(world.ring) < data_keys.KEYS_MAX:
                await world.store.update(data_keys.begin)
            case "wait":
                world.clock.advance(seconds=100 * DAY_S)
            case "write":
                secret = world.store.get(Secret, "s05")
                assert secret is not None
                again = world.sealer.seal_data(CONTENT["s05"])
                draft = world.store.draft()
                draft.put(structs.replace(secret, sealed=again))
                await world.store.commit(draft)
            case _:
                world.engine.left = data.draw(st.integers(0, 7))
                world.engine.after = data.draw(st.booleans())
                with contextlib.suppress(Stopped):
                    await world.keys.settle()
                world.engine.left = None
                world.sealer = Sealer(KEY)
                world.keys = DataKeys(world.store, world.clock, world.sealer)
        world.check_opens()
    await world.keys.settle()
    assert len(world.ring) == 1
    assert world.used() == set(world.ring)
    world.check_opens()
    await world.store.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3), st.integers(0, 2**32))
async def test_several_managers_at_once_come_to_the_same(managers: int, seed: int) -> None:
    """On one store, as on several: each commits only what the others have left as it was."""
    world = World()
    await world.fill()
    others = [DataKeys(world.store, world.clock, world.sealer) for _ in range(managers)]
    if seed % 2:
        await world.store.update(data_keys.begin)
    for _ in range(2):
        await asyncio.gather(*(k.settle() for k in others))
        assert len(world.ring) == 1
        assert world.used() == set(world.ring)
        world.check_opens()
        await world.store.update(data_keys.begin)
    await world.store.close()
