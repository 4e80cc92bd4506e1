"""Where a manager's state lies: one small file in its folder, replaced as a whole.

The choice is the node's: all managers of a cluster use the same log, but each reaches it in its own
way. A folder without the file is of the embedded engine, as all were at first.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import structs

from swarm import errors
from swarm.files import write_private
from swarm.v1 import EtcdAccess
from swarm.vault import Vault

FORMAT: Final = 1
FILE: Final = "place.json"
PREFIX: Final = "/swarm"
EMBEDDED: Final = "embedded"
ETCD: Final = "etcd"
_PURPOSE: Final = b"swarm etcd client key"


class Place(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which engine, and how it is reached.

    `to`: the state is to be moved there before it is used again; `fresh`: that was chosen when the
    cluster was made, so that where it cannot be, there is no cluster. `voter`: the own member of
    etcd has its vote.
    """

    format: int
    engine: Literal["embedded", "etcd"] = "embedded"
    prefix: str = ""
    voter: bool = False
    to: str = ""
    fresh: bool = False
    # Why the last move failed, and when: it is not begun again at once.
    move_failed: str = ""
    move_failed_at_ns: int = 0
    # An etcd of somebody else's; no endpoints: the member that runs beside this manager.
    endpoints: tuple[str, ...] = ()
    ca_pem: str = ""
    certificate_pem: str = ""
    sealed_key: str = ""  # base 64

    @property
    def external(self) -> bool:
        """Whether the etcd is somebody else's."""
        return bool(self.endpoints)

    @property
    def own_member(self) -> bool:
        """Whether a member of etcd runs here, or will when the state has moved."""
        return ETCD in (self.engine, self.to) and not self.external

    def access(self, vault: Vault) -> EtcdAccess | None:
        """How somebody else's etcd is reached; None: it is our own."""
        if not self.external:
            return None
        key_pem = ""
        if self.sealed_key:
            key_pem = vault.open(base64.b64decode(self.sealed_key), purpose=_PURPOSE).decode()
        return EtcdAccess(
            endpoints=self.endpoints,
            prefix=self.prefix,
            ca_pem=self.ca_pem,
            certificate_pem=self.certificate_pem,
            key_pem=key_pem,
        )

    def reached_by(self, access: EtcdAccess, vault: Vault) -> Place:
        """The same with somebody else's etcd."""
        sealed = ""
        if access.key_pem:
            data = vault.seal(access.key_pem.encode(), purpose=_PURPOSE)
            sealed = base64.b64encode(data).decode()
        return structs.replace(
            self,
            prefix=access.prefix,
            endpoints=access.endpoints,
            ca_pem=access.ca_pem,
            certificate_pem=access.certificate_pem,
            sealed_key=sealed,
        )


def load(folder: Path) -> Place | None:
    """What the folder's file says; None: it has none. Raises Invalid for a damaged one."""
    path = folder / FILE
    try:
        place = msgspec.json.decode(path.read_bytes(), type=Place)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise errors.Invalid(
            f"{path} is damaged: {error}. Restore it from a backup of the folder; where the "
            "cluster has other managers, `swarmctl swarm leave --force` here and join again"
        ) from None
    if place.format != FORMAT:
        raise errors.Invalid(
            f"{path} has format {place.format}, this version reads {FORMAT}; use the swarmd that "
            "wrote it, or a newer one"
        )
    return place


def save(folder: Path, place: Place) -> None:
    """Replaces the file; it is on the disk when this returns. Raises OSError."""
    write_private(folder / FILE, msgspec.json.format(msgspec.json.encode(place)))
