"""Versions of a service for people, and letting a paused roll-out go on.

What is kept of a service's versions, and where a rollback leads, is said in
manager/control/versions.py; what pausing means, in manager/control/update.py.
"""

from __future__ import annotations

from collections import Counter

from msgspec import structs

from manager.api.field_diff import changes
from manager.api.lookup import find, quoted, seen_version
from manager.api.present import present, present_revision
from manager.api.readable import Readable
from manager.ca import Sealer
from manager.control import versions
from manager.store import Draft, View
from swarm import errors
from swarm.v1 import (
    GetServiceHistoryResponse,
    ResumeUpdateRequest,
    Service,
    ServiceRevision,
    ServiceVersion,
    Task,
    TaskState,
    UpdateState,
)

_GOES_ON = {
    UpdateState.PAUSED: UpdateState.UPDATING,
    UpdateState.ROLLBACK_PAUSED: UpdateState.ROLLBACK_STARTED,
}
_SAID = {
    UpdateState.UPDATING: "its update is in progress",
    UpdateState.COMPLETED: "its update is completed",
    UpdateState.ROLLBACK_STARTED: "its rollback is in progress",
    UpdateState.ROLLBACK_COMPLETED: "its rollback is completed",
}


def service_history(view: View, ref: str, *, sealer: Sealer) -> GetServiceHistoryResponse:
    """A service's versions, newest first, with what each has changed. Raises NotFound, Invalid
    (ambiguous).
    """
    service = find(view, Service, ref)
    entries = versions.listed(view, service)
    goal = versions.target(view, service)
    templates = versions.templates(versions.kept(view, service.id))
    runs = _running(view, service, entries, templates)
    readable = Readable(sealer)
    specs = [readable.service(view, e.spec) if e.spec is not None else None for e in entries]
    out = []
    for i, entry in enumerate(entries):
        new, old = specs[i], specs[i + 1] if i + 1 < len(entries) else None
        out.append(
            ServiceVersion(
                revision=structs.replace(
                    present_revision(entry), task_version=templates[entry.spec_version]
                ),
                changes=changes(old, new) if old is not None and new is not None else (),
                tasks=runs[entry.spec_version],
                previous=goal is not None and goal.spec_version == entry.spec_version,
            )
        )
    return GetServiceHistoryResponse(service=present(service).service, versions=tuple(out))


def _running(
    view: View, service: Service, entries: list[ServiceRevision], templates: dict[int, int]
) -> Counter[int]:
    """How many tasks run each version that is shown. One that is not shown is no other template
    than the newest that shares its task_version: what runs it is counted there.
    """
    shown = {e.spec_version for e in entries}
    newest: dict[int, int] = {}
    for entry in entries:
        newest.setdefault(templates[entry.spec_version], entry.spec_version)
    counts: Counter[int] = Counter()
    for task in view.by(Task, "service", service.id):
        if task.status is None or task.status.state != TaskState.RUNNING:
            continue
        number = task.spec_version
        if number not in shown:
            number = newest.get(templates.get(number, 0), 0)
        counts[number] += 1
    return counts


def resume_update(draft: Draft, request: ResumeUpdateRequest) -> Service:
    """The service's paused roll-out goes on: what has failed so far does not count any more, and
    its deadline begins anew. Raises NotFound, Conflict (another version than the caller has seen;
    nothing is paused).
    """
    service = find(draft, Service, request.service)
    at = seen_version(service)
    if request.version not in (0, at):
        raise errors.Conflict(
            f"{quoted(service)} is at version {at}, what is to be resumed was seen at version "
            f"{request.version}: look at it again"
        )
    if service.pending_delete:
        raise errors.Conflict(f"{quoted(service)} is being removed: there is nothing to resume")
    status = service.update_status
    state = _GOES_ON.get(status.state) if status is not None else None
    if status is None or state is None:
        why = _SAID.get(status.state, "") if status is not None else "it has no update"
        raise errors.Conflict(f"{quoted(service)} has no paused update to resume: {why}")
    back = state == UpdateState.ROLLBACK_STARTED
    return draft.put(
        structs.replace(
            service,
            update_status=structs.replace(
                status,
                state=state,
                message=f"{'rollback' if back else 'update'} resumed",
                pause_after=request.pause_after,
                awaits_resume=False,
                resumed_at_ns=draft.now_ns,
                next_batch_at_ns=0,
                progress_at_ns=0,
                done=0,
            ),
        )
    )
