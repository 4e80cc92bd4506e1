"""Tables of immutable objects with secondary indexes, and drafts of changes laid over them.

`Tables` is the state that the log of changes has led to; only the store applies changes to it.
`Draft` is what every writer works on: it reads through to the tables, sees its own changes, and
remembers what it relied upon, so that a commit can be refused when that has changed meanwhile
(optimistic transactions). Objects are frozen, so nobody copies defensively. Between two awaits the
tables do not change: what a plain function reads from a View in one go is a consistent snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar, cast

import msgspec
from msgspec import structs

from manager.store import sealed
from manager.store.engine import Stale
from swarm import errors
from swarm.v1 import (
    Cluster,
    Config,
    Keyring,
    Kind,
    Message,
    Meta,
    Network,
    Node,
    Secret,
    Service,
    ServiceRevision,
    Stack,
    StackRevision,
    Task,
    Volume,
)

STACK_LABEL = "com.docker.stack.namespace"

T = TypeVar("T", bound=Message)
Index = Callable[[Any], tuple[Hashable, ...]]


def _stack_of(o: Any) -> tuple[Hashable, ...]:
    stack = o.spec.labels.get(STACK_LABEL) if o.spec else None
    return (stack,) if stack else ()


def _name(o: Any) -> tuple[Hashable, ...]:
    return (o.spec.name,) if o.spec else ()


def slot_key(task: Task) -> tuple[str, int | str]:
    """What makes tasks attempts of the same slot: the slot's number, or in a global service the
    node.
    """
    return (task.service_id, task.slot or task.node_id)


@dataclass(frozen=True, slots=True)
class Schema:
    """One kind: its class, its indexes, and whether names are unique."""

    kind: Kind
    cls: type[Message]
    indexes: dict[str, Index]
    unique_name: bool = False


_NAMED: dict[str, Index] = {"name": _name, "stack": _stack_of}
SCHEMAS: tuple[Schema, ...] = (
    Schema(Kind.CLUSTER, Cluster, {}),
    Schema(Kind.KEYRING, Keyring, {}),
    Schema(
        Kind.NODE,
        Node,
        {
            "name": lambda o: tuple(
                n for n in (o.spec and o.spec.name, o.description and o.description.hostname) if n
            )
        },
    ),
    Schema(Kind.STACK, Stack, {"name": _name}, unique_name=True),
    Schema(
        Kind.SERVICE,
        Service,
        {**_NAMED, "stack_id": lambda o: (o.stack_id,) if o.stack_id else ()},
        unique_name=True,
    ),
    Schema(Kind.SERVICE_REVISION, ServiceRevision, {"service": lambda o: (o.service_id,)}),
    Schema(
        Kind.TASK,
        Task,
        {
            "service": lambda o: (o.service_id,),
            "node": lambda o: (o.node_id,) if o.node_id else (),
            "slot": lambda o: (slot_key(o),),
        },
    ),
    Schema(Kind.SECRET, Secret, _NAMED, unique_name=True),
    Schema(Kind.CONFIG, Config, _NAMED, unique_name=True),
    Schema(Kind.NETWORK, Network, _NAMED, unique_name=True),
    Schema(Kind.VOLUME, Volume, _NAMED, unique_name=True),
    Schema(Kind.STACK_REVISION, StackRevision, {"stack": lambda o: (o.stack_id,)}),
)
BY_CLASS: dict[type[Message], Schema] = {s.cls: s for s in SCHEMAS}
BY_KIND: dict[Kind, Schema] = {s.kind: s for s in SCHEMAS}


class Change(msgspec.Struct, frozen=True, gc=False):
    """One object before and after; `new` is None for a removal, `old` for a creation."""

    kind: Kind
    id: str
    old: Any
    new: Any


class View(Protocol):
    """What readers and decisions see."""

    @property
    def revision(self) -> int: ...
    def get(self, cls: type[T], id_: str) -> T | None: ...
    def all(self, cls: type[T]) -> Iterable[T]: ...
    def by(self, cls: type[T], index: str, key: Hashable) -> list[T]: ...
    def count(self, cls: type[Message]) -> int: ...
    def guarded(self, name: str) -> int:
        """The version at which a guard was last written; 0: never. See Draft.guard."""
        ...


class _Table(Generic[T]):
    """One kind's objects by id and by each index."""

    __slots__ = ("indexes", "objects", "schema")

    def __init__(self, schema: Schema, *, lazy: bool = False) -> None:
        """`lazy`: an index is made when it is first asked for; most drafts never ask."""
        self.schema = schema
        self.objects: dict[str, T] = {}
        self.indexes: dict[str, dict[Hashable, dict[str, T]]] = {}
        if not lazy:
            self.indexes = {n: {} for n in schema.indexes}

    def set(self, id_: str, new: T | None) -> T | None:
        """Puts or removes an object; returns what was there."""
        old = self.objects.get(id_)
        for name, index in self.indexes.items():
            keys_of = self.schema.indexes[name]
            after = keys_of(new) if new is not None else ()
            if old is not None and (new is None or keys_of(old) != after):
                for key in keys_of(old):
                    if key not in after and (entry := index.get(key)) is not None:
                        entry.pop(id_, None)
                        if not entry:
                            del index[key]
            if new is None:
                continue
            for key in after:
                entry = index.get(key)
                if entry is None:
                    index[key] = {id_: new}
                else:
                    entry[id_] = new
        if new is None:
            self.objects.pop(id_, None)
        else:
            self.objects[id_] = new
        return old

    def by(self, index: str, key: Hashable) -> dict[str, T]:
        entries = self.indexes.get(index)
        if entries is None:
            keys_of = self.schema.indexes[index]
            entries = self.indexes[index] = {}
            for id_, o in self.objects.items():
                for found in keys_of(o):
                    entries.setdefault(found, {})[id_] = o
        return entries.get(key, {})


