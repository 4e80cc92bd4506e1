"""Whether what clients saw of the store can have happened one after another.

`check` takes the operations of many clients, each with the times of its call and its answer, and
looks for an order that respects these times and in which each answer is the right one: Herlihy and
Wing, "Linearizability", TOPLAS 1990. The search is Wing and Gong's ("Testing and verifying
concurrent objects", JPDC 1993) with Lowe's memory of what was tried ("Testing for linearizability",
CCPE 2017). Objects are independent, so each key is searched by itself: a history is linearizable
exactly when that of each object is (locality; Horn and Kroening's P-compositionality, FORTE 2015).

An object is a register with a version: absent (version 0), or a value at the revision of the commit
that wrote it. A put or delete names the version that it expects. What an answer means:

- OK: it took effect between call and answer;
- REFUSED: the version was another one at some moment between call and answer;
- FAILED: it took no effect and never will;
- UNKNOWN: it takes effect at any moment after its call, or never.

The other checks look at the whole store: acknowledged commits are in the log, every watch saw the
same commits once and in order, a reader behind a barrier had all that was acknowledged before, and
no leader wrote after a later one had.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

STEPS_MAX = 2_000_000  # of one search; a history that needs more has too many unknown answers
LINES_MAX = 40  # of operations in a failure's text


class Outcome(enum.Enum):
    OK = "ok"
    REFUSED = "refused"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Action(enum.Enum):
    READ = "read"
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Operation:
    """One call. Values put under one key differ from each other, so that a value tells who wrote it.

    `version`: what a read found (0: nothing), what an acknowledged write got. `expected`: None where
    any version will do. `seen`: the revision of the reader's whole view. Times in any unit.
    """

    client: str
    key: str
    action: Action
    invoked: float
    returned: float
    outcome: Outcome = Outcome.OK
    value: Hashable = None
    expected: int | None = None
    version: int = 0
    seen: int = 0

    def __str__(self) -> str:
        match self.action:
            case Action.READ:
                what = f"read {_state(self.version, self.value)}"
            case Action.PUT:
                what = f"put {self.value!r} over {_expected(self.expected)}"
            case Action.DELETE:
                what = f"delete {_expected(self.expected)}"
        if self.action is not Action.READ or self.outcome is not Outcome.OK:
            what += f": {self.outcome.value}"
            if self.outcome is Outcome.OK:
                what += f" v{self.version}"
        end = "…" if self.outcome is Outcome.UNKNOWN else f"{self.returned:.4f}"
        return f"{self.client:>8}  {self.invoked:.4f} to {end:8}  {what}"


def _expected(version: int | None) -> str:
    return "any" if version is None else _state(version, None)


def _state(version: int, value: Hashable) -> str:
    if version == 0:
        return "absent"
    # The version of a write whose answer was lost may never have been seen.
    name = f"v{version}" if version > 0 else "v?"
    return name if value is None else f"{name}={value!r}"


@dataclass(frozen=True, slots=True)
class _Register:
    """`floor`: no later write has a version up to this one."""

    version: int = 0
    value: Hashable = None
    floor: int = 0

    def after(self, op: Operation) -> _Register | None:
        """The register once the operation has happened to it; None: it cannot have, with that
        answer.
        """
        if op.action is Action.READ:
            fits = op.version == self.version and (not op.version or op.value == self.value)
            return self if fits else None
        fits = op.expected is None or op.expected == self.version
        if op.outcome is Outcome.REFUSED:
            return None if fits else self
        if not fits or 0 < op.version <= self.floor:
            return None
        floor = max(self.floor, op.version)
        if op.action is Action.DELETE:
            return _Register(0, None, floor)
        return _Register(op.version, op.value, floor)


@dataclass(frozen=True, slots=True)
class Violation:
    """One key's history that has no order. `prefix`: its shortest beginning that has none."""

    key: str
    prefix: tuple[Operation, ...]
    order: tuple[Operation, ...]  # the longest that was found
    stuck: Operation  # what had to come next at the latest
    state: str  # what the order leads to

    def __str__(self) -> str:
        shown = self.prefix[-LINES_MAX:]
        left_out = len(self.prefix) - len(shown)
        lines = [f"{self.key}: {len(self.prefix)} operations have no order that explains them:"]
        lines += [f"  ({left_out} earlier ones)"] if left_out else []
        lines += [f"  {op}" for op in shown]
        lines.append(f"the longest order found ends in {self.state}:")
        lines += [f"  {op}" for op in self.order[-8:]] or ["  (nothing)"]
        lines += ["and this does not fit after it:", f"  {self.stuck}"]
        return "\n".join(lines)


class UndecidedError(Exception):
    """The search was given up; nothing is known."""


Versions = Mapping[tuple[str, Hashable], int]
"""What is known besides of the version that a put got, by key and value."""


