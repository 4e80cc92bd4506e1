"""A cluster that is only a memory: the services that swarmctl calls, on a unix socket.

Objects stand in lists that a test fills; answers of streams are scripts. What is asked is recorded. The server runs in a thread with a loop of
its own, so that commands run as they do in a process.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from swarm import rpc
from swarm.errors import Conflict, Invalid, NotFound, SwarmError
from swarm.v1 import (
    AuditRecord,
    BackupRequest,
    BackupResponse,
    Caller,
    Cluster,
    ClusterSpec,
    Config,
    CopyInput,
    CopyOutput,
    CreateRequest,
    CreateResponse,
    DeployStackRequest,
    DeployStackResponse,
    Event,
    ExecInput,
    ExecOutput,
    ExplainTaskRequest,
    ExplainTaskResponse,
    GetInfoRequest,
    GetInfoResponse,
    GetJoinTokensRequest,
    GetJoinTokensResponse,
    GetNodeInfoRequest,
    GetNodeInfoResponse,
    GetRequest,
    GetResponse,
    GetServiceHistoryRequest,
    GetServiceHistoryResponse,
    GetStackHistoryRequest,
    GetStackHistoryResponse,
    GetUnlockKeyRequest,
    GetUnlockKeyResponse,
    InitRequest,
    InitResponse,
    IssueClientCertificateRequest,
    IssueClientCertificateResponse,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    JoinRequest,
    JoinResponse,
    Kind,
    LeaveRequest,
    LeaveResponse,
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
    Meta,
    Network,
    NodeRole,
    Object,
    PlanStackResponse,
    RebalanceRequest,
    RebalanceResponse,
    RemoveRequest,
    RemoveResponse,
    RestoreRequest,
    RestoreResponse,
    ResumeUpdateRequest,
    ResumeUpdateResponse,
    RotateRequest,
    RotateResponse,
    Secret,
    Service,
    ServiceRevision,
    ServiceStatus,
    StatsRequest,
    StatsResponse,
    UnlockRequest,
    UnlockResponse,
    UpdateRequest,
    UpdateResponse,
    WatchRequest,
    WatchResponse,
    WatchServicesRequest,
    WatchServicesResponse,
)
from swarm.v1.services import CERTIFICATES_METHODS, CONTROL_METHODS, LOCAL_METHODS
from tests.integration.cli.fake_files import FakeFiles

START_S = 10
STORE_REVISION = 10_000
CREATED_NS = 1_795_250_000_000_000_000


class FakeCluster:
    """What the fake holds, and what it was asked."""

    def __init__(self) -> None:
        self.objects: dict[Kind, list[Any]] = {kind: [] for kind in Kind}
        self.statuses: dict[str, ServiceStatus] = {}
        self.revisions: dict[tuple[str, int], ServiceRevision] = {}
        self.calls: list[Any] = []
        # By method: whether its last call may be answered from what is known, however old.
        self.stale: dict[str, bool] = {}
        self.leave_warnings: tuple[str, ...] = ()
        # What Stats answers with, by the number of the measurement; and the time between them.
        self.measure: Callable[[int], list[StatsResponse]] = lambda number: []
        self.measure_s = 0.1
        # One item per message of WatchServices: statuses (or a revision and statuses), an error to
        # raise, or seconds to wait.
        self.watch_script: list[Any] = []
        self.log_script: list[Any] = []
        # How long logs that are followed go on after the last of it.
        self.log_hold_s = 0.0
        self.events: list[Event] = []
        self.kept_from_ns = 0
        # What a watch sees after its first, empty message.
        self.watch_events: list[Event] = []
        # Raised by the next call of the method with this name, once per item.
        self.failures: dict[str, list[SwarmError]] = {}
        # Removal takes its time: what is removed stays until a test takes it away.
        self.keep_removed = False
        self.deploy_changes: tuple[Any, ...] = ()
        self.plan = PlanStackResponse()
        self.history = GetStackHistoryResponse()
        # By service id.
        self.service_histories: dict[str, GetServiceHistoryResponse] = {}
        self.files: FakeFiles | None = None
        self.rotated = RotateResponse()
        self.gpus = ListGpusResponse()
        self.queues = ListQueuesResponse()
        self.rebalanced = RebalanceResponse()
        self.explanation = ExplainTaskResponse()
        self.info = GetInfoResponse(
            cluster_id="c1", node_id="n1", version="0.1.0", store_engine="embedded", revision=7
        )
        self.node = GetNodeInfoResponse(
            node_id="n1", state="active", control_available=True, hostname="host1", version="0.1.0"
        )
        # The pieces of a backup, and the audit trail.
        self.backup: list[bytes] = []
        self.audit: list[AuditRecord] = []
        self.damaged: tuple[str, ...] = ()
        self.exec_reply = b""
        self.exec_code = 0
        self.exec_refusal: SwarmError | None = None
        self.exec_inputs: list[ExecInput] = []
        self.version = 100
        self.cluster = Cluster(
            id="c1", meta=Meta(version=3), spec=ClusterSpec(name="default"), root_ca_pem="PEM\n"
        )
        self.objects[Kind.CLUSTER] = [self.cluster]

    def add(self, item: Any) -> Any:
        """Adds an object; its kind is its class's."""
        self.objects[Kind[type(item).__name__.upper()]].append(item)
        return item

    def find(self, kind: Kind, ref: str) -> Any:
        found = [item for item in self.objects[kind] if _fits(item, ref)]
        if kind is Kind.CLUSTER:
            found = self.objects[kind]
        if not found:
            raise NotFound(f"{kind.name.lower()} {ref} not found")
        return found[0]

    def last(self, kind: type[Any]) -> Any:
        """The last request of a class."""
        return [call for call in self.calls if isinstance(call, kind)][-1]

    def note(self, name: str, request: Any) -> None:
        self.calls.append(request)
        if self.failures.get(name):
            raise self.failures[name].pop(0)