class Tables:
    """All tables at one revision. Only `apply` changes them."""

    def __init__(self) -> None:
        self._tables: dict[type[Message], _Table[Any]] = {s.cls: _Table(s) for s in SCHEMAS}
        self._guards: dict[str, int] = {}
        self._revision = 0

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, cls: type[T], id_: str) -> T | None:
        found: T | None = self._tables[cls].objects.get(id_)
        return found

    def all(self, cls: type[T]) -> Iterable[T]:
        return self._tables[cls].objects.values()

    def by(self, cls: type[T], index: str, key: Hashable) -> list[T]:
        return list(self._tables[cls].by(index, key).values())

    def count(self, cls: type[Message]) -> int:
        return len(self._tables[cls].objects)

    def guarded(self, name: str) -> int:
        return self._guards.get(name, 0)

    def apply(
        self,
        revision: int,
        changes: Iterable[tuple[Kind, str, Message | None]],
        *,
        guards: Mapping[str, int] = MappingProxyType({}),
    ) -> tuple[Change, ...]:
        """Takes one commit; `guards`: those written in it, with their versions, 0: removed. The
        same changes in the same order lead to the same tables on every manager.
        """
        errors.invariant(revision >= self._revision, f"revision {revision} after {self._revision}")
        out = []
        for kind, id_, new in changes:
            table = self._tables[BY_KIND[kind].cls]
            out.append(Change(kind, id_, table.set(id_, new), new))
        self._guards.update(guards)
        self._revision = revision
        return tuple(out)

    def freeze(self) -> Frozen:
        """All of it as it is now, for work in another thread. Costs a copy of the dictionaries by
        id: some milliseconds for 100,000 objects.
        """
        return Frozen(
            self._revision,
            {cls: dict(table.objects) for cls, table in self._tables.items()},
            dict(self._guards),
        )

    def check_invariants(self) -> None:
        """Indexes hold exactly the objects; for tests."""
        for table in self._tables.values():
            for name, keys_of in table.schema.indexes.items():
                expected: dict[Hashable, set[str]] = {}
                for id_, o in table.objects.items():
                    for key in keys_of(o):
                        expected.setdefault(key, set()).add(id_)
                found = {k: set(v) for k, v in table.indexes[name].items()}
                errors.invariant(
                    found == expected, f"index {name} of {table.schema.kind.name} is off"
                )
        for name, version in self._guards.items():
            errors.invariant(0 <= version <= self._revision, f"guard {name} is at {version}")


