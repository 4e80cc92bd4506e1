"""Keeps the table of the node's GPUs: what NVML finds and what the inventory file declares.

NVML blocks, so a thread of its own looks: every SCAN_S, and at once after an event of the driver.
It sends whole tables to the event loop; nothing else crosses between the two. The inventory file is
read again when it changes. A GPU that was there and is not any more stays in the table, unhealthy,
until swarmd starts anew; an instance (MIG) goes with its partition. The last table is kept on disk,
because a driver may take longer to answer than a node may stay silent: until the first look, it
holds. Where there is no driver and no file the table is empty, and nobody hears of it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec import structs

from agent.gpus import inventory as declared
from agent.gpus import metrics, sharing
from agent.gpus.device import Device, Use
from agent.gpus.handover import Handover, hand_over
from agent.gpus.health import Faults, Signs, judge
from agent.gpus.inventory import Inventory
from swarm import errors
from swarm.clock import Clock
from swarm.v1 import Gpu, GpuLoad

if TYPE_CHECKING:
    from agent.gpus import nvml

log = structlog.get_logger("gpus")

SCAN_S = 5.0
# While somebody wants to see what the GPUs do, and for so long after they last asked.
SCAN_S_WATCHED, WATCHED_S = 1.0, 10.0
# A driver that was never there is looked for more seldom.
ABSENT_S = 30.0
# The thread hears of the end no later than this.
WAIT_S = 0.5
EVENTS_MAX = 100  # taken together before the GPUs are looked at again
# A driver that is silent for so long hangs.
STALE_S = 60.0
JOIN_S = 3.0


@dataclass(frozen=True, slots=True)
class Look:
    """The table as the thread saw it."""

    devices: tuple[Device, ...] = ()
    uses: dict[str, Use] = field(default_factory=dict)
    # UUIDs that the driver answers for.
    driven: frozenset[str] = frozenset()
    problem: str = ""
    # Where the control daemon of MPS has its pipes; empty: none runs.
    mps: str = ""


class Gpus:
    """See the module. For one event loop; `run` until cancelled."""

    def __init__(
        self,
        *,
        clock: Clock,
        inventory: Path | None = None,
        cache: Path | None = None,
        discovery: bool = True,
        scan_s: float = SCAN_S,
    ) -> None:
        """`cache` is the file that keeps the last table."""
        self._clock = clock
        self._watcher = _Watcher(clock, inventory, cache, discovery=discovery, scan_s=scan_s)
        self._look = Look(devices=_load(cache), problem="")
        self._stale = False
        self._heard_s = 0.0
        # Set once the GPUs were looked at.
        self.looked = asyncio.Event()
        # Called when `gpus` or `problem` is another one.
        self.on_change: Callable[[], None] = lambda: None

    @property
    def devices(self) -> tuple[Device, ...]:
        """All that there are, healthy or not."""
        if not self._stale:
            return self._look.devices
        why = f"the driver has not answered for {STALE_S:.0f} s"
        driven = self._look.driven or frozenset(d.gpu.uuid for d in self._look.devices)
        return tuple(_unhealthy(d, why) if d.gpu.uuid in driven else d for d in self._look.devices)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(d.gpu for d in self.devices)

    @property
    def problem(self) -> str:
        """Why the table may be wrong, for people; empty: it is not."""
        return self._look.problem

    def loads(self) -> tuple[GpuLoad, ...]:
        """What the GPUs do, as of the last look. Who asks will ask again, so the next looks come
        sooner.
        """
        self._watcher.hurry()
        return tuple(_load_of(d.gpu, self._look.uses.get(d.gpu.uuid)) for d in self.devices)

    @property
    def mps(self) -> str:
        """Where the control daemon of MPS has its pipes; empty: none runs."""
        return self._look.mps

    def hand_over(self, claimed: Sequence[str]) -> Handover:
        """What a task with these claims is given."""
        look = self._look
        return hand_over(look.devices, claimed, strict=self.looked.is_set(), mps=look.mps)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        stop = threading.Event()

        def tell(look: Look) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(self._take, look)

        thread = threading.Thread(
            target=self._watcher.run, args=(tell, stop), name="gpus", daemon=True
        )
        self._heard_s = self._clock.monotonic_s()
        thread.start()
        try:
            while True:
                await asyncio.sleep(SCAN_S)
                self._check_stale()
        finally:
            stop.set()
            # A driver that hangs must not keep swarmd from ending.
            await asyncio.to_thread(thread.join, JOIN_S)
            metrics.clear()

    def _check_stale(self) -> None:
        stale = self._clock.monotonic_s() - self._heard_s > STALE_S
        if stale != self._stale:
            self._stale = stale
            if stale and self._look.devices:
                log.warning("gpu_driver_silent", seconds=STALE_S)
            self.on_change()

    def _take(self, look: Look) -> None:
        self._heard_s = self._clock.monotonic_s()
        before, self._look = self._look, look
        was_stale, self._stale = self._stale, False
        first = not self.looked.is_set()
        self.looked.set()
        _log_changes(before, look, first=first)
        metrics.show(look.devices, look.uses)
        told = (before.devices, before.problem, before.mps)
        if was_stale or first or told != (look.devices, look.problem, look.mps):
            self.on_change()


def _log_changes(before: Look, now: Look, *, first: bool) -> None:
    were = {d.gpu.uuid: d.gpu for d in before.devices}
    if now.devices and (first or set(were) != {d.gpu.uuid for d in now.devices}):
        log.info("gpus_found", gpus=len(now.devices))
    for device in now.devices:
        gpu, was = device.gpu, were.get(device.gpu.uuid)
        if not gpu.healthy and (was is None or was.health_message != gpu.health_message):
            log.warning("gpu_unhealthy", gpu=gpu.uuid, reason=gpu.health_message)
        elif gpu.healthy and was is not None and not was.healthy:
            log.info("gpu_healthy", gpu=gpu.uuid)
    if now.problem and now.problem != before.problem:
        log.warning("gpus_unreadable", reason=now.problem)


def _load_of(gpu: Gpu, use: Use | None) -> GpuLoad:
    ratio = use.ratio if use is not None else None
    return GpuLoad(
        uuid=gpu.uuid,
        index=gpu.index,
        model=gpu.model,
        percent=None if ratio is None else round(100 * ratio),
        memory_bytes=(use.memory_bytes or 0) if use is not None else 0,
        memory_total_bytes=gpu.memory_bytes,
    )


def _unhealthy(device: Device, why: str) -> Device:
    return replace(device, gpu=structs.replace(device.gpu, healthy=False, health_message=why))


# ------------------------------------------------------------------ the thread


class _Watcher:
    """Looks at the GPUs; all of it but the constructor runs in the thread."""

    def __init__(
        self,
        clock: Clock,
        inventory: Path | None,
        cache: Path | None,
        *,
        discovery: bool,
        scan_s: float,
    ) -> None:
        self._clock = clock
        self._path = inventory
        self._cache = cache
        self._discovery = discovery
        self._scan_s = scan_s
        self._stamp: tuple[int, ...] | None = None  # of the file as it was read last
        self._inventory = Inventory()
        self._inventory_problem = ""
        self._kept: tuple[Device, ...] | None = None
        self._faults = Faults()
        # Whole GPUs that the driver has told of.
        self._known: dict[str, Device] = {}
        self._open_at_s = 0.0
        self._driver: nvml.Driver | None = None
        self._defect = ""  # the last one, which is logged once
        self._away = False  # the driver was there, and is not now
        self._watched_until_s = 0.0  # set by another thread, which a float takes well

    def hurry(self) -> None:
        """Somebody looks at what the GPUs do. From any thread."""
        self._watched_until_s = self._clock.monotonic_s() + WATCHED_S

    def run(self, tell: Callable[[Look], None], stop: threading.Event) -> None:
        # Here, because it costs 30 ms and 4 MiB.
        from agent.gpus import nvml

        self._nvml = nvml
        while not stop.is_set():
            begun_s = self._clock.monotonic_s()
            try:
                look = self._look()
            except Exception as error:
                # A defect here must not end the watch over the rest, nor hide.
                if repr(error) != self._defect:
                    self._defect = repr(error)
                    log.exception("gpu_watch_failed")
                look = Look(tuple(self._known.values()), problem=f"GPUs: defect: {error}")
            self._keep(look.devices)
            tell(look)
            self._wait(begun_s, stop)
        if self._driver is not None:
            self._driver.close()

    # -------------------------------------------------------------- one look

    def _look(self) -> Look:
        self._read_again()
        now_s = self._clock.monotonic_s()
        problem = ""
        readings: tuple[nvml.Reading, ...] = ()
        if self._discovery and self._inventory.discovery:
            try:
                readings = self._scan(now_s)
            except self._nvml.Absent:
                self._lose(now_s, self._scan_s if self._known else ABSENT_S)
            except self._nvml.Trouble as error:
                self._lose(now_s, self._scan_s)
                problem = str(error)
        else:
            self._lose(now_s, 0.0)
            self._known.clear()
        found: dict[str, Device] = {}
        uses: dict[str, Use] = {}
        for reading in readings:
            device = self._judged(reading.device, reading.signs, now_s)
            found[device.gpu.uuid] = device
            uses[device.gpu.uuid] = reading.use
            if not device.gpu.parent_uuid and device.gpu.model:
                self._known[device.gpu.uuid] = device
        why = (
            "its driver does not answer" if self._driver is None else "the driver lists it no more"
        )
        gone = [_unhealthy(d, why) for uuid, d in self._known.items() if uuid not in found]
        devices = declared.merge((*found.values(), *gone), self._inventory.devices)
        pipes = Path(self._inventory.mps) if self._inventory.mps else sharing.PIPES
        return Look(
            devices=devices,
            uses=uses,
            driven=frozenset(found),
            problem="; ".join(p for p in (self._inventory_problem, problem) if p),
            mps=str(pipes) if devices and sharing.daemon_at(pipes) else "",
        )

    def _scan(self, now_s: float) -> tuple[nvml.Reading, ...]:
        if self._driver is None:
            if now_s < self._open_at_s:
                raise self._nvml.Absent
            self._driver = self._nvml.open_driver()
            if self._away:
                self._faults.driver_loaded()
                self._away = False
        return self._driver.scan()

    def _lose(self, now_s: float, again_s: float) -> None:
        if self._driver is not None:
            self._driver.close()
            self._driver, self._away = None, True
        if now_s >= self._open_at_s:
            self._open_at_s = now_s + again_s

    def _judged(self, device: Device, signs: Signs, now_s: float) -> Device:
        uuid = device.gpu.uuid
        fault = self._faults.of(uuid, now_s, driver_tells=signs.recovery is not None)
        why = judge(signs, fault)
        if why:
            return _unhealthy(device, why)
        return replace(device, gpu=structs.replace(device.gpu, healthy=True))

    def _read_again(self) -> None:
        """Takes a changed inventory file; one that is wrong leaves the last that was right."""
        stamp = _stamp(self._path)
        if self._path is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._inventory = declared.read(self._path)
            self._inventory_problem = ""
        except errors.SwarmError as error:
            lines = error.message.splitlines()
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            self._inventory_problem = f"{lines[0]}{more}; what it said before holds"

    # -------------------------------------------------------------- between looks

    def _pause_s(self) -> float:
        """From the begin of one look to the next."""
        watched = self._driver is not None and self._clock.monotonic_s() < self._watched_until_s
        return min(self._scan_s, SCAN_S_WATCHED) if watched else self._scan_s

    def _wait(self, begun_s: float, stop: threading.Event) -> None:
        """Until the next look is due, or the driver tells something of a GPU's health."""
        while not stop.is_set():
            left_s = min(WAIT_S, begun_s + self._pause_s() - self._clock.monotonic_s())
            if left_s <= 0:
                return
            if self._driver is None or not self._driver.listens:
                stop.wait(left_s)
                continue
            try:
                if self._heard(self._driver, int(left_s * 1000)):
                    return
            except (self._nvml.Absent, self._nvml.Trouble):
                stop.wait(left_s)  # the next look finds out; it must not be asked without pause
                return

    def _heard(self, driver: nvml.Driver, timeout_ms: int) -> bool:
        matters = False
        for number in range(EVENTS_MAX):
            event = driver.wait(0 if number else timeout_ms)
            if event is None:
                break
            now_s = self._clock.monotonic_s()
            uuids = event.uuids or tuple(self._known)
            log.info("gpu_event", xid=event.number, gpus=uuids)
            if not event.number:
                matters = True
            for uuid in uuids:
                if event.number and self._faults.note(uuid, event.number, now_s):
                    matters = True
        return matters

    # -------------------------------------------------------------- the last table

    def _keep(self, devices: tuple[Device, ...]) -> None:
        static = tuple(replace(d, gpu=structs.replace(d.gpu, processes=())) for d in devices)
        if self._cache is None or static == self._kept:
            return
        self._kept = static
        new = self._cache.with_suffix(".new")
        try:
            if static:
                self._cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                new.write_bytes(msgspec.json.encode(static))
                new.replace(self._cache)
            else:
                self._cache.unlink(missing_ok=True)
        except OSError as error:
            log.warning("gpus_not_written", reason=str(error))


def _load(cache: Path | None) -> tuple[Device, ...]:
    """The last table of an earlier agent; none where there is none, or another version wrote it."""
    if cache is None:
        return ()
    try:
        return msgspec.json.decode(cache.read_bytes(), type=tuple[Device, ...])
    except (OSError, msgspec.DecodeError):
        return ()


def _stamp(path: Path | None) -> tuple[int, ...]:
    if path is None:
        return ()
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)
