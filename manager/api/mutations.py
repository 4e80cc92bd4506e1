"""Create, update and remove by kind: one request, one draft, and what was done to which object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manager.allocator import PortLedger
from manager.api.leftovers import ask_stack_removal
from manager.api.lookup import find, name_of, quoted, seen_version, served, word
from manager.api.objects import (
    check_subnets_free,
    create_config,
    create_network,
    create_secret,
    create_volume,
    remove_node,
    remove_used,
    update_cluster,
    update_config,
    update_network,
    update_node,
    update_secret,
    update_volume,
)
from manager.api.problems import Finder, Problems
from manager.api.roles import Here
from manager.api.services import (
    Credentials,
    ask_removal,
    create_service,
    prepare,
    restart_followers,
    roll_back,
    update_service,
)
from manager.api.superseding import check_current
from manager.api.validate import mode_name, warnings_of
from manager.api.validate_objects import (
    check_config,
    check_network,
    check_secret,
    check_volume,
)
from manager.ca import Sealer
from manager.store import Draft
from manager.store.tables import BY_KIND
from swarm import errors
from swarm.v1 import (
    Cluster,
    Config,
    CreateRequest,
    Kind,
    Message,
    Network,
    Node,
    RemoveRequest,
    Secret,
    Service,
    ServiceSpec,
    Spec,
    Stack,
    UpdateRequest,
    Volume,
)


@dataclass(frozen=True, slots=True)
class Done:
    """What a request did, for the answer and the audit line."""

    action: str
    kind: Kind
    id: str
    name: str
    warnings: tuple[str, ...] = ()
    # Services whose tasks are replaced as well, because they follow this one (depends_on.restart).
    restarted: tuple[str, ...] = ()

    @property
    def cls(self) -> type[Message]:
        return BY_KIND[self.kind].cls


_SPECS = {
    Kind.SERVICE: "service",
    Kind.SECRET: "secret",
    Kind.CONFIG: "config",
    Kind.NETWORK: "network",
    Kind.VOLUME: "volume",
    Kind.NODE: "node",
    Kind.CLUSTER: "cluster",
}


def _kind_of(spec: Spec) -> Kind:
    kinds = [k for k, field in _SPECS.items() if getattr(spec, field) is not None]
    if len(kinds) != 1:
        raise errors.Invalid("the spec is missing: set exactly one kind of spec")
    return kinds[0]


# ---------------------------------------------------------------- create


def create(
    draft: Draft, request: CreateRequest, *, new_id: Callable[[], str], sealer: Sealer
) -> Done:
    """Makes one object. Raises Invalid, Conflict (the name is taken), Unsupported."""
    given = request.spec or Spec()
    kind = _kind_of(given)
    spec: Any = getattr(given, _SPECS[kind])
    problems = Problems()
    find_ = problems.of(f'{word(kind)} "{spec.name}"')
    if kind == Kind.SERVICE:
        return _create_service(
            find_, draft, spec, new_id(), Credentials(request.registry_auth, sealer)
        )
    match kind:
        case Kind.SECRET:
            check_secret(find_, spec)
        case Kind.CONFIG:
            check_config(find_, spec)
        case Kind.NETWORK:
            check_network(find_, spec)
            check_subnets_free(find_, draft, spec)
        case Kind.VOLUME:
            check_volume(find_, spec)
        case _:
            raise errors.Invalid(
                f"a {word(kind)} cannot be created; nodes join with `swarmctl swarm join`, and a "
                "cluster is made with `swarmctl swarm init`"
            )
    problems.raise_any()
    id_ = new_id()
    match kind:
        case Kind.SECRET:
            create_secret(draft, spec, new_id=id_, sealer=sealer)
        case Kind.CONFIG:
            create_config(draft, spec, new_id=id_)
        case Kind.NETWORK:
            create_network(draft, spec, new_id=id_)
        case _:
            create_volume(draft, spec, new_id=id_)
    return Done("create", kind, id_, spec.name)


def _create_service(
    find_: Finder, draft: Draft, spec: ServiceSpec, id_: str, credentials: Credentials
) -> Done:
    problems = find_.problems
    credentials.check(problems)
    spec = prepare(find_, draft, spec)
    problems.raise_any()
    create_service(
        find_, draft, spec, new_id=id_, credentials=credentials, ledger=PortLedger(draft)
    )
    problems.raise_any()
    return Done("create", Kind.SERVICE, id_, spec.name, warnings_of(spec))


# ---------------------------------------------------------------- update


def update(draft: Draft, request: UpdateRequest, *, sealer: Sealer, here: Here) -> Done:
    """Replaces one object's spec. Raises Conflict when it is not at the given version any more."""
    cls = served(request.kind)
    o: Any = find(draft, cls, request.id)
    _check_version(o, request)
    if request.rollback:
        if not isinstance(o, Service):
            raise errors.Invalid(f"only services can be rolled back, {quoted(o)} cannot")
        _check_pause(o, request.pause_after)
        roll_back(draft, o, to=request.rollback_to, pause_after=request.pause_after)
        followers = _restart_followers(draft, o, sealer)
        return Done("rollback", Kind.SERVICE, o.id, name_of(o), restarted=followers)
    if request.rollback_to:
        raise errors.Invalid(
            f"{quoted(o)}: a version to go back to is named, and the update is no rollback"
        )
    _check_pause(o, request.pause_after)
    given = request.spec or Spec()
    if _kind_of(given) != request.kind:
        raise errors.Invalid(
            f"the spec is one of a {word(_kind_of(given))}, while {quoted(o)} is to be updated"
        )
    warnings: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    match o:
        case Service():
            assert given.service is not None
            warnings = _update_service(
                draft,
                o,
                given.service,
                Credentials(request.registry_auth, sealer),
                pause_after=request.pause_after,
            )
            restarted = _restart_followers(draft, o, sealer)
        case Secret():
            assert given.secret is not None
            check_current(draft, o, what="updated")
            update_secret(draft, o, given.secret, sealer)
        case Config():
            assert given.config is not None
            check_current(draft, o, what="updated")
            update_config(draft, o, given.config)
        case Network():
            assert given.network is not None
            update_network(draft, o, given.network)
        case Volume():
            assert given.volume is not None
            update_volume(draft, o, given.volume)
        case Node():
            assert given.node is not None
            update_node(draft, o, given.node, here=here)
        case Cluster():
            assert given.cluster is not None
            update_cluster(draft, o, given.cluster)
        case _:
            raise errors.Invalid(f"{quoted(o)} cannot be updated")
    return Done("update", request.kind, o.id, name_of(o), warnings, restarted)