def _name(item: Any) -> str:
    spec = getattr(item, "spec", None)
    name = getattr(spec, "name", "")
    if not name and getattr(item, "description", None):
        name = item.description.hostname
    return str(name)


def _fits(item: Any, ref: str) -> bool:
    return bool(ref) and (item.id == ref or _name(item) == ref or item.id.startswith(ref))


def _passes(item: Any, key: str, values: tuple[str, ...]) -> bool:
    match key:
        case "label":
            labels = item.spec.labels
            return all(
                k in labels and (not s or labels[k] == v)
                for k, s, v in (value.partition("=") for value in values)
            )
        case "mode":
            return any(getattr(item.spec.mode, value.replace("-", "_"), None) for value in values)
        case "service":
            return item.service_id in values
        case "node":
            return item.node_id in values
        case "name":
            return any(_name(item).startswith(value) for value in values)
        case "desired-state":
            return item.desired_state.name.lower() in values
        case "superseded":
            return str(item.superseded).lower() in values
    raise Invalid(f"invalid filter {key!r}")


class _Control:
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def backup(
        self, request: BackupRequest, context: rpc.Context
    ) -> AsyncIterator[BackupResponse]:
        self.cluster.note("backup", request)
        for piece in self.cluster.backup:
            yield BackupResponse(data=piece)

    async def list_audit(
        self, request: ListAuditRequest, context: rpc.Context
    ) -> AsyncIterator[ListAuditResponse]:
        self.cluster.note("list_audit", request)
        yield ListAuditResponse(records=tuple(self.cluster.audit), damaged=self.cluster.damaged)

    async def get_info(self, request: GetInfoRequest, context: rpc.Context) -> GetInfoResponse:
        self.cluster.stale["get_info"] = context.stale
        self.cluster.note("get_info", request)
        return self.cluster.info

    async def get(self, request: GetRequest, context: rpc.Context) -> GetResponse:
        self.cluster.note("get", request)
        found = self.cluster.find(request.kind, request.ref)
        holder = Object(**{request.kind.name.lower(): found})
        revision = None
        if request.kind is Kind.TASK:
            revision = self.cluster.revisions.get((found.service_id, found.spec_version))
        status = self.cluster.statuses.get(found.id)
        return GetResponse(object=holder, revision=revision, service_status=status)

    async def list(self, request: ListRequest, context: rpc.Context) -> ListResponse:
        self.cluster.stale["list"] = context.stale
        self.cluster.note("list", request)
        found = [
            item
            for item in self.cluster.objects[request.kind]
            if all(_passes(item, f.key, f.values) for f in request.filters)
        ]
        name = request.kind.name.lower()
        return ListResponse(
            objects=tuple(Object(**{name: item}) for item in found),
            service_statuses=tuple(
                self.cluster.statuses.get(item.id, ServiceStatus(service_id=item.id))
                for item in found
            )
            if request.with_status
            else (),
        )

    async def create(self, request: CreateRequest, context: rpc.Context) -> CreateResponse:
        self.cluster.note("create", request)
        spec = request.spec
        assert spec is not None
        self.cluster.version += 1
        id_ = f"new{self.cluster.version}"
        meta = Meta(version=self.cluster.version, created_at_ns=CREATED_NS)
        if spec.service is not None:
            self.cluster.add(Service(id=id_, meta=meta, spec=spec.service))
        elif spec.secret is not None:
            self.cluster.add(Secret(id=id_, meta=meta, spec=spec.secret))
        elif spec.config is not None:
            self.cluster.add(Config(id=id_, meta=meta, spec=spec.config))
        elif spec.network is not None:
            self.cluster.add(Network(id=id_, meta=meta, spec=spec.network))
        return CreateResponse(id=id_, version=self.cluster.version)

    async def update(self, request: UpdateRequest, context: rpc.Context) -> UpdateResponse:
        self.cluster.note("update", request)
        found = self.cluster.find(request.kind, request.id)
        if found.meta.version != request.version:
            raise Conflict("update out of sequence")
        self.cluster.version += 1
        if not request.rollback:
            spec = getattr(request.spec, request.kind.name.lower())
            new = msgspec.structs.replace(found, spec=spec, meta=Meta(version=self.cluster.version))
            held = self.cluster.objects[request.kind]
            held[held.index(found)] = new
        return UpdateResponse(version=self.cluster.version)

    async def remove(self, request: RemoveRequest, context: rpc.Context) -> RemoveResponse:
        self.cluster.note("remove", request)
        found = self.cluster.find(request.kind, request.ref)
        if not self.cluster.keep_removed:
            self.cluster.objects[request.kind].remove(found)
        return RemoveResponse(id=found.id)

    async def deploy_stack(
        self, request: DeployStackRequest, context: rpc.Context
    ) -> DeployStackResponse:
        self.cluster.note("deploy_stack", request)
        return DeployStackResponse(
            stack_id="stack1",
            revision=1,
            changes=self.cluster.deploy_changes,
            store_revision=STORE_REVISION,
        )

    async def plan_stack(
        self, request: DeployStackRequest, context: rpc.Context
    ) -> PlanStackResponse:
        self.cluster.note("plan_stack", request)
        return self.cluster.plan

    async def list_gpus(self, request: ListGpusRequest, context: rpc.Context) -> ListGpusResponse:
        self.cluster.note("list_gpus", request)
        return self.cluster.gpus

    async def list_queues(
        self, request: ListQueuesRequest, context: rpc.Context
    ) -> ListQueuesResponse:
        self.cluster.note("list_queues", request)
        return self.cluster.queues

    async def rebalance(self, request: RebalanceRequest, context: rpc.Context) -> RebalanceResponse:
        self.cluster.note("rebalance", request)
        return self.cluster.rebalanced

    async def get_stack_history(
        self, request: GetStackHistoryRequest, context: rpc.Context
    ) -> GetStackHistoryResponse:
        self.cluster.note("get_stack_history", request)
        return self.cluster.history

    async def get_service_history(
        self, request: GetServiceHistoryRequest, context: rpc.Context
    ) -> GetServiceHistoryResponse:
        self.cluster.note("get_service_history", request)
        found = self.cluster.find(Kind.SERVICE, request.service)
        answer = self.cluster.service_histories.get(found.id, GetServiceHistoryResponse())
        return msgspec.structs.replace(answer, service=found)

    async def resume_update(
        self, request: ResumeUpdateRequest, context: rpc.Context
    ) -> ResumeUpdateResponse:
        self.cluster.note("resume_update", request)
        self.cluster.version += 1
        return ResumeUpdateResponse(version=self.cluster.version)

    async def copy(
        self, request: AsyncIterator[CopyInput], context: rpc.Context
    ) -> AsyncIterator[CopyOutput]:
        self.cluster.note("copy", None)
        assert self.cluster.files is not None, "the test gives the task's files"
        async for output in self.cluster.files.copy(request):
            yield output

    async def rotate(self, request: RotateRequest, context: rpc.Context) -> RotateResponse:
        self.cluster.note("rotate", request)
        return self.cluster.rotated

    async def watch_services(
        self, request: WatchServicesRequest, context: rpc.Context
    ) -> AsyncIterator[WatchServicesResponse]:
        self.cluster.note("watch_services", request)
        while self.cluster.watch_script:
            step = self.cluster.watch_script.pop(0)
            if isinstance(step, SwarmError):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            revision = STORE_REVISION
            if isinstance(step, tuple):
                # Statuses of an earlier revision.
                revision, step = step
            yield WatchServicesResponse(statuses=tuple(step), revision=revision)
        await asyncio.sleep(3600)  # until the caller ends the call

    async def watch(
        self, request: WatchRequest, context: rpc.Context
    ) -> AsyncIterator[WatchResponse]:
        self.cluster.note("watch", request)
        if self.cluster.events:
            yield WatchResponse(
                events=tuple(self.cluster.events), kept_from_ns=self.cluster.kept_from_ns
            )
            return
        yield WatchResponse()
        while not self.cluster.watch_events:
            await asyncio.sleep(0.01)
        yield WatchResponse(events=tuple(self.cluster.watch_events))

    async def explain_task(
        self, request: ExplainTaskRequest, context: rpc.Context
    ) -> ExplainTaskResponse:
        self.cluster.note("explain_task", request)
        return self.cluster.explanation

    async def logs(self, request: LogsRequest, context: rpc.Context) -> AsyncIterator[LogsResponse]:
        self.cluster.note("logs", request)
        for answer in self.cluster.log_script:
            yield answer
        if request.options is not None and request.options.follow:
            await asyncio.sleep(self.cluster.log_hold_s)

    async def stats(
        self, request: StatsRequest, context: rpc.Context
    ) -> AsyncIterator[StatsResponse]:
        self.cluster.note("stats", request)
        for number in itertools.count():
            for answer in self.cluster.measure(number):
                yield answer
            if request.once and number == 1:
                return
            await asyncio.sleep(self.cluster.measure_s)
            if self.cluster.failures.get("stats"):
                raise self.cluster.failures["stats"].pop(0)

    async def exec(
        self, request: AsyncIterator[ExecInput], context: rpc.Context
    ) -> AsyncIterator[ExecOutput]:
        self.cluster.note("exec", None)
        self.cluster.exec_inputs.append(await anext(request))
        if self.cluster.exec_refusal is not None:
            raise self.cluster.exec_refusal
        yield ExecOutput(started=True)
        if self.cluster.exec_reply:
            yield ExecOutput(stdout=self.cluster.exec_reply)
        async for item in request:
            self.cluster.exec_inputs.append(item)
            if item.stdin is not None:
                if item.stdin == b"\x04":
                    break
                yield ExecOutput(stdout=b"[" + item.stdin.upper() + b"]")
            if item.resize is not None:
                yield ExecOutput(stdout=f"<{item.resize.rows}x{item.resize.columns}>".encode())
            if item.detach:
                return
            if item.stdin_closed:
                break
        yield ExecOutput(exit_code=self.cluster.exec_code)

    async def get_unlock_key(
        self, request: GetUnlockKeyRequest, context: rpc.Context
    ) -> GetUnlockKeyResponse:
        self.cluster.note("get_unlock_key", request)
        key = "SWMKEY-1-new" if request.rotate or request.received else "SWMKEY-1-old"
        return GetUnlockKeyResponse(unlock_key=key, in_force=not request.rotate)

    async def get_join_tokens(
        self, request: GetJoinTokensRequest, context: rpc.Context
    ) -> GetJoinTokensResponse:
        self.cluster.note("get_join_tokens", request)
        return GetJoinTokensResponse(
            worker="SWMTKN-1-w", manager="SWMTKN-1-m", addr="10.0.0.1:2377"
        )


