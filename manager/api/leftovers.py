"""What stacks and rotations leave behind: asking for a stack's removal, and the clean-up after it.

Networks, secrets and configs that are no longer part of a stack, earlier versions of secrets and
configs, and stacks on their way out are removed as soon as nothing refers to them any more.
`finish` may run on any manager, as often as it likes: doing it twice is the same as once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from msgspec import structs

from manager.api import history
from manager.api.lookup import quoted, word
from manager.api.references import kept_ids, users
from manager.api.services import ask_removal
from manager.control import rely_on_uses
from manager.store import Draft, View
from swarm import errors
from swarm.v1 import Config, Kind, Network, Secret, Service, Stack, Volume

# What services use, and may go on using when it is no part of the stack any more.
USED: tuple[tuple[Kind, type[Any]], ...] = (
    (Kind.NETWORK, Network),
    (Kind.SECRET, Secret),
    (Kind.CONFIG, Config),
)


def ask_stack_removal(draft: Draft, stack: Stack) -> None:
    """Stops the stack's services and marks the rest to follow them. Raises Conflict, with nothing
    changed, when services outside of the stack use its networks, secrets or configs.
    """
    if stack.pending_delete:
        return
    assert stack.spec is not None
    name = stack.spec.name
    services = by_id(draft.by(Service, "stack", name))
    own = {quoted(s) for s in services}
    leftovers = set(stack.leftover_ids)
    for kind, cls in USED:
        for o in by_id(draft.by(cls, "stack", name)):
            foreign = [u for u in users(draft, o.id) if _service_part(u) not in own]
            if foreign:
                raise errors.Conflict(
                    f'stack "{name}" cannot be removed: its {word(kind)} {o.spec.name!r} is in '
                    f"use by {', '.join(foreign)}, which is not part of it; remove that first"
                )
            leftovers.add(o.id)
    for service in services:
        ask_removal(draft, service)
    history.forget(draft, stack)
    draft.put(structs.replace(stack, pending_delete=True, leftover_ids=tuple(sorted(leftovers))))


def finish(draft: Draft) -> tuple[str, ...]:
    """Removes earlier versions and leftovers that nothing refers to, and stacks that are being
    removed and have nothing left; returns the names of stacks that went. Doing it again changes
    nothing.
    """
    stacks = [s for s in by_id(draft.all(Stack)) if s.leftover_ids or s.pending_delete]
    earlier = _earlier(draft)
    if not stacks and not earlier:
        return ()
    kept = kept_ids(draft)
    for o in earlier:
        _drop(draft, o.id, kept)
    gone = []
    for stack in stacks:
        left = tuple(i for i in stack.leftover_ids if not _drop(draft, i, kept))
        assert stack.spec is not None
        name = stack.spec.name
        if stack.pending_delete and not left and not draft.by(Service, "stack", name):
            for volume in by_id(draft.by(Volume, "stack", name)):
                draft.delete(Volume, volume.id)
            history.forget(draft, stack)
            draft.delete(Stack, stack.id)
            gone.append(name)
        elif left != stack.leftover_ids:
            draft.put(structs.replace(stack, leftover_ids=left))
    return tuple(gone)


def unfinished(view: View) -> bool:
    """Whether `finish` may have anything to do."""
    if any(s.leftover_ids or s.pending_delete for s in view.all(Stack)):
        return True
    return any(s.superseded for s in view.all(Secret)) or any(
        c.superseded for c in view.all(Config)
    )


def _earlier(view: View) -> list[Secret | Config]:
    """Superseded secrets and configs, of stacks or not."""
    found: list[Secret | Config] = [s for s in view.all(Secret) if s.superseded]
    found += [c for c in view.all(Config) if c.superseded]
    return by_id(found)


def _drop(draft: Draft, id_: str, kept: set[str]) -> bool:
    """Removes a leftover unless it is still referred to; True: it is gone."""
    if id_ in kept:
        return False
    for _, cls in USED:
        if draft.get(cls, id_) is not None:
            rely_on_uses(draft, id_)
            draft.delete(cls, id_)
    return True


def _service_part(user: str) -> str:
    return user.partition(" (")[0]


def by_id(objects: Iterable[Any]) -> list[Any]:
    return sorted(objects, key=lambda o: o.id)
