"""Stacks: the whole composition in one transaction, and their removal.

`deploy` makes the cluster hold what the spec says, or changes nothing. A secret or config whose
content changed is not edited (tasks were started with the old one, a rollback needs it): the old
object gives its name up, a new one takes it, and the services that use it get a changed template by
that alone, so they are rolled out and can be rolled back. What is no longer part of the stack but
still in use is a leftover of the Stack object; `finish` removes leftovers nobody uses any more, and
at last a stack that is being removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from manager.allocator import PortLedger
from manager.api.lookup import quoted, spec_of, word
from manager.api.names import check_stack_name
from manager.api.objects import (
    check_subnets_free,
    create_config,
    create_network,
    create_secret,
    create_volume,
)
from manager.api.problems import Finder, Problems
from manager.api.references import kept_ids, users
from manager.api.services import (
    Credentials,
    RemovalPending,
    ask_removal,
    create_service,
    prepare,
    update_service,
)
from manager.api.validate import warnings_of
from manager.api.validate_objects import (
    check_config,
    check_network,
    check_secret,
    check_volume,
)
from manager.ca import Sealer
from manager.store import STACK_LABEL, Draft, View
from swarm import errors
from swarm.v1 import (
    Config,
    ConfigSpec,
    DeployStackResponse,
    Kind,
    Network,
    NetworkSpec,
    Secret,
    SecretSpec,
    Service,
    ServiceSpec,
    Stack,
    StackChange,
    StackSpec,
    Volume,
    VolumeSpec,
)

SERVICES_MAX = 1000  # of one stack
CREATED, UPDATED, UNCHANGED, REMOVED = "created", "updated", "unchanged", "removed"
_USED: tuple[tuple[Kind, type[Any]], ...] = (
    (Kind.NETWORK, Network),
    (Kind.SECRET, Secret),
    (Kind.CONFIG, Config),
)
_NAME_CHARS_MAX = 64
_SUFFIX_CHARS = 8


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
    changes: list[StackChange] = field(default_factory=list)
    leftovers: set[str] = field(default_factory=set)

    def credentials_of(self, spec: ServiceSpec) -> Credentials:
        """What the service's image is pulled with; images may come from several registries."""
        auth = self.registry_auths.get(spec.name)
        return self.credentials if auth is None else Credentials(auth, self.sealer)

    def note(self, kind: Kind, name: str, id_: str, action: str) -> None:
        self.changes.append(StackChange(kind=kind, name=name, id=id_, action=action))

    def mine(self, cls: type[Any], name: str, find: Finder) -> Any:
        """The object of this name; one that is not this stack's is noted as a problem."""
        found = next(iter(self.draft.by(cls, "name", name)), None)
        if found is None:
            return None
        owner = found.spec.labels.get(STACK_LABEL)
        if owner == self.spec.name:
            return found
        whose = f"belongs to stack {owner!r}" if owner else "was not made by a stack"
        find.add(
            "name",
            f"{name!r} exists already and {whose}; declare it as external, rename it, or remove "
            "that one",
        )
        return found


def deploy(
    draft: Draft,
    spec: StackSpec,
    *,
    prune: bool,
    registry_auth: str,
    registry_auths: Mapping[str, str],
    new_id: Callable[[], str],
    sealer: Sealer,
) -> DeployStackResponse:
    """Makes the draft hold what the spec says. Raises Invalid with all problems, Conflict, and
    RemovalPending when parts of an earlier removal are in the way.
    """
    spec = _labelled(spec)
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
        credentials=Credentials(registry_auth, sealer),
        registry_auths=registry_auths,
        problems=Problems(),
        stack_id=stack.id if stack is not None else new_id(),
        ledger=PortLedger(draft),
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
    gone = _prune_services(work) if prune else []
    services = [_prepare(work, s) for s in spec.services]
    work.problems.raise_any()
    _give_ports_up(work, services)
    for service in services:
        _deploy_service(work, service)
    work.problems.raise_any()
    work.changes.extend(gone)
    if prune:
        _prune_used(work)
    stack = _put_stack(work, stack)
    return DeployStackResponse(
        stack_id=stack.id,
        revision=stack.revision,
        changes=tuple(work.changes),
        warnings=tuple(w for s in services for w in warnings_of(s)),
    )


