"""The checker of histories: good ones pass, bad ones are told, and why."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import linearizability as module
from tests.linearizability import (
    Action,
    Commit,
    Operation,
    Outcome,
    UndecidedError,
    check,
    check_acknowledged,
    check_barriers,
    check_fences,
    check_watches,
)

_ACTIONS = {a.value: a for a in Action}
_OUTCOMES = {o.value: o for o in Outcome}


def history(text: str) -> list[Operation]:
    """Lines of `client invoked-returned …`, and then one of

    read absent | read 3 a; put a over 3 ok 5 | put a over absent refused; delete 3 ok 5.
    """
    ops = []
    for line in text.strip().splitlines():
        client, times, action, *rest = line.split()
        invoked, _, returned = times.partition("-")
        op = Operation(client, "k", _ACTIONS[action], float(invoked), float(returned))
        rest = ["0" if word == "absent" else word for word in rest if word != "over"]
        match op.action:
            case Action.READ:
                value = rest[1] if len(rest) > 1 else None
                op = replace(op, version=int(rest[0]), value=value)
            case Action.PUT:
                op = _write(op, rest[1:], value=rest[0])
            case Action.DELETE:
                op = _write(op, rest, value=None)
        ops.append(op)
    return ops


def _write(op: Operation, words: list[str], *, value: str | None) -> Operation:
    expected, outcome, *version = words
    return replace(
        op,
        outcome=_OUTCOMES[outcome],
        value=value,
        expected=None if expected == "any" else int(expected),
        version=int(version[0]) if version else 0,
    )


GOOD = {
    "nothing": "a 0-1 read absent",
    "one after another": """
        a 0-1 put x over absent ok 1
        b 2-3 read 1 x
        a 4-5 put y over 1 ok 2
        b 6-7 delete 2 ok 3
        a 8-9 read absent
        a 10-11 put z over absent ok 4""",
    "a read beside a write sees the old": """
        a 0-1 put x over absent ok 1
        a 2-5 put y over 1 ok 2
        b 3-4 read 1 x
        c 3-6 read 1 x""",
    "a read beside a write sees the new": """
        a 0-1 put x over absent ok 1
        a 2-5 put y over 1 ok 2
        b 3-4 read 2 y""",
    "an order that is not that of the calls": """
        a 0-9 put x over 1 ok 2
        b 1-8 put y over absent ok 1
        c 2-7 read 2 x""",
    "of two that create one is refused": """
        a 0-2 put x over absent ok 1
        b 1-3 put y over absent refused
        b 4-5 read 1 x""",
    "an unknown write that never happened": """
        a 0-1 put x over absent unknown
        b 2-3 read absent
        b 4-5 put y over absent ok 4""",
    "an unknown write that shows up at once": """
        a 0-1 put x over absent unknown
        b 2-3 read 1 x""",
    "an unknown write that shows up later": """
        a 0-1 put x over absent unknown
        b 2-3 read absent
        b 4-5 read absent
        b 6-7 read 9 x
        b 8-9 put y over 9 ok 10""",
    "an unknown write that only a refusal shows": """
        a 0-1 put x over absent unknown
        b 2-3 put y over absent refused""",
    "an unknown write and one over it": """
        a 0-1 put x over absent unknown
        b 1-2 put y over any ok 5
        b 3-4 read 5 y""",
    "an unknown delete": """
        a 0-1 put x over absent ok 1
        b 2-3 delete 1 unknown
        c 4-5 read 1 x
        c 6-7 read absent""",
    "a failed write that nobody sees": """
        a 0-1 put x over absent failed
        b 2-3 read absent""",
    "a write that any version will do for": """
        a 0-1 put x over any ok 1
        b 2-3 put y over any ok 2""",
}

BAD = {
    "a stale read": """
        a 0-1 put x over absent ok 1
        a 2-3 put y over 1 ok 2
        b 4-5 read 1 x""",
    "a lost write": """
        a 0-1 put x over absent ok 1
        b 2-3 read absent""",
    "a write that is lost later": """
        a 0-1 put x over absent ok 1
        a 2-3 put y over 1 ok 2
        b 4-5 read 2 y
        c 6-7 read 1 x""",
    "a resurrected value": """
        a 0-1 put x over absent ok 1
        a 2-3 delete 1 ok 2
        b 4-5 read absent
        b 6-7 read 1 x""",
    "both sides of a split let a change through": """
        a 0-1 put x over absent ok 1
        b 2-4 put y over 1 ok 2
        c 3-5 put z over 1 ok 3""",
    "both create": """
        a 0-2 put x over absent ok 1
        b 1-3 put y over absent ok 2""",
    "a failed write is read": """
        a 0-1 put x over absent failed
        b 2-3 read 1 x""",
    "a refused write is read": """
        a 0-1 put x over absent ok 1
        b 2-3 put y over absent refused
        b 4-5 read 2 y""",
    "a value of nobody": "a 0-1 read 1 x",
    "an unknown write is seen before its call": """
        b 0-1 read 1 x
        a 2-3 put x over absent unknown""",
    "an unknown write comes and goes": """
        a 0-1 put x over absent unknown
        b 2-3 read 1 x
        b 4-5 read absent""",
    "an unknown write takes effect twice": """
        a 0-1 put x over absent unknown
        b 2-3 read 1 x
        b 4-5 delete 1 ok 2
        b 6-7 read 1 x""",
    "two readers see two writes in two orders": """
        a 0-9 put x over any ok 1
        b 0-9 put y over any ok 2
        c 1-2 read 1 x
        d 1-2 read 2 y
        c 3-4 read 2 y
        d 3-4 read 1 x""",
    "refused though nothing had changed": """
        a 0-1 put x over absent ok 1
        b 2-3 put y over 1 refused""",
    "a version that does not grow": """
        a 0-1 put x over absent ok 5
        b 2-3 put y over 5 ok 4""",
    "a deleted object's version comes again": """
        a 0-1 put x over absent ok 5
        b 2-3 delete 5 ok 6
        b 4-5 put y over absent ok 5""",
    "a value at two versions": """
        a 0-1 put x over absent ok 1
        b 2-3 read 2 x""",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_a_history_that_can_be_is_accepted(text: str) -> None:
    assert not [str(v) for v in check(history(text))]


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_history_that_cannot_be_is_refused(text: str) -> None:
    (violation,) = check(history(text))
    assert violation.key == "k"


def test_keys_are_judged_by_themselves() -> None:
    good = [replace(op, key="good") for op in history(GOOD["one after another"])]
    bad = [replace(op, key="bad") for op in history(BAD["a lost write"])]
    assert [v.key for v in check(good + bad)] == ["bad"]


def test_a_failure_shows_the_shortest_beginning_and_what_does_not_fit() -> None:
    (violation,) = check(
        history("""
            a 0-1 put x over absent ok 1
            a 2-3 put y over 1 ok 2
            d 2-9 put w over 7 unknown
            b 4-5 read 1 x
            c 6-7 read 2 y
            c 8-9 delete 2 ok 3""")
    )
    assert [op.client for op in violation.prefix] == ["a", "a", "d", "b"]
    assert violation.stuck.client == "b"
    text = str(violation)
    assert "k: 4 operations have no order that explains them" in text
    assert "ends in v2='y'" in text
    assert "read v1='x'" in text.splitlines()[-1]
    assert "absent" in text and "…" in text


def test_a_version_that_nobody_was_told_may_come_from_the_log() -> None:
    ops = history("""
        a 0-1 put x over absent unknown
        b 2-3 put y over 5 ok 6""")
    assert check(ops), "where from does b know it?"
    assert not check(ops, {("k", "x"): 5})
    assert check(ops, {("k", "x"): 4})


def test_two_puts_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match="two puts of one value"):
        check(history("a 0-1 put x over absent ok 1\na 2-3 put x over 1 ok 2"))


def test_an_answer_before_its_call_is_refused() -> None:
    with pytest.raises(ValueError, match="an answer before its call"):
        check(history("a 1-0 read absent"))


def test_a_search_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS_MAX", 3)
    with pytest.raises(UndecidedError, match="no answer after 3 steps"):
        check(history(GOOD["one after another"]))


# ------------------------------------------------------------------ against a real object


class Register:
    """The sequential object itself."""

    def __init__(self) -> None:
        self.version = self.revision = 0
        self.value: str | None = None

    def perform(self, action: Action, expected: int | None, value: str | None) -> tuple[bool, int]:
        if expected is not None and expected != self.version:
            return False, 0
        self.revision += 1
        deletes = action is Action.DELETE
        self.version, self.value = (0, None) if deletes else (self.revision, value)
        return True, self.revision


def simulated(seed: int, *, clients: int, steps: int) -> list[Operation]:
    """Clients that work at once on a real register: each operation takes effect at some moment
    between its call and its answer; some answers are lost, of those some effects too, and some come
    long after.
    """
    rng = random.Random(seed)
    register = Register()
    known = [0] * clients  # what each client believes the version to be
    told = {0}
    now = 0.0
    effects: list[tuple[float, int]] = []
    ops: list[Operation] = []
    done: dict[int, Operation] = {}
    free = [0.0] * clients
    for number in range(steps):
        c = min(range(clients), key=lambda c: free[c])
        invoked = free[c] + rng.random()
        returned = invoked + rng.random() * 3
        free[c] = returned
        action = rng.choice([Action.READ, Action.PUT, Action.PUT, Action.DELETE])
        ops.append(Operation(f"c{c}", "k", action, invoked, returned, value=f"x{number}"))
        effects.append((rng.uniform(invoked, returned), number))
    for at, number in sorted(effects):
        now = max(now, at)
        op = ops[number]
        c = int(op.client[1:])
        if op.action is Action.READ:
            done[number] = replace(op, version=register.version, value=register.value)
            known[c] = register.version
            told.add(register.version)
            continue
        value = op.value if op.action is Action.PUT else None
        # Nobody expects a version that nobody has been told.
        present = register.version if register.version in told else known[c]
        expected = rng.choice([present, present, known[c], 0])
        fate = rng.random()
        op = replace(op, expected=expected, value=value)
        if fate < 0.1:
            done[number] = replace(op, outcome=rng.choice([Outcome.FAILED, Outcome.UNKNOWN]))
            continue
        assert value is None or isinstance(value, str)
        won, version = register.perform(op.action, expected, value)
        if fate < 0.2:
            # Its effect, if any, lies inside of what was shortened; the answer was lost.
            op = replace(op, returned=rng.uniform(op.invoked, op.returned), outcome=Outcome.UNKNOWN)
            done[number] = op
        elif won:
            done[number] = replace(op, version=version)
            known[c] = 0 if op.action is Action.DELETE else version
            told.add(known[c])
        else:
            done[number] = replace(op, outcome=Outcome.REFUSED)
    return [done[n] for n in sorted(done)]


@given(seed=st.integers(0, 2**32), clients=st.integers(1, 5), steps=st.integers(1, 60))
def test_what_a_real_object_answered_is_accepted(seed: int, clients: int, steps: int) -> None:
    assert not [str(v) for v in check(simulated(seed, clients=clients, steps=steps))]


def _reads(ops: list[Operation]) -> list[Operation]:
    return [op for op in ops if op.action is Action.READ]


def _wins(ops: list[Operation]) -> list[Operation]:
    return [op for op in ops if op.action is Action.PUT and op.outcome is Outcome.OK]


def _stale(ops: list[Operation], rng: random.Random) -> Operation | None:
    """A read after two writes, which gets to see what was before the second."""
    wins = sorted(_wins(ops), key=lambda op: op.version)
    for op in rng.sample(_reads(ops), len(_reads(ops))):
        old = [w for w in wins if w.returned < op.invoked]
        if len(old) > 1:
            return replace(op, version=old[-2].version, value=old[-2].value)
    return None


def _failed_is_read(ops: list[Operation], rng: random.Random) -> Operation | None:
    """A read that gets to see what was refused."""
    refused = [op for op in ops if op.outcome in (Outcome.REFUSED, Outcome.FAILED)]
    values = [op.value for op in refused if op.action is Action.PUT]
    if not values or not _reads(ops):
        return None
    return replace(rng.choice(_reads(ops)), version=10_000, value=rng.choice(values))


def _double_success(ops: list[Operation], rng: random.Random) -> Operation | None:
    """A put that was refused, and is told to have won with a version that another one got."""
    refused = [op for op in ops if op.outcome is Outcome.REFUSED and op.action is Action.PUT]
    if not refused or not _wins(ops):
        return None
    version = rng.choice(_wins(ops)).version
    return replace(rng.choice(refused), outcome=Outcome.OK, version=version)


def _never_refused(ops: list[Operation], rng: random.Random) -> Operation | None:
    """A put that won is told to have been refused; somebody has read what it wrote."""
    read = {op.value for op in _reads(ops)}
    wins = [op for op in _wins(ops) if op.value in read]
    return replace(rng.choice(wins), outcome=Outcome.REFUSED, version=0) if wins else None


@pytest.mark.parametrize(
    "mutate",
    [_stale, _failed_is_read, _double_success, _never_refused],
    ids=lambda f: f.__name__.strip("_"),
)
@given(seed=st.integers(0, 2**32))
def test_a_history_with_one_wrong_answer_is_refused(mutate, seed: int) -> None:
    ops = simulated(seed, clients=3, steps=40)
    wrong = mutate(ops, random.Random(seed))
    assume(wrong is not None)
    changed = [
        wrong if (op.client, op.invoked) == (wrong.client, wrong.invoked) else op for op in ops
    ]
    (violation,) = check(changed)
    shorter = violation.prefix[:-1]
    assert str(violation)
    assert len(shorter) < len(ops)


def test_a_long_history_is_judged_in_time() -> None:
    assert not check(simulated(7, clients=8, steps=3_000))


# ------------------------------------------------------------------ the whole store


def _log(*commits: tuple[int, str, str | None]) -> list[Commit]:
    return [Commit(revision, ((key, value),)) for revision, key, value in commits]


def test_watches_that_agree_are_accepted() -> None:
    log = _log((1, "a", "x"), (3, "b", "y"))
    assert not check_watches({"m1": log, "m2": list(log)})


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (_log((1, "a", "x")), "commit 2 is"),
        (_log((1, "a", "x"), (1, "a", "x"), (3, "b", "y")), "revision 1 after 1"),
        (_log((3, "b", "y"), (1, "a", "x")), "revision 1 after 3"),
        (_log((1, "a", "z"), (3, "b", "y")), "commit 1 is"),
        (_log((1, "a", "x"), (3, "b", "y"), (4, "c", "z")), "None to m1"),
    ],
    ids=["a gap", "twice", "out of order", "another value", "one too many"],
)
def test_watches_that_disagree_are_told(other: list[Commit], problem: str) -> None:
    problems = check_watches({"m1": _log((1, "a", "x"), (3, "b", "y")), "m2": other})
    assert any(problem in p for p in problems)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("a 0-1 put x over absent ok 1", None),
        ("a 0-1 delete 1 ok 2", None),
        ("a 0-1 put y over absent ok 3", "acknowledged and not in the log"),
        ("a 0-1 put y over absent ok 1", "in the place of"),
        ("a 0-1 put x over absent failed", "said to have failed"),
        ("a 0-1 put x over absent refused", "said to have failed"),
        ("a 0-1 put x over absent unknown", None),
        ("a 0-1 put y over absent unknown", None),
    ],
)
def test_the_log_holds_what_was_acknowledged_and_nothing_that_failed(
    line: str, problem: str | None
) -> None:
    problems = check_acknowledged(history(line), _log((1, "k", "x"), (2, "k", None)))
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_a_reader_behind_a_barrier_has_what_was_acknowledged_before() -> None:
    write = history("a 0-1 put x over absent ok 5")
    (read,) = history("b 2-3 read absent")
    other = replace(read, key="other")
    assert not check_barriers([*write, replace(other, seen=5)])
    (problem,) = check_barriers([*write, replace(other, seen=4)])
    assert "ends at 4" in problem
    assert not check_barriers([*write, replace(other, invoked=0.5, seen=0)])


def test_a_deposed_leader_writes_no_more() -> None:
    assert not check_fences([(1, 1), (2, 1), (5, 4), (6, 4)])
    (problem,) = check_fences([(1, 1), (5, 4), (6, 1), (7, 4)])
    assert "revision 6 was written in epoch 1" in problem
