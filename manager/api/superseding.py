"""Earlier versions of secrets and configs: how an object gives its name up to a newer one.

Content is never edited in place: tasks were started with it, and a rollback needs it. The old
object is renamed NAME.<8 of its id> and marked `superseded`; the new one takes the name. The old
one stays for as long as a spec that can come back refers to it (references.kept_ids), then
leftovers.finish removes it, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from msgspec import structs

from manager.api.lookup import quoted
from manager.store import STACK_LABEL, Draft, View
from swarm import errors
from swarm.v1 import Config, ConfigSpec, Secret, SecretSpec

_C = TypeVar("_C", Secret, Config)

_NAME_CHARS_MAX = 64
_SUFFIX_CHARS = 8
_KEPT_CHARS = _NAME_CHARS_MAX - _SUFFIX_CHARS - 1


def supersede(draft: Draft, old: Secret | Config) -> None:
    """Takes the object's name off, so that a newer one can be put under it."""
    assert old.spec is not None
    name = f"{old.spec.name[:_KEPT_CHARS]}.{old.id[:_SUFFIX_CHARS]}"
    renamed = structs.replace(old.spec, name=name)
    draft.put(structs.replace(old, spec=renamed, superseded=True))


def revive(draft: Draft, old: _C, spec: SecretSpec | ConfigSpec, same: Callable[[_C], bool]) -> str:
    """Lets an earlier version of `old`, which has just given its name up, have the name again; its
    id, or "" where there is none that is the `same`. Services that use it (their update was rolled
    back) then have what is asked for, and are not rolled.
    """
    if len(spec.name) > _KEPT_CHARS:
        return ""  # two names may have been cut to the same
    owner = spec.labels.get(STACK_LABEL, "")
    for o in sorted(draft.by(type(old), "stack", owner), key=lambda o: o.id):
        assert o.spec is not None
        earlier = o.superseded and o.spec.name == f"{spec.name}.{o.id[:_SUFFIX_CHARS]}"
        if earlier and o.id != old.id and same(o):
            named = structs.replace(o.spec, name=spec.name, labels=spec.labels)
            draft.put(structs.replace(o, spec=named, superseded=False))
            return o.id
    return ""


def newer(view: View, old: Secret | Config) -> str:
    """The name that a superseded object had, as far as it is known; of a long name the first 55
    characters were kept, and what has them now is looked for.
    """
    assert old.spec is not None
    base = old.spec.name.removesuffix(f".{old.id[:_SUFFIX_CHARS]}")
    if len(base) < _KEPT_CHARS:
        return base
    objects: Iterable[Secret | Config] = view.all(type(old))
    names = sorted(
        o.spec.name
        for o in objects
        if o.spec is not None and not o.superseded and o.spec.name.startswith(base)
    )
    return names[0] if names else base


def check_current(view: View, o: Secret | Config, *, what: str) -> None:
    """Raises Conflict for an earlier version: it is history and stays as it is."""
    if o.superseded:
        raise errors.Conflict(
            f"{quoted(o)} ({o.id}) is an earlier version and cannot be {what}: it is kept only for "
            f"specs that can be rolled back to; name the present one, {newer(view, o)!r}"
        )
