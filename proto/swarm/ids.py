"""Identifiers: 25 characters of base 36, as Docker's, drawn from a source of randomness that is
handed in.
"""

from __future__ import annotations

import random
import re
import secrets
from typing import NewType, Protocol

NodeId = NewType("NodeId", str)
ServiceId = NewType("ServiceId", str)
TaskId = NewType("TaskId", str)

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
LENGTH = 25  # 25 characters of base 36 hold just over 128 bits
_BITS = 128
_ID = re.compile(r"[0-9a-z]{25}")


class Rng(Protocol):
    """What is needed of random.Random."""

    def getrandbits(self, k: int, /) -> int: ...
    def random(self) -> float: ...


def system_rng() -> Rng:
    """The operating system's randomness; for ids and secrets outside of simulation."""
    return secrets.SystemRandom()


def seeded_rng(seed: int) -> Rng:
    """The same sequence for the same seed; for tests and simulation."""
    return random.Random(seed)  # not for secrets


def new_id(rng: Rng) -> str:
    """A fresh identifier."""
    return base36(rng.getrandbits(_BITS), length=LENGTH)


def base36(number: int, *, length: int) -> str:
    """The number's last `length` digits in base 36, padded with zeros."""
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 36)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def is_id(text: str) -> bool:
    """Whether the text has the form of a whole identifier."""
    return _ID.fullmatch(text) is not None
