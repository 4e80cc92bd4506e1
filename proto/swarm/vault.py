"""The key at rest of one node: what its private files are sealed with, and what in turn locks it.

A manager's private key and the key of its stored secrets lie on the disk sealed with a random key
of the node's own. That key is one small file. It holds the key as it is, or, while managers are
locked, sealed with each unlock key that opens it; so locking, unlocking and changing the unlock key
replace one file in one step, whatever else is written meanwhile, and a crash leaves either the file
before or the one after. SwarmKit puts the sealed keys into the headers of the node's TLS key
instead (ca/keyreadwriter.go).

An unlock key is 256 random bits, so deriving a key from it (HKDF-SHA256, RFC 5869) need not be
slow. Nothing here waits; writing takes one fsync.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Collection
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from swarm import errors
from swarm.files import write_private

FILE = "node.key"  # in the node's state folder
_FORMAT = 1
_KEY_BYTES = 32
_NONCE_BYTES = 12
_SALT_BYTES = 16
_UNLOCK_KEY = re.compile(r"SWMKEY-1-([A-Za-z0-9+/]{43})")
_SEALED = b"\x01"  # the format of what `seal` makes


class _Lock(msgspec.Struct, frozen=True):
    """The node's key as one unlock key opens it."""

    salt: bytes
    sealed: bytes


class _File(msgspec.Struct, frozen=True, omit_defaults=True):
    """Either the key, or at least one lock."""

    format: int
    key: bytes = b""
    locks: tuple[_Lock, ...] = ()


def new_unlock_key() -> str:
    """SWMKEY-1- and 256 random bits in base 64, as Docker writes it."""
    return "SWMKEY-1-" + base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode().rstrip("=")


class Vault:
    """One node's key, in a file that may not be there yet. Raises Invalid for a damaged file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._key = b""
        self._file: _File | None = None
        if path.exists():
            self._file = _read(path)
            self._key = self._file.key

    @property
    def exists(self) -> bool:
        return self._file is not None

    @property
    def locked(self) -> bool:
        """Whether an unlock key is needed before anything can be opened."""
        return self._file is not None and not self._key

    def make(self) -> None:
        """Makes the key, unless there is one. Raises OSError."""
        if self._file is None:
            key = secrets.token_bytes(_KEY_BYTES)
            self._write(_File(format=_FORMAT, key=key))
            self._key = key

    def forget(self) -> None:
        """What was sealed cannot be opened any more."""
        self.path.unlink(missing_ok=True)
        self._key, self._file = b"", None

    # -------------------------------------------------------------- sealing

    def seal(self, data: bytes, *, purpose: bytes) -> bytes:
        """What may lie on the disk. It opens for the same purpose only."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _SEALED + nonce + self._cipher().encrypt(nonce, data, purpose)

    def open(self, sealed: bytes, *, purpose: bytes) -> bytes:
        """The data again. Raises Invalid when it was changed, or sealed with another node's key."""
        nonce, rest = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _SEALED:
                raise ValueError
            return self._cipher().decrypt(nonce, rest, purpose)
        except (InvalidTag, ValueError):
            raise errors.Invalid(
                f"it is damaged, or was sealed with another key than the one in {self.path}"
            ) from None

    def _cipher(self) -> AESGCM:
        errors.invariant(self._key, "the node's key is locked, or was not made")
        return AESGCM(self._key)

    # -------------------------------------------------------------- locking

    def unlock(self, unlock_key: str) -> None:
        """Opens the key for this process; the file stays as it is. Raises Denied, in Docker's
        words, for a key that does not fit.
        """
        if not self.locked:
            return
        assert self._file is not None
        secret = _secret(unlock_key)
        for lock in self._file.locks if secret else ():
            if key := _open(lock, secret):
                self._key = key
                return
        raise errors.Denied(
            "swarm could not be unlocked: invalid key provided. It has the form SWMKEY-1-…; "
            "`swarmctl swarm unlock-key` on a manager that is not locked prints it"
        )

    def lock_with(self, unlock_keys: Collection[str]) -> bool:
        """From now on each of the unlock keys opens the file, and nothing else; none: it lies open.
        Returns whether anything was written. Raises OSError; then all is as it was.
        """
        errors.invariant(self._key, "the node's key is locked, or was not made")
        assert self._file is not None
        wanted = sorted(set(unlock_keys))
        if self._is_locked_with(wanted):
            return False
        if not wanted:
            self._write(_File(format=_FORMAT, key=self._key))
            return True
        locks = []
        for text in wanted:
            secret = _secret(text)
            errors.invariant(secret, "an unlock key of this cluster is none")
            salt = secrets.token_bytes(_SALT_BYTES)
            nonce = secrets.token_bytes(_NONCE_BYTES)
            sealed = _derived(secret, salt).encrypt(nonce, self._key, None)
            locks.append(_Lock(salt, nonce + sealed))
        self._write(_File(format=_FORMAT, locks=tuple(locks)))
        return True

    def _is_locked_with(self, unlock_keys: list[str]) -> bool:
        assert self._file is not None
        locks = self._file.locks
        return len(locks) == len(unlock_keys) and all(
            any(_open(lock, _secret(text)) == self._key for lock in locks) for text in unlock_keys
        )

    def _write(self, file: _File) -> None:
        write_private(self.path, msgspec.json.format(msgspec.json.encode(file)))
        self._file = file


def _read(path: Path) -> _File:
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from None
    if file.format != _FORMAT:
        raise errors.Invalid(
            f"{path} has format {file.format}, this version reads {_FORMAT}; use the swarmd that "
            "wrote it, or a newer one"
        )
    if bool(file.key) == bool(file.locks) or (file.key and len(file.key) != _KEY_BYTES):
        raise _damaged(path, "it holds no whole key")
    return file


def _damaged(path: Path, problem: str) -> errors.Invalid:
    return errors.Invalid(
        f"{path} is damaged: {problem}. Put back a copy of it; without it the node's keys "
        "cannot be read. To begin anew, move it and identity.json away"
    )


def _secret(unlock_key: str) -> bytes:
    """The unlock key's bits; empty for what is none."""
    match = _UNLOCK_KEY.fullmatch(unlock_key.strip())
    try:
        return base64.b64decode(match[1] + "=", validate=True) if match else b""
    except binascii.Error:
        return b""


def _derived(secret: bytes, salt: bytes) -> AESGCM:
    return AESGCM(
        HKDF(hashes.SHA256(), _KEY_BYTES, salt=salt, info=b"swarm unlock 1").derive(secret)
    )


def _open(lock: _Lock, secret: bytes) -> bytes:
    """The node's key; empty when this unlock key is not for this lock."""
    if not secret:
        return b""
    nonce, rest = lock.sealed[:_NONCE_BYTES], lock.sealed[_NONCE_BYTES:]
    try:
        return _derived(secret, lock.salt).decrypt(nonce, rest, None)
    except (InvalidTag, ValueError):
        return b""
