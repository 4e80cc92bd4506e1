"""What one caller may ask of a server: sizes of messages, calls a second, streams at a time.

`Limits` is a server's memory of its callers; swarm.rpc asks it before a method runs. It protects
the manager from callers that it knows: a script that loops, an agent with a defect, a node that
somebody has taken over. Strangers do not come past TLS, and what they cost there is bounded by
gRPC's own limits (rpc.server). Users of the machine's own socket are not limited.

    who                             what                                      how many
    any member, by certificate      calls that answer once                    500/s, 1,000 at once
    token and address               joins, as each makes a node               20/s, 50 at once
    address, certificate, method    denied calls; then refused unlooked at    10/s, 20 at once
    person                          streams open (logs, watch, exec)          200
    node                            streams open (session, relays)            1,000
    manager                         streams open (relays handed on as well)   10,000

Rates are token buckets, kept as the one time at which a bucket is full again (the generic cell rate
algorithm, ATM Forum TM 4.1 §4.4.2): one number for each caller, forgotten once it is past. More
callers at a time than BUCKETS_MAX push the oldest out, which can only be in a caller's favour.
Nothing here waits: a call is let in, or raises Exhausted, which says when it may come again.
"""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swarm import errors
from swarm.v1.structs import Caller

if TYPE_CHECKING:
    from collections.abc import Hashable

    from swarm.clock import Clock
    from swarm.rpc import Identity, Method

KIB, MIB = 1 << 10, 1 << 20
# A stack with a few of the largest configs (1 MB each) fits. Of one message, both ways.
MESSAGE_BYTES_MAX: Final = 32 * MIB
# Of one request, by service, and by method where that needs more.
REQUEST_BYTES_MAX: Final = {
    "Control": 8 * MIB,
    "Control/DeployStack": MESSAGE_BYTES_MAX,
    "Control/PlanStack": MESSAGE_BYTES_MAX,
    "Certificates": 64 * KIB,
    "Dispatcher": 8 * MIB,
    "Managers": 8 * MIB,
    "Local": 2 * MIB,  # restores send half a MiB at a time
}
BUCKETS_MAX: Final = 10_000  # of each sort; about 2 MB
ROUNDING_S: Final = 1e-6  # sums of steps are not exact
TOLD_S: Final = 10.0  # one caller's refusals are logged at most so often


@dataclass(frozen=True, slots=True)
class Rate:
    """So many a second over time, and so many at once."""

    per_s: float
    burst: int

    def __str__(self) -> str:
        return f"{self.per_s:g} a second, {self.burst:,} at once"


CALLS: Final = Rate(500, 1_000)
JOINS: Final = Rate(20, 50)
DENIED: Final = Rate(10, 20)
STREAMS_MAX: Final = {Caller.ADMIN: 200, Caller.WORKER: 1_000, Caller.MANAGER: 10_000}
_JOINERS: Final = frozenset({Caller.JOIN_WORKER, Caller.JOIN_MANAGER})


def request_bytes_max(path: str) -> int:
    """The largest request of the method "/swarm.v1.Service/Method"."""
    name = path.rpartition(".")[2]
    service = name.partition("/")[0]
    return REQUEST_BYTES_MAX.get(name) or REQUEST_BYTES_MAX.get(service, MESSAGE_BYTES_MAX)


