"""Sealing of what must not lie readable in the store: secrets, registry credentials, the keyring.

AES-256-GCM with a random nonce, under one of two sorts of keys:

- The sealing key is a file beside the manager's state, not in the store, so that a copy of the
  store alone tells nothing; the file in turn is sealed with the node's key (swarm.vault), which an
  unlock key may lock. It seals the keyring's row and nothing else that is new; earlier versions
  sealed everything with it, and that stays readable.
- Data keys lie in the keyring and change (manager/ca/data_keys.py). The newest seals everything
  that is not the keyring. Which one it was stands in front of what it sealed.

manager/store/sealed.py has the form of both. `digest` lets one see whether two secrets hold the
same without opening them; it depends on the sealing key alone, so it stays when data keys change.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from manager.store.sealed import BY_DATA_KEY, BY_SEALING_KEY, ID_BYTES, key_id
from swarm import errors
from swarm.files import write_private
from swarm.v1 import DataKey, Keyring
from swarm.vault import Vault

if TYPE_CHECKING:
    from manager.store import View

_NONCE_BYTES = 12
KEY_BYTES = 32
_CONTEXT = b"swarm seal 1"
_DATA_CONTEXT = b"swarm seal 2"
_PURPOSE = b"swarm seal key"


class Sealer:
    """Seals and opens: with the sealing key, and with the data keys of the view it follows."""

    def __init__(self, key: bytes) -> None:
        errors.invariant(len(key) == KEY_BYTES, "a sealing key has 32 bytes")
        self.key = key  # for backups, and for managers that are let in
        self._cipher = AESGCM(key)
        self._digest_key = hashlib.sha256(b"swarm digest 1" + key).digest()
        self._view: View | None = None
        self._data_keys: tuple[DataKey, ...] = ()
        self._ciphers: dict[int, AESGCM] = {}

    def follow(self, view: View) -> None:
        """From now on the data keys are those of this view's keyring."""
        self._view = view

    def _ring(self) -> tuple[DataKey, ...]:
        """The data keys as they are now, their ciphers made."""
        ring = next(iter(self._view.all(Keyring)), None) if self._view is not None else None
        keys = ring.data_keys if ring is not None else ()
        if keys is not self._data_keys:
            self._ciphers = {k.id: AESGCM(k.key) for k in keys}
            self._data_keys = keys
        return keys

    def seal(self, data: bytes) -> bytes:
        """What may be stored of the keyring: sealed with the sealing key."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, data, _CONTEXT)
        return bytes([BY_SEALING_KEY]) + nonce + sealed

    def seal_data(self, data: bytes) -> bytes:
        """What may be stored of everything else: sealed with the newest data key; with the sealing
        key where there is none yet.
        """
        keys = self._ring()
        if not keys:
            return self.seal(data)
        prefix = bytes([BY_DATA_KEY]) + keys[-1].id.to_bytes(ID_BYTES, "big")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._ciphers[keys[-1].id].encrypt(nonce, data, _DATA_CONTEXT + prefix)
        return prefix + nonce + sealed

    def open(self, sealed: bytes) -> bytes:
        """The data again. Raises Internal when it was changed, or sealed with another key."""
        version = sealed[0] if sealed else 0
        if version == BY_SEALING_KEY:
            prefix, context, cipher = sealed[:1], _CONTEXT, self._cipher
        elif version == BY_DATA_KEY:
            prefix = sealed[: 1 + ID_BYTES]
            context, cipher = _DATA_CONTEXT + prefix, self._data_cipher(key_id(sealed))
        else:
            raise errors.Internal(
                "sealed data has an unknown format; it was written by a newer version"
            )
        nonce_at = len(prefix)
        nonce, rest = sealed[nonce_at : nonce_at + _NONCE_BYTES], sealed[nonce_at + _NONCE_BYTES :]
        try:
            return cipher.decrypt(nonce, rest, context)
        except (InvalidTag, ValueError):
            raise errors.Internal(
                "sealed data cannot be opened: it is damaged, or sealed with another key than "
                "this manager's; restore seal.key from the backup that belongs to the store"
            ) from None

    def _data_cipher(self, id_: int) -> AESGCM:
        keys = self._ring()
        if (cipher := self._ciphers.get(id_)) is None:
            held = ", ".join(str(k.id) for k in keys) or "none"
            raise errors.Internal(
                f"sealed data needs data key {id_}, and the keyring does not hold it (it holds "
                f"{held}): the data is damaged, or the keyring is of another state; restore both "
                "from one backup"
            )
        return cipher

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
