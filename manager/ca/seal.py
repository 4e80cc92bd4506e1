"""Sealing of what must not lie readable in the store: secrets and registry credentials.

AES-256-GCM with a random nonce; the first byte is the format's version. The key is a file beside
the manager's state, not in the store, so that a copy of the store alone tells nothing. `digest`
lets one see whether two secrets hold the same without opening them.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from swarm import errors
from swarm.files import write_private

_VERSION = b"\x01"
_NONCE_BYTES = 12
_KEY_BYTES = 32
_CONTEXT = b"swarm seal 1"


class Sealer:
    """Seals and opens with one key."""

    def __init__(self, key: bytes) -> None:
        errors.invariant(len(key) == _KEY_BYTES, "a sealing key has 32 bytes")
        self._cipher = AESGCM(key)
        self._digest_key = hashlib.sha256(b"swarm digest 1" + key).digest()

    def seal(self, data: bytes) -> bytes:
        """What may be stored."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _VERSION + nonce + self._cipher.encrypt(nonce, data, _CONTEXT)

    def open(self, sealed: bytes) -> bytes:
        """The data again. Raises Internal when it was changed, or sealed with another key."""
        if sealed[:1] != _VERSION:
            raise errors.Internal(
                "sealed data has an unknown format; it was written by a newer version"
            )
        nonce, rest = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher.decrypt(nonce, rest, _CONTEXT)
        except (InvalidTag, ValueError):
            raise errors.Internal(
                "sealed data cannot be opened: it is damaged, or sealed with another key than "
                "this manager's; restore seal.key from the backup that belongs to the store"
            ) from None

    def digest(self, data: bytes) -> str:
        """The same for the same data and key, and no use without the key; hex."""
        return hmac.new(self._digest_key, data, hashlib.sha256).hexdigest()


def load_or_make_key(path: Path) -> bytes:
    """The key in the file, made on first use, readable by its owner only. Raises Invalid for a
    damaged file.
    """
    if path.exists():
        key = path.read_bytes()
        if len(key) != _KEY_BYTES:
            raise errors.Invalid(
                f"{path} is damaged: a sealing key has {_KEY_BYTES} bytes, it has {len(key)}; "
                "restore it from a backup (without it, stored secrets cannot be read)"
            )
        return key
    key = secrets.token_bytes(_KEY_BYTES)
    write_private(path, key)
    return key
