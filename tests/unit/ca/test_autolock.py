"""What opens a manager, decided in the store: at each moment a key that somebody was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from manager.ca import Autolock, autolock, objects
from manager.store import Draft, Store
from manager.store.engines.memory import MemoryEngine
from swarm import errors
from swarm.clock import ManualClock
from swarm.v1 import Cluster, ClusterSpec, Keyring
from swarm.vault import Vault
from tests.fakes.waiting import until

CLOCK = ManualClock()


class Manager:
    def __init__(self, folder: Path) -> None:
        self.store = Store(MemoryEngine(CLOCK), CLOCK)
        self.vault = Vault(folder / "node.key")
        self.problem = ""
        self.autolock = Autolock(self.store, self.vault, report=self._report)

    def _report(self, problem: str) -> None:
        self.problem = problem

    async def open(self) -> None:
        self.vault.make()
        await self.store.open()

        def fill(draft: Draft) -> None:
            draft.put(Cluster(id="c", spec=ClusterSpec(name="default")))
            draft.put(Keyring(id="c"))

        await self.store.update(fill)

    async def switch(self, *, on: bool) -> None:
        def change(draft: Draft) -> None:
            cluster, _ = objects(draft)
            draft.put(structs.replace(cluster, spec=ClusterSpec(autolock_managers=on)))
            autolock.switch(draft, on=on)

        await self.store.update(change)
        await self.autolock.settle()

    def opens(self, key: str) -> bool:
        """Whether a restarted manager would serve, given this key."""
        again = Vault(self.vault.path)
        if again.locked:
            try:
                again.unlock(key)
            except errors.Denied:
                return False
        return True

    async def take(self) -> str:
        """Asks for the key, shows it, and says so."""
        key, in_force = await self.autolock.key()
        if not in_force:
            await self.autolock.received(key)
        return key


@pytest.fixture
async def manager(tmp_path: Path) -> AsyncIterator[Manager]:
    manager = Manager(tmp_path)
    await manager.open()
    yield manager
    await manager.store.close()


async def test_nothing_is_locked_before_somebody_has_the_key(manager: Manager) -> None:
    await manager.switch(on=True)
    assert manager.opens("")
    assert "nobody has been given the unlock key" in manager.problem
    key = await manager.take()
    assert not manager.opens("")
    assert manager.opens(key)
    assert manager.problem == ""


async def test_both_keys_open_until_the_new_one_was_received(manager: Manager) -> None:
    await manager.switch(on=True)
    first = await manager.take()
    await manager.autolock.rotate()
    second, in_force = await manager.autolock.key()
    assert not in_force
    assert manager.opens(first)
    assert manager.opens(second)
    await manager.autolock.rotate()
    third, _ = await manager.autolock.key()
    assert manager.opens(first), "the second was never received"
    assert not manager.opens(second)
    await manager.autolock.received(third)
    assert [manager.opens(k) for k in (first, second, third)] == [False, False, True]
    with pytest.raises(errors.Conflict, match="changed meanwhile"):
        await manager.autolock.received(second)


async def test_turned_off_nothing_is_locked_and_a_later_key_is_another(manager: Manager) -> None:
    await manager.switch(on=True)
    first = await manager.take()
    await manager.switch(on=False)
    assert manager.opens("")
    for call in (manager.autolock.key(), manager.autolock.rotate(), manager.autolock.received("")):
        with pytest.raises(errors.Conflict):
            await call
    await manager.switch(on=True)
    assert await manager.take() != first
    assert not manager.opens(first)


async def test_manager_follows_what_another_one_changed(manager: Manager) -> None:
    running = asyncio.create_task(manager.autolock.run())
    try:
        key = "SWMKEY-1-" + "k" * 42 + "A"
        keyring = Keyring(id="c", unlock_key=key, unlock_key_received=True)
        await manager.store.update(lambda d: d.put(keyring))
        await until(lambda: not manager.opens(""))
        assert manager.opens(key)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_disk_that_refuses_is_told_and_what_opened_it_still_does(manager: Manager) -> None:
    await manager.switch(on=True)
    first = await manager.take()
    blocked = manager.vault.path.with_name("node.key.new")
    blocked.mkdir()  # in the way of the temporary file
    with pytest.raises(errors.Unavailable, match=r"node\.key cannot be written"):
        await manager.autolock.rotate()
    assert "cannot be written" in manager.problem
    assert manager.opens(first)
    blocked.rmdir()
    await manager.autolock.settle()
    assert manager.opens((await manager.autolock.key())[0])


@given(st.lists(st.sampled_from(["on", "off", "rotate", "take"]), max_size=12))
def test_some_key_that_was_given_out_always_opens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    async def walk() -> None:
        manager = Manager(tmp_path_factory.mktemp("v"))
        await manager.open()
        given = [""]
        for step in steps:
            try:
                if step == "take":
                    given.append(await manager.take())
                elif step == "rotate":
                    await manager.autolock.rotate()
                else:
                    await manager.switch(on=step == "on")
            except errors.Conflict:
                continue  # autolock is off
            assert any(manager.opens(key) for key in given), step
        await manager.store.close()

    asyncio.run(walk())
