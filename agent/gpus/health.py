"""Whether a GPU can be trusted with work. Pure but for `Faults`, which remembers events.

Two sources: what the driver says now (a lost GPU, errors in its memory, a reset that it asks for),
and XIDs, the driver's numbered errors, which come as events and say nothing of when they are over.
XIDs that a program causes by itself are no fault of the GPU; the list is that of NVIDIA's device
plugin for Kubernetes, with those that NVIDIA's catalogue (XID errors, r580) calls informational.
After any other XID a GPU is given no work for a while, twice as long each time. One that needs a
reset stays out until the driver is loaded anew; newer drivers tell by themselves when a reset is
needed, and then their word counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

QUIET_S_FIRST, QUIET_S_MAX = 60.0, 3600.0

# Caused by programs, or mere notes.
HARMLESS = frozenset({13, 31, 43, 45, 63, 68, 92, 94, 109, 154})
# What only a reset, a reboot or a repair ends.
LASTING = {
    48: "uncorrectable memory error",
    64: "memory rows cannot be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "its processor does not answer",
    120: "its processor failed",
    140: "unrecovered memory error",
    143: "cannot be initialised",
}


@dataclass(frozen=True, slots=True)
class Signs:
    """What the driver says of one GPU's health."""

    # Why it cannot be talked to; empty: it can.
    lost: str = ""
    # What the driver asks for before the GPU is used again; empty: nothing, None: it cannot say.
    recovery: str | None = None
    ecc_errors: int = 0
    remap_failed: bool = False
    retirement_pending: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """The last XID that took a GPU out."""

    xid: int
    since_s: float
    times: int

    @property
    def quiet_s(self) -> float:
        return min(QUIET_S_MAX, QUIET_S_FIRST * 2.0 ** min(self.times - 1, 10))

    def over(self, now_s: float, *, driver_tells: bool) -> bool:
        """`driver_tells`: the driver says by itself when a reset is needed."""
        if self.xid in LASTING and not driver_tells:
            return False
        return now_s >= self.since_s + self.quiet_s

    def __str__(self) -> str:
        name = LASTING.get(self.xid)
        return f"XID {self.xid}" + (f" ({name})" if name else "")


class Faults:
    """XIDs by UUID. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}

    def note(self, uuid: str, xid: int, now_s: float) -> bool:
        """Takes an event; whether it says something of the GPU's health."""
        if xid in HARMLESS:
            return False
        before = self._faults.get(uuid)
        self._faults[uuid] = Fault(xid, now_s, before.times + 1 if before else 1)
        return True

    def driver_loaded(self) -> None:
        """The driver was away: what a reset ends has ended, the rest still waits."""
        for uuid, fault in self._faults.items():
            if fault.xid in LASTING:
                self._faults[uuid] = Fault(fault.xid, -math.inf, fault.times)

    def of(self, uuid: str, now_s: float, *, driver_tells: bool) -> Fault | None:
        fault = self._faults.get(uuid)
        if fault is None or fault.since_s == -math.inf:
            return None
        return None if fault.over(now_s, driver_tells=driver_tells) else fault


def judge(signs: Signs, fault: Fault | None) -> str:
    """Why the GPU is not healthy; empty: it is."""
    if signs.lost:
        return signs.lost
    if signs.recovery:
        return f"the driver asks for {signs.recovery}" + (f" after {fault}" if fault else "")
    if signs.remap_failed:
        return "a failed row of its memory cannot be replaced; the GPU has to be exchanged"
    if signs.retirement_pending:
        return "pages of its memory wait to be retired; reset the GPU"
    if signs.ecc_errors and signs.recovery is None:
        # A driver that tells when a reset is needed has contained these.
        return f"{signs.ecc_errors} uncorrectable memory errors; reset the GPU"
    if fault is None:
        return ""
    if fault.over(math.inf, driver_tells=signs.recovery is not None):
        # Not the seconds that are left: the reason must not change from look to look.
        return f"{fault}; in use again after {fault.quiet_s:.0f} s without another"
    return f"{fault}; reset the GPU or load its driver anew"
