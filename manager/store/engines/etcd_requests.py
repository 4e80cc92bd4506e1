"""The names of keys in etcd, and the requests that are made of them.

Under the prefix: `r/<table>/<id>` holds a row; `head` is written with every group of commits and
says when and by whom; `leader` hangs on the leader's lease; `w/<writer>` is a manager's generation
(see etcd_writer); `barrier` is written by readers where etcd's own read index does not answer;
`format` says how all of this is written.
"""

from __future__ import annotations

from typing import Any

import msgspec
from etcd3aio import _protobuf as pb

from manager.store.engine import Corrupt, Op


class Head(msgspec.Struct, array_like=True, frozen=True):
    """What every group writes beside its rows."""

    time_ns: int
    writer: str
    number: int


class Keys:
    """The keys under one prefix."""

    def __init__(self, prefix: str, writer: str) -> None:
        self.prefix = prefix.rstrip("/")
        self.all = f"{self.prefix}/".encode()
        self.rows = f"{self.prefix}/r/".encode()
        self.head = f"{self.prefix}/head".encode()
        self.leader = f"{self.prefix}/leader".encode()
        self.format = f"{self.prefix}/format".encode()
        self.barrier = f"{self.prefix}/barrier".encode()
        self.writer = f"{self.prefix}/w/{writer}".encode()

    def row(self, op: Op) -> bytes:
        return b"%s%d/%s" % (self.rows, op.table, op.id.encode())

    def row_of(self, key: bytes, *, where: str) -> tuple[int, str]:
        """The table and id of a row's key. Raises Corrupt for one that is none of ours."""
        table, _, id_ = key[len(self.rows) :].decode().partition("/")
        try:
            return int(table), id_
        except ValueError:
            raise Corrupt(
                f"{where} holds a key {key!r} that is none of ours; remove it, or use another "
                "prefix"
            ) from None


def end_of(prefix: bytes) -> bytes:
    """The first key after all that begin with the prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def put(key: bytes, value: bytes) -> Any:
    return pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))


def delete(key: bytes) -> Any:
    return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=key))


def read(key: bytes) -> Any:
    return pb.RequestOp(request_range=pb.RangeRequest(key=key))


def at(key: bytes, revision: int) -> Any:
    """That the key was last written then; 0: that it is absent."""
    return pb.Compare(
        key=key, target=pb.Compare.MOD, result=pb.Compare.EQUAL, mod_revision=revision
    )


def created(key: bytes, revision: int) -> Any:
    """That the key has been there since then; 0: that it is absent."""
    return pb.Compare(
        key=key, target=pb.Compare.CREATE, result=pb.Compare.EQUAL, create_revision=revision
    )
