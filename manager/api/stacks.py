"""Stacks: the whole composition in one transaction.

`deploy` makes the cluster hold what is wanted, or changes nothing; a plan calls it on a draft that
is thrown away, so it must look at nothing but the draft. A secret or config whose content changed
is not edited (tasks were started with the old one, a rollback needs it): the old object gives its
name up, a new one takes it, and the services that use it get a changed template by that alone, so
they are rolled out and can be rolled back. What is no longer part of the stack but still in use is
a leftover of the Stack object, which leftovers.finish removes. Every deploy that changed something
makes an entry in the stack's history.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from msgspec import structs

from manager.allocator import PortLedger
from manager.api import history
from manager.api.leftovers import USED, by_id
from manager.api.lookup import nearest_name, spec_of, word
from manager.api.names import check_stack_name
from manager.api.objects import (
    check_subnets_free,
    create_config,
    create_network,
    create_secret,
    create_volume,
)
from manager.api.plan_version import check_expected
from manager.api.problems import Finder, Problems
from manager.api.references import kept_ids
from manager.api.services import (
    Credentials,
    RemovalPending,
    ask_removal,
    create_service,
    follows,
    force_update,
    forced,
    mode_change,
    prepare,
    restart_followers,
    service_revision,
    update_service,
)
from manager.api.stack_request import Wanted, resolve_request
from manager.api.superseding import newer, revive, supersede
from manager.api.validate import warnings_of
from manager.api.validate_objects import (
    check_config,
    check_network,
    check_secret,
    check_volume,
)
from manager.ca import Sealer
from manager.control import needs_new_tasks, rely_on_uses
from manager.control.versions import is_cancelled
from manager.store import STACK_LABEL, Draft
from swarm.v1 import (
    Config,
    ConfigSpec,
    DeployStackRequest,
    DeployStackResponse,
    JobSpec,
    Kind,
    Network,
    NetworkSpec,
    Secret,
    SecretSpec,
    Service,
    ServiceSpec,
    Stack,
    StackChange,
    StackRevision,
    StackSpec,
    Volume,
    VolumeSpec,
)

SERVICES_MAX = 1000  # of one stack
CREATED, UPDATED, UNCHANGED, REMOVED = "created", "updated", "unchanged", "removed"

_C = TypeVar("_C", Secret, Config)


@dataclass(slots=True)
class _Deploy:
    """One deploy under way: what it needs, and what it has done so far."""

    draft: Draft
    spec: StackSpec
    new_id: Callable[[], str]
    sealer: Sealer
    # Of services without an entry in `registry_auths`.
    credentials: Credentials
    registry_auths: Mapping[str, str]
    problems: Problems
    stack_id: str
    ledger: PortLedger
    # The stack as the deploy found it, for the history.
    before: StackRevision | None
    leftovers: set[str]
    changes: list[StackChange] = field(default_factory=list)
    # Ids of services of which nothing but a paused roll-out is taken up again.
    resumed: set[str] = field(default_factory=set)
    service_names: frozenset[str] = field(init=False)
    # What the spec declares, (kind, name): problems with it are told where it is declared, and not
    # once more by each service that uses it.
    declared: frozenset[tuple[Kind, str]] = field(init=False)

    def __post_init__(self) -> None:
        spec = self.spec
        self.service_names = frozenset(s.name for s in spec.services)
        own: tuple[tuple[Kind, Iterable[Any]], ...] = (
            (Kind.NETWORK, spec.networks),
            (Kind.SECRET, spec.secrets),
            (Kind.CONFIG, spec.configs),
        )
        external = (
            (Kind.NETWORK, spec.external_networks),
            (Kind.SECRET, spec.external_secrets),
            (Kind.CONFIG, spec.external_configs),
        )
        self.declared = frozenset(
            [(kind, o.name) for kind, specs in own for o in specs]
            + [(kind, name) for kind, names in external for name in names]
        )

    def credentials_of(self, spec: ServiceSpec) -> Credentials:
        """What the service's image is pulled with; images may come from several registries."""
        auth = self.registry_auths.get(spec.name)
        return self.credentials if auth is None else Credentials(auth, self.sealer)

    def note(self, kind: Kind, name: str, id_: str, action: str) -> None:
        changed = action in (CREATED, UPDATED) and kind is Kind.SERVICE
        service = self.draft.get(Service, id_) if changed else None
        version = service.spec_version if service is not None else 0
        self.changes.append(
            StackChange(kind=kind, name=name, id=id_, action=action, spec_version=version)
        )

    def mine(self, cls: type[Any], name: str, find: Finder) -> Any:
        """The object of this name; one that is not this stack's is noted as a problem."""
        found = next(iter(self.draft.by(cls, "name", name)), None)
        if found is None:
            return None
        owner = found.spec.labels.get(STACK_LABEL)
        if getattr(found, "superseded", False):
            find.add(
                "name",
                f"{name!r} is the name that an earlier version of {newer(self.draft, found)!r} is "
                "kept under; choose another name",
            )
        elif owner == self.spec.name:
            return found
        else:
            self._note_taken(name, owner, find)
        return found

    def _note_taken(self, name: str, owner: str | None, find: Finder) -> None:
        whose = f"belongs to stack {owner!r}" if owner else "was not made by a stack"
        find.add(
            "name",
            f"{name!r} exists already and {whose}; declare it as external, rename it, or remove "
            "that one",
        )


