"""Changes of services, as functions over a draft: create, update, roll back, ask for removal.

Everything here happens inside one transaction; nothing awaits. Each change of a spec makes a
ServiceRevision, which tasks refer to; `task_version` moves only when running tasks no longer fit
the spec, so that scaling, labels and the like restart nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection
from dataclasses import dataclass

from msgspec import structs

from manager.allocator import PortLedger
from manager.api.lookup import nearest_name, quoted, spec_of, task_of
from manager.api.problems import Finder, Problems, nearest
from manager.api.references import Declared, resolve
from manager.api.validate import check_service, complete, mode_name
from manager.api.validate_jobs import check_queue, rely_on_queue
from manager.ca import Sealer
from manager.control import needs_new_tasks, rely_on, versions
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

PAUSED = (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED)
GOING = (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
ROLLED_BACK = (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED)


class RemovalPending(errors.Conflict):
    """What is asked for is still held by services or stacks that are on their way out, named by
    id; it can be had once these are gone.
    """

    def __init__(self, message: str, waits_for: Collection[str]) -> None:
        super().__init__(message)
        self.waits_for = frozenset(waits_for)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an image is pulled with: `auth` as the client sends it (empty: as before)."""

    auth: str
    sealer: Sealer

    def check(self, problems: Problems) -> None:
        """Notes anything but base64 of Docker's auth JSON."""
        if not self.auth:
            return
        try:
            padded = self.auth + "=" * (-len(self.auth) % 4)
            decoded = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        except (binascii.Error, ValueError):
            decoded = None
        if not isinstance(decoded, dict):
            problems.of("registry auth").add(
                "", "this is not the base64 form of Docker's auth JSON"
            )

    def seal(self, before: bytes) -> bytes:
        """What is stored; the same bytes as before where the credentials are the same."""
        if not self.auth:
            return before
        data = self.auth.encode()
        same = before and self.sealer.open(before) == data
        return before if same else self.sealer.seal_data(data)


# ---------------------------------------------------------------- checking


def prepare(
    find: Finder,
    view: View,
    spec: ServiceSpec,
    *,
    others: Collection[str] = (),
    declared: Declared = frozenset(),
) -> ServiceSpec:
    """The spec completed and resolved; everything wrong with it is noted. `others`: names of
    services that come with it; `declared`: what is declared beside it and checked there.
    """
    spec = complete(spec)
    check_service(find, spec)
    check_queue(find, view, spec)
    spec = resolve(find, view, spec, declared=declared)
    for i, dependency in enumerate(spec.depends_on):
        known = dependency.service in others or view.by(Service, "name", dependency.service)
        if dependency.required and dependency.service and not known:
            hint = nearest(dependency.service, sorted(others)) or nearest_name(
                view, Service, dependency.service
            )
            find.add(f"depends_on[{i}]", f"service {dependency.service!r} not found{hint}")
    return spec


def _endpoint(
    find: Finder, ledger: PortLedger, spec: ServiceSpec, service: Service
) -> Endpoint | None:
    """The spec's ports with the published ones filled in; ports that others have are noted."""
    endpoint, clashes = versions.endpoint_of(ledger, spec, service)
    for clash in clashes:
        port = clash.port
        theirs = "ingress" if port.publish_mode == "host" else "published"
        find.add(
            f"ports[{clash.index}].published",
            f"port {port.published_port}/{port.protocol or 'tcp'} is already in use by "
            f"{quoted(clash.holder)} ({clash.holder.id}) as a {theirs} port; choose another",
        )
    return endpoint


def _check_name_free(draft: Draft, name: str) -> None:
    for other in draft.by(Service, "name", name):
        if other.pending_delete:
            raise RemovalPending(
                f'service "{name}" is still being removed: its tasks are stopping; try again when '
                "they are gone, or choose another name",
                {other.id},
            )
        raise errors.Conflict(
            f'service "{name}" exists already ({other.id}); choose another name, or update it'
        )


# ---------------------------------------------------------------- changing


def create_service(
    find: Finder,
    draft: Draft,
    spec: ServiceSpec,
    *,
    new_id: str,
    credentials: Credentials,
    ledger: PortLedger,
    stack_id: str = "",
) -> Service:
    """Puts a new service with a prepared spec; ports that others have are noted. Raises Conflict
    for a name that is taken.
    """
    _check_name_free(draft, spec.name)
    service = Service(id=new_id, spec=spec, spec_version=1, task_version=1, stack_id=stack_id)
    service = structs.replace(service, endpoint=_endpoint(find, ledger, spec, service))
    rely_on(draft, spec, None)
    rely_on_queue(draft, spec, None)
    versions.put_revision(draft, service, credentials.seal(b""))
    ledger.enter(None, service)
    return draft.put(service)


def update_service(
    find: Finder,
    draft: Draft,
    service: Service,
    spec: ServiceSpec,
    *,
    credentials: Credentials,
    ledger: PortLedger,
    pause_after: int = 0,
) -> bool:
    """Gives the service a prepared spec; False: it has it already and nothing was changed.
    `pause_after`: its roll-out pauses for a person after so many slots; 0: it does not.

    Without changes, an update whose roll-out is paused is taken up again, as in Docker; and where
    the spec is what a rollback led to, it is no rollback any more: it is what is asked for, and the
    service is no longer said to be rolled back. Raises Conflict while the service is being removed,
    Unsupported for a rename or a change of mode.
    """
    _check_changeable(service, spec)
    current = service_revision(draft, service)
    before = current.sealed_registry_auth if current is not None else b""
    sealed = credentials.seal(before)
    if spec == spec_of(service):
        if sealed != before and current is not None:
            draft.put(structs.replace(current, sealed_registry_auth=sealed))
        state = service.update_status.state if service.update_status is not None else None
        if state in PAUSED or state in ROLLED_BACK:
            status = _begun(draft, pause_after) if pause_after else None
            draft.put(structs.replace(service, update_status=status))
        return state in PAUSED or sealed != before
    status = _begun(draft, pause_after) if pause_after else None
    if status is not None and not needs_new_tasks(spec_of(service), spec):
        under_way = service.update_status
        going = under_way is not None and under_way.state in GOING
        status = structs.replace(under_way, pause_after=pause_after) if going else None  # type: ignore[type-var]  # not None where it goes
    _put_next(find, draft, service, spec, sealed, ledger=ledger, status=status)
    return True


