"""What a deploy would do: the deploy itself, on a draft that is never committed.

`plan` runs resolve_request and deploy as DeployStack does, so that it can be of nothing else than
what the deploy would take, and raises what the deploy would raise. Then it compares each object
before and after, field by field, and lets the control loop be rehearsed on the draft
(manager/control/rehearse.py) to say what becomes of the tasks.

Invariants: nothing is changed; two plans of the same request on the same state are equal, though
each draws new ids (ids of what would be made are left out); nothing secret is in a plan, of secrets
there are digests with the manager's key.

It looks at every task of the cluster once, and plays every step of the change: from 0.2 s to some
seconds for large stacks. `Planner` runs it in a thread on a frozen view, so that the event loop
never waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import structs

from manager.api.aside import Aside
from manager.api.field_diff import TEXT_BYTES_MAX, change, changes
from manager.api.lookup import CLASSES, spec_of
from manager.api.plan_version import check_expected, plan_version
from manager.api.readable import Readable, short
from manager.api.services import PAUSED
from manager.api.stack_request import resolve_request
from manager.api.stacks import UNCHANGED, UPDATED, deploy
from manager.ca import Sealer
from manager.control import Rehearsal, Templates, rehearse
from manager.store import Draft, View
from swarm import ids, states
from swarm.clock import Clock
from swarm.v1 import (
    Config,
    DeployStackRequest,
    FieldChange,
    Kind,
    PlannedChange,
    PlanStackResponse,
    Secret,
    Service,
    ServicePlacement,
    Stack,
    StackChange,
    Task,
    TaskState,
)

RECREATED, SCALED, KEPT, REPLACED = "recreated", "scaled", "kept", "replaced"
# Of all contents of configs in a plan; what is beyond is shown by digest, so that a plan of many
# large ones stays far below the limit of a message.
TEXTS_BYTES_MAX = 4 * 1024 * 1024


class Planner:
    """Makes plans beside the event loop."""

    def __init__(self, aside: Aside, clock: Clock, rng: ids.Rng, *, sealer: Sealer) -> None:
        self._aside = aside
        self._clock = clock
        self._rng = rng
        self._sealer = sealer

    async def plan(self, request: DeployStackRequest) -> PlanStackResponse:
        """As `plan`, of the store as it is when the call's turn comes."""
        rng = ids.seeded_rng(self._rng.getrandbits(64))
        return await self._aside.ask(
            lambda view: plan(
                view,
                request,
                now_ns=self._clock.now_ns(),
                new_id=lambda: ids.new_id(rng),
                sealer=self._sealer,
                rng=rng,
            )
        )


def plan(
    view: View,
    request: DeployStackRequest,
    *,
    now_ns: int,
    new_id: Callable[[], str],
    sealer: Sealer,
    rng: ids.Rng,
) -> PlanStackResponse:
    """What the request would do to the view. `rng` draws the ids of tasks that are played.

    Raises what the deploy would raise: Invalid with all problems, Conflict (RemovalPending among
    them: a plan does not wait for a removal to end), NotFound, Unsupported, Exhausted.
    """
    draft = Draft(view, now_ns=now_ns)
    wanted = resolve_request(draft, request, sealer=sealer)
    if request.expected_version:
        check_expected(draft, wanted, request.expected_version, sealer=sealer)
    version = plan_version(view, wanted, sealer=sealer)
    done = deploy(draft, wanted, who="", new_id=new_id, sealer=sealer)
    stack = next(iter(view.by(Stack, "name", wanted.spec.name)), None)
    touched = [c.id for c in draft.changes() if c.kind == Kind.SERVICE]
    rehearsal = rehearse(draft, now_ns=now_ns, rng=rng, services=touched)
    compared = _Comparison(view, draft, sealer, rehearsal)
    return PlanStackResponse(
        stack_id=stack.id if stack is not None else "",
        revision=stack.revision if stack is not None else 0,
        version=version,
        changes=tuple(compared.of(c) for c in done.changes),
        warnings=(*done.warnings, *rehearsal.preempted()),
        differs=any(c.action != UNCHANGED for c in done.changes),
        settled=rehearsal.settled,
    )