def deploy_request(
    draft: Draft,
    request: DeployStackRequest,
    *,
    who: str,
    new_id: Callable[[], str],
    sealer: Sealer,
) -> DeployStackResponse:
    """One DeployStack call: what `resolve_request`, `check_expected` and `deploy` do and raise."""
    wanted = resolve_request(draft, request, sealer=sealer)
    if request.expected_version:
        check_expected(draft, wanted, request.expected_version, sealer=sealer)
    return deploy(draft, wanted, who=who, new_id=new_id, sealer=sealer)


def deploy(
    draft: Draft, wanted: Wanted, *, who: str, new_id: Callable[[], str], sealer: Sealer
) -> DeployStackResponse:
    """Makes the draft hold what is wanted; `who` is noted in the history.

    Raises Invalid with all problems, Conflict, and RemovalPending when parts of an earlier removal
    are in the way. After an error the draft is of no use and must not be committed.
    """
    spec = wanted.spec
    stack = next(iter(draft.by(Stack, "name", spec.name)), None)
    if stack is not None and stack.pending_delete:
        raise RemovalPending(
            f'stack "{spec.name}" is still being removed: its tasks are stopping; try again when '
            "they are gone",
            {stack.id},
        )
    work = _Deploy(
        draft=draft,
        spec=spec,
        new_id=new_id,
        sealer=sealer,
        credentials=Credentials(wanted.registry_auth, sealer),
        registry_auths=wanted.registry_auths,
        problems=Problems(),
        stack_id=stack.id if stack is not None else new_id(),
        ledger=PortLedger(draft),
        before=history.present_revision(draft, stack) if stack is not None else None,
        leftovers=set(stack.leftover_ids) if stack is not None else set(),
    )
    _check(work)
    for network in spec.networks:
        _deploy_network(work, network)
    for secret in spec.secrets:
        _deploy_secret(work, secret)
    for config in spec.configs:
        _deploy_config(work, config)
    for volume in spec.volumes:
        _deploy_volume(work, volume)
    gone = _prune_services(work) if wanted.prune else []
    services = [_prepare(work, s) for s in spec.services]
    work.problems.raise_any()
    changed = _to_be_rolled(work, services)
    services = [_following(work, s, changed) for s in services]
    _give_ports_up(work, services)
    for service in services:
        _deploy_service(work, service)
    _restart_others(work, changed)
    work.problems.raise_any()
    work.changes.extend(gone)
    if work.before is not None:
        history.keep(draft, work.before)
    if wanted.prune:
        _prune_used(work)
    stack = _put_stack(work, stack, wanted, who=who)
    return DeployStackResponse(
        stack_id=stack.id,
        revision=stack.revision,
        changes=tuple(work.changes),
        warnings=tuple(w for s in services for w in warnings_of(s)),
    )


