"""The names of keys in etcd, and the requests that are made of them.

Under the prefix: `r/<table>/<id>` holds a row; `head` is written with every group of commits and
says when and by whom; `leader` hangs on the leader's lease; `w/<writer>` is a manager's generation
(see etcd_writer); `m/<node_id>` hangs on the lease of a manager that is there (see etcd_presence);
`nothing` is never there; `filling` is, while a state is brought in, and `filled` says which one it
was (see etcd_fill); `format` says how all of this is written, and the base.

The base is what is added to etcd's revisions to get the store's: a state that was brought in goes
on above the revisions that it had elsewhere.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from etcd3aio import _protobuf as pb

from manager.store.engine import Corrupt, Op
from manager.store.engines.etcd_client import ANSWER_S, EtcdClient


class Head(msgspec.Struct, array_like=True, frozen=True):
    """What every group writes beside its rows."""

    time_ns: int
    writer: str
    number: int
    # Who asked for the group's commits: all of them, in their order.
    who: str = ""


FORMAT: Final = b"1"


def format_value(base: int) -> bytes:
    """What the key `format` holds."""
    return b"%s %d" % (FORMAT, base) if base else FORMAT


def base_of(value: bytes, *, where: str, prefix: str) -> int:
    """The base in the key `format`. Raises Corrupt for a format of another version."""
    number, _, base = bytes(value).partition(b" ")
    if number != FORMAT or not (base.isdigit() or not base):
        raise Corrupt(
            f"{where} holds a state of format {bytes(value)!r} under {prefix}, and this version "
            f"knows {FORMAT!r}; upgrade swarmd"
        )
    return int(base or 0)


class Keys:
    """The keys under one prefix."""

    def __init__(self, prefix: str, writer: str) -> None:
        self.prefix = prefix.rstrip("/")
        self.all = f"{self.prefix}/".encode()
        self.rows = f"{self.prefix}/r/".encode()
        self.head = f"{self.prefix}/head".encode()
        self.leader = f"{self.prefix}/leader".encode()
        self.format = f"{self.prefix}/format".encode()
        self.filling = f"{self.prefix}/filling".encode()
        self.filled = f"{self.prefix}/filled".encode()
        self.nothing = f"{self.prefix}/nothing".encode()
        self.managers = f"{self.prefix}/m/".encode()
        self.writer = self.writer_of(writer)

    def writer_of(self, writer: str) -> bytes:
        return f"{self.prefix}/w/{writer}".encode()

    def manager(self, node_id: str) -> bytes:
        return self.managers + node_id.encode()

    def manager_of(self, key: bytes) -> str:
        return key[len(self.managers) :].decode()

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


async def newest(
    client: EtcdClient, keys: Keys, *, by_writing: bool = False, timeout_s: float = ANSWER_S
) -> int:
    """etcd's revision of the latest commit, of all that were acknowledged before the call.

    `by_writing`: with a transaction that goes through Raft's log and changes nothing. After a
    change of its leader etcd 3.4 leaves reads that were under way, and those that queue behind
    them, without an answer for some 6 s; what is written goes through. Raises Unavailable,
    TimedOut.
    """
    if by_writing:
        answer = await client.txn(
            pb.TxnRequest(success=[delete(keys.nothing), read(keys.head)]), timeout_s=timeout_s
        )
        kvs = answer.responses[1].response_range.kvs
    else:
        kvs = (await client.range(pb.RangeRequest(key=keys.head), timeout_s=timeout_s)).kvs
    return kvs[0].mod_revision if kvs else 0


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
