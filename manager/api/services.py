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
from manager.api.references import Declared, rely_on, resolve
from manager.api.validate import check_service, complete, mode_name
from manager.api.validate_jobs import check_queue, rely_on_queue
from manager.ca import Sealer
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
ROLLED_BACK = (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_COMPLETED)
JOB_MODES = ("replicated-job", "global-job")


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
    if spec.endpoint is None:
        return None
    ports, clashes = ledger.allocate(spec.endpoint.ports, owner=service)
    for clash in clashes:
        port = clash.port
        theirs = "ingress" if port.publish_mode == "host" else "published"
        find.add(
            f"ports[{clash.index}].published",
            f"port {port.published_port}/{port.protocol or 'tcp'} is already in use by "
            f"{quoted(clash.holder)} ({clash.holder.id}) as a {theirs} port; choose another",
        )
    return Endpoint(
        spec=spec.endpoint,
        ports=ports,
        virtual_ips=service.endpoint.virtual_ips if service.endpoint else (),
    )


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
    _put_revision(draft, service, credentials.seal(b""))
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
) -> bool:
    """Gives the service a prepared spec; False: it has it already and nothing was changed.

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
            draft.put(structs.replace(service, update_status=None))
        return state in PAUSED or sealed != before
    _put_next(find, draft, service, spec, sealed, ledger=ledger, status=None)
    return True


def roll_back(draft: Draft, service: Service) -> None:
    """Back to the previous spec, with the credentials it had. Raises Invalid where there is none,
    or where what it uses is gone.
    """
    previous = _revision(draft, service, service.previous_spec_version)
    if not service.previous_spec_version or previous is None or previous.spec is None:
        raise errors.Invalid(
            f"{quoted(service)} ({service.id}) does not have a previous spec to go back to: it was "
            "not updated since it was created"
        )
    problems = Problems()
    find = problems.of(f"previous spec of {quoted(service)}")
    spec = prepare(find, draft, previous.spec)
    problems.raise_any()
    _check_changeable(service, spec)
    status = UpdateStatus(
        state=UpdateState.ROLLBACK_STARTED,
        started_at_ns=draft.now_ns,
        message="manually requested rollback",
    )
    sealed = previous.sealed_registry_auth
    _put_next(find, draft, service, spec, sealed, ledger=PortLedger(draft), status=status)
    problems.raise_any()


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
    """The next version of the service; its roll-out begins anew where tasks must be replaced."""
    number = service.spec_version + 1
    replaces = needs_new_tasks(spec_of(service), spec)
    is_job = spec.mode is not None and mode_name(spec.mode) in JOB_MODES
    runs_again = is_cancelled(spec_of(service)) and not is_cancelled(spec)
    changed = structs.replace(
        service,
        spec=spec,
        spec_version=number,
        previous_spec_version=service.spec_version,
        task_version=number if replaces else service.task_version,
        endpoint=_endpoint(find, ledger, spec, service),
        update_status=status if replaces or status else service.update_status,
        job_iteration=service.job_iteration + (1 if is_job and (replaces or runs_again) else 0),
    )
    rely_on(draft, spec, spec_of(service))
    rely_on_queue(draft, spec, spec_of(service))
    _put_revision(draft, changed, sealed)
    ledger.enter(service, changed)
    draft.put(changed)


def is_cancelled(spec: ServiceSpec) -> bool:
    """Whether it is a job that should not run. One that should again begins a new iteration: what
    it had done before it was cancelled is done again.
    """
    return spec.job is not None and spec.job.cancelled


def needs_new_tasks(before: ServiceSpec, after: ServiceSpec) -> bool:
    """Whether running tasks no longer fit the spec: their template changed, or the ports that they
    were started with. (SwarmKit replaces tasks for any change of ports; a new published port for an
    unchanged target needs none, as nodes balance to the target.)
    """
    return before.task != after.task or _task_ports(before) != _task_ports(after)


def _task_ports(spec: ServiceSpec) -> set[tuple[str, int, int, str]]:
    """What of the published ports a task itself has to do with."""
    return {
        (p.protocol or "tcp", p.target_port, p.published_port, p.host_ip)
        if p.publish_mode == "host"
        else (p.protocol or "tcp", p.target_port, 0, "ingress")
        for p in (spec.endpoint.ports if spec.endpoint else ())
    }


def _revision(view: View, service: Service, number: int) -> ServiceRevision | None:
    return view.get(ServiceRevision, f"{service.id}.{number}")


def service_revision(view: View, service: Service) -> ServiceRevision | None:
    """The entry of the present spec, with what its image is pulled with."""
    return _revision(view, service, service.spec_version)


def previous_revision(view: View, service: Service) -> ServiceRevision | None:
    """The spec that a rollback returns to."""
    return _revision(view, service, service.previous_spec_version)


def _put_revision(draft: Draft, service: Service, sealed: bytes) -> None:
    draft.put(
        ServiceRevision(
            id=f"{service.id}.{service.spec_version}",
            service_id=service.id,
            spec_version=service.spec_version,
            spec=service.spec,
            sealed_registry_auth=sealed,
        )
    )