class Buckets:
    """One rate for many callers."""

    def __init__(self, rate: Rate, *, buckets_max: int = BUCKETS_MAX) -> None:
        self._step_s = 1 / rate.per_s
        self._ahead_s = (rate.burst - 1) * self._step_s + ROUNDING_S
        self._max = buckets_max
        # When the caller's bucket is full again, in order of the last call.
        self._full_s: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._full_s)

    def wait_s(self, key: Hashable, now_s: float) -> float:
        """How long until the next one is let in; 0: it is now. Takes nothing."""
        full_s = self._full_s.get(key)
        return 0.0 if full_s is None else max(0.0, full_s - self._ahead_s - now_s)

    def take(self, key: Hashable, now_s: float) -> float:
        """Lets one in and returns 0, or returns how long until it may come again, in seconds."""
        full_s = max(self._full_s.pop(key, now_s), now_s)
        early_s = full_s - self._ahead_s - now_s
        self._full_s[key] = full_s if early_s > 0 else full_s + self._step_s
        if early_s > 0:
            return early_s
        if len(self._full_s) > self._max:
            self._forget(now_s)
        return 0.0

    def _forget(self, now_s: float) -> None:
        """Those that are full again say nothing; of the others, the oldest tenth goes."""
        kept = [(key, full_s) for key, full_s in self._full_s.items() if full_s > now_s]
        self._full_s = dict(kept[-(self._max - self._max // 10) :])


class Limits:
    """One server's callers. For one event loop; `ended` belongs to each call let in."""

    def __init__(
        self,
        clock: Clock,
        *,
        calls: Rate = CALLS,
        joins: Rate = JOINS,
        denied: Rate = DENIED,
        buckets_max: int = BUCKETS_MAX,
    ) -> None:
        self._clock = clock
        self._rates = (calls, joins, denied)
        self._calls = Buckets(calls, buckets_max=buckets_max)
        self._joins = Buckets(joins, buckets_max=buckets_max)
        self._denied = Buckets(denied, buckets_max=buckets_max)
        self._streams: dict[str, int] = {}  # open ones by caller; no zeros
        self._told_s: dict[str, float] = {}

    def check_denied(self, method: Method, certificate: bytes, peer: str) -> None:
        """Raises Exhausted for a call that was denied too often lately to be looked at again."""
        if not len(self._denied):
            return
        key = (host_of(peer), hash(certificate), method.path)
        if wait_s := self._denied.wait_s(key, self._clock.monotonic_s()):
            raise self._refused(
                f"a caller at {host_of(peer)}", f"denied calls of {_name(method)}", 2, wait_s
            )

    def denied(self, method: Method, certificate: bytes, peer: str) -> None:
        """A call was denied."""
        key = (host_of(peer), hash(certificate), method.path)
        self._denied.take(key, self._clock.monotonic_s())

    def admit(self, identity: Identity, method: Method, peer: str) -> str:
        """Lets a call in; `ended` wants what this returns. Raises Exhausted."""
        caller = identity.caller
        if caller == Caller.LOCAL:
            return ""
        who = str(identity)
        if caller in _JOINERS:
            who = f"{who} at {host_of(peer)}"
            if wait_s := self._joins.take(who, self._clock.monotonic_s()):
                raise self._refused(who, "joins", 1, wait_s)
            return ""
        if not method.server_streams:
            if wait_s := self._calls.take(who, self._clock.monotonic_s()):
                raise self._refused(who, "calls", 0, wait_s)
            return ""
        opened, most = self._streams.get(who, 0), STREAMS_MAX[caller]
        if opened >= most:
            raise self._told(
                who,
                f"{who} has {opened:,} streams open at this manager, the most for one caller; "
                "end some of them (logs, exec, watches) and try again",
            )
        self._streams[who] = opened + 1
        return who

    def ended(self, held: str) -> None:
        """A call that was let in is over."""
        if not held:
            return
        left = self._streams[held] - 1
        if left:
            self._streams[held] = left
        else:
            del self._streams[held]

    def _refused(self, who: str, what: str, rate: int, wait_s: float) -> errors.Exhausted:
        return self._told(
            who,
            f"{who}: too many {what} (the limit is {self._rates[rate]}); try again in "
            f"{max(wait_s, 0.01):.2f} s",
        )

    def _told(self, who: str, problem: str) -> errors.Exhausted:
        now_s = self._clock.monotonic_s()
        if now_s >= self._told_s.get(who, now_s):
            if len(self._told_s) >= BUCKETS_MAX:
                self._told_s.clear()
            self._told_s[who] = now_s + TOLD_S
            import structlog  # costs clients 0.1 s, and they never come here

            structlog.get_logger("rpc").warning("caller_limited", who=who, reason=problem)
        return errors.Exhausted(problem)

    def check_invariants(self) -> None:
        """For tests."""
        errors.invariant(all(n > 0 for n in self._streams.values()), "streams of nobody are kept")
        for buckets in (self._calls, self._joins, self._denied):
            errors.invariant(len(buckets) <= BUCKETS_MAX, "buckets are kept without bound")


@functools.lru_cache(maxsize=4_096)
def host_of(peer: str) -> str:
    """The address in gRPC's name of a peer: "ipv4:10.0.0.1:4711"; of IPv6 its /64, for who has one
    address of it has all.
    """
    kind, _, rest = peer.partition(":")
    host = rest.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]").strip("[]")
    if kind != "ipv6":
        return host or peer
    try:
        address = ipaddress.IPv6Address(host.partition("%")[0])
    except ValueError:
        return peer
    if (mapped := address.ipv4_mapped) is not None:
        return str(mapped)
    return str(ipaddress.IPv6Network((address, 64), strict=False))


def _name(method: Method) -> str:
    return method.path.rpartition("/")[2]
