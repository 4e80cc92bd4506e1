"""Where objects hold sealed data, and what of its form the store has to know: which key sealed it.

The store opens none of it (manager/ca/seal.py does). It keeps one promise about it: nothing is
committed that was sealed with a data key the keyring no longer gives out. `tables.Draft` sees to
that, so that a key that is dropped takes nobody's secret with it, however late a manager follows
the log.

    version 1:  1 | nonce, 12 bytes | AES-256-GCM            with the sealing key itself
    version 2:  2 | id of the data key, 4 bytes | nonce, 12 bytes | AES-256-GCM
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from msgspec import structs

from swarm.v1 import Message, Secret, ServiceRevision, StackRevision

BY_SEALING_KEY: Final = 1
BY_DATA_KEY: Final = 2
ID_BYTES: Final = 4
CLASSES: Final[tuple[type[Message], ...]] = (Secret, ServiceRevision, StackRevision)
HOLDERS: Final = frozenset(CLASSES)


def parts(o: Any) -> tuple[bytes, ...]:
    """The sealed data of an object of `CLASSES`, in order."""
    match o:
        case Secret():
            return (o.sealed,) if o.sealed else ()
        case ServiceRevision():
            return (o.sealed_registry_auth,) if o.sealed_registry_auth else ()
        case StackRevision():
            return tuple(o.sealed_registry_auths[name] for name in sorted(o.sealed_registry_auths))
        case _:
            return ()


def replaced(o: Any, change: Callable[[bytes], bytes]) -> Any:
    """The object with `change` done to all of its sealed data."""
    match o:
        case Secret() if o.sealed:
            return structs.replace(o, sealed=change(o.sealed))
        case ServiceRevision() if o.sealed_registry_auth:
            return structs.replace(o, sealed_registry_auth=change(o.sealed_registry_auth))
        case StackRevision() if o.sealed_registry_auths:
            changed = {name: change(data) for name, data in o.sealed_registry_auths.items()}
            return structs.replace(o, sealed_registry_auths=changed)
        case _:
            return o


def key_id(data: bytes) -> int:
    """The data key that sealed it; 0: the sealing key itself."""
    if data[:1] != bytes([BY_DATA_KEY]):
        return 0
    return int.from_bytes(data[1 : 1 + ID_BYTES], "big")


def key_ids(objects: Iterable[Any]) -> set[int]:
    """The keys that anything in these objects was sealed with."""
    return {key_id(data) for o in objects for data in parts(o)}
