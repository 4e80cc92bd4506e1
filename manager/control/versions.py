"""The versions of a service: what each change of its spec leaves behind, and the way back to one.

Every change of a spec makes a ServiceRevision, which tasks refer to. `task_version` moves only with
what needs new tasks, so versions that share it are one template: of these only the newest is worth
keeping. Kept are

- the present version, the previous one, and those that tasks run;
- of each of the last VERSIONS_MAX templates the newest version.

What these use of secrets and configs is kept as well (manager/api/references.kept_ids).

Going back makes an old version's spec the next version. By hand and after a failed update it is
the same: `target` says where to, `spec_back` what that leads to, `checked` what is in the way,
`put_next` writes it. A roll-out under way is gone back from as a whole, whatever was changed
meanwhile that needs no new tasks: who scales a service in the middle of an update and then rolls
back does not mean to go back to the middle. As many replicas stay as are wanted by then. Nor does
it lead to versions that were superseded before they were through (ServiceRevision.unfinished), for
nobody knows whether these run, as long as another is kept.

Revisions from before `task_version` was noted in them are told apart by their specs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import structs

from manager.allocator import Clash, PortLedger
from manager.control.template import PAUSED, UPDATING, mode_of, needs_new_tasks
from manager.control.uses import missing, rely_on
from manager.store import Draft, View
from swarm import errors
from swarm.v1 import (
    Endpoint,
    Service,
    ServiceRevision,
    ServiceSpec,
    UpdateState,
    UpdateStatus,
)

# Templates that can be gone back to, the present one among them; as of stacks' deploys.
VERSIONS_MAX = 10


# ------------------------------------------------------------------ reading


def revision(view: View, service: Service, number: int) -> ServiceRevision | None:
    """The entry of one version; None: it is not kept."""
    return view.get(ServiceRevision, f"{service.id}.{number}") if number else None


def kept(view: View, service_id: str) -> list[ServiceRevision]:
    """All entries there are, newest first."""
    found = view.by(ServiceRevision, "service", service_id)
    return sorted(found, key=lambda r: r.spec_version, reverse=True)


def templates(newest_first: Sequence[ServiceRevision]) -> dict[int, int]:
    """The task_version of each of a service's versions."""
    out: dict[int, int] = {}
    later: ServiceRevision | None = None
    for entry in newest_first:
        number = entry.task_version
        if not number:
            number = entry.spec_version
            same = later is not None and entry.spec is not None and later.spec is not None
            if same and later and not needs_new_tasks(entry.spec, later.spec):  # type: ignore[arg-type]  # checked above
                number = out[later.spec_version]
        out[entry.spec_version] = number
        later = entry
    return out


def listed(view: View, service: Service) -> list[ServiceRevision]:
    """The versions that people are shown, newest first: the present one, and the newest of each
    other template; the previous one besides, for a rollback may lead there.
    """
    entries = [e for e in kept(view, service.id) if e.spec_version <= service.spec_version]
    of = templates(entries)
    goal = target(view, service)
    shown = {service.spec_version} | ({goal.spec_version} if goal is not None else set())
    seen: set[int] = set()
    for entry in entries:
        if of[entry.spec_version] not in seen:
            seen.add(of[entry.spec_version])
            shown.add(entry.spec_version)
    return [e for e in entries if e.spec_version in shown]


# ------------------------------------------------------------------ writing


def put_next(
    draft: Draft,
    service: Service,
    spec: ServiceSpec,
    *,
    endpoint: Endpoint | None,
    sealed: bytes,
    status: UpdateStatus | None,
    rollback_to: int = 0,
    forgets: bool = False,
) -> Service:
    """The next version of the service; its roll-out begins anew where tasks must be replaced, or
    as `status` says. `forgets`: there is no previous version then. Raises nothing: whoever calls
    has checked the spec.
    """
    before = service.spec
    assert before is not None
    number = service.spec_version + 1
    replaces = needs_new_tasks(before, spec)
    runs_again = is_cancelled(before) and not is_cancelled(spec)
    anew = mode_of(spec).job and (replaces or runs_again)
    changed = structs.replace(
        service,
        spec=spec,
        spec_version=number,
        previous_spec_version=0 if forgets else service.spec_version,
        task_version=number if replaces else service.task_version,
        endpoint=endpoint,
        update_status=status if replaces or status else service.update_status,
        job_iteration=service.job_iteration + (1 if anew else 0),
    )
    rely_on(draft, spec, before)
    if replaces:
        _note_unfinished(draft, service)
    put_revision(draft, changed, sealed, rollback_to=rollback_to)
    return draft.put(changed)


def _note_unfinished(draft: Draft, service: Service) -> None:
    """Another template follows: if the present one's roll-out is not through, that is noted. Not of
    a rollback, for what it leads to ran before.
    """
    status = service.update_status
    if status is None or status.state not in (UpdateState.UPDATING, UpdateState.PAUSED):
        return
    for entry in kept(draft, service.id):
        if entry.spec_version >= service.task_version:
            draft.put(structs.replace(entry, unfinished=True))


def put_revision(draft: Draft, service: Service, sealed: bytes, *, rollback_to: int = 0) -> None:
    """The entry of the service's present version, made by whom the draft is for."""
    draft.put(
        ServiceRevision(
            id=f"{service.id}.{service.spec_version}",
            service_id=service.id,
            spec_version=service.spec_version,
            spec=service.spec,
            sealed_registry_auth=sealed,
            task_version=service.task_version,
            who=draft.who,
            rollback_to=rollback_to,
        )
    )


