"""The control API: what clients ask of a manager, over the store.

Thin: each call is checked, done in one transaction by the functions of this package, counted, and,
when it changed something, written to the log as one line that says who changed what. Calls that
give out names, ports and subnets run one after the other on this manager, so that two of them
cannot choose the same; other managers are kept apart by the store's preconditions on names.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog
from msgspec import structs

from manager.api import gpus, history, mutations, queries, scheduling
from manager.api.aside import Aside
from manager.api.auditing import audit_query
from manager.api.backup import Backups, Source
from manager.api.copying import run_copy
from manager.api.leftovers import finish, unfinished
from manager.api.lookup import name_of
from manager.api.metrics import measured
from manager.api.mutations import Done
from manager.api.plan import Planner
from manager.api.quorum import Answers, answers, explained, while_in_touch
from manager.api.relays import LogReader, Relays, run_exec
from manager.api.roles import Here
from manager.api.rotate import rotate
from manager.api.services import RemovalPending
from manager.api.stacks import deploy_request
from manager.api.updating import resume_update, service_history
from manager.api.usage import UsageReader
from manager.api.watching import dirty, watch_objects, watch_services
from manager.ca import Sealer, manager_addrs
from manager.control import usage
from manager.store import Draft, Store
from manager.store.tables import BY_KIND
from swarm import errors
from swarm.audit import Trail
from swarm.clock import Clock
from swarm.ids import Rng, new_id
from swarm.rpc import Context, Identity
from swarm.v1 import (
    BackupRequest,
    BackupResponse,
    CopyInput,
    CopyOutput,
    CreateRequest,
    CreateResponse,
    DeployStackRequest,
    DeployStackResponse,
    ExecInput,
    ExecOutput,
    ExplainTaskRequest,
    ExplainTaskResponse,
    GetInfoRequest,
    GetInfoResponse,
    GetJoinTokensRequest,
    GetJoinTokensResponse,
    GetRequest,
    GetResponse,
    GetServiceHistoryRequest,
    GetServiceHistoryResponse,
    GetStackHistoryRequest,
    GetStackHistoryResponse,
    GetUnlockKeyRequest,
    GetUnlockKeyResponse,
    Kind,
    ListAuditRequest,
    ListAuditResponse,
    ListGpusRequest,
    ListGpusResponse,
    ListQueuesRequest,
    ListQueuesResponse,
    ListRequest,
    ListResponse,
    LogsRequest,
    LogsResponse,
    PlanStackResponse,
    RebalanceRequest,
    RebalanceResponse,
    RemoveRequest,
    RemoveResponse,
    ResumeUpdateRequest,
    ResumeUpdateResponse,
    RotateRequest,
    RotateResponse,
    Service,
    Stack,
    StatsRequest,
    StatsResponse,
    UpdateRequest,
    UpdateResponse,
    WatchRequest,
    WatchResponse,
    WatchServicesRequest,
    WatchServicesResponse,
)

log = structlog.get_logger("api")

R = TypeVar("R")

# How long a create or deploy waits for an earlier removal of the same names: the default stop grace
# period and some time to spare. Below the clients' own limit of 60 s.
REMOVAL_WAIT_S = 45.0

# Between two clean-ups. Each looks at every spec in the store (5 ms for 2,000 services), and a
# roll-out changes services many times a second.
CLEANUP_PACE_S = 0.2


class Tokens(Protocol):
    """The join tokens."""

    def worker(self) -> str: ...
    def manager(self) -> str: ...
    async def rotate(self, *, worker: bool, manager: bool) -> None: ...


class UnlockKeys(Protocol):
    """What opens managers after a restart; see manager.ca.Autolock."""

    async def settle(self) -> None: ...
    async def key(self) -> tuple[str, bool]: ...
    async def rotate(self) -> None: ...
    async def received(self, key: str) -> None: ...


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The node that answers. `advertise_addr` is host:port."""

    node_id: str
    advertise_addr: str
    version: str
    # The cluster's state is in an etcd that somebody else runs: managers need none of their own.
    external_etcd: bool = False


async def _no_barrier() -> None:
    """One manager holds all there is to know: nothing to wait for."""