class _Comparison:
    """Objects before and after the deploy."""

    def __init__(self, before: View, after: View, sealer: Sealer, rehearsal: Rehearsal) -> None:
        self._before = before
        self._after = after
        self._sealer = sealer
        self._rehearsal = rehearsal
        self._texts_left = TEXTS_BYTES_MAX
        self._readable = Readable(sealer)

    def of(self, done: StackChange) -> PlannedChange:
        """The account of one object."""
        cls: type[Any] = CLASSES[done.kind]
        there = self._before.get(cls, done.id) is not None
        placement = None
        if done.kind == Kind.SERVICE:
            placement = self._rehearsal.placement(done.id)
        effect, fields = "", tuple[FieldChange, ...]()
        if done.action == UPDATED:
            effect, fields = self._updated(done, cls, placement)
        return PlannedChange(
            change=done if there else structs.replace(done, id=""),
            effect=effect,
            fields=fields,
            placement=placement,
        )

    def _updated(
        self, done: StackChange, cls: type[Any], placement: ServicePlacement | None
    ) -> tuple[str, tuple[FieldChange, ...]]:
        after = self._after.get(cls, done.id)
        before = self._before.get(cls, done.id)
        if before is None or getattr(before, "superseded", False):
            # A secret or config with other content is another object that takes the name.
            before = next(iter(self._before.by(cls, "name", done.name)), None)
        if isinstance(before, Service) and isinstance(after, Service):
            assert placement is not None
            effect = self._effect(before, after, placement)
            return effect, self._service_fields(before, after, recreated=effect == RECREATED)
        if isinstance(before, Secret) and isinstance(after, Secret):
            data = (short(before.digest), short(after.digest))
        elif isinstance(before, Config) and isinstance(after, Config):
            data = self._texts(_spec(before).data, _spec(after).data)
        else:
            return "", changes(_spec(before), _spec(after))
        fields = changes(_bare(before), _bare(after))
        if data[0] != data[1]:
            fields = tuple(sorted((*fields, change("data", *data)), key=lambda f: f.path))
        return (REPLACED if before.id != after.id else ""), fields

    def _texts(self, before: bytes, after: bytes) -> tuple[str, str]:
        """Two contents: as texts, unless one is none or too large."""
        size = len(before) + len(after)
        if before == after:
            return "", ""
        if max(len(before), len(after)) <= TEXT_BYTES_MAX and size <= self._texts_left:
            try:
                texts = before.decode(), after.decode()
            except UnicodeDecodeError:
                pass
            else:
                self._texts_left -= size
                return texts
        return self._digest(before), self._digest(after)

    def _digest(self, data: bytes) -> str:
        return short(self._sealer.digest(data))

    # ------------------------------------------------------------ services

    def _effect(self, before: Service, after: Service, placement: ServicePlacement) -> str:
        templates = Templates(self._after, after)
        replaced = not _paused(after) and any(
            not templates.up_to_date(task)
            for task in self._before.by(Task, "service", after.id)
            if states.wanted(task.desired_state)
            and not states.ended(task.status.state if task.status else TaskState.NEW)
        )
        if replaced or before.job_iteration != after.job_iteration:
            return RECREATED
        # A gate that opens gives a service its tasks as well.
        number = spec_of(before).mode != spec_of(after).mode
        return SCALED if number or placement.created or placement.stopped else KEPT

    def _service_fields(
        self, before: Service, after: Service, *, recreated: bool
    ) -> tuple[FieldChange, ...]:
        old = self._readable.service(self._before, spec_of(before))
        new = self._readable.service(self._after, spec_of(after))
        found = changes(old, new)
        if recreated and all(_leaves_tasks_alone(f) for f in found):
            # Something that makes no difference to people makes one to the control loop: the plan
            # must not be silent about why tasks are replaced.
            found = changes(old, new, literal=True)
        if _paused(before) and not _paused(after) and before.spec_version == after.spec_version:
            found = (*found, change("update_status", "paused", "taken up again"))
        return found


def _paused(service: Service) -> bool:
    return service.update_status is not None and service.update_status.state in PAUSED


def _leaves_tasks_alone(field: FieldChange) -> bool:
    return not field.path.startswith(("task", "endpoint"))


def _bare(o: Secret | Config) -> Any:
    """The spec without name (a superseded version has lost it) and content."""
    return structs.replace(_spec(o), name="", data=b"")


def _spec(o: Any) -> Any:
    assert o.spec is not None
    return o.spec