def _labelled(spec: StackSpec) -> StackSpec:
    """Every object of the stack says so in its labels, whoever wrote the spec."""
    mark = {STACK_LABEL: spec.name}

    def all_of(specs: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(structs.replace(s, labels={**s.labels, **mark}) for s in specs)

    return structs.replace(
        spec,
        services=all_of(spec.services),
        networks=all_of(spec.networks),
        secrets=all_of(spec.secrets),
        configs=all_of(spec.configs),
        volumes=all_of(spec.volumes),
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
        names = [s.name for s in _any(specs)]
        for name in sorted({n for n in names if names.count(n) > 1}):
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
                    f"create it before the stack is deployed (`swarmctl {word(kind)} create`)",
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
    if old is not None:
        assert old.spec is not None
        same = work.sealer.digest(spec.data) == old.digest
        if same and old.spec.templating == spec.templating:
            work.leftovers.discard(old.id)
            _put_labels(work, Kind.SECRET, old, spec)
            return
        _supersede(work, old)
    made = create_secret(work.draft, spec, new_id=work.new_id(), sealer=work.sealer)
    work.note(Kind.SECRET, spec.name, made.id, CREATED if old is None else UPDATED)


def _deploy_config(work: _Deploy, spec: ConfigSpec) -> None:
    find = work.problems.of(f'config "{spec.name}"')
    before = len(work.problems.found)
    check_config(find, spec)
    old: Config | None = work.mine(Config, spec.name, find)
    if len(work.problems.found) > before:
        return
    if old is not None:
        assert old.spec is not None
        if old.spec.data == spec.data and old.spec.templating == spec.templating:
            work.leftovers.discard(old.id)
            _put_labels(work, Kind.CONFIG, old, spec)
            return
        _supersede(work, old)
    made = create_config(work.draft, spec, new_id=work.new_id())
    work.note(Kind.CONFIG, spec.name, made.id, CREATED if old is None else UPDATED)


def _supersede(work: _Deploy, old: Secret | Config) -> None:
    """The earlier version gives its name up and stays for as long as a spec refers to it."""
    assert old.spec is not None
    name = old.spec.name[: _NAME_CHARS_MAX - _SUFFIX_CHARS - 1]
    renamed = structs.replace(old.spec, name=f"{name}.{old.id[:_SUFFIX_CHARS]}")
    work.draft.put(structs.replace(old, spec=renamed))
    work.leftovers.add(old.id)


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
    if old is not None and spec.task is not None:
        # A stack file has no way to say it, so what `service update --force` counted up stays.
        force = max(spec.task.force_update, _force_update(old))
        spec = structs.replace(spec, task=structs.replace(spec.task, force_update=force))
    names = {s.name for s in work.spec.services}
    return prepare(find, work.draft, spec, others=names)


def _force_update(service: Service) -> int:
    task = spec_of(service).task
    return task.force_update if task is not None else 0


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
    changed = update_service(
        find, work.draft, old, spec, credentials=work.credentials_of(spec), ledger=work.ledger
    )
    work.note(Kind.SERVICE, spec.name, old.id, UPDATED if changed else UNCHANGED)


# ---------------------------------------------------------------- what is no longer named


def _prune_services(work: _Deploy) -> list[StackChange]:
    named = {s.name for s in work.spec.services}
    out = []
    for service in _sorted(work.draft.by(Service, "stack", work.spec.name)):
        name = spec_of(service).name
        if name not in named and not service.pending_delete:
            ask_removal(work.draft, service)
            out.append(StackChange(kind=Kind.SERVICE, name=name, id=service.id, action=REMOVED))
    return out


def _prune_used(work: _Deploy) -> None:
    """Networks, secrets and configs the spec no longer names: at once where nothing uses them, else
    as soon as that is so.
    """
    kept = kept_ids(work.draft)
    named = {
        Kind.NETWORK: {n.name for n in work.spec.networks},
        Kind.SECRET: {s.name for s in work.spec.secrets},
        Kind.CONFIG: {c.name for c in work.spec.configs},
    }
    for kind, cls in _USED:
        for o in _sorted(work.draft.by(cls, "stack", work.spec.name)):
            if o.spec.name in named[kind] or o.id in work.leftovers:
                continue
            work.note(kind, o.spec.name, o.id, REMOVED)
            if o.id in kept:
                work.leftovers.add(o.id)
            else:
                work.draft.delete(cls, o.id)


def _put_stack(work: _Deploy, old: Stack | None) -> Stack:
    """The Stack object; a deploy that changed nothing leaves it as it is."""
    spec = structs.replace(
        work.spec,
        secrets=tuple(structs.replace(s, data=b"") for s in work.spec.secrets),
        configs=tuple(structs.replace(c, data=b"") for c in work.spec.configs),
    )
    leftovers = tuple(sorted(work.leftovers))
    changed = any(c.action != UNCHANGED for c in work.changes)
    if (
        old is not None
        and not changed
        and old.spec == spec
        and tuple(sorted(old.leftover_ids)) == leftovers
    ):
        return old
    revision = old.revision + 1 if old is not None else 1
    base = old or Stack(id=work.stack_id)
    return work.draft.put(
        structs.replace(base, spec=spec, revision=revision, leftover_ids=leftovers)
    )


# ---------------------------------------------------------------- removal


def ask_stack_removal(draft: Draft, stack: Stack) -> None:
    """Stops the stack's services and marks the rest to follow them. Raises Conflict, with nothing
    changed, when services outside of the stack use its networks, secrets or configs.
    """
    if stack.pending_delete:
        return
    assert stack.spec is not None
    name = stack.spec.name
    services = _sorted(draft.by(Service, "stack", name))
    own = {quoted(s) for s in services}
    leftovers = set(stack.leftover_ids)
    for kind, cls in _USED:
        for o in _sorted(draft.by(cls, "stack", name)):
            foreign = [u for u in users(draft, o.id) if _service_part(u) not in own]
            if foreign:
                raise errors.Conflict(
                    f'stack "{name}" cannot be removed: its {word(kind)} {o.spec.name!r} is in '
                    f"use by {', '.join(foreign)}, which is not part of it; remove that first"
                )
            leftovers.add(o.id)
    for service in services:
        ask_removal(draft, service)
    draft.put(structs.replace(stack, pending_delete=True, leftover_ids=tuple(sorted(leftovers))))


def finish(draft: Draft) -> tuple[str, ...]:
    """Removes leftovers that nothing uses, and stacks that are being removed and have nothing left;
    returns the names of stacks that went. Doing it again changes nothing.
    """
    stacks = [s for s in _sorted(draft.all(Stack)) if s.leftover_ids or s.pending_delete]
    if not stacks:
        return ()
    kept = kept_ids(draft)
    gone = []
    for stack in stacks:
        left = tuple(i for i in stack.leftover_ids if not _drop(draft, i, kept))
        assert stack.spec is not None
        name = stack.spec.name
        if stack.pending_delete and not left and not draft.by(Service, "stack", name):
            for volume in _sorted(draft.by(Volume, "stack", name)):
                draft.delete(Volume, volume.id)
            draft.delete(Stack, stack.id)
            gone.append(name)
        elif left != stack.leftover_ids:
            draft.put(structs.replace(stack, leftover_ids=left))
    return tuple(gone)


def unfinished(view: View) -> bool:
    """Whether `finish` may have anything to do."""
    return any(s.leftover_ids or s.pending_delete for s in view.all(Stack))


def _drop(draft: Draft, id_: str, kept: set[str]) -> bool:
    """Removes a leftover unless it is still referred to; True: it is gone."""
    if id_ in kept:
        return False
    for _, cls in _USED:
        if draft.get(cls, id_) is not None:
            draft.delete(cls, id_)
    return True


def _service_part(user: str) -> str:
    return user.partition(" (")[0]


def _sorted(objects: Iterable[Any]) -> list[Any]:
    return sorted(objects, key=lambda o: o.id)


def _any(specs: Iterable[Any]) -> Iterable[Any]:
    return specs