class _Local:
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def restore(
        self, request: AsyncIterator[RestoreRequest], context: rpc.Context
    ) -> AsyncIterator[RestoreResponse]:
        taken = bytearray()
        async for message in request:
            self.cluster.note("restore", message)
            taken += message.data
            yield RestoreResponse(
                bytes=len(taken),
                node_id="n1" if message.finish else "",
                cluster_id="c1" if message.finish else "",
                revision=1_000_000_007,
                backup_revision=7,
                addr="10.0.0.1:2377",
            )

    async def get_node_info(
        self, request: GetNodeInfoRequest, context: rpc.Context
    ) -> GetNodeInfoResponse:
        self.cluster.note("get_node_info", request)
        return self.cluster.node

    async def init(self, request: InitRequest, context: rpc.Context) -> InitResponse:
        self.cluster.note("init", request)
        return InitResponse(
            node_id="n1",
            cluster_id="c1",
            worker_token="SWMTKN-1-w",
            manager_token="SWMTKN-1-m",
            addr="10.0.0.1:2377",
        )

    async def join(self, request: JoinRequest, context: rpc.Context) -> JoinResponse:
        self.cluster.note("join", request)
        return JoinResponse(node_id="n2", role=NodeRole.WORKER)

    async def leave(self, request: LeaveRequest, context: rpc.Context) -> LeaveResponse:
        self.cluster.note("leave", request)
        return LeaveResponse(warnings=self.cluster.leave_warnings)

    async def unlock(self, request: UnlockRequest, context: rpc.Context) -> UnlockResponse:
        self.cluster.note("unlock", request)
        self.cluster.node = msgspec.structs.replace(self.cluster.node, state="active")
        return UnlockResponse()