def _check_version(o: Any, request: UpdateRequest) -> None:
    at = seen_version(o)
    if not request.version:
        raise errors.Invalid(
            f"{quoted(o)}: the version that the update is based on is missing (it is at {at})"
        )
    if request.version != at:
        what = (
            "it was changed meanwhile"
            if request.version < at
            else "there has never been such a version of it"
        )
        raise errors.Conflict(
            f"update out of sequence: {quoted(o)} is at version {at}, the update is based on "
            f"version {request.version}: {what}; read it again and repeat the change"
        )


def _update_service(
    draft: Draft,
    service: Service,
    spec: ServiceSpec,
    credentials: Credentials,
    *,
    pause_after: int,
) -> tuple[str, ...]:
    problems = Problems()
    find_ = problems.of(quoted(service))
    credentials.check(problems)
    spec = prepare(find_, draft, spec)
    problems.raise_any()
    update_service(
        find_,
        draft,
        service,
        spec,
        credentials=credentials,
        ledger=PortLedger(draft),
        pause_after=pause_after,
    )
    problems.raise_any()
    warnings = warnings_of(spec)
    after = draft.get(Service, service.id)
    status = after.update_status if after is not None else None
    if pause_after and (status is None or status.pause_after != pause_after):
        warnings += (
            f"{quoted(service)} has nothing to pause: no task has to be replaced for this change",
        )
    return warnings


def _check_pause(o: Any, pause_after: int) -> None:
    if not pause_after:
        return
    if not isinstance(o, Service):
        raise errors.Invalid(f"only updates of services can be paused, those of {quoted(o)} cannot")
    if o.spec is not None and o.spec.mode is not None and mode_name(o.spec.mode).endswith("-job"):
        raise errors.Invalid(
            f"{quoted(o)} is a job: its update replaces all of its tasks, and cannot pause"
        )


def _restart_followers(draft: Draft, before: Service, sealer: Sealer) -> tuple[str, ...]:
    """Rolls those who follow the service, if its tasks are being replaced; returns their names."""
    after = draft.get(Service, before.id)
    if after is None or after.task_version == before.task_version:
        return ()
    problems = Problems()
    restarted = restart_followers(
        problems, draft, {name_of(after)}, sealer=sealer, ledger=PortLedger(draft)
    )
    problems.raise_any()
    return tuple(name_of(s) for s in restarted)


# ---------------------------------------------------------------- remove


def remove(draft: Draft, request: RemoveRequest) -> Done:
    """Removes one object, or asks for it where tasks must stop first. Raises NotFound, Conflict."""
    cls = served(request.kind)
    if request.kind in (Kind.CLUSTER, Kind.TASK):
        raise errors.Invalid(
            f"a {word(request.kind)} cannot be removed; "
            + (
                "tasks go with their service, or when it is scaled down"
                if request.kind == Kind.TASK
                else "`swarmctl swarm leave --force` on the last manager ends it"
            )
        )
    o: Any = find(draft, cls, request.ref)
    match o:
        case Service():
            ask_removal(draft, o)
        case Stack():
            ask_stack_removal(draft, o)
        case Secret() | Config() | Network():
            remove_used(draft, o)
        case Node():
            remove_node(draft, o, force=request.force)
        case _:
            draft.delete(cls, o.id)
    return Done("remove", request.kind, o.id, name_of(o))