class ControlService:
    """Implements swarm.v1.services.ControlServicer. `run` must be kept running beside it."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        rng: Rng,
        *,
        sealer: Sealer,
        relays: Relays,
        tokens: Tokens,
        unlock_keys: UnlockKeys,
        facts: NodeFacts,
        audit: Trail | None = None,
        barrier: Callable[[], Awaitable[None]] = _no_barrier,
        removal_wait_s: float = REMOVAL_WAIT_S,
        answers: Answers = answers,
    ) -> None:
        self._store = store
        self._clock = clock
        self._rng = rng
        self._sealer = sealer
        self._relays = relays
        self._tokens = tokens
        self._unlock_keys = unlock_keys
        self._facts = facts
        self._here = Here(facts.node_id, external_etcd=facts.external_etcd)
        # Waits until this manager's tables have reached the cluster's present revision, so that
        # reads are linearizable; see `_catch_up`.
        self._barrier = barrier
        # Whether another manager can be reached at its address.
        self._answers = answers
        self._audit_trail = audit
        self._backups = Backups(
            store, clock, Source(sealer, facts.node_id, facts.advertise_addr, facts.version)
        )
        self._aside = Aside(store)
        self._planner = Planner(self._aside, clock, rng, sealer=sealer)
        self._removal_wait_s = removal_wait_s
        # Held around a draft and its commit where names, ports or subnets are given out.
        self._giving_out = asyncio.Lock()

    async def run(self) -> None:
        """Removes what stacks leave behind, as it becomes free; until cancelled. Any manager may do
        it: doing it twice is the same as once.
        """
        kinds = (
            Kind.STACK,
            Kind.STACK_REVISION,
            Kind.SERVICE,
            Kind.SERVICE_REVISION,
            Kind.SECRET,
            Kind.CONFIG,
        )
        async with dirty(self._store, tuple(("kind", k) for k in kinds)) as changed:
            while True:
                await changed.wait()
                changed.clear()
                if not unfinished(self._store):
                    continue
                try:
                    async with self._giving_out:
                        gone = await self._store.update(finish)
                except (errors.Unavailable, errors.TimedOut, errors.Conflict) as error:
                    # What is not removed now is removed after the next change.
                    log.warning("stack_cleanup_failed", error=error.message)
                    continue
                for name in gone:
                    log.info("stack_removed", stack=name, revision=self._store.revision)
                await asyncio.sleep(CLEANUP_PACE_S)

    # -------------------------------------------------------------- reading

    async def get_info(self, request: GetInfoRequest, context: Context) -> GetInfoResponse:
        async with measured(self._clock, "GetInfo"):
            await self._catch_up(context)
            try:
                engine = await self._store.engine.facts()
            except errors.Unavailable:
                engine = None  # it is asked for what it knows, which may be all that is left
            facts = self._facts
            return queries.info(
                self._store, node_id=facts.node_id, version=facts.version, engine=engine
            )

    async def get(self, request: GetRequest, context: Context) -> GetResponse:
        async with measured(self._clock, "Get"):
            await self._catch_up(context)
            return queries.get(self._store, request, now_ns=self._clock.now_ns())

    async def list(self, request: ListRequest, context: Context) -> ListResponse:
        async with measured(self._clock, "List"):
            await self._catch_up(context)
            return queries.list_objects(self._store, request, now_ns=self._clock.now_ns())

    async def explain_task(
        self, request: ExplainTaskRequest, context: Context
    ) -> ExplainTaskResponse:
        async with measured(self._clock, "ExplainTask"):
            await self._catch_up(context)
            now_ns = self._clock.now_ns()
            return await self._aside.ask(
                lambda view: queries.explain_task(view, request.task, now_ns=now_ns)
            )

    async def list_gpus(self, request: ListGpusRequest, context: Context) -> ListGpusResponse:
        async with measured(self._clock, "ListGpus"):
            await self._catch_up(context)
            return await self._aside.ask(gpus.list_gpus)

    async def list_queues(self, request: ListQueuesRequest, context: Context) -> ListQueuesResponse:
        async with measured(self._clock, "ListQueues"):
            await self._catch_up(context)
            return ListQueuesResponse(queues=await self._aside.ask(usage))

    async def plan_stack(self, request: DeployStackRequest, context: Context) -> PlanStackResponse:
        async with measured(self._clock, "PlanStack"):
            await self._catch_up(context)
            return await self._planner.plan(request)

    async def get_stack_history(
        self, request: GetStackHistoryRequest, context: Context
    ) -> GetStackHistoryResponse:
        async with measured(self._clock, "GetStackHistory"):
            await self._catch_up(context)
            return history.history(self._store, request.stack)

    # -------------------------------------------------------------- changing

    async def create(self, request: CreateRequest, context: Context) -> CreateResponse:
        async with measured(self._clock, "Create"):
            done = await self._apply_when_free(
                context,
                lambda draft: mutations.create(
                    draft, request, new_id=self._new_id, sealer=self._sealer
                ),
            )
            self._audit(context, done)
            return CreateResponse(id=done.id, version=self._version(done), warnings=done.warnings)

    async def update(self, request: UpdateRequest, context: Context) -> UpdateResponse:
        async with measured(self._clock, "Update"):
            done = await self._apply(
                context,
                lambda draft: mutations.update(
                    draft, request, sealer=self._sealer, here=self._here
                ),
            )
            if request.kind == Kind.CLUSTER:
                await self._unlock_keys.settle()
            restarted = {"restarted": done.restarted} if done.restarted else {}
            self._audit(context, done, **restarted)
            return UpdateResponse(version=self._version(done), warnings=done.warnings)

    async def remove(self, request: RemoveRequest, context: Context) -> RemoveResponse:
        async with measured(self._clock, "Remove"):
            done = await self._apply(context, lambda draft: mutations.remove(draft, request))
            self._audit(context, done, force=request.force)
            return RemoveResponse(id=done.id)

    async def deploy_stack(
        self, request: DeployStackRequest, context: Context
    ) -> DeployStackResponse:
        async with measured(self._clock, "DeployStack"):
            who = _who(context.identity)
            response = await self._apply_when_free(
                context,
                lambda draft: deploy_request(
                    draft, request, who=who, new_id=self._new_id, sealer=self._sealer
                ),
            )
            # Nothing has been awaited since the commit: this is its revision, or a later one.
            response = structs.replace(response, store_revision=self._store.revision)
            actions = [c.action for c in response.changes]
            stack = self._store.get(Stack, response.stack_id)
            _changed(
                context,
                what="rollback" if request.rollback is not None else "deploy",
                kind="stack",
                name=name_of(stack) if stack is not None else "",
                id=response.stack_id,
                stack_revision=response.revision,
                revision=response.store_revision,
                **{a: actions.count(a) for a in ("created", "updated", "removed")},
            )
            return response

    async def rotate(self, request: RotateRequest, context: Context) -> RotateResponse:
        async with measured(self._clock, "Rotate"):
            response = await self._apply(
                context,
                lambda draft: rotate(draft, request, new_id=self._new_id, sealer=self._sealer),
            )
            response = structs.replace(response, revision=self._store.revision)
            o = self._store.get(BY_KIND[request.kind].cls, response.id)
            _changed(
                context,
                what="rotate",
                kind=request.kind.name.lower(),
                name=name_of(o) if o is not None else "",
                id=response.id,
                services=len(response.services),
                revision=response.revision,
            )
            return response

    async def rebalance(self, request: RebalanceRequest, context: Context) -> RebalanceResponse:
        async with measured(self._clock, "Rebalance"):
            await self._catch_up(context)
            now_ns = self._clock.now_ns()
            response = await self._aside.ask(
                lambda view: scheduling.plan(view, request, now_ns=now_ns)
            )
            if request.dry_run:
                return response
            asked = await self._apply(context, lambda draft: scheduling.ask(draft, request))
            _changed(
                context,
                what="rebalance",
                kind=asked.kind.name.lower(),
                name=asked.name,
                id=asked.id,
                services=len(asked.services),
                revision=self._store.revision,
            )
            ids = tuple(service.id for service in asked.services)
            return structs.replace(response, service_ids=ids)

    async def get_join_tokens(
        self, request: GetJoinTokensRequest, context: Context
    ) -> GetJoinTokensResponse:
        async with measured(self._clock, "GetJoinTokens"):
            worker, manager = request.rotate_worker, request.rotate_manager
            if worker or manager:
                await self._tokens.rotate(worker=worker, manager=manager)
                _changed(
                    context,
                    what="rotate",
                    kind="join_token",
                    worker=worker,
                    manager=manager,
                    revision=self._store.revision,
                )
            else:
                context.note(what="show", kind="join_token")
            return GetJoinTokensResponse(
                worker=self._tokens.worker(),
                manager=self._tokens.manager(),
                addr=self._facts.advertise_addr or next(iter(manager_addrs(self._store)), ""),
            )

    async def get_unlock_key(
        self, request: GetUnlockKeyRequest, context: Context
    ) -> GetUnlockKeyResponse:
        async with measured(self._clock, "GetUnlockKey"):
            if request.received:
                await self._unlock_keys.received(request.received)
            if request.rotate:
                await self._unlock_keys.rotate()
            if request.rotate or request.received:
                _changed(
                    context,
                    what="rotate" if request.rotate else "receive",
                    kind="unlock_key",
                    revision=self._store.revision,
                )
            else:
                context.note(what="show", kind="unlock_key")
            key, in_force = await self._unlock_keys.key()
            return GetUnlockKeyResponse(unlock_key=key, in_force=in_force)

    # -------------------------------------------------------------- streams

    async def watch_services(
        self, request: WatchServicesRequest, context: Context
    ) -> AsyncGenerator[WatchServicesResponse, None]:
        async with measured(self._clock, "WatchServices", stream=True):
            await self._catch_up(context)
            told = watch_services(self._store, self._clock, request)
            async with aclosing(self._while_in_touch(told, context)) as responses:
                async for response in responses:
                    yield response

    async def watch(
        self, request: WatchRequest, context: Context
    ) -> AsyncGenerator[WatchResponse, None]:
        async with measured(self._clock, "Watch", stream=True):
            # Before the watch begins, so that what was done before it was asked for is not in it.
            await self._catch_up(context)
            told = watch_objects(self._store, self._clock, request)
            async with aclosing(self._while_in_touch(told, context)) as responses:
                async for response in responses:
                    yield response

    async def logs(
        self, request: LogsRequest, context: Context
    ) -> AsyncGenerator[LogsResponse, None]:
        async with measured(self._clock, "Logs", stream=True):
            await self._catch_up(context)
            reader = LogReader(self._store, self._relays, request)
            async with aclosing(reader.read()) as responses:
                async for response in responses:
                    yield response

    async def get_service_history(
        self, request: GetServiceHistoryRequest, context: Context
    ) -> GetServiceHistoryResponse:
        async with measured(self._clock, "GetServiceHistory"):
            await self._catch_up(context)
            return await self._aside.ask(
                lambda view: service_history(view, request.service, sealer=self._sealer)
            )

    async def resume_update(
        self, request: ResumeUpdateRequest, context: Context
    ) -> ResumeUpdateResponse:
        async with measured(self._clock, "ResumeUpdate"):
            asked = await self._apply(context, lambda draft: resume_update(draft, request))
            service = self._store.get(Service, asked.id)
            _changed(
                context,
                what="resume",
                kind="service",
                name=name_of(asked),
                id=asked.id,
                revision=self._store.revision,
            )
            version = service.meta.version if service is not None and service.meta else 0
            return ResumeUpdateResponse(version=version)

    async def stats(
        self, request: StatsRequest, context: Context
    ) -> AsyncGenerator[StatsResponse, None]:
        async with measured(self._clock, "Stats", stream=True):
            await self._catch_up(context)
            reader = UsageReader(self._store, self._relays, request)
            async with aclosing(reader.read()) as responses:
                async for response in responses:
                    yield response

    async def copy(
        self, request: AsyncIterator[CopyInput], context: Context
    ) -> AsyncGenerator[CopyOutput, None]:
        async with measured(self._clock, "Copy", stream=True):
            await self._catch_up(context)
            copying = run_copy(
                self._store, self._relays, request, who=_who(context.identity), note=context.note
            )
            async with aclosing(copying) as outputs:
                async for output in outputs:
                    yield output

    async def exec(
        self, request: AsyncIterator[ExecInput], context: Context
    ) -> AsyncGenerator[ExecOutput, None]:
        async with measured(self._clock, "Exec", stream=True):
            await self._catch_up(context)
            running = run_exec(
                self._store, self._relays, request, who=_who(context.identity), note=context.note
            )
            async with aclosing(running) as outputs:
                async for output in outputs:
                    yield output

    async def backup(
        self, request: BackupRequest, context: Context
    ) -> AsyncGenerator[BackupResponse, None]:
        async with measured(self._clock, "Backup", stream=True):
            await self._catch_up(context)
            context.note(what="backup", kind="cluster", revision=self._store.revision)
            log.info("backup", who=_who(context.identity), revision=self._store.revision)
            async with aclosing(self._backups.stream()) as responses:
                async for response in responses:
                    yield response

    async def list_audit(
        self, request: ListAuditRequest, context: Context
    ) -> AsyncGenerator[ListAuditResponse, None]:
        async with measured(self._clock, "ListAudit", stream=True):
            if self._audit_trail is None:
                raise errors.Unavailable("this manager keeps no audit trail")
            async with aclosing(self._audit_trail.read(audit_query(request))) as batches:
                async for records, damaged in batches:
                    yield ListAuditResponse(records=tuple(records), damaged=tuple(damaged))

    # -------------------------------------------------------------- helpers

    async def _catch_up(self, context: Context) -> None:
        """Waits until this manager knows all that was acknowledged before, by any manager, unless
        the caller is content with less.
        """
        if not context.stale:
            await self._reach()

    async def _reach(self) -> None:
        """The barrier, with words for people. Raises Unavailable."""
        try:
            await self._barrier()
        except errors.Unavailable as error:
            raise await self._explained(error) from error

    async def _explained(self, error: errors.SwarmError) -> errors.SwarmError:
        return await explained(
            self._store, error, node_id=self._facts.node_id, answers=self._answers
        )

    def _while_in_touch(
        self, responses: AsyncGenerator[R, None], context: Context
    ) -> AsyncGenerator[R, None]:
        return while_in_touch(
            responses,
            in_touch=lambda: context.stale or self._store.engine.in_touch,
            explained=self._explained,
        )

    def _new_id(self) -> str:
        return new_id(self._rng)

    def _version(self, done: Done) -> int:
        """The version of the object as it is now; 0: gone already."""
        o = self._store.get(done.cls, done.id)
        return o.meta.version if o is not None else 0  # type: ignore[attr-defined]  # all have meta

    async def _apply(self, context: Context, change: Callable[[Draft], R]) -> R:
        # The commit's preconditions see to what is written. What is refused, or has nothing to
        # change, is never committed: that must not be for what another manager has changed since.
        await self._reach()
        try:
            async with self._giving_out:
                return await self._store.update(change, who=_who(context.identity))
        except (errors.Unavailable, errors.TimedOut) as error:
            if self._store.engine.in_touch:
                raise
            raise await self._explained(error) from error

    async def _apply_when_free(self, context: Context, change: Callable[[Draft], R]) -> R:
        """As `_apply`; where an earlier removal is in the way, waits until it is done, but not for
        ever.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._removal_wait_s
        while True:
            try:
                return await self._apply(context, change)
            except RemovalPending as pending:
                try:
                    async with asyncio.timeout_at(until_s):
                        await self._wait_gone(pending.waits_for)
                except TimeoutError:
                    raise pending from None

    async def _wait_gone(self, ids: frozenset[str]) -> None:
        async with dirty(self._store, (("kind", Kind.SERVICE), ("kind", Kind.STACK))) as changed:
            while any(self._store.get(Service, i) or self._store.get(Stack, i) for i in ids):
                await changed.wait()
                changed.clear()

    def _audit(self, context: Context, done: Done, **more: object) -> None:
        _changed(
            context,
            what=done.action,
            kind=done.kind.name.lower(),
            name=done.name,
            id=done.id,
            revision=self._store.revision,
            **more,
        )


def _changed(context: Context, **facts: object) -> None:
    """Tells the log and the audit trail of a change."""
    log.info(
        "change",
        who=_who(context.identity),
        peer=context.peer,
        request_id=context.request_id,
        **facts,
    )
    context.note(**{"object_id" if key == "id" else key: value for key, value in facts.items()})


def _who(identity: Identity) -> str:
    """The caller in the log, in events and in stacks: "local", "admin ada", "manager ID"."""
    return str(identity)