def _check(work: _Deploy) -> None:
    """Names, doubles, and what must already exist."""
    spec, problems = work.spec, work.problems
    find = problems.of(f'stack "{spec.name}"')
    check_stack_name(find, spec.name)
    if len(spec.services) > SERVICES_MAX:
        find.add("services", f"{len(spec.services)} are more than the limit of {SERVICES_MAX}")
    work.credentials.check(problems)
    for name in sorted(work.registry_auths):
        Credentials(work.registry_auths[name], work.sealer).check(problems)
    for field_, specs in (
        ("services", spec.services),
        ("networks", spec.networks),
        ("secrets", spec.secrets),
        ("configs", spec.configs),
        ("volumes", spec.volumes),
    ):
        counts = Counter(s.name for s in _any(specs))
        for name in sorted(n for n, count in counts.items() if count > 1):
            find.add(field_, f"{name!r} is declared twice")
    for kind, cls, wanted in (
        (Kind.NETWORK, Network, spec.external_networks),
        (Kind.SECRET, Secret, spec.external_secrets),
        (Kind.CONFIG, Config, spec.external_configs),
    ):
        for name in wanted:
            if not work.draft.by(cls, "name", name):
                find.add(
                    f"{word(kind)}s",
                    f"{word(kind)} {name!r} is declared as external, but could not be found; "
                    f"create it before the stack is deployed (`swarmctl {word(kind)} create`)"
                    f"{nearest_name(work.draft, cls, name)}",
                )
    waits = _cycle({s.name: [d.service for d in s.depends_on] for s in spec.services})
    if waits:
        find.add("depends_on", f"services wait for each other: {' -> '.join(waits)}")


def _cycle(waits_for: dict[str, list[str]]) -> list[str]:
    """One circle of services that wait for each other, or nothing."""
    done: set[str] = set()
    for start in waits_for:
        path: list[str] = []
        trail = [iter([start])]
        while trail:
            name = next(trail[-1], None)
            if name is None:
                trail.pop()
                if path:
                    done.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name in waits_for and name not in done:
                path.append(name)
                trail.append(iter(waits_for[name]))
    return []


# ---------------------------------------------------------------- each kind


def _deploy_network(work: _Deploy, spec: NetworkSpec) -> None:
    find = work.problems.of(f'network "{spec.name}"')
    before = len(work.problems.found)
    check_network(find, spec)
    old: Network | None = work.mine(Network, spec.name, find)
    if old is None:
        check_subnets_free(find, work.draft, spec)
    if len(work.problems.found) > before:
        return
    if old is None:
        made = create_network(work.draft, spec, new_id=work.new_id())
        work.note(Kind.NETWORK, spec.name, made.id, CREATED)
        return
    work.leftovers.discard(old.id)
    assert old.spec is not None
    differing = _differences(old.spec, spec)
    if differing:
        find.add(
            differing[0],
            f"a network cannot be changed, and {', '.join(differing)} differ from the network that "
            "exists; give it another name, or remove the stack and deploy it again",
        )
        return
    _put_labels(work, Kind.NETWORK, old, spec)


def _differences(before: Any, after: Any) -> list[str]:
    """Fields in which two specs differ, labels aside. Absent and empty drivers are the same."""
    out = []
    for name in before.__struct_fields__:
        old, new = getattr(before, name), getattr(after, name)
        if name != "labels" and old != new and (old or new):
            out.append(name)
    return out


def _put_labels(work: _Deploy, kind: Kind, old: Any, spec: Any) -> None:
    """An object of which at most the labels change."""
    if old.spec.labels == spec.labels:
        work.note(kind, spec.name, old.id, UNCHANGED)
        return
    labelled = structs.replace(old.spec, labels=spec.labels)
    work.draft.put(structs.replace(old, spec=labelled))
    work.note(kind, spec.name, old.id, UPDATED)


def _deploy_secret(work: _Deploy, spec: SecretSpec) -> None:
    find = work.problems.of(f'secret "{spec.name}"')
    before = len(work.problems.found)
    check_secret(find, spec)
    old: Secret | None = work.mine(Secret, spec.name, find)
    if len(work.problems.found) > before:
        return
    digest = work.sealer.digest(spec.data)

    def same(o: Secret) -> bool:
        assert o.spec is not None
        return o.digest == digest and o.spec.templating == spec.templating

    if not _take(work, Kind.SECRET, old, spec, same):
        made = create_secret(work.draft, spec, new_id=work.new_id(), sealer=work.sealer)
        work.note(Kind.SECRET, spec.name, made.id, CREATED if old is None else UPDATED)


