"""A backup sealed with a passphrase: encrypted and authenticated in pieces, so that it streams.

Owns the container around the bytes of swarm/backup.py. The key comes from the passphrase by scrypt
(RFC 7914), each piece is sealed with AES-256-GCM under a nonce that counts the pieces and marks the
last one (the STREAM construction: Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-
Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015, section 7). So no piece can be
changed, moved, left out or added without notice, and the end cannot be cut off.

    file  = "SWRMSEAL" format:u16 log2_n:u8 r:u8 p:u8 zeros:3 salt:16 check:16 piece*
    piece = AES-256-GCM(nonce = salt[:7] number:u32 last:u8, of up to 64 KiB, with the head as
            associated data), 16 bytes longer than what it seals

`check` is more of scrypt's output: it tells a wrong passphrase from a damaged file.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarm import errors
from swarm.backup import Corrupt

__all__ = ["MAGIC", "Opener", "Sealing", "is_sealed"]

MAGIC: Final = b"SWRMSEAL"
FORMAT: Final = 1
# 32 MiB and some 0.1 s for each guess, what RFC 7914 calls interactive use and more.
LOG2_N, R, P = 15, 8, 1
LOG2_N_MAX: Final = 20  # 1 GiB: a file cannot make its reader use more
PIECE_BYTES: Final = 64 << 10
_TAG_BYTES: Final = 16
_SEALED_BYTES: Final = PIECE_BYTES + _TAG_BYTES
_SALT_BYTES: Final = 16
_HEAD: Final = struct.Struct(f">8sHBBB3x{_SALT_BYTES}s16s")
PASSPHRASE_BYTES_MIN: Final = 8


def is_sealed(start: bytes) -> bool:
    """Whether a file that begins like this is sealed."""
    return start.startswith(MAGIC)


class Sealing:
    """Seals one file: `update` with its bytes, then `finish`; both return what to write."""

    def __init__(self, passphrase: bytes) -> None:
        if len(passphrase) < PASSPHRASE_BYTES_MIN:
            raise errors.Invalid(
                f"the passphrase has {len(passphrase)} bytes; use {PASSPHRASE_BYTES_MIN} or more"
            )
        self._salt = secrets.token_bytes(_SALT_BYTES)
        key, check = _derive(passphrase, self._salt, LOG2_N, R, P)
        self._head = _HEAD.pack(MAGIC, FORMAT, LOG2_N, R, P, self._salt, check)
        self._cipher = AESGCM(key)
        self._buffer = bytearray()
        self._number = 0
        self._begun = False

    def update(self, data: bytes) -> bytes:
        self._buffer += data
        out = bytearray(self._begin())
        # One piece stays behind, for the last one is sealed as such.
        while len(self._buffer) > PIECE_BYTES:
            out += self._piece(bytes(self._buffer[:PIECE_BYTES]), last=False)
            del self._buffer[:PIECE_BYTES]
        return bytes(out)

    def finish(self) -> bytes:
        return self._begin() + self._piece(bytes(self._buffer), last=True)

    def _begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._head

    def _piece(self, data: bytes, *, last: bool) -> bytes:
        nonce = _nonce(self._salt, self._number, last=last)
        self._number += 1
        return self._cipher.encrypt(nonce, data, self._head)


class Opener:
    """Opens one file: `update` with its bytes, then `finish`; both return what was sealed.

    Raises Denied for a wrong passphrase, Corrupt for the rest.
    """

    def __init__(self, passphrase: bytes, *, name: str = "the backup") -> None:
        self._passphrase = passphrase
        self._name = name
        self._buffer = bytearray()
        self._at = 0
        self._number = 0
        self._head = b""
        self._salt = b""
        self._cipher: AESGCM | None = None

    def update(self, data: bytes) -> bytes:
        self._buffer += data
        if self._cipher is None and not self._begin():
            return b""
        out = bytearray()
        while len(self._buffer) > _SEALED_BYTES:
            out += self._piece(bytes(self._buffer[:_SEALED_BYTES]), last=False)
            del self._buffer[:_SEALED_BYTES]
        return bytes(out)

    def finish(self) -> bytes:
        if self._cipher is None or len(self._buffer) < _TAG_BYTES:
            raise self._corrupt(self._at + len(self._buffer), "it was cut off here")
        return self._piece(bytes(self._buffer), last=True)

    def _begin(self) -> bool:
        if len(self._buffer) < _HEAD.size:
            return False
        self._head = bytes(self._buffer[: _HEAD.size])
        magic, found, log2_n, r, p, self._salt, check = _HEAD.unpack(self._head)
        if magic != MAGIC:
            raise Corrupt(f"{self._name} is no sealed backup: it begins with {magic!r} at byte 0")
        if found != FORMAT:
            raise Corrupt(
                f"{self._name} is sealed in format {found} (bytes 8 and 9), this version opens "
                f"format {FORMAT}; use the version of swarmctl that wrote it, or a later one"
            )
        if not (10 <= log2_n <= LOG2_N_MAX and 1 <= r <= 16 and 1 <= p <= 4):
            raise self._corrupt(10, f"its cost of {log2_n}, {r}, {p} is none that is written")
        key, expected = _derive(self._passphrase, self._salt, log2_n, r, p)
        if not hmac.compare_digest(check, expected):
            raise errors.Denied(
                f"{self._name} cannot be opened with this passphrase; give the one that it was "
                "sealed with (if it is the right one, the file's first 48 bytes are damaged)"
            )
        self._cipher = AESGCM(key)
        del self._buffer[: _HEAD.size]
        self._at = _HEAD.size
        return True

    def _piece(self, sealed: bytes, *, last: bool) -> bytes:
        assert self._cipher is not None
        nonce = _nonce(self._salt, self._number, last=last)
        try:
            data = self._cipher.decrypt(nonce, sealed, self._head)
        except InvalidTag:
            raise self._corrupt(
                self._at,
                f"the {len(sealed)} bytes from here on are not as written"
                + (", or the file was cut off" if last else ""),
            ) from None
        self._number += 1
        self._at += len(sealed)
        return data

    def _corrupt(self, offset: int, problem: str) -> Corrupt:
        return Corrupt(
            f"{self._name} is damaged at byte {offset}: {problem}; nothing was changed. Use "
            "another copy of this backup, or another backup"
        )


def _derive(passphrase: bytes, salt: bytes, log2_n: int, r: int, p: int) -> tuple[bytes, bytes]:
    """The key and the check."""
    n = 1 << log2_n
    memory = 128 * r * (n + p + 2)
    made = hashlib.scrypt(passphrase, salt=salt, n=n, r=r, p=p, maxmem=memory + (1 << 20), dklen=48)
    return made[:32], made[32:]


def _nonce(salt: bytes, number: int, *, last: bool) -> bytes:
    errors.invariant(number < 1 << 32, "a sealed file has fewer than 2^32 pieces")
    return salt[:7] + number.to_bytes(4, "big") + bytes([last])
