"""Rotation: new content for a secret or config under its name, and new tasks for those that use it.

The same as what a stack deploy does with a changed file: a new object takes the name, the old one
becomes an earlier version, and every service whose spec refers to it, of whatever stack or of none,
gets a spec that refers to the new one. So tasks are replaced by each service's own update rules,
and a rollback brings the old content back. All of it is one transaction. It is no deploy: a stack's
revision and history stay as they are, and its next deploy brings back what its files say.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import structs

from manager.allocator import PortLedger
from manager.api.lookup import find, quoted, seen_version, spec_of, task_of, word
from manager.api.objects import create_config, create_secret
from manager.api.problems import Problems
from manager.api.services import Credentials, restart_followers, update_service
from manager.api.superseding import check_current, supersede
from manager.api.validate_objects import check_config, check_secret
from manager.ca import Sealer
from manager.control import ids_used, rely_on_uses
from manager.store import STACK_LABEL, Draft
from swarm import errors
from swarm.v1 import (
    Config,
    Kind,
    RotateRequest,
    RotateResponse,
    Secret,
    Service,
    ServiceSpec,
    Stack,
)


def rotate(
    draft: Draft, request: RotateRequest, *, new_id: Callable[[], str], sealer: Sealer
) -> RotateResponse:
    """Gives the object new content; the same content changes nothing. Services that are being
    removed keep the old one.

    Raises NotFound, Invalid (another kind, content that is not allowed), Conflict (another version
    than the caller has seen; an earlier version; its stack is being removed).
    """
    old = _find(draft, request)
    check_current(draft, old, what="rotated")
    at = seen_version(old)
    if request.version not in (0, at):
        raise errors.Conflict(
            f"rotation out of sequence: {quoted(old)} is at version {at}, the rotation is based on "
            f"version {request.version}; look at it again and repeat the rotation"
        )
    name = _name(old)
    stack = _stack(draft, old)
    if stack is not None and stack.pending_delete:
        raise errors.Conflict(
            f"{quoted(old)} cannot be rotated: {quoted(stack)}, whose it is, is being removed, and "
            "it goes with it"
        )
    new = _put_new(draft, old, request.data, new_id=new_id, sealer=sealer)
    if new is None:
        return RotateResponse(id=old.id)
    if stack is not None:
        leftovers = tuple(sorted({*stack.leftover_ids, old.id}))
        draft.put(structs.replace(stack, leftover_ids=leftovers))
    rolled = _roll_users(draft, old.id, new.id, name, sealer)
    return RotateResponse(
        id=new.id,
        services=tuple(spec_of(s).name for s in rolled),
        service_ids=tuple(s.id for s in rolled),
    )


def _find(draft: Draft, request: RotateRequest) -> Secret | Config:
    match request.kind:
        case Kind.SECRET:
            return find(draft, Secret, request.ref)
        case Kind.CONFIG:
            return find(draft, Config, request.ref)
        case _:
            raise errors.Invalid(
                f"only secrets and configs can be rotated, a {word(request.kind)} cannot"
            )


def _name(o: Secret | Config) -> str:
    assert o.spec is not None
    return o.spec.name


def _stack(draft: Draft, o: Secret | Config) -> Stack | None:
    """The stack that the object is part of."""
    assert o.spec is not None
    owner = o.spec.labels.get(STACK_LABEL, "")
    return next(iter(draft.by(Stack, "name", owner)), None)


def _put_new(
    draft: Draft,
    old: Secret | Config,
    data: bytes,
    *,
    new_id: Callable[[], str],
    sealer: Sealer,
) -> Secret | Config | None:
    """The object that takes the name, with the labels and templating of the old one; None: the
    content is the same.
    """
    problems = Problems()
    finder = problems.of(quoted(old))
    assert old.spec is not None
    if isinstance(old, Secret):
        secret = structs.replace(old.spec, data=data)
        check_secret(finder, secret)
        problems.raise_any()
        if sealer.digest(data) == old.digest:
            return None
        supersede(draft, old)
        return create_secret(draft, secret, new_id=new_id(), sealer=sealer)
    config = structs.replace(old.spec, data=data)
    check_config(finder, config)
    problems.raise_any()
    if data == old.spec.data:
        return None
    supersede(draft, old)
    return create_config(draft, config, new_id=new_id())


def _roll_users(draft: Draft, old: str, new: str, name: str, sealer: Sealer) -> list[Service]:
    """Services that get the new object, and those that follow one of them, by name."""
    problems = Problems()
    ledger = PortLedger(draft)
    rely_on_uses(draft, old)
    users = [s for s in draft.all(Service) if old in ids_used(spec_of(s)) and not s.pending_delete]
    for service in users:
        update_service(
            problems.of(quoted(service)),
            draft,
            service,
            _referring(spec_of(service), old, new, name),
            credentials=Credentials("", sealer),
            ledger=ledger,
        )
    changed = frozenset(spec_of(s).name for s in users)
    users += restart_followers(problems, draft, changed, sealer=sealer, ledger=ledger)
    problems.raise_any()
    return sorted(users, key=lambda s: spec_of(s).name)


def _referring(spec: ServiceSpec, old: str, new: str, name: str) -> ServiceSpec:
    """The spec with the new object in the old one's place, in the same file."""
    task = task_of(spec)
    container = task.container
    assert container is not None, "only containers use secrets and configs"
    container = structs.replace(
        container,
        secrets=tuple(
            structs.replace(s, secret_id=new, secret_name=name) if s.secret_id == old else s
            for s in container.secrets
        ),
        configs=tuple(
            structs.replace(c, config_id=new, config_name=name) if c.config_id == old else c
            for c in container.configs
        ),
    )
    return structs.replace(spec, task=structs.replace(task, container=container))
