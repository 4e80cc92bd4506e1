"""Upkeep of the etcd member beside this manager, so that nobody has to lay a hand on it.

What compaction frees stays in the member's file until it is defragmented, which the member stands
still for (some 10 s for each GB in use); so it is done where it is worth it, and members take
turns: by the manager's rank among those that are present, and the time of day.

A member whose file reaches the quota raises an alarm, after which no member takes anything that
needs room, until the alarm is disarmed. etcd does not lift it by itself when there is room again.
Each manager compacts then (to what is now: whoever reads the log and is behind reads everything
anew), defragments its own member, and disarms its own member's alarm. Where nearly all of it is in
use, that makes little room; it is said, and done again from time to time, for even what removes
objects needs a little. Where it is above the quota, a restart gives some (see Member).

Alarms: etcd-io/website, "Maintenance", "Space quota".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_member import QUOTA_BYTES
from swarm import errors
from swarm.clock import Clock

log = structlog.get_logger("store.etcd")

LOOK_S: Final = 10.0
ALARM_LOOK_S: Final = 2.0  # while there is an alarm
# Worth it: the file is more than this many times what it uses, and by more than so much.
WASTE_RATIO: Final = 2
WASTE_BYTES: Final = 64 << 20
# A turn: every member has one in SLOTS times SLOT_S; it begins in the first half, to end in it.
SLOT_S: Final = 60.0
SLOTS: Final = 8
# While nothing can be written anyway, turns are short.
ALARM_TURN_S: Final = 3.0
# Above this share of the quota in use, room is made this often, or at a fifth of the time at most.
ROOM_RATIO: Final = 0.9
SCARCE_S: Final = 20.0
SCARCE_REST: Final = 4
# After this long an alarm counts as one of a member that is gone.
ORPHANED_S: Final = 60.0
NOSPACE: Final = "NOSPACE"
CORRUPT: Final = "CORRUPT"


class Upkeep:
    """`client`: of the member beside this manager alone. `rank`: which of the managers that are
    present this one is, from 0; negative: none of them now. `quota_bytes`: as the member has it.
    """

    def __init__(
        self,
        client: EtcdClient,
        *,
        clock: Clock,
        rank: Callable[[], int],
        quota_bytes: int = QUOTA_BYTES,
    ) -> None:
        self._client = client
        self._clock = clock
        self._rank = rank
        self._quota_bytes = quota_bytes
        self._full_since_s: float | None = None
        self._compacted = 0
        self._again_s = 0.0  # when room may be made again where it is scarce
        self._said: object = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.look()
            except errors.SwarmError as error:
                log.info("etcd_upkeep_put_off", where=self._client.where, reason=error.message)
            await asyncio.sleep(LOOK_S if self._full_since_s is None else ALARM_LOOK_S)

    async def look(self) -> None:
        """One look, and what it takes. Raises Unavailable."""
        status = await self._client.status()
        if status.isLearner:
            return
        raised = [e for e in status.errors if NOSPACE in e or CORRUPT in e]
        if any(CORRUPT in e for e in raised):
            self._say(
                "etcd_members_differ",
                what="etcd's members do not hold the same; `swarmctl swarm backup` on each "
                "manager shows which; restore the right one with `swarmctl swarm restore FILE`",
            )
        if any(NOSPACE in e for e in raised):
            await self._make_room(status)
            return
        self._full_since_s = None
        if self._wasteful(status) and self._my_turn():
            await self._defragment(status)

    def _wasteful(self, status: Any) -> bool:
        used = int(status.dbSizeInUse)
        waste = int(status.dbSize) - used
        return waste > WASTE_BYTES and waste > (WASTE_RATIO - 1) * used

    def _my_turn(self) -> bool:
        slot, into = divmod(self._clock.now_ns() / 1e9, SLOT_S)
        rank = self._rank()
        return rank >= 0 and int(slot) % SLOTS == rank % SLOTS and into < SLOT_S / 2

    async def _make_room(self, status: Any) -> None:
        now_s = self._clock.monotonic_s()
        if self._full_since_s is None:
            self._full_since_s = now_s
            log.warning("etcd_full", where=self._client.where, bytes=status.dbSize)
        revision = status.header.revision
        if revision > self._compacted:
            await self._client.compact(revision, physical=True)
            self._compacted = revision
            status = await self._client.status()
        rank = self._rank()
        since_s = now_s - self._full_since_s
        room = ROOM_RATIO * self._quota_bytes
        if status.dbSize > room:
            # How much of it is in use etcd tells late: when something has been written since.
            if rank < 0 or since_s < rank * ALARM_TURN_S or now_s < self._again_s:
                return
            await self._defragment(status)
            status = await self._client.status()
            took_s = self._clock.monotonic_s() - now_s
            self._again_s = now_s + took_s + max(SCARCE_S, SCARCE_REST * took_s)
        if status.dbSize > room:
            self._say(
                "etcd_stays_full",
                bytes_used=status.dbSize,
                quota_bytes=self._quota_bytes,
                what="nearly all of it is in use: remove services, secrets or configs; where that "
                "is refused for want of room, restart swarmd on the managers first: etcd is given "
                "a tenth more than it has then",
            )
        own = status.header.member_id
        for alarm in await self._client.alarms():
            orphaned = rank == 0 and since_s > ORPHANED_S
            if alarm.kind == NOSPACE and (alarm.member_id == own or orphaned):
                await self._client.disarm(alarm)
                log.info("etcd_alarm_disarmed", where=self._client.where, bytes=status.dbSize)

    async def _defragment(self, status: Any) -> None:
        began_s = self._clock.monotonic_s()
        await self._client.defragment()
        log.info(
            "etcd_defragmented",
            where=self._client.where,
            bytes_before=status.dbSize,
            bytes_used=status.dbSizeInUse,
            took_s=round(self._clock.monotonic_s() - began_s, 3),
        )

    def _say(self, event: str, **facts: object) -> None:
        """An error, once for as long as nothing about it changes."""
        if self._said != (event, facts):
            self._said = (event, facts)
            log.error(event, where=self._client.where, **facts)
