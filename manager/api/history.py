"""The history of stacks: one StackRevision for each deploy that changed something.

A revision holds no content: it says which Secret and Config objects held it, and these stay for as
long as the revision does (references.kept_ids). Only objects of the stack itself are noted; what is
external to it is used as it is at the time, also after a rollback. A stack that was deployed before
histories were kept gets the entry for what it is at that moment (`present_revision`), so that its
first deploy afterwards can be undone as any other.

Called by stacks.deploy (writing), stack_request (going back) and the API (showing).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from msgspec import structs

from manager.api.lookup import find, quoted
from manager.api.present import present_stack, present_stack_revision
from manager.ca import Sealer
from manager.store import STACK_LABEL, Draft, View
from swarm import errors
from swarm.v1 import (
    Config,
    GetStackHistoryResponse,
    Secret,
    Service,
    ServiceRevision,
    Stack,
    StackChange,
    StackRevision,
    StackSpec,
)

# Deploys that can be gone back to, the present one among them. As many as Kubernetes keeps of a
# Deployment (revisionHistoryLimit): more than people go back by hand, and it bounds what old
# content stays in the store.
HISTORY_MAX = 10

_C = TypeVar("_C", Secret, Config)


# ---------------------------------------------------------------- reading


def history(view: View, ref: str) -> GetStackHistoryResponse:
    """A stack's revisions, newest first. Raises NotFound, Invalid (ambiguous)."""
    stack = find(view, Stack, ref)
    return GetStackHistoryResponse(
        stack=present_stack(stack),
        revisions=tuple(present_stack_revision(r) for r in revisions(view, stack)),
    )


def revisions(view: View, stack: Stack) -> list[StackRevision]:
    """The kept revisions, newest first. A stack on its way out has none any more."""
    if stack.pending_delete:
        return []
    kept = view.by(StackRevision, "stack", stack.id)
    if all(r.revision != stack.revision for r in kept):
        kept.append(present_revision(view, stack))
    return sorted(kept, key=lambda r: r.revision, reverse=True)


def present_revision(view: View, stack: Stack) -> StackRevision:
    """What the entry of the present revision would be, from the objects as they are."""
    assert stack.spec is not None
    return StackRevision(
        id=f"{stack.id}.{stack.revision}",
        meta=stack.meta,
        stack_id=stack.id,
        revision=stack.revision,
        spec=stack.spec,
        secret_ids=_ids(view, Secret, stack.spec.name, (s.name for s in stack.spec.secrets)),
        config_ids=_ids(view, Config, stack.spec.name, (c.name for c in stack.spec.configs)),
        sealed_registry_auths=_auths(view, stack.spec),
    )


def _ids(view: View, cls: type[_C], stack: str, names: Iterable[str]) -> dict[str, str]:
    """The stack's own objects by name."""
    return {
        name: o.id
        for name in names
        for o in view.by(cls, "name", name)
        if o.spec is not None and o.spec.labels.get(STACK_LABEL) == stack
    }


def _auths(view: View, spec: StackSpec) -> dict[str, bytes]:
    """What the services of the spec are pulled with now, sealed, by their names."""
    out = {}
    for name in sorted(s.name for s in spec.services):
        for service in view.by(Service, "name", name):
            revision = view.get(ServiceRevision, f"{service.id}.{service.spec_version}")
            if revision is not None and revision.sealed_registry_auth:
                out[name] = revision.sealed_registry_auth
    return out


# ---------------------------------------------------------------- going back


def chosen(view: View, stack: Stack, number: int) -> StackRevision:
    """The revision to go back to; 0: the one before the present. Raises NotFound, with those that
    are kept, and Conflict when there is none before the present one.
    """
    if stack.pending_delete:
        raise errors.Conflict(
            f"{quoted(stack)} is being removed, and its history with it: there is nothing to go "
            "back to; deploy it again from its files"
        )
    kept = revisions(view, stack)
    if number == 0:
        for revision in kept:
            if revision.revision < stack.revision:
                return revision
        why = (
            "it was deployed once"
            if stack.revision == 1
            else f"only revision {stack.revision}, the present one, is kept"
        )
        raise errors.Conflict(
            f"{quoted(stack)} has no earlier revision to go back to: {why}; change its files and "
            "deploy it instead"
        )
    for revision in kept:
        if revision.revision == number:
            return revision
    raise errors.NotFound(
        f"{quoted(stack)} has no revision {number} to go back to; kept are "
        f"{_listed([r.revision for r in kept])} (`swarmctl stack history` says what they did)"
    )


def _listed(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if len(numbers) > 2 and high - low + 1 == len(numbers):
        return f"{low} to {high}"
    return (
        " and ".join(str(n) for n in sorted(numbers))
        if len(numbers) < 3
        else ", ".join(str(n) for n in sorted(numbers))
    )


def rebuilt(view: View, revision: StackRevision, *, sealer: Sealer) -> StackSpec:
    """The spec of a revision with the content that its secrets and configs had. Raises Conflict,
    with all that is missing, where content was removed by hand since.
    """
    spec = revision.spec
    errors.invariant(spec is not None, f"stack revision {revision.id} has no spec")
    assert spec is not None
    missing: list[str] = []
    secrets = []
    for secret in spec.secrets:
        held = view.get(Secret, revision.secret_ids.get(secret.name, ""))
        if held is None:
            missing.append(f"secret {secret.name!r}")
        else:
            secrets.append(structs.replace(secret, data=sealer.open(held.sealed)))
    configs = []
    for config in spec.configs:
        kept = view.get(Config, revision.config_ids.get(config.name, ""))
        if kept is None or kept.spec is None:
            missing.append(f"config {config.name!r}")
        else:
            configs.append(structs.replace(config, data=kept.spec.data))
    if missing:
        raise errors.Conflict(
            f'stack "{spec.name}" cannot go back to revision {revision.revision}: the content that '
            f"{', '.join(missing)} had then was removed; choose another revision, or deploy from "
            "files"
        )
    return structs.replace(spec, secrets=tuple(secrets), configs=tuple(configs))


def credentials(revision: StackRevision, *, sealer: Sealer) -> Mapping[str, str]:
    """What the images of the revision were pulled with, by service."""
    return {
        name: sealer.open(sealed).decode()
        for name, sealed in sorted(revision.sealed_registry_auths.items())
    }


# ---------------------------------------------------------------- writing


def keep(draft: Draft, revision: StackRevision) -> None:
    """The entry that a stack from before histories were kept should have; nothing for others."""
    if draft.get(StackRevision, revision.id) is None:
        draft.put(structs.replace(revision, meta=None))


def record(
    draft: Draft,
    stack: Stack,
    *,
    changes: Iterable[StackChange],
    who: str,
    rollback_to: int,
    prune: bool,
) -> None:
    """Notes what the deploy made of the stack, and forgets what is too old."""
    draft.put(
        structs.replace(
            present_revision(draft, stack),
            meta=None,
            changes=tuple(changes),
            who=who,
            rollback_to=rollback_to,
            prune=prune,
        )
    )
    for old in revisions(draft, stack)[HISTORY_MAX:]:
        draft.delete(StackRevision, old.id)


def forget(draft: Draft, stack: Stack) -> None:
    """A stack that goes takes its history along."""
    for revision in sorted(draft.by(StackRevision, "stack", stack.id), key=lambda r: r.id):
        draft.delete(StackRevision, revision.id)