def check(history: Iterable[Operation], versions: Versions | None = None) -> list[Violation]:
    """The keys whose operations have no order, by name. Raises ValueError for a history that says
    what cannot be said, UndecidedError after STEPS_MAX steps.

    `versions` of writes whose answers were lost are needed where clients may expect a version that
    no operation of the history shows.
    """
    by_key: dict[str, list[Operation]] = {}
    for op in history:
        by_key.setdefault(op.key, []).append(op)
    found = (check_key(by_key[key], versions) for key in sorted(by_key))
    return [violation for violation in found if violation is not None]


def check_key(history: Sequence[Operation], versions: Versions | None = None) -> Violation | None:
    """The same for the operations of one key."""
    ops = _prepared(history, versions or {})
    if _search(ops) is None:
        return None
    # What has no order has none however it goes on; so the shortest beginning can be halved for.
    ends = sorted(op.returned for op in ops if op.outcome is not Outcome.UNKNOWN)
    shortest = bisect.bisect_left(ends, True, key=lambda end: _search(_until(ops, end)) is not None)
    prefix = _until(ops, ends[shortest])
    failure = _search(prefix)
    assert failure is not None
    order, stuck, register = failure
    return Violation(
        ops[0].key, tuple(prefix), order, stuck, _state(register.version, register.value)
    )


def _prepared(history: Sequence[Operation], versions: Versions) -> list[Operation]:
    """By time of call; without what has no effect, and with the versions of unanswered writes as
    others saw them.
    """
    version_of: dict[Hashable, int] = {}
    for op in history:
        if not op.invoked <= op.returned:
            raise ValueError(f"an answer before its call: {op}")
        if op.outcome is Outcome.OK and op.version > 0 and op.action is not Action.DELETE:
            version_of.setdefault(op.value, op.version)
    written = [op.value for op in history if op.action is Action.PUT]
    if len(written) != len(set(written)):
        raise ValueError(f"two puts of one value under {history[0].key}: who wrote it is not told")
    ops = []
    for i, op in enumerate(sorted(history, key=lambda op: op.invoked)):
        if op.outcome is Outcome.FAILED or (
            op.action is Action.READ and op.outcome is not Outcome.OK
        ):
            continue
        if op.outcome is Outcome.UNKNOWN and op.action is Action.PUT:
            # One that nobody saw gets a version that nobody expects.
            version = versions.get((op.key, op.value), version_of.get(op.value, -1 - i))
            op = replace(op, version=version)
        ops.append(op)
    return ops


def _until(ops: Sequence[Operation], end: float) -> list[Operation]:
    """What was known at that time: calls without an answer yet may have taken effect."""
    prefix = []
    for op in ops:
        if op.invoked > end:
            break
        if op.returned > end:
            if op.action is Action.READ or op.outcome is Outcome.REFUSED:
                continue
            op = replace(op, outcome=Outcome.UNKNOWN)
        prefix.append(op)
    return prefix


_Failure = tuple[tuple[Operation, ...], Operation, _Register]


def _search(ops: Sequence[Operation]) -> _Failure | None:
    """None: there is an order. Else the longest one, what did not fit, and where it led to.

    Operations without an answer are tried only where nothing else fits: each of them stays possible
    for ever, and trying all of them at every step takes time without end.
    """
    answered = [i for i, op in enumerate(ops) if op.outcome is not Outcome.UNKNOWN]
    following, before = _linked(ops, answered)
    head, end = 2 * len(ops), 2 * len(ops) + 1
    unanswered = _Unanswered(ops)

    def take_out(entry: int) -> None:
        following[before[entry]], before[following[entry]] = following[entry], before[entry]

    def put_back(entry: int) -> None:
        following[before[entry]] = before[following[entry]] = entry

    register, done = _Register(), 0
    tried: set[tuple[int, _Register]] = set()
    # What was given a place, the register before, and where to go on when it does not do: the entry
    # and, for one without an answer, its place among those.
    taken: list[tuple[int, _Register, int, int]] = []
    longest: _Failure | None = None
    entry, start = following[head], 0
    for _ in range(STEPS_MAX):
        if entry == end:
            return None  # no answer is left that waits for its call
        i, answer = divmod(entry, 2)
        place = -1
        if answer:
            # It cannot wait for later calls.
            if longest is None or len(taken) > len(longest[0]):
                longest = tuple(ops[n] for n, *_ in taken), ops[i], register
            i, place = unanswered.next(register.version, start, done, ops[i].returned)
            start = 0
        after = register.after(ops[i]) if i >= 0 else None
        if after is not None and (step := (done | 1 << i, after)) not in tried:
            tried.add(step)
            taken.append((i, register, entry, place))
            done, register = step
            if place < 0:
                take_out(2 * i)
                take_out(2 * i + 1)
            entry = following[head]
        elif not answer:
            entry = following[entry]
        elif i >= 0:
            start = place + 1
        elif taken:
            i, register, entry, place = taken.pop()
            done ^= 1 << i
            if place < 0:
                put_back(2 * i + 1)
                put_back(2 * i)
                entry = following[entry]
            else:
                start = place + 1
        else:
            return longest
    raise UndecidedError(f"{ops[0].key}: no answer after {STEPS_MAX} steps, {len(ops)} operations")


