"""Sealing of what must not lie readable in the store: secrets, registry credentials, the keyring.

AES-256-GCM with a random nonce; the first byte is the format's version. The key is a file beside
the manager's state, not in the store, so that a copy of the store alone tells nothing; the file in
turn is sealed with the node's key (swarm.vault), which an unlock key may lock. `digest` lets one
see whether two secrets hold the same without opening them.
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
from swarm.vault import Vault

_VERSION = b"\x01"
_NONCE_BYTES = 12
KEY_BYTES = 32
_CONTEXT = b"swarm seal 1"
_PURPOSE = b"swarm seal key"


class Sealer:
    """Seals and opens with one key."""

    def __init__(self, key: bytes) -> None:
        errors.invariant(len(key) == KEY_BYTES, "a sealing key has 32 bytes")
        self.key = key  # for backups alone
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


def load_key(path: Path, vault: Vault | None = None) -> bytes:
    """The key in the file. With a vault the file holds it sealed; one that lies in clear, as a
    restored backup leaves it, is replaced. Raises Invalid for a damaged file, and for one that is
    gone.
    """
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        raise errors.Invalid(
            f"{path} is gone, and without it stored secrets cannot be read; put the file back, or "
            "restore a backup with `swarmctl swarm restore`"
        ) from None
    try:
        if len(found) > KEY_BYTES and vault is not None:
            return vault.open(found, purpose=_PURPOSE)
        if len(found) != KEY_BYTES:
            raise errors.Invalid(f"a sealing key has {KEY_BYTES} bytes, it has {len(found)}")
    except errors.Invalid as error:
        raise errors.Invalid(
            f"{path} is damaged: {error.message}; restore it from a backup (without it, stored "
            "secrets cannot be read)"
        ) from None
    if vault is not None:
        write_key(path, found, vault)
    return found


def load_or_make_key(path: Path, vault: Vault | None = None) -> bytes:
    """As `load_key`, but the key is made on first use. Its file is readable by its owner only."""
    if path.exists():
        return load_key(path, vault)
    key = secrets.token_bytes(KEY_BYTES)
    write_key(path, key, vault)
    return key


def write_key(path: Path, key: bytes, vault: Vault | None) -> None:
    """Replaces the file with one that holds this key."""
    write_private(path, key if vault is None else vault.seal(key, purpose=_PURPOSE))