class Frozen:
    """The tables at one revision, whatever becomes of them: a View for long work that must neither
    hold the event loop up nor see the state move. Indexes are made at the first question.
    For one thread.
    """

    def __init__(
        self,
        revision: int,
        objects: dict[type[Message], dict[str, Any]],
        guards: Mapping[str, int],
    ) -> None:
        self._revision = revision
        self._objects = objects
        self._guards = guards
        self._indexes: dict[tuple[type[Message], str], dict[Hashable, list[Any]]] = {}

    @property
    def revision(self) -> int:
        return self._revision

    def get(self, cls: type[T], id_: str) -> T | None:
        return self._objects[cls].get(id_)

    def all(self, cls: type[T]) -> Iterable[T]:
        return self._objects[cls].values()

    def by(self, cls: type[T], index: str, key: Hashable) -> list[T]:
        made = self._indexes.get((cls, index))
        if made is None:
            made = self._indexes[cls, index] = {}
            keys_of = BY_CLASS[cls].indexes[index]
            for o in self._objects[cls].values():
                for found in keys_of(o):
                    made.setdefault(found, []).append(o)
        return list(made.get(key, ()))

    def count(self, cls: type[Message]) -> int:
        return len(self._objects[cls])

    def guarded(self, name: str) -> int:
        return self._guards.get(name, 0)