def _begun(draft: Draft, pause_after: int) -> UpdateStatus:
    """A roll-out that begins now and pauses for a person."""
    return UpdateStatus(
        state=UpdateState.UPDATING,
        started_at_ns=draft.now_ns,
        message="update in progress",
        pause_after=pause_after,
    )


def roll_back(draft: Draft, service: Service, *, to: int = 0, pause_after: int = 0) -> None:
    """Back to the spec of a version (0: the previous one, see versions.target), with the
    credentials it had. Raises Invalid and NotFound where there is none, Conflict where what it uses
    is gone.
    """
    entry = versions.chosen(draft, service, to)
    spec = versions.spec_back(draft, service, entry)
    _check_changeable(service, spec)
    ledger = PortLedger(draft)
    endpoint = versions.checked(draft, service, spec, entry.spec_version, ledger)
    problems = Problems()
    find = problems.of(f"version {entry.spec_version} of {quoted(service)}")
    spec = prepare(find, draft, spec)
    problems.raise_any()
    status = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        started_at_ns=draft.now_ns,
        message="manually requested rollback",
        pause_after=pause_after,
    )
    before = spec_of(service)
    changed = versions.put_next(
        draft,
        service,
        spec,
        endpoint=endpoint,
        sealed=entry.sealed_registry_auth,
        status=status,
        rollback_to=entry.spec_version,
    )
    rely_on_queue(draft, spec, before)
    ledger.enter(service, changed)


def follows(spec: ServiceSpec, changed: Collection[str]) -> bool:
    """Whether the service is to be restarted with one of these (`depends_on: restart: true`)."""
    return any(d.restart and d.service in changed for d in spec.depends_on)


def forced(spec: ServiceSpec) -> ServiceSpec:
    """The spec with `force_update` counted up: tasks are replaced though nothing else differs."""
    task = task_of(spec)
    return structs.replace(spec, task=structs.replace(task, force_update=force_update(spec) + 1))


def force_update(spec: ServiceSpec) -> int:
    return task_of(spec).force_update


def restart_followers(
    problems: Problems,
    draft: Draft,
    changed: Collection[str],
    *,
    but: Collection[str] = (),
    sealer: Sealer,
    ledger: PortLedger,
) -> list[Service]:
    """Rolls the services that follow one of those whose template `changed`, except the changed
    ones and those in `but`; returns them, as they were, by name.

    One step only: what follows a service that is merely restarted with another one is not. Its
    own dependency has not changed; depends_on's conditions still order the starts.
    """
    if not changed:
        return []
    followers = [
        s
        for s in draft.all(Service)
        if follows(spec_of(s), changed)
        and not s.pending_delete
        and spec_of(s).name not in changed
        and spec_of(s).name not in but
    ]
    followers.sort(key=lambda s: spec_of(s).name)
    for service in followers:
        update_service(
            problems.of(quoted(service)),
            draft,
            service,
            forced(spec_of(service)),
            credentials=Credentials("", sealer),
            ledger=ledger,
        )
    return followers


def ask_removal(draft: Draft, service: Service) -> None:
    """The control loop stops the tasks, then removes the service. Asking again changes nothing."""
    if not service.pending_delete:
        draft.put(structs.replace(service, pending_delete=True))


def _check_changeable(service: Service, spec: ServiceSpec) -> None:
    if service.pending_delete:
        raise RemovalPending(
            f"{quoted(service)} is being removed: it cannot be changed any more", {service.id}
        )
    before = spec_of(service)
    if spec.name != before.name:
        raise errors.Unsupported(
            f"renaming services is not supported ({before.name!r} to {spec.name!r}); create a "
            "service with the new name and remove the old one"
        )
    changes_mode = mode_change(before, spec)
    if changes_mode:
        raise errors.Unsupported(f"{quoted(service)}: {changes_mode}")


def mode_change(before: ServiceSpec, after: ServiceSpec) -> str:
    """Why the spec cannot follow the other one: a service has one mode for life. Empty: it can."""
    was = mode_name(before.mode) if before.mode else "replicated"
    becomes = mode_name(after.mode) if after.mode else "replicated"
    if was == becomes:
        return ""
    return (
        f"service mode change is not allowed (it is {was}, asked for is {becomes}); remove the "
        "service and create it again"
    )


def _put_next(
    find: Finder,
    draft: Draft,
    service: Service,
    spec: ServiceSpec,
    sealed: bytes,
    *,
    ledger: PortLedger,
    status: UpdateStatus | None,
) -> None:
    """The next version of the service; ports that others have are noted."""
    endpoint = _endpoint(find, ledger, spec, service)
    changed = versions.put_next(
        draft, service, spec, endpoint=endpoint, sealed=sealed, status=status
    )
    rely_on_queue(draft, spec, spec_of(service))
    ledger.enter(service, changed)


def service_revision(view: View, service: Service) -> ServiceRevision | None:
    """The entry of the present spec, with what its image is pulled with."""
    return versions.revision(view, service, service.spec_version)


def previous_revision(view: View, service: Service) -> ServiceRevision | None:
    """The version before the last change."""
    return versions.revision(view, service, service.previous_spec_version)