class _Certificates:
    def __init__(self, cluster: FakeCluster) -> None:
        self.cluster = cluster

    async def issue_node_certificate(
        self, request: IssueNodeCertificateRequest, context: rpc.Context
    ) -> IssueNodeCertificateResponse:
        raise Invalid("the fake issues client certificates only")

    async def issue_client_certificate(
        self, request: IssueClientCertificateRequest, context: rpc.Context
    ) -> IssueClientCertificateResponse:
        self.cluster.note("issue_client_certificate", request)
        return IssueClientCertificateResponse(certificate_pem="CERT\n", root_ca_pem="ROOT\n")


class FakeServer:
    """Serves a FakeCluster on a unix socket; a context manager."""

    def __init__(self, cluster: FakeCluster, path: Path) -> None:
        self._cluster = cluster
        self._path = path
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = rpc.server()

        def authorize(method: rpc.Method, context: dict[str, list[bytes]]) -> rpc.Identity:
            return rpc.Identity(Caller.LOCAL)

        server.add_generic_rpc_handlers(
            (
                rpc.handler(CONTROL_METHODS, _Control(self._cluster), authorize),
                rpc.handler(LOCAL_METHODS, _Local(self._cluster), authorize),
                rpc.handler(CERTIFICATES_METHODS, _Certificates(self._cluster), authorize),
            )
        )
        server.add_insecure_port(f"unix:{self._path}")
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(0)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(START_S), "the fake server has not started"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive(), "the fake server has not stopped"