def _deploy_config(work: _Deploy, spec: ConfigSpec) -> None:
    find = work.problems.of(f'config "{spec.name}"')
    before = len(work.problems.found)
    check_config(find, spec)
    old: Config | None = work.mine(Config, spec.name, find)
    if len(work.problems.found) > before:
        return

    def same(o: Config) -> bool:
        assert o.spec is not None
        return o.spec.data == spec.data and o.spec.templating == spec.templating

    if not _take(work, Kind.CONFIG, old, spec, same):
        made = create_config(work.draft, spec, new_id=work.new_id())
        work.note(Kind.CONFIG, spec.name, made.id, CREATED if old is None else UPDATED)


def _take(
    work: _Deploy,
    kind: Kind,
    old: _C | None,
    spec: SecretSpec | ConfigSpec,
    same: Callable[[_C], bool],
) -> bool:
    """Lets the object that is there, or an earlier version of it, stand for the spec; False: a new
    one has to be made, for which the name is free.
    """
    if old is None:
        return False
    if same(old):
        work.leftovers.discard(old.id)
        _put_labels(work, kind, old, spec)
        return True
    supersede(work.draft, old)
    work.leftovers.add(old.id)
    revived = revive(work.draft, old, spec, same)
    if revived:
        work.leftovers.discard(revived)
        work.note(kind, spec.name, revived, UPDATED)
    return bool(revived)


def _deploy_volume(work: _Deploy, spec: VolumeSpec) -> None:
    find = work.problems.of(f'volume "{spec.name}"')
    before = len(work.problems.found)
    check_volume(find, spec)
    old: Volume | None = work.mine(Volume, spec.name, find)
    if len(work.problems.found) > before:
        return
    if old is None:
        made = create_volume(work.draft, spec, new_id=work.new_id())
        work.note(Kind.VOLUME, spec.name, made.id, CREATED)
        return
    assert old.spec is not None
    if _differences(old.spec, spec):
        find.add(
            "driver",
            "a volume cannot be changed, and its driver or options differ from those it was made "
            "with; give it another name",
        )
        return
    _put_labels(work, Kind.VOLUME, old, spec)


def _prepare(work: _Deploy, spec: ServiceSpec) -> ServiceSpec:
    find = work.problems.of(f'service "{spec.name}"')
    old: Service | None = work.mine(Service, spec.name, find)
    if old is not None and not old.pending_delete:
        refused = mode_change(spec_of(old), spec)
        if refused:
            find.add("mode", refused)
    if old is not None and spec.task is not None:
        # A stack file has no way to say it, so what `service update --force` counted up stays.
        force = max(spec.task.force_update, force_update(spec_of(old)))
        spec = structs.replace(spec, task=structs.replace(spec.task, force_update=force))
    spec = prepare(find, work.draft, spec, others=work.service_names, declared=work.declared)
    if old is not None and is_cancelled(spec_of(old)) and not needs_new_tasks(spec_of(old), spec):
        # Nor that a job was cancelled; it stays so until its template changes.
        spec = structs.replace(spec, job=structs.replace(spec.job or JobSpec(), cancelled=True))
    return spec


def _to_be_rolled(work: _Deploy, specs: Iterable[ServiceSpec]) -> frozenset[str]:
    """Names of the services that exist and whose tasks the deploy replaces."""
    return frozenset(
        spec.name
        for spec in specs
        for old in work.draft.by(Service, "name", spec.name)
        if not old.pending_delete and needs_new_tasks(spec_of(old), spec)
    )


def _following(work: _Deploy, spec: ServiceSpec, changed: frozenset[str]) -> ServiceSpec:
    """The spec, rolled if it says so of a service that is (`depends_on: restart`). Counted up here,
    before the service is put, so that it gets one new version and not two.
    """
    exists = any(not s.pending_delete for s in work.draft.by(Service, "name", spec.name))
    if not exists or spec.name in changed or not follows(spec, changed):
        return spec
    return forced(spec)


def _restart_others(work: _Deploy, changed: frozenset[str]) -> None:
    """The same for services that the spec does not name."""
    restarted = restart_followers(
        work.problems,
        work.draft,
        changed,
        but=work.service_names,
        sealer=work.sealer,
        ledger=work.ledger,
    )
    for service in restarted:
        work.note(Kind.SERVICE, spec_of(service).name, service.id, UPDATED)


