"""Autolock: what opens a manager's keys at rest, decided in the store, carried out in its vault.

The store says whether managers are locked and with which key (Keyring); each manager follows it and
locks the key of its node accordingly. A key that nobody has seen would lock the cluster for good,
so a new one counts only after it was received: until then the one before opens as well, and with
none before, nothing is locked. At every moment, whatever crashes, a key that somebody was given
opens the files: `rotate` answers once both open them, `received` before the former is dropped.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

import structlog
from msgspec import structs

from manager.ca.objects import objects
from manager.store import Draft, Store, View, WatchLost
from swarm import errors
from swarm.v1 import Cluster, Keyring, Kind
from swarm.vault import Vault, new_unlock_key

log = structlog.get_logger("autolock")

RETRY_S = 5.0  # after a disk that refused
NOT_RECEIVED = (
    "autolock is on, and nobody has been given the unlock key yet, so this manager is not locked; "
    "run `swarmctl swarm unlock-key`, and keep what it prints"
)


def switch(draft: Draft, *, on: bool) -> None:
    """Turns autolock on, with a new key, or off."""
    _, keyring = objects(draft)
    if on == bool(keyring.unlock_key):
        return
    draft.put(
        structs.replace(
            keyring,
            unlock_key=new_unlock_key() if on else "",
            unlock_key_received=False,
            previous_unlock_key="",
        )
    )


def opening(keyring: Keyring) -> tuple[str, ...]:
    """The keys each of which opens a manager; none: it is not locked."""
    if keyring.unlock_key_received:
        return (keyring.unlock_key,)
    if keyring.previous_unlock_key:
        return (keyring.previous_unlock_key, keyring.unlock_key)
    return ()


def _is_on(view: View) -> bool:
    return any(c.spec is not None and c.spec.autolock_managers for c in view.all(Cluster))


def _rotate(draft: Draft) -> str:
    if not _is_on(draft):
        raise errors.Conflict("cannot rotate because autolock is not turned on")
    _, keyring = objects(draft)
    # A key that nobody received is replaced; the one that people have stays.
    before = keyring.unlock_key if keyring.unlock_key_received else keyring.previous_unlock_key
    key = new_unlock_key()
    draft.put(
        structs.replace(
            keyring, unlock_key=key, unlock_key_received=False, previous_unlock_key=before
        )
    )
    return key


def _receive(draft: Draft, key: str) -> None:
    _, keyring = objects(draft)
    if not key or not hmac.compare_digest(key.encode(), keyring.unlock_key.encode()):
        raise errors.Conflict(
            "the unlock key was changed meanwhile; run `swarmctl swarm unlock-key` again"
        )
    if not keyring.unlock_key_received:
        draft.put(structs.replace(keyring, unlock_key_received=True, previous_unlock_key=""))


class Autolock:
    """One manager's side of it. `run` until cancelled."""

    def __init__(
        self, store: Store, vault: Vault, *, report: Callable[[str], None] = lambda problem: None
    ) -> None:
        """`report` gets what a person should know; empty: nothing."""
        self._store = store
        self._vault = vault
        self._report = report
        self._changing = asyncio.Lock()

    async def run(self) -> None:
        """Follows the store."""
        while True:
            with self._store.watch(("kind", Kind.KEYRING)) as watch:
                await self._follow()
                try:
                    async for _ in watch:
                        await self._follow()
                    return  # the store was closed
                except WatchLost:
                    continue

    async def _follow(self) -> None:
        while True:
            try:
                await self.settle()
                return
            except errors.Unavailable as error:
                log.error("not_locked", reason=error.message, retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def settle(self) -> None:
        """Returns once this manager is locked as the store says. Raises Unavailable when the disk
        refuses; then what opened it before still does.
        """
        async with self._changing:
            _, keyring = objects(self._store)
            keys = opening(keyring)
            try:
                if await asyncio.to_thread(self._vault.lock_with, keys):
                    log.info("locks_changed", locked=bool(keys), keys=len(keys))
            except OSError as error:
                problem = (
                    f"{self._vault.path} cannot be written: {error.strerror or error}; what "
                    "unlocked this manager before still does. Free space on its disk"
                )
                self._report(problem)
                raise errors.Unavailable(problem) from error
            self._report(NOT_RECEIVED if keyring.unlock_key and not keys else "")

    async def key(self) -> tuple[str, bool]:
        """The unlock key, and whether it is in force. Raises Conflict without autolock."""
        await self.settle()
        _, keyring = objects(self._store)
        if not keyring.unlock_key:
            raise errors.Conflict(
                "no unlock key is set: autolock is off; `swarmctl swarm update --autolock` turns "
                "it on"
            )
        return keyring.unlock_key, keyring.unlock_key_received

    async def rotate(self) -> None:
        """Makes a new key, which this manager's files open for when it returns. Raises Conflict."""
        await self._store.update(_rotate)
        await self.settle()

    async def received(self, key: str) -> None:
        """Somebody has the key: it alone opens this manager when this returns. Raises Conflict."""
        await self._store.update(lambda draft: _receive(draft, key))
        await self.settle()