class Draft:
    """Changes over a view, not yet committed; reads see them.

    `put` and `delete` fill in Meta (times from `now_ns`; the version is the one it was read at,
    which the commit checks and replaces). Raises Conflict at once when a unique name is taken in
    this view.
    """

    def __init__(self, base: View, *, now_ns: int, who: str = "") -> None:
        """`who`: on whose behalf, for objects that note it; empty: the cluster's own."""
        self._base = base
        self.now_ns = now_ns
        self.who = who
        self._over: dict[type[Message], _Table[Any]] = {}
        self._gone: dict[type[Message], set[str]] = {}
        # What the commit relies on: (kind, id) -> version; 0: must not exist.
        self.expected: dict[tuple[Kind, str], int] = {}
        # Guards that it writes, with the versions that they must be at.
        self.guards: dict[str, int] = {}

    @property
    def revision(self) -> int:
        return self._base.revision

    def get(self, cls: type[T], id_: str) -> T | None:
        if self._gone and id_ in self._gone.get(cls, ()):
            return None
        over = self._over.get(cls)
        if over is not None:
            found: T | None = over.objects.get(id_)
            if found is not None:
                return found
        return self._base.get(cls, id_)

    def all(self, cls: type[T]) -> Iterable[T]:
        """The objects as they are now: puts and deletes during the iteration do not show in it."""
        over, gone = self._over.get(cls), self._gone.get(cls)
        if over is None and not gone:
            return self._base.all(cls)
        changed: dict[str, Any] = dict(over.objects) if over is not None else {}
        return self._merged(cls, changed, frozenset(gone or ()))

    def _merged(self, cls: type[T], changed: dict[str, T], gone: frozenset[str]) -> Iterator[T]:
        for o in self._base.all(cls):
            if (id_ := _id(o)) not in changed and id_ not in gone:
                yield o
        yield from changed.values()

    def by(self, cls: type[T], index: str, key: Hashable) -> list[T]:
        base = self._base.by(cls, index, key)
        over, gone = self._over.get(cls), self._gone.get(cls)
        if over is None and not gone:
            return base
        changed = over.objects if over is not None else {}
        gone = gone or set()
        out = [o for o in base if (id_ := _id(o)) not in changed and id_ not in gone]
        if over is not None:
            out.extend(over.by(index, key).values())
        return out

    def count(self, cls: type[Message]) -> int:
        over = self._over.get(cls)
        added = sum(self._base.get(cls, id_) is None for id_ in over.objects) if over else 0
        return self._base.count(cls) + added - len(self._gone.get(cls, ()))

    def put(self, o: T, *, unseen: bool = False) -> T:
        """Creates or replaces an object; returns it as stored in the draft.

        An object that was read carries its version, and the commit insists on that one: what was
        read before an await and has changed meanwhile is refused with Stale, here if it can be
        seen, else at the commit. A new object has no meta. `unseen`: a change of how it is stored
        that nobody can see, so the time of its last change stays.
        """
        cls, id_ = type(o), _id(o)
        schema = BY_CLASS[cls]
        before = self.get(cls, id_)
        expected = self._expect(schema.kind, cls, id_)
        read: Meta | None = cast("Any", o).meta
        if read is not None and read.version != expected:
            raise _stale(schema.kind, id_, read.version, expected)
        if schema.unique_name and (spec := cast("Any", o).spec) is not None:
            self._claim_name(schema, cls, id_, spec.name)
        if cls in sealed.HOLDERS:
            self._check_keys(o, before)
        old: Meta | None = cast("Any", before).meta if before is not None else None
        meta = Meta(
            version=expected,
            created_at_ns=old.created_at_ns if old else self.now_ns,
            updated_at_ns=old.updated_at_ns if old and unseen else self.now_ns,
            seen_version=(old.seen_version or old.version) if old and unseen else 0,
        )
        o = structs.replace(o, meta=meta)
        over = self._over.get(cls)
        if over is None:
            over = self._over[cls] = _Table(schema, lazy=True)
        over.set(id_, o)
        if (gone := self._gone.get(cls)) is not None:
            gone.discard(id_)
        return o

    def delete(self, cls: type[Message], id_: str) -> None:
        """Removes an object; one that is not there is an error of the caller."""
        errors.invariant(self.get(cls, id_) is not None, f"delete of unknown {cls.__name__} {id_}")
        self._expect(BY_CLASS[cls].kind, cls, id_)
        if (over := self._over.get(cls)) is not None:
            over.set(id_, None)
        if self._base.get(cls, id_) is not None:
            self._gone.setdefault(cls, set()).add(id_)

    def require(self, o: Message) -> None:
        """The commit fails with Stale unless this object is still as it was read."""
        kind, read = BY_CLASS[type(o)].kind, _version(o)
        expected = self._expect(kind, type(o), _id(o))
        if read != expected:
            raise _stale(kind, _id(o), read, expected)

    def guard(self, name: str) -> None:
        """The commit fails with Stale if another one has guarded this name since the view.

        For what is given out by looking at all objects of a kind, and clashes with no row: of two
        writers who each find a port free, on one manager or on two, one goes again. Called in one
        go with the look, by whoever gives out or takes; not by who lets go.
        """
        self.guards.setdefault(name, self._base.guarded(name))

    def guarded(self, name: str) -> int:
        return self.guards.get(name, self._base.guarded(name))

    def _expect(self, kind: Kind, cls: type[Message], id_: str) -> int:
        key = (kind, id_)
        version = self.expected.get(key)
        if version is None:
            version = self.expected[key] = _version(self._base.get(cls, id_))
        return version

    def _check_keys(self, o: Any, before: Any) -> None:
        """What was sealed now, or copied from elsewhere, must still open when a data key is
        dropped: the commit relies on the keyring, and takes none that is on its way out.
        """
        new = set(sealed.parts(o)).difference(sealed.parts(before))
        keyring = next(iter(self.all(Keyring)), None) if new else None
        if keyring is None:
            return
        self._expect(Kind.KEYRING, Keyring, keyring.id)
        given_out = {k.id for k in keyring.data_keys if not k.retired}
        newest = max(given_out, default=0)
        for data in new:
            key_id = sealed.key_id(data)
            # One above the newest came after this view: then the keyring's version says so.
            if 0 < key_id <= newest and key_id not in given_out:
                raise Stale(
                    f"{_id(o)} holds what was sealed with data key {key_id}, which is being "
                    "dropped; read it again and repeat the change"
                )

    def _claim_name(self, schema: Schema, cls: type[Message], id_: str, name: str) -> None:
        for other in self.by(cls, "name", name):
            if _id(other) != id_:
                raise errors.Conflict(
                    f"{schema.kind.name.lower()} name {name!r} is taken by {_id(other)}; "
                    "choose another name, or update or remove that one"
                )

    def changes(self) -> tuple[Change, ...]:
        """What differs from the base, removals last; objects put back unchanged but for Meta are
        left out.
        """
        out = []
        for cls, table in self._over.items():
            kind = BY_CLASS[cls].kind
            for id_, new in table.objects.items():
                old = self._base.get(cls, id_)
                if old is None or structs.replace(cast("Any", old), meta=new.meta) != new:
                    out.append(Change(kind, id_, old, new))
        for cls, ids in self._gone.items():
            kind = BY_CLASS[cls].kind
            out.extend(Change(kind, id_, self._base.get(cls, id_), None) for id_ in sorted(ids))
        return tuple(out)


def _id(o: Any) -> str:
    return cast("str", o.id)


def _version(o: Any) -> int:
    return o.meta.version if o is not None and o.meta is not None else 0


def _stale(kind: Kind, id_: str, read: int, now: int) -> Stale:
    present = f"is at version {now} now" if now else "does not exist now"
    return Stale(
        f"{kind.name.lower()} {id_} was read at version {read} and {present}; read it again and "
        "repeat the change"
    )