def is_cancelled(spec: ServiceSpec) -> bool:
    """Whether it is a job that should not run. One that should again begins a new iteration: what
    it had done before it was cancelled is done again.
    """
    return spec.job is not None and spec.job.cancelled


def keep_versions(draft: Draft, service_id: str, used: set[int]) -> None:
    """Deletes the service's versions that nothing may come back to, `used` being those that tasks
    run; makes sure that the present one is kept.
    """
    service = draft.get(Service, service_id)
    entries = kept(draft, service_id)
    if service is not None:
        used = used | {service.spec_version, service.previous_spec_version} | _newest(entries)
    for entry in reversed(entries):
        if entry.spec_version not in used:
            draft.delete(ServiceRevision, entry.id)
    if service is None or service.spec is None:
        return
    if revision(draft, service, service.spec_version) is None:
        put_revision(draft, service, b"")


def _newest(newest_first: Sequence[ServiceRevision]) -> set[int]:
    """The newest version of each of the last templates."""
    found: dict[int, int] = {}
    for number, template in templates(newest_first).items():
        if len(found) < VERSIONS_MAX:
            found.setdefault(template, number)
    return set(found.values())


# ------------------------------------------------------------------ going back


def target(view: View, service: Service) -> ServiceRevision | None:
    """Where a rollback leads that names no version: back from the roll-out that is under way or
    paused, else to the version before the last change.
    """
    status = service.update_status
    if status is not None and (status.state in UPDATING or status.state in PAUSED):
        return before_roll_out(view, service)
    return revision(view, service, service.previous_spec_version)


def before_roll_out(view: View, service: Service) -> ServiceRevision | None:
    """The last version before the present template that was through, or else the last one; None: it
    is forgotten, or there was none.
    """
    older = _older(view, service)
    return next((e for e in older if not e.unfinished), older[0] if older else None)


def _older(view: View, service: Service) -> list[ServiceRevision]:
    """The versions before the present template, newest first."""
    if not service.previous_spec_version:
        return []
    return [e for e in kept(view, service.id) if e.spec_version < service.task_version]


def chosen(view: View, service: Service, number: int) -> ServiceRevision:
    """The version to go back to; 0: as `target`. Raises Conflict, with those that are kept, where
    there is no such version.
    """
    found = target(view, service) if number == 0 else revision(view, service, number)
    if found is not None and found.spec is not None and number != service.spec_version:
        return found
    name = _name(service)
    others = [
        e.spec_version for e in listed(view, service) if e.spec_version != service.spec_version
    ]
    if number == 0:
        hint = (
            f"; `--to VERSION` goes back to one that is kept: {_numbers(others)}"
            if others
            else ": it was not updated since it was created"
        )
        why = f"{name} ({service.id}) does not have a previous spec to go back to{hint}"
        raise errors.Invalid(why)
    if number == service.spec_version:
        raise errors.Conflict(f"{name} is at version {number} already: nothing to go back to")
    kept_are = f"kept are {_numbers(others)}" if others else "no other version is kept"
    raise errors.NotFound(
        f"{name} has no version {number} to go back to; {kept_are} (`swarmctl service history` "
        "says what they did)"
    )


def spec_back(view: View, service: Service, to: ServiceRevision) -> ServiceSpec:
    """What going back to a version leads to: its spec. Back from a roll-out in whose middle the
    service was changed otherwise, or from several: with as many replicas as are wanted now.
    """
    spec, present = to.spec, service.spec
    assert spec is not None and present is not None
    status = service.update_status
    rolls = status is not None and (status.state in UPDATING or status.state in PAUSED)
    before = before_roll_out(view, service) if rolls else None
    if before is None or before.spec_version != to.spec_version:
        return spec
    several = before != _older(view, service)[0]
    if not several and service.spec_version == service.task_version:
        return spec
    return structs.replace(spec, mode=present.mode)


def checked(
    draft: Draft, service: Service, spec: ServiceSpec, number: int, ledger: PortLedger
) -> Endpoint | None:
    """The endpoint that the service has with the spec of its version `number`. Raises Conflict,
    with all that is in the way: what the spec uses and is gone, ports that others have by now.
    """
    gone = [f"{what}, which it uses, was removed" for what in missing(draft, spec)]
    for dependency in spec.depends_on:
        if dependency.required and not draft.by(Service, "name", dependency.service):
            gone.append(f'service "{dependency.service}", which it depends on, was removed')
    endpoint, clashes = endpoint_of(ledger, spec, service)
    for clash in clashes:
        port = clash.port
        gone.append(
            f"port {port.published_port}/{port.protocol or 'tcp'} is already in use by "
            f"{_name(clash.holder)} ({clash.holder.id})"
        )
    if gone:
        raise errors.Conflict(
            f"{_name(service)} cannot go back to version {number}: {'; '.join(gone)}"
        )
    return endpoint


def endpoint_of(
    ledger: PortLedger, spec: ServiceSpec, service: Service
) -> tuple[Endpoint | None, Sequence[Clash]]:
    """What the service gets for the spec's ports, the published ones filled in."""
    if spec.endpoint is None:
        return None, ()
    ports, clashes = ledger.allocate(spec.endpoint.ports, owner=service)
    virtual_ips = service.endpoint.virtual_ips if service.endpoint else ()
    return Endpoint(spec=spec.endpoint, ports=ports, virtual_ips=virtual_ips), clashes


def _name(service: Service) -> str:
    return f'service "{service.spec.name}"' if service.spec is not None else service.id


def _numbers(numbers: Iterable[int]) -> str:
    *first, last = sorted(str(n) for n in sorted(numbers)) or [""]
    return f"{', '.join(first)} and {last}" if first else last
