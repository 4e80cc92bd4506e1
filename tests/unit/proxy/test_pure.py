"""Preambles, sequence windows and balancing, without sockets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.proxy import preamble
from agent.proxy.balance import BACKOFF_S_MAX, Balancer, Slot
from agent.proxy.preamble import (
    NONCES_MAX,
    TCP,
    WINDOW_NS,
    Datagram,
    Guard,
    Hello,
    Kind,
    Sequence64,
    decode_datagram,
    encode,
    encode_datagram,
)
from swarm import errors
from swarm.v1 import Backend

KEY, OTHER = b"k" * 32, b"o" * 32
NOW_NS = 1_700_000_000 * 10**9
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=25)


def made(key: bytes = KEY, *, now_ns: int = NOW_NS, nonce: bytes = b"n" * 16) -> bytes:
    return encode(key, protocol=TCP, task_id="task", port=80, now_ns=now_ns, nonce=nonce)


@given(names, st.integers(0, 65535), st.binary(min_size=16, max_size=16))
def test_a_preamble_says_what_was_put_in(name: str, port: int, nonce: bytes) -> None:
    data = encode(KEY, protocol=TCP, task_id=name, port=port, now_ns=NOW_NS, nonce=nonce)
    assert preamble.length(data) == len(data) <= preamble.LENGTH_MAX
    assert preamble.length(data[:10]) is None
    assert Guard().check([OTHER, KEY], data, NOW_NS) == Hello(TCP, name, port)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_bit_is_taken(place: int, change: int) -> None:
    data = bytearray(made())
    data[place % len(data)] ^= change

    def read() -> None:
        preamble.length(bytes(data))
        Guard().check([KEY], bytes(data), NOW_NS)

    with pytest.raises(errors.Denied):
        read()


def test_old_early_and_repeated_preambles_are_denied() -> None:
    guard = Guard()
    for shift in (-WINDOW_NS - 1, WINDOW_NS + 1):
        with pytest.raises(errors.Denied, match="clocks"):
            guard.check([KEY], made(), NOW_NS + shift)
    guard.check([KEY], made(), NOW_NS + WINDOW_NS)
    with pytest.raises(errors.Denied, match="before"):
        guard.check([KEY], made(), NOW_NS + WINDOW_NS)


def test_a_nonce_is_remembered_for_as_long_as_its_preamble_is_good() -> None:
    guard = Guard()
    # Steps of every size between two uses, with the earliest and the latest time allowed.
    for step_ns in range(WINDOW_NS // 10, 2 * WINDOW_NS, WINDOW_NS // 10):
        nonce = step_ns.to_bytes(16, "big")
        data = made(now_ns=NOW_NS + WINDOW_NS, nonce=nonce)
        guard.check([KEY], data, NOW_NS)
        guard.check([KEY], made(now_ns=NOW_NS + step_ns, nonce=b"x" + nonce[1:]), NOW_NS + step_ns)
        with pytest.raises(errors.Denied, match="before"):
            guard.check([KEY], data, NOW_NS + step_ns)


def test_the_memory_for_nonces_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NONCES_MAX >= 100_000
    monkeypatch.setattr(preamble, "NONCES_MAX", 10)
    guard = Guard()
    for number in range(100):
        guard.check([KEY], made(nonce=number.to_bytes(16, "big")), NOW_NS)
    assert len(guard._young) + len(guard._old) <= 20


@given(st.sampled_from(Kind), names, st.integers(0, 65535), st.integers(0, 2**64 - 1), st.binary())
def test_a_datagram_says_what_was_put_in(
    kind: Kind, name: str, port: int, sequence: int, data: bytes
) -> None:
    datagram = Datagram(kind, name, port, b"s" * 16, sequence, data)
    wire = encode_datagram(KEY, datagram, NOW_NS)
    assert decode_datagram([OTHER, KEY], wire, NOW_NS) == datagram
    for keys, at_ns in (([OTHER], NOW_NS), ([KEY], NOW_NS + WINDOW_NS + 1)):
        with pytest.raises(errors.Denied):
            decode_datagram(keys, wire, at_ns)
    with pytest.raises(errors.Denied):
        decode_datagram([KEY], wire[:-1], NOW_NS)


@given(st.lists(st.integers(1, 200), max_size=300))
def test_no_sequence_number_is_taken_twice(numbers: list[int]) -> None:
    window = Sequence64()
    taken = [number for number in numbers if window.accept(number)]
    assert len(taken) == len(set(taken))
    # What is not more than 63 behind the newest is taken the first time.
    newest, seen = 0, set()
    for number in numbers:
        if number not in seen and number > newest - 64:
            assert number in taken
        seen.add(number)
        newest = max(newest, number)


def backends(*names: str) -> list[Backend]:
    return [Backend(task_id=name) for name in names]


def test_short_connections_go_round_robin() -> None:
    balancer = Balancer()
    balancer.update(backends("a", "b", "c"))
    got = []
    for _ in range(7):
        slot = balancer.order(0.0)[0]
        balancer.chosen(slot)
        got.append(slot.backend.task_id)
        balancer.closed(slot)
    assert got == list("abcabca")


@given(st.lists(st.one_of(st.just(-1), st.integers(0, 20)), max_size=120))
def test_open_connections_never_differ_by_more_than_one_when_none_closes(ops: list[int]) -> None:
    balancer = Balancer()
    balancer.update(backends("a", "b", "c"))
    held: list[Slot] = []
    for op in ops:
        if op < 0 or not held:
            slot = balancer.order(0.0)[0]
            least = min(s.open for s in balancer.order(0.0))
            assert slot.open == least
            balancer.chosen(slot)
            held.append(slot)
        else:
            balancer.closed(held.pop(op % len(held)))
        balancer.check_invariants()
    assert sum(s.open for s in balancer.order(0.0)) == len(held)


def test_what_refused_is_last_for_a_while_that_grows_and_never_left_out() -> None:
    balancer = Balancer()
    balancer.update(backends("a", "b"))
    first = balancer.order(0.0)[0]
    balancer.failed(first, 0.0)
    assert [s.backend.task_id for s in balancer.order(0.4)] == ["b", "a"]
    assert [s.backend.task_id for s in balancer.order(0.6)] == ["a", "b"]
    for _ in range(20):
        balancer.failed(first, 0.0)
    assert first.put_off_until_s == BACKOFF_S_MAX
    balancer.succeeded(first)
    assert balancer.order(0.0)[0] is first


def test_an_update_keeps_counts_and_drops_what_is_gone() -> None:
    balancer = Balancer()
    balancer.update(backends("a", "b"))
    slot = balancer.order(0.0)[0]
    balancer.chosen(slot)
    balancer.update(backends("a", "c"))
    assert Counter({s.backend.task_id: s.open for s in balancer.order(0.0)}) == Counter(
        {"a": 1, "c": 0}
    )
    balancer.update(backends("c"))
    balancer.closed(slot)  # a connection of a backend that is gone ends
    balancer.check_invariants()
