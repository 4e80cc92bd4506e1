"""Objects to rows and back.

A row's value is one byte of format version and the object as msgpack, fields by name, defaults left
out: fields that a later version adds are skipped by an earlier one, and fields that an earlier one
never wrote read as their defaults. So the format only grows. An object's Meta.version is not taken
from its bytes but from its row (the revision of the commit that wrote it), for the revision is not
known when the bytes are made.

Rows of `SEALED` tables lie sealed where the store was given a seal: then a copy of the engine's
files tells none of the cluster's keys, and no earlier version of them either.

A table's number is its Kind. Beside them `NAMES` holds one row for each name that must be unique,
"<kind>/<name>" with the owner's id as value: two writers who create the same name at once both put
that row as new, and any engine lets only one of them through. `GUARDS` holds a row for each thing
that is given out by looking at all of a kind, like a published port: whoever gives it out writes
that row, at the version that it had when he looked (see Draft.guard).
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec
from msgspec import structs

from manager.store.engine import Corrupt, Row
from manager.store.tables import BY_CLASS, BY_KIND, SCHEMAS
from swarm.v1 import Kind, Message, Meta

FORMAT: Final = 1
NAMES: Final = 128  # far above any Kind, below what one byte holds
GUARDS: Final = 129
SEALED: Final = frozenset({Kind.KEYRING})

_PREFIX: Final = bytes([FORMAT])
GUARD: Final = _PREFIX  # the value of a row in GUARDS: its version is all that it says
_SEALED_PREFIX: Final = b"\xfe"  # before the sealed bytes of a row; no format will have this number
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODERS: Final[dict[int, msgspec.msgpack.Decoder[Any]]] = {
    s.kind: msgspec.msgpack.Decoder(s.cls) for s in SCHEMAS
}


class Seal(Protocol):
    """What seals rows; manager.ca.Sealer is one."""

    def seal(self, data: bytes) -> bytes: ...
    def open(self, sealed: bytes) -> bytes: ...


def encode(o: Message, seal: Seal | None = None) -> bytes:
    """The object as a row's value."""
    value = _PREFIX + _ENCODER.encode(o)
    if seal is not None and BY_CLASS[type(o)].kind in SEALED:
        return _SEALED_PREFIX + seal.seal(value)
    return value


def decode(kind: Kind, value: bytes, seal: Seal | None = None) -> Message:
    """The object in a row's value, with the version that its writer had read; see `stamped`.

    Raises ValueError with what is wrong, and what the seal raises; `decode_row` names the row as
    well.
    """
    if value[:1] == _SEALED_PREFIX:
        if seal is None:
            raise ValueError("it is sealed, and the store was opened without the key")
        value = seal.open(value[1:])
    if value[:1] != _PREFIX:
        raise ValueError(_wrong_format(value))
    # Without its first byte, and without copying the rest.
    decoded: Message = _DECODERS[kind].decode(memoryview(value)[1:])
    return decoded


def stamped(o: Any, version: int) -> Any:
    """The object as of the commit that wrote it."""
    meta = o.meta
    if meta is None:
        return structs.replace(o, meta=Meta(version=version))
    if meta.version == version:
        return o
    return structs.replace(
        o,
        meta=Meta(
            version=version,
            created_at_ns=meta.created_at_ns,
            updated_at_ns=meta.updated_at_ns,
            seen_version=meta.seen_version,
        ),
    )


def decode_row(row: Row, *, where: str, seal: Seal | None = None) -> tuple[Kind, Message]:
    """One row's object. Raises Corrupt that names the row; `where` says which state it is in."""
    try:
        kind = Kind(row.table)
        o: Any = decode(kind, row.value, seal)
        if o.id != row.id:
            raise ValueError(f"it holds the object {o.id!r}")
    except (ValueError, KeyError) as error:  # msgspec's errors are ValueErrors
        raise corrupt(row.table, row.id, str(error), where=where) from error
    return kind, stamped(o, row.version)


def corrupt(table: int, id_: str, problem: str, *, where: str) -> Corrupt:
    """What is said of a row that cannot be read."""
    name = BY_KIND[Kind(table)].kind.name.lower() if table in _DECODERS else f"table {table}"
    return Corrupt(
        f"{where}: row {name} {id_!r} cannot be read: {problem}; nothing was loaded. If a newer "
        "version wrote it, install that version again; otherwise restore the state from a backup"
    )


def name_row(kind: Kind, name: str) -> str:
    """The id of the row in NAMES that holds a unique name."""
    return f"{kind:d}/{name}"


def encode_owner(id_: str) -> bytes:
    """The value of a row in NAMES."""
    return _PREFIX + id_.encode()


def decode_owner(value: bytes) -> str:
    """The id of the object that holds a name. Raises ValueError."""
    if value[:1] != _PREFIX:
        raise ValueError(_wrong_format(value))
    return value[1:].decode()


def check_guard(value: bytes) -> None:
    """Raises ValueError unless this is the value of a row in GUARDS."""
    if value[:1] != _PREFIX:
        raise ValueError(_wrong_format(value))


def _wrong_format(value: bytes) -> str:
    if not value:
        return "it is empty"
    return f"it has format {value[0]}, and this version reads format {FORMAT}"