def _give_ports_up(work: _Deploy, specs: Iterable[ServiceSpec]) -> None:
    """Ports that a service of the stack loses can be taken by another one of it, in any order."""
    for spec in specs:
        for old in work.draft.by(Service, "name", spec.name):
            if old.endpoint is not None and old.endpoint.ports and not old.pending_delete:
                work.ledger.give_up(old, spec.endpoint.ports if spec.endpoint else ())


def _deploy_service(work: _Deploy, spec: ServiceSpec) -> None:
    find = work.problems.of(f'service "{spec.name}"')
    old = next(iter(work.draft.by(Service, "name", spec.name)), None)
    if old is None or old.pending_delete:
        made = create_service(
            find,
            work.draft,
            spec,
            new_id=work.new_id(),
            credentials=work.credentials_of(spec),
            ledger=work.ledger,
            stack_id=work.stack_id,
        )
        work.note(Kind.SERVICE, spec.name, made.id, CREATED)
        return
    before = service_revision(work.draft, old)
    changed = update_service(
        find, work.draft, old, spec, credentials=work.credentials_of(spec), ledger=work.ledger
    )
    if changed and spec == spec_of(old) and service_revision(work.draft, old) is before:
        work.resumed.add(old.id)
    work.note(Kind.SERVICE, spec.name, old.id, UPDATED if changed else UNCHANGED)


# ---------------------------------------------------------------- what is no longer named


def _prune_services(work: _Deploy) -> list[StackChange]:
    named = {s.name for s in work.spec.services}
    out = []
    for service in by_id(work.draft.by(Service, "stack", work.spec.name)):
        name = spec_of(service).name
        if name not in named and not service.pending_delete:
            ask_removal(work.draft, service)
            out.append(StackChange(kind=Kind.SERVICE, name=name, id=service.id, action=REMOVED))
    return out


def _prune_used(work: _Deploy) -> None:
    """Networks, secrets and configs the spec no longer names: at once where nothing uses them, else
    as soon as that is so. Secrets and configs are used by the history as well, for long: these give
    their names up, so that they are neither seen nor in the way.
    """
    kept = kept_ids(work.draft)
    named = {
        Kind.NETWORK: {n.name for n in work.spec.networks},
        Kind.SECRET: {s.name for s in work.spec.secrets},
        Kind.CONFIG: {c.name for c in work.spec.configs},
    }
    for kind, cls in USED:
        for o in by_id(work.draft.by(cls, "stack", work.spec.name)):
            if o.spec.name in named[kind] or o.id in work.leftovers:
                continue
            work.note(kind, o.spec.name, o.id, REMOVED)
            if o.id not in kept:
                rely_on_uses(work.draft, o.id)
                work.draft.delete(cls, o.id)
                continue
            work.leftovers.add(o.id)
            if isinstance(o, Secret | Config):
                supersede(work.draft, o)


def _put_stack(work: _Deploy, old: Stack | None, wanted: Wanted, *, who: str) -> Stack:
    """The Stack object and its history. A deploy that changed nothing leaves them as they are, also
    where its files are not those of the last one: after a failed update was rolled back, the files
    before it are what the cluster has already. So does one that takes a paused roll-out up again:
    with a second revision of the same, a rollback of the stack would lead nowhere.
    """
    spec = structs.replace(
        work.spec,
        secrets=tuple(structs.replace(s, data=b"") for s in work.spec.secrets),
        configs=tuple(structs.replace(c, data=b"") for c in work.spec.configs),
    )
    leftovers = tuple(sorted(work.leftovers))
    changes = [c for c in work.changes if c.action != UNCHANGED]
    changed = any(c.id not in work.resumed for c in changes)
    if old is not None and not changed and tuple(sorted(old.leftover_ids)) == leftovers:
        return old
    revision = old.revision + 1 if old is not None else 1
    base = old or Stack(id=work.stack_id)
    stack = work.draft.put(
        structs.replace(base, spec=spec, revision=revision, leftover_ids=leftovers)
    )
    history.record(
        work.draft,
        stack,
        changes=changes,
        who=who,
        rollback_to=wanted.rollback_to,
        prune=wanted.prune,
    )
    return stack


def _any(specs: Iterable[Any]) -> Iterable[Any]:
    return specs
