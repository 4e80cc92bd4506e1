"""Dispatcher, session and worker together: what they promise each other over a real stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec import structs

from agent.runtime.base import Failed, Rejected
from manager.store import Draft, Stale
from swarm import errors, rpc
from swarm.clock import ManualClock
from swarm.v1 import (
    AgentMessage,
    Cluster,
    Config,
    ConfigReference,
    ConfigSpec,
    FileTarget,
    Heartbeat,
    Hello,
    ManagerMessage,
    Network,
    NetworkAttachment,
    NetworkSpec,
    Node,
    NodeDescription,
    NodeRole,
    NodeState,
    PortConfig,
    Secret,
    SecretReference,
    SecretSpec,
    Service,
    StatusBatch,
    Task,
    TaskReport,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from swarm.v1.services import DispatcherClient
from tests.fakes.runtime import Script
from tests.fakes.waiting import until
from tests.integration.dispatcher.harness import CONTAINER, Agent, Manager, cluster

S = TaskState
PORT = PortConfig(target_port=80, published_port=8080, protocol="tcp", publish_mode="ingress")


class Raw:
    """A session spoken message by message, for what no proper agent does."""

    def __init__(self, manager: Manager, node_id: str) -> None:
        self._channel = rpc.Channel.unix(manager.socket(node_id))
        self._out: asyncio.Queue[AgentMessage] = asyncio.Queue()
        self._answers = DispatcherClient(self._channel).session(self._say())

    async def _say(self) -> AsyncIterator[AgentMessage]:
        while True:
            yield await self._out.get()

    def say(self, message: AgentMessage) -> None:
        self._out.put_nowait(message)

    def hello(self, *tasks: TaskReport, protocol: int = 1) -> None:
        description = NodeDescription(hostname="raw")
        self.say(AgentMessage(hello=Hello(protocol=protocol, description=description, tasks=tasks)))

    async def hear(self) -> ManagerMessage:
        async with asyncio.timeout(10):
            return await anext(self._answers)

    async def hear_of(self, field: str) -> ManagerMessage:
        """The next message of a kind."""
        while True:
            message = await self.hear()
            if getattr(message, field) is not None:
                return message

    async def __aenter__(self) -> Raw:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()


# ------------------------------------------------------------------ tasks


async def test_task_runs_and_its_states_reach_the_store(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        assert manager.node_status("n1").state == NodeState.READY
        work = agent.runtime.containers[task].work
        assert work.assignment.name == f"web.1.{task}"
        assert work.assignment.service_labels == {"tier": "front"}
        assert work.assignment.node_name == "n1"


async def test_shutdown_keeps_the_container_and_remove_deletes_the_task(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        await manager.want(S.SHUTDOWN, task)
        await manager.reach(S.SHUTDOWN, task)
        assert agent.runtime.running() == set()
        assert task in agent.runtime.containers
        await manager.want(S.REMOVE, task)
        await until(lambda: manager.store.get(Task, task) is None)
        assert agent.runtime.containers == {}
        assert len(agent.worker) == 0


async def test_task_that_ends_by_itself_is_reported_with_its_exit_code(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        good, bad = await manager.add_tasks(service, "n1", 2)
        await manager.reach(S.RUNNING, good, bad)
        agent.runtime.exit(good, 0)
        agent.runtime.exit(bad, 137, "out of memory")
        await manager.reach(S.COMPLETE, good)
        await manager.reach(S.FAILED, bad)
        status = manager.status(bad)
        assert status.err == "task: non-zero exit (137): out of memory"
        assert status.container is not None
        assert status.container.exit_code == 137


@pytest.mark.parametrize(
    ("script", "state"),
    [
        (Script(prepare_error=Rejected("no such image: nope")), S.REJECTED),
        (Script(prepare_error=Failed("registry is away")), S.FAILED),
        (Script(start_error=Failed("port is taken")), S.FAILED),
        (Script(start_error=Rejected("bad option")), S.REJECTED),
    ],
    ids=["rejected preparation", "failed preparation", "failed start", "rejected start"],
)
async def test_what_the_runtime_refuses_is_reported_with_the_reason(
    tmp_path: Path, script: Script, state: TaskState
) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.runtime.script = lambda _: script
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(state, task)
        error = script.prepare_error or script.start_error
        assert error is not None
        assert manager.status(task).err == error.message


async def test_task_for_a_runtime_the_node_lacks_is_rejected(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, _):
        service = await manager.add_service("web", TaskSpec(container=CONTAINER, runtime="runsc"))
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.REJECTED, task)
        assert "'runsc' is not offered by this node, which has: docker" in manager.status(task).err


async def test_healthcheck_decides_when_a_task_runs_and_when_it_fails(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.runtime.script = lambda _: Script(healthy_after_s=0.1)
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.STARTING, task)
        await manager.reach(S.RUNNING, task)
        agent.runtime.become_unhealthy(task, "no answer")
        await manager.reach(S.FAILED, task)
        assert manager.status(task).err == "unhealthy: no answer"
        assert manager.status(task).cause == "unhealthy"
        assert agent.runtime.running() == set()


async def test_an_unhealthy_task_gets_no_connections_while_it_is_being_stopped(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1", "n2") as (manager, (first, second)):
        first.runtime.script = lambda _: Script(healthy_after_s=0.1, stop_s=3.0)
        service = await manager.add_service("web", ports=(PORT,))
        tasks = await manager.add_tasks(service, "n1", 2)

        def backends(agent: Agent) -> set[str]:
            found = agent.ingress.services.get(service)
            return {b.task_id for b in found.backends} if found else set()

        await manager.reach(S.STARTING, *tasks)
        assert first.ingress.targets == {}, "not before the healthcheck has passed"
        await until(lambda: backends(second) == set(tasks))
        first.runtime.become_unhealthy(tasks[0], "3 checks failed: no answer")
        await until(lambda: set(first.ingress.targets) == {tasks[1]}, timeout_s=1.0)
        await until(lambda: backends(first) == backends(second) == {tasks[1]}, timeout_s=1.0)
        assert manager.state(tasks[0]) == S.RUNNING
        assert manager.status(tasks[0]).err == "unhealthy: 3 checks failed: no answer"
        assert tasks[0] in first.runtime.running()
        await manager.reach(S.FAILED, tasks[0])


async def test_preparation_that_hangs_is_abandoned_when_the_task_is_not_wanted(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.runtime.script = lambda _: Script(prepare_s=3600)
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.PREPARING, task)
        await manager.want(S.REMOVE, task)
        await until(lambda: manager.store.get(Task, task) is None)


async def test_starts_at_once_are_limited(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.runtime.script = lambda _: Script(prepare_s=0.01, start_s=0.02)
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 100)
        await manager.reach(S.RUNNING, *tasks)
        assert agent.runtime.in_flight_most <= 24
        assert set(agent.runtime.starts.values()) == {1}


async def test_secrets_and_configs_come_as_files_and_only_to_their_users(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", "n2") as (manager, (first, second)):

        def fill(draft: Draft) -> None:
            spec = SecretSpec(name="key")
            draft.put(Secret(id="sec", spec=spec, sealed=manager.sealer.seal(b"hush")))
            draft.put(Config(id="cfg", spec=ConfigSpec(name="conf", data=b"a=1")))

        await manager.store.update(fill)
        spec = TaskSpec(
            container=structs.replace(
                CONTAINER,
                secrets=(SecretReference(secret_id="sec", secret_name="key"),),
                configs=(
                    ConfigReference(
                        config_id="cfg",
                        config_name="conf",
                        file=FileTarget(name="etc/app.conf", uid="7", mode=0o400),
                    ),
                ),
            )
        )
        with_secret = await manager.add_service("a", spec)
        without = await manager.add_service("b")
        (task,) = await manager.add_tasks(with_secret, "n1")
        (other,) = await manager.add_tasks(without, "n2")
        await manager.reach(S.RUNNING, task, other)
        secret, config = first.runtime.containers[task].work.files
        assert (secret.target, secret.data, secret.secret) == ("/run/secrets/key", b"hush", True)
        assert (config.target, config.data) == ("/etc/app.conf", b"a=1")
        assert (config.uid, config.mode) == (7, 0o400)
        assert second.worker._supplies.secrets == {}
        await first.worker._state.flushed()
        for path in first.folder.iterdir():
            assert b"hush" not in path.read_bytes()
        await manager.want(S.SHUTDOWN, task)
        await until(lambda: not first.worker._supplies.secrets)


async def test_network_is_released_with_its_last_task(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        await manager.store.update(
            lambda draft: draft.put(Network(id="net", spec=NetworkSpec(name="back")))
        )
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(
            service,
            "n1",
            2,
            change=lambda t: structs.replace(t, networks=(NetworkAttachment(network_id="net"),)),
        )
        await manager.reach(S.RUNNING, *tasks)
        stored = manager.store.get(Task, tasks[0])
        assert stored is not None
        assert stored.networks[0].addresses
        await manager.want(S.REMOVE, tasks[0])
        await until(lambda: manager.store.get(Task, tasks[0]) is None)
        assert agent.runtime.released == []
        await manager.want(S.REMOVE, tasks[1])
        await until(lambda: agent.runtime.released == ["net"])


async def test_sealed_registry_credentials_reach_the_node_and_not_its_disk(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service(
            "web",
            change=lambda r: structs.replace(
                r, sealed_registry_auth=manager.sealer.seal(b"Y3JlZHM=")
            ),
        )
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        assert agent.runtime.containers[task].work.assignment.registry_auth == "Y3JlZHM="
        await agent.worker._state.flushed()
        assert all(b"Y3JlZHM=" not in p.read_bytes() for p in agent.folder.iterdir())


# ------------------------------------------------------------------ published ports


async def test_every_node_hears_of_all_backends_of_published_services(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", "n2") as (manager, (first, second)):
        service = await manager.add_service("web", ports=(PORT,))
        tasks = await manager.add_tasks(service, "n1", 2)
        await manager.reach(S.RUNNING, *tasks)

        def backends(agent: Agent) -> set[str]:
            found = agent.ingress.services.get(service)
            return {b.task_id for b in found.backends} if found else set()

        await until(lambda: backends(first) == backends(second) == set(tasks))
        assert set(first.ingress.targets) == set(tasks)
        assert second.ingress.targets == {}
        assert second.ingress.services[service].backends[0].relay_addr == "10.0.0.1"
        await manager.want(S.SHUTDOWN, tasks[0])
        await until(lambda: backends(second) == {tasks[1]})
        await until(lambda: set(first.ingress.targets) == {tasks[1]})

        def delete(draft: Draft) -> None:
            stored = draft.get(Service, service)
            assert stored is not None
            draft.put(structs.replace(stored, pending_delete=True))

        await manager.store.update(delete)
        await until(lambda: not second.ingress.services)


async def test_ports_that_cannot_be_opened_are_told_in_the_nodes_warnings(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.ingress.problems = ("port 8080 is taken",)
        await manager.add_service("web", ports=(PORT,))

        def warnings() -> tuple[str, ...]:
            node = manager.store.get(Node, "n1")
            assert node is not None
            return node.description.warnings if node.description else ()

        await until(lambda: "port 8080 is taken" in warnings())


# ------------------------------------------------------------------ restarts


async def test_killed_agent_adopts_its_tasks_and_starts_none_twice(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 5)
        await manager.reach(S.RUNNING, *tasks)
        await agent.kill()
        agent.runtime.exit(tasks[0], 3)
        agent.runtime.vanish(tasks[1])
        await agent.start()
        await manager.reach(S.FAILED, *tasks[:2])
        assert manager.status(tasks[0]).err == "task: non-zero exit (3)"
        assert "is gone" in manager.status(tasks[1]).err
        assert all(manager.state(t) == S.RUNNING for t in tasks[2:])
        assert agent.runtime.running() == set(tasks[2:])
        assert set(agent.runtime.starts.values()) == {1}
        assert set(agent.ingress.targets) == set(tasks[2:])


async def test_agent_killed_at_any_moment_starts_each_task_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        agent.runtime.script = lambda _: Script(prepare_s=0.03, start_s=0.03)
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 20)
        for _ in range(6):
            await asyncio.sleep(0.04)  # a moment in the middle of things, whichever
            await agent.kill()
            await agent.start()
        await until(lambda: all((manager.state(t) or 0) >= S.RUNNING for t in tasks))
        assert max(agent.runtime.starts.values()) == 1
        assert all(manager.state(t) == S.RUNNING for t in tasks)


async def test_lost_records_are_found_again_in_the_runtime(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 3)
        await manager.reach(S.RUNNING, *tasks)
        await agent.kill()
        for path in agent.folder.iterdir():
            path.unlink()
        (agent.folder / "tasks.db").write_bytes(b"garbage" * 1000)
        await agent.start()
        await agent.connected()
        await until(lambda: len(agent.worker) == 3)
        assert agent.runtime.running() == set(tasks)
        assert set(agent.runtime.starts.values()) == {1}
        assert (agent.folder / "tasks.db.damaged-1").exists()

        def told() -> bool:
            node = manager.store.get(Node, "n1")
            assert node is not None and node.description is not None
            return any("was damaged" in w for w in node.description.warnings)

        await until(told)


async def test_leftovers_nobody_knows_go_only_after_a_managers_word(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        kept, stray = await manager.add_tasks(service, "n1", 2)
        await manager.reach(S.RUNNING, kept, stray)
        await agent.kill()
        await manager.stop()
        for path in agent.folder.iterdir():
            path.unlink()
        await agent.start()
        assert agent.runtime.running() == {kept, stray}
        await manager.start()
        await manager.store.update(lambda d: d.delete(Task, stray))
        await until(lambda: agent.runtime.running() == {kept})
        await until(lambda: stray not in agent.runtime.containers)


async def test_tasks_run_on_without_a_manager_and_what_happened_is_told_later(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 3)
        await manager.reach(S.RUNNING, *tasks)
        await manager.stop()
        await until(lambda: not agent.session.connected)
        agent.runtime.exit(tasks[0], 0)
        assert agent.runtime.running() == set(tasks[1:])
        await manager.start()
        await agent.connected()
        await manager.reach(S.COMPLETE, tasks[0])
        assert set(agent.runtime.starts.values()) == {1}


async def test_node_cut_off_stops_on_return_what_is_no_longer_its_own(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        old, gone, kept = await manager.add_tasks(service, "n1", 3)
        await manager.reach(S.RUNNING, old, gone, kept)
        await agent.stop()  # nothing is heard of it, its tasks run
        await manager.node_reaches("n1", NodeState.DOWN)
        await manager.want(S.SHUTDOWN, old)
        await manager.store.update(lambda d: d.delete(Task, gone))
        assert agent.runtime.running() == {old, gone, kept}
        await agent.start()
        await manager.reach(S.SHUTDOWN, old)
        await until(lambda: agent.runtime.running() == {kept})
        await manager.node_reaches("n1", NodeState.READY)


# ------------------------------------------------------------------ the session itself


async def test_silent_node_is_down_after_three_heartbeats_and_ready_when_back(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        loop = asyncio.get_running_loop()
        await manager.node_reaches("n1", NodeState.READY)
        await agent.stop()
        begin_s = loop.time()
        await manager.node_reaches("n1", NodeState.DOWN)
        assert 0.2 <= loop.time() - begin_s < 2.0
        assert manager.node_status("n1").message == "3 heartbeats were missed"
        await agent.start()
        await manager.node_reaches("n1", NodeState.READY)
        assert manager.node_status("n1").message == ""


async def test_manager_that_stood_still_gives_nodes_time_to_come_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        await manager.node_reaches("n1", NodeState.READY)
        await agent.stop()  # it gave up on a manager that did not answer
        with manager.store.watch(("node", "n1")) as watch:
            time.sleep(0.9)  # noqa: ASYNC251  # the whole loop stands still
            await asyncio.sleep(1.0)  # longer than three heartbeats, shorter than the grace
            await agent.start()
            await agent.connected()
            await asyncio.sleep(0.1)
            batches = [await anext(watch) for _ in range(watch.pending)]
            nodes = [c.new for b in batches for c in b.changes if isinstance(c.new, Node)]
            # It was ready all the time; that it has a new session is all that is new.
            assert all(n.status and n.status.state == NodeState.READY for n in nodes)


async def test_what_an_agent_said_before_it_left_a_standing_manager_shortens_no_grace(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):
        async with Raw(manager, "n1") as raw:
            raw.hello()
            await raw.hear_of("assignments")
            await manager.node_reaches("n1", NodeState.READY)
            manager.dispatcher._custody._stood_still(2.0, 2.0)
            raw.say(AgentMessage(heartbeat=Heartbeat(sequence=1)))
            await raw.hear_of("heartbeat")
        await asyncio.sleep(1.0)  # longer than three heartbeats, shorter than the grace
        assert manager.node_status("n1").state == NodeState.READY


async def test_manager_whose_machine_was_suspended_gives_nodes_time_to_come_back(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        await manager.node_reaches("n1", NodeState.READY)
        clock = ManualClock()
        manager.dispatcher._custody._clock = clock
        await asyncio.sleep(0.5)  # the next look is by this clock from begin to end
        await agent.stop()
        clock.advance(seconds=3600)  # the loop's own time stood still
        await asyncio.sleep(1.0)
        assert manager.node_status("n1").state == NodeState.READY


async def test_defect_while_an_agent_is_heard_leaves_no_session_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):

        def fails(session: object, message: AgentMessage) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(manager.dispatcher, "_hear", fails)
        async with Raw(manager, "n1") as agent:
            agent.hello()
            await agent.hear_of("assignments")
            assert "n1" in manager.dispatcher._sessions
            agent.say(AgentMessage(heartbeat=Heartbeat(sequence=1)))
            await until(lambda: not manager.dispatcher._sessions)


async def test_node_that_leaves_is_down_at_once(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", heartbeat_ns=60 * 10**9) as (manager, (agent,)):
        await manager.node_reaches("n1", NodeState.READY)
        assert await agent.session.leave()
        await manager.node_reaches("n1", NodeState.DOWN, timeout_s=2)
        assert manager.node_status("n1").message == "the node left the cluster"


async def test_node_that_does_not_come_back_after_a_managers_start_is_down(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        await manager.node_reaches("n1", NodeState.READY)
        await agent.stop()
        await manager.stop()
        await manager.start()
        assert manager.node_status("n1").state == NodeState.READY
        await manager.node_reaches("n1", NodeState.DOWN)


async def test_agent_leaves_a_manager_that_is_silent(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        await agent.connected()
        # The stream stands, but nothing is acknowledged any more.
        session = manager.dispatcher._sessions["n1"]
        session.acknowledge_heartbeat = lambda sequence: None  # type: ignore[method-assign]
        await until(lambda: "was silent for 3 heartbeats" in agent.session.problem)
        await agent.connected()


async def test_newer_session_supersedes_the_older_one(tmp_path: Path) -> None:
    async with (
        cluster(tmp_path, "n1", start=False) as (manager, _),
        Raw(manager, "n1") as older,
        Raw(manager, "n1") as newer,
    ):
        older.hello()
        await older.hear_of("assignments")
        newer.hello()
        assert (await newer.hear()).welcome is not None
        goodbye = (await older.hear_of("goodbye")).goodbye
        assert goodbye is not None and goodbye.reason == "superseded"


async def test_unknown_protocol_is_refused_with_what_to_do(tmp_path: Path) -> None:
    async with (
        cluster(tmp_path, "n1", start=False) as (manager, _),
        Raw(manager, "n1") as raw,
    ):
        raw.hello(protocol=2)
        with pytest.raises(errors.Invalid, match="version 2 .* this manager version 1; update"):
            await raw.hear()


async def test_first_message_must_be_hello(tmp_path: Path) -> None:
    async with (
        cluster(tmp_path, "n1", start=False) as (manager, _),
        Raw(manager, "n1") as raw,
    ):
        raw.say(AgentMessage(heartbeat=Heartbeat(sequence=1)))
        with pytest.raises(errors.Invalid, match="first message must be its hello"):
            await raw.hear()


async def test_node_may_report_its_own_tasks_only(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", "n2", start=False) as (manager, _):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n2")
        async with Raw(manager, "n1") as raw:
            raw.hello()
            report = TaskReport(task_id=task, status=TaskStatus(state=S.FAILED))
            raw.say(AgentMessage(statuses=StatusBatch(sequence=1, reports=(report,))))
            ack = (await raw.hear_of("statuses")).statuses
            assert ack is not None and ack.sequence == 1
            assert manager.state(task) == S.ASSIGNED


async def test_statuses_are_acknowledged_only_after_their_commit(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        async with Raw(manager, "n1") as raw:
            raw.hello()
            await raw.hear_of("assignments")
            async with manager.store.task_writer:  # nobody can write tasks now
                report = TaskReport(
                    task_id=task, status=TaskStatus(state=S.RUNNING, timestamp_ns=2**62)
                )
                raw.say(AgentMessage(statuses=StatusBatch(sequence=7, reports=(report,))))
                raw.say(AgentMessage(heartbeat=Heartbeat(sequence=1)))
                # The heartbeat came later and is answered, the statuses are not.
                message = await raw.hear()
                assert message.heartbeat is not None
                assert manager.state(task) == S.ASSIGNED
            ack = (await raw.hear_of("statuses")).statuses
            assert ack is not None and ack.sequence == 7
            assert manager.state(task) == S.RUNNING


async def test_status_that_goes_back_is_not_entered(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        async with Raw(manager, "n1") as raw:
            raw.hello()
            for number, state in enumerate((S.RUNNING, S.PREPARING, S.FAILED, S.RUNNING), 1):
                report = TaskReport(
                    task_id=task, status=TaskStatus(state=state, timestamp_ns=2**62 + number)
                )
                raw.say(AgentMessage(statuses=StatusBatch(sequence=number, reports=(report,))))
            for _ in range(4):
                await raw.hear_of("statuses")
            assert manager.state(task) == S.FAILED


async def test_assignments_have_numbers_without_a_gap(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1", start=False) as (manager, _):
        service = await manager.add_service("web")
        (first,) = await manager.add_tasks(service, "n1")
        async with Raw(manager, "n1") as raw:
            raw.hello()
            full = (await raw.hear_of("assignments")).assignments
            assert full is not None and full.full and full.sequence == 1
            assert [a.task.id for a in full.tasks if a.task] == [first]
            (second,) = await manager.add_tasks(service, "n1")
            more = (await raw.hear_of("assignments")).assignments
            assert more is not None and not more.full and more.sequence == 2
            assert [a.task.id for a in more.tasks if a.task] == [second]
            await manager.store.update(lambda d: d.delete(Task, first))
            less = (await raw.hear_of("assignments")).assignments
            assert less is not None and less.sequence == 3
            assert less.removed_tasks == (first,)


async def test_agents_own_reports_are_not_sent_back_to_it(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, _):
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 5)
        await manager.reach(S.RUNNING, *tasks)
        assert manager.dispatcher._sessions["n1"]._ledger._sequence == 2


async def test_gap_in_the_numbers_makes_the_agent_start_over(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, _):
        service = await manager.add_service("web")
        before = manager.dispatcher._sessions["n1"]
        before._ledger._sequence += 1  # one message is lost
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        assert manager.dispatcher._sessions["n1"] is not before


async def test_removed_node_is_told_and_stops_its_tasks(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        await manager.store.update(lambda d: d.delete(Node, "n1"))
        await until(agent.removed.is_set)
        await until(lambda: not agent.runtime.containers)
        await until(lambda: "is not in the cluster" in agent.session.problem)


async def test_cluster_facts_and_role_reach_the_agent_when_they_change(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        assert agent.clusters[-1].role == NodeRole.WORKER
        assert agent.ingress.key == b"r" * 32

        def change(draft: Draft) -> None:
            cluster_, node = draft.get(Cluster, "cluster"), draft.get(Node, "n1")
            assert cluster_ is not None and node is not None and node.spec is not None
            draft.put(structs.replace(cluster_, root_ca_pem="root two"))
            draft.put(structs.replace(node, spec=structs.replace(node.spec, role=NodeRole.MANAGER)))

        await manager.store.update(change)
        await until(lambda: agent.clusters[-1].role == NodeRole.MANAGER)
        assert agent.clusters[-1].root_ca_pem == "root two"


async def test_writer_that_loses_races_still_enters_what_was_reported(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, _):
        service = await manager.add_service("web")
        tasks = await manager.add_tasks(service, "n1", 10)
        for task in tasks:  # others change the same tasks without the writers' lock
            draft = manager.store.draft()
            stored = draft.get(Task, task)
            assert stored is not None
            draft.put(structs.replace(stored, labels={"seen": "yes"}))
            try:
                await manager.store.commit(draft)
            except Stale:
                continue
        await manager.reach(S.RUNNING, *tasks)


async def test_runtime_that_answers_late_is_adopted_and_described_then(tmp_path: Path) -> None:
    async with cluster(tmp_path, "n1") as (manager, (agent,)):
        service = await manager.add_service("web")
        (task,) = await manager.add_tasks(service, "n1")
        await manager.reach(S.RUNNING, task)
        await agent.kill()
        agent.runtime.down = "the engine does not answer; start it"
        await agent.start()
        await agent.connected()

        def description() -> NodeDescription:
            node = manager.store.get(Node, "n1")
            assert node is not None and node.description is not None
            return node.description

        await until(lambda: description().runtimes == ())
        (problem,) = description().runtime_problems
        assert (problem.cause, problem.runtimes) == ("engine_unresponsive", ("docker",))
        assert "start it" in problem.message
        assert manager.state(task) == S.RUNNING
        agent.runtime.down = ""
        await until(lambda: description().runtimes == ("docker",))
        assert (*description().runtime_problems, *description().warnings) == ()
        assert agent.runtime.starts[task] == 1