def _linked(ops: Sequence[Operation], chosen: Iterable[int]) -> tuple[list[int], list[int]]:
    """Calls and answers in a linked list, in order of time: the entry after each, and before each.

    Entry 2i is the call of ops[i], 2i + 1 its answer, the last two are the ends. At one time calls
    come first, so that what touches counts as concurrent.
    """
    entries = sorted(
        entry
        for i in chosen
        for entry in ((ops[i].invoked, 0, 2 * i), (ops[i].returned, 1, 2 * i + 1))
    )
    head, end = 2 * len(ops), 2 * len(ops) + 1
    following, before = [end] * (end + 1), [head] * (end + 1)
    at = head
    for _, _, entry in entries:
        following[at], before[entry] = entry, at
        at = entry
    following[at], before[end] = end, at
    return following, before


class _Unanswered:
    """The writes that nobody got an answer to, by the version they expect."""

    def __init__(self, ops: Sequence[Operation]) -> None:
        self._ops = ops
        self._by_expected: dict[int | None, list[int]] = {}
        for i, op in enumerate(ops):
            if op.outcome is Outcome.UNKNOWN:
                self._by_expected.setdefault(op.expected, []).append(i)
        self._anyway = self._by_expected.get(None, [])

    def next(self, version: int, start: int, done: int, until: float) -> tuple[int, int]:
        """One that fits the version, was called by then and is not done, and its place from which
        to go on; (-1, -1): none.
        """
        fitting = self._by_expected.get(version, [])
        for place in range(start, len(fitting) + len(self._anyway)):
            i = fitting[place] if place < len(fitting) else self._anyway[place - len(fitting)]
            if self._ops[i].invoked <= until and not done >> i & 1:
                return i, place
        return -1, -1


# ------------------------------------------------------------------ the whole store


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit as a watch saw it: what each key has since; None: it is gone."""

    revision: int
    changes: tuple[tuple[str, Hashable], ...]


def check_watches(watches: Mapping[str, Sequence[Commit]]) -> list[str]:
    """Each watch saw each commit once, in order, and all saw the same."""
    problems = []
    for name, commits in watches.items():
        for earlier, later in itertools.pairwise(commits):
            if later.revision <= earlier.revision:
                problems.append(
                    f"{name} saw revision {later.revision} after {earlier.revision}: versions grow"
                )
    (first, reference), *others = watches.items()
    for name, commits in others:
        for i in range(max(len(reference), len(commits))):
            pair = [s[i] if i < len(s) else None for s in (reference, commits)]
            if pair[0] != pair[1]:
                problems.append(f"commit {i + 1} is {pair[0]} to {first} and {pair[1]} to {name}")
                break
    return problems


def check_acknowledged(history: Iterable[Operation], log: Sequence[Commit]) -> list[str]:
    """Each acknowledged write is in the log at the version it was told, and no failed one is."""
    written = {(c.revision, key): value for c in log for key, value in c.changes}
    values = {(key, value) for c in log for key, value in c.changes if value is not None}
    problems = []
    for op in history:
        if op.action is Action.READ:
            continue
        if op.outcome is Outcome.OK:
            place = (op.version, op.key)
            wanted = None if op.action is Action.DELETE else op.value
            if place not in written:
                problems.append(f"acknowledged and not in the log: {op.key} {op}")
            elif written[place] != wanted:
                problems.append(f"the log has {written[place]!r} in the place of {op.key} {op}")
        elif op.outcome is not Outcome.UNKNOWN and (op.key, op.value) in values:
            problems.append(f"said to have failed and in the log: {op.key} {op}")
    return problems


def check_barriers(history: Sequence[Operation]) -> list[str]:
    """A reader's view holds everything, of all keys, that was acknowledged before it was asked."""
    writes = sorted(
        (op.returned, op.version)
        for op in history
        if op.action is not Action.READ and op.outcome is Outcome.OK
    )
    times = [t for t, _ in writes]
    newest: list[int] = []
    for _, version in writes:
        newest.append(max(version, newest[-1] if newest else 0))
    problems = []
    for op in history:
        if op.action is Action.READ and op.outcome is Outcome.OK:
            before = bisect.bisect_left(times, op.invoked)
            if before and newest[before - 1] > op.seen:
                problems.append(
                    f"revision {newest[before - 1]} was acknowledged before, and the reader's view "
                    f"ends at {op.seen}: {op.key} {op}"
                )
    return problems


def check_fences(writes: Iterable[tuple[int, int]]) -> list[str]:
    """Fenced writes as (revision, epoch): none of a deposed leader after its successor's first."""
    problems = []
    epoch, since = 0, 0
    for revision, written_in in sorted(writes):
        if written_in < epoch:
            problems.append(
                f"revision {revision} was written in epoch {written_in}, and epoch {epoch} had "
                f"written at revision {since}"
            )
        elif written_in > epoch:
            epoch, since = written_in, revision
    return problems
