"""Data keys: what secrets and registry credentials are sealed with, replaced from time to time.

    one key      a next one is made       everything is sealed anew      nothing uses key 1
    [1] ──────► [1, 2]  seals: 2 ───────► [1 retired, 2] ─────────────► [2]

A next one is made when the newest has lived for ClusterSpec.data_key_lifetime_ns, and at once when
somebody asks (ClusterSpec.data_key_force_rotate; the API calls `begin` in the commit that raises
it). A cluster that has none, because it is new or was made by an earlier version, gets its first
one when a manager starts.

Invariants: the newest key seals. A key is dropped only when nothing in the store was sealed with
it, and after it was retired: from then on no commit brings anything in that was sealed with it
(`Draft` refuses it, and every commit of something sealed or copied relies on the keyring's
version). So neither a manager that is behind nor one that stops between two steps loses anything:
each step is one commit, and whoever goes on, goes on with what the store says.

Any manager may run `DataKeys`, several at once: who comes second finds the work done. Sealing anew
shows nowhere: the time of an object's last change, the version that people see and the tasks that
use it stay as they are (`Draft.put(unseen=True)`). Method: as envelope encryption in Kubernetes
(KMS providers) and SwarmKit's rotation of its data encryption key, which rewrites its log with the
new one; here each object says by itself which key it needs, so nothing has to be rewritten at once.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final

import structlog
from msgspec import structs

from manager.ca.objects import objects
from manager.ca.seal import KEY_BYTES, Sealer
from manager.store import Draft, Store, View, WatchLost, sealed
from manager.store.codec import encode
from manager.store.tables import BY_CLASS
from swarm import errors
from swarm.clock import SECOND_NS, Clock
from swarm.v1 import DataKey, Kind, Message

log = structlog.get_logger("ca")

LIFETIME_NS: Final = 90 * 86400 * SECOND_NS
LIFETIME_NS_MIN: Final = 3600 * SECOND_NS
# More than are in use at a time only where somebody asks for them faster than anything is sealed
# anew.
KEYS_MAX: Final = 16
# Of one transaction that seals anew; one object above it has a transaction to itself.
BATCH_BYTES: Final = 256 << 10
BATCH_OBJECTS: Final = 100
LOOKED_AT: Final = 2_000  # objects between two turns for other work: about 2 ms
CHECK_S: Final = 60.0  # how often the clock is looked at, so that a machine that slept is noticed
RETRY_S: Final = 1.0  # after a store that could not write

Place = tuple[type[Message], str]


def begin(draft: Draft) -> None:
    """Adds a key, which seals from then on. Raises Conflict when too many are still in use."""
    _, keyring = objects(draft)
    keys = keyring.data_keys
    if len(keys) >= KEYS_MAX:
        raise errors.Conflict(
            f"{len(keys)} data keys are in use still, the most there may be: what the older ones "
            "sealed is being sealed anew; try again in a moment"
        )
    key = DataKey(
        id=keys[-1].id + 1 if keys else 1,
        key=secrets.token_bytes(KEY_BYTES),
        created_at_ns=draft.now_ns,
    )
    draft.put(structs.replace(keyring, data_keys=(*keys, key)))


def due_ns(view: View) -> int:
    """When the newest key is to be replaced, unix time; 0: there is none yet."""
    cluster, keyring = objects(view)
    if not keyring.data_keys:
        return 0
    lifetime_ns = (cluster.spec.data_key_lifetime_ns if cluster.spec is not None else 0) or (
        LIFETIME_NS
    )
    return keyring.data_keys[-1].created_at_ns + lifetime_ns


def _begin_due(draft: Draft) -> bool:
    if draft.now_ns < due_ns(draft):
        return False
    begin(draft)
    return True


def _retire(draft: Draft) -> bool:
    """Has the older keys seal nothing any more; whether one did until now."""
    _, keyring = objects(draft)
    older, newest = keyring.data_keys[:-1], keyring.data_keys[-1:]
    if all(key.retired for key in older):
        return False
    retired = tuple(structs.replace(key, retired=True) for key in older)
    draft.put(structs.replace(keyring, data_keys=(*retired, *newest)))
    return True


def _drop(draft: Draft) -> bool:
    """Drops the retired keys that nothing was sealed with; whether there was one."""
    _, keyring = objects(draft)
    used: set[int] = set()
    for cls in sealed.CLASSES:
        used |= sealed.key_ids(draft.all(cls))
    kept = tuple(k for k in keyring.data_keys if not k.retired or k.id in used)
    if len(kept) == len(keyring.data_keys):
        return False
    draft.put(structs.replace(keyring, data_keys=kept))
    return True


class DataKeys:
    """Makes them, seals anew, drops them. `run` until cancelled."""

    def __init__(self, store: Store, clock: Clock, sealer: Sealer) -> None:
        """`sealer` follows the store from now on."""
        self._store = store
        self._clock = clock
        self._sealer = sealer
        sealer.follow(store)

    async def run(self) -> None:
        """Follows the clock, the cluster's settings and the keyring."""
        while True:
            with self._store.watch(("kind", Kind.CLUSTER), ("kind", Kind.KEYRING)) as watch:
                await self._look()
                try:
                    while True:
                        try:
                            async with asyncio.timeout(self._wait_s()):
                                if await anext(watch, None) is None:
                                    return  # the store was closed
                        except TimeoutError:
                            if self._clock.now_ns() < due_ns(self._store):
                                continue
                        await self._look()
                except WatchLost:
                    continue

    def _wait_s(self) -> float:
        left_s = (due_ns(self._store) - self._clock.now_ns()) / SECOND_NS
        return min(CHECK_S, max(0.0, left_s))

    async def _look(self) -> None:
        while True:
            try:
                await self.settle()
                return
            except (errors.Unavailable, errors.TimedOut, errors.Conflict) as error:
                log.warning("data_keys_not_settled", reason=error.message, retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)

    async def settle(self) -> None:
        """Returns once the newest key is young enough and everything is sealed with it that opens
        at all. Raises what a store that cannot write raises.
        """
        if self._clock.now_ns() >= due_ns(self._store) and await self._store.update(_begin_due):
            log.info("data_key_made", key_id=_newest(self._store))
        while True:
            await self._seal_anew()
            if len(objects(self._store)[1].data_keys) < 2:
                return
            if await self._store.update(_retire):
                continue  # what was committed until then is in the tables now
            if not await self._store.update(_drop):
                return
            kept = [k.id for k in objects(self._store)[1].data_keys]
            log.info("data_keys_dropped", kept=kept)

    # -------------------------------------------------------------- sealing anew

    async def _seal_anew(self) -> None:
        done = 0
        # Damaged ones stay as they are, and the keys that they name stay with them.
        broken: set[Place] = set()
        while outdated := await self._outdated(broken):
            for batch in self._batches(outdated):
                done += await self._store.update(partial(self._seal, places=batch, broken=broken))
                await asyncio.sleep(0)
        if done:
            log.info("sealed_anew", objects=done)

    async def _outdated(self, broken: Collection[Place]) -> list[Place]:
        """Everything that another key than the newest sealed."""
        found: list[Place] = []
        for cls in sealed.CLASSES:
            ids = [o.id for o in _any(self._store.all(cls))]
            for at in range(0, len(ids), LOOKED_AT):
                newest = _newest(self._store)
                found += [
                    (cls, id_)
                    for id_ in ids[at : at + LOOKED_AT]
                    if _is_outdated(self._store.get(cls, id_), newest) and (cls, id_) not in broken
                ]
                await asyncio.sleep(0)
        return found

    def _batches(self, places: Sequence[Place]) -> Iterator[list[Place]]:
        batch: list[Place] = []
        size = 0
        for cls, id_ in places:
            o = self._store.get(cls, id_)
            added = len(encode(o)) if o is not None else 0
            if batch and (size + added > BATCH_BYTES or len(batch) == BATCH_OBJECTS):
                yield batch
                batch, size = [], 0
            batch.append((cls, id_))
            size += added
        if batch:
            yield batch

    def _seal(self, draft: Draft, *, places: Sequence[Place], broken: set[Place]) -> int:
        newest, done = _newest(draft), 0
        for cls, id_ in places:
            o = draft.get(cls, id_)
            if o is None or not _is_outdated(o, newest):
                continue
            try:
                again = sealed.replaced(o, self._again)
            except errors.Internal as error:
                kind = BY_CLASS[cls].kind.name.lower()
                log.error("not_sealed_anew", kind=kind, object_id=id_, reason=error.message)
                broken.add((cls, id_))
                continue
            draft.put(again, unseen=True)
            done += 1
        return done

    def _again(self, data: bytes) -> bytes:
        return self._sealer.seal_data(self._sealer.open(data))


def _newest(view: View) -> int:
    keys = objects(view)[1].data_keys
    return keys[-1].id if keys else 0


def _is_outdated(o: Message | None, newest: int) -> bool:
    return any(sealed.key_id(data) != newest for data in sealed.parts(o))


def _any(found: Iterable[Any]) -> Iterable[Any]:
    return found
