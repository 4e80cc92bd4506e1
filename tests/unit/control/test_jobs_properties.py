"""Random events against jobs: a gang never half-runs, attempts are bounded and wait, what has
completed never runs again, and each job comes to its end. Leaders change at any point.
"""

from __future__ import annotations

from collections import defaultdict

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from manager.control import Tally, service_status
from manager.control.slots import is_live, is_unplaced
from swarm import states
from swarm.v1 import (
    Availability,
    JobSpec,
    JobState,
    Node,
    NodeState,
    RestartPolicy,
    Service,
    StopCause,
    Task,
)
from tests.unit.control.test_jobs import end, respec
from tests.unit.control.world import (
    CPU,
    GLOBAL_JOB,
    SECOND,
    S,
    World,
    job,
    make_node,
    make_spec,
    state_of,
)

NODES = ("n1", "n2", "n3")
JOBS = ("plain", "gang", "docker", "global")
MINUTE = 60 * SECOND
ATTEMPTS = 2
ENDED = (JobState.COMPLETE, JobState.FAILED, JobState.CANCELLED)


class Jobs(RuleBasedStateMachine):
    """Users, nodes and tasks do what they like; the loop ticks when it gets to."""

    @initialize(
        seed=st.integers(0, 1000),
        total=st.integers(1, 6),
        at_once=st.integers(1, 6),
        gang=st.integers(1, 4),
        delay_s=st.sampled_from([0, 2]),
        timeout_s=st.sampled_from([0, 30]),
        keep_s=st.sampled_from([None, 20]),
    )
    def begin(
        self,
        seed: int,
        total: int,
        at_once: int,
        gang: int,
        delay_s: int,
        timeout_s: int,
        keep_s: int | None,
    ) -> None:
        self.world = world = World(0, seed=seed, history=2)
        self.delay_s = delay_s
        self.at_once = at_once
        self.own_failures: dict[tuple[str, int, int | str], int] = defaultdict(int)
        self.seen: dict[str, Task] = {}
        self.tallies: dict[str, Tally] = {}
        self.completed: dict[str, set[tuple[int, int | str]]] = defaultdict(set)
        for node_id in NODES:
            world.put(make_node(node_id, cpu=4 * CPU))
        policy = RestartPolicy(
            condition="on-failure", delay_ns=delay_s * SECOND, max_attempts=ATTEMPTS
        )
        kept = None if keep_s is None else keep_s * SECOND
        common = JobSpec(timeout_ns=timeout_s * SECOND, keep_ns=kept)
        plain = make_spec("plain", mode=job(total, at_once), restart=policy, cpu=CPU, job=common)
        world.create(plain)
        world.create(
            structs.replace(
                plain,
                name="gang",
                mode=job(gang, gang),
                job=structs.replace(common, gang=True),
            )
        )
        world.create(make_spec("docker", mode=job(3, 2), restart=policy, cpu=CPU))
        world.create(make_spec("global", mode=GLOBAL_JOB, restart=policy, job=common))

    def _jobs(self) -> list[Service]:
        return list(self.world.tables.all(Service))

    def _alive(self, name: str) -> Service | None:
        return self.world.tables.get(Service, f"s-{name}")

    # ------------------------------------------------------------ events

    @rule(
        pick=st.integers(0, 50),
        code=st.sampled_from([0, 0, 0, 3]),
    )
    def task_ends(self, pick: int, code: int) -> None:
        """Also one that was told to stop and has not heard of it."""
        running = [
            t
            for t in sorted(self.world.tables.all(Task), key=lambda t: t.id)
            if state_of(t) == S.RUNNING and self._up(t)
        ]
        if running:
            task = running[pick % len(running)]
            if code and task.stop_cause == StopCause.UNSPECIFIED:
                self.own_failures[task.service_id, task.job_iteration, _slot(task)] += 1
            end(self.world, task, code)

    def _up(self, task: Task) -> bool:
        node = self.world.tables.get(Node, task.node_id)
        return node is not None and node.status is not None and node.status.state == NodeState.READY

    @rule(node_id=st.sampled_from(NODES), state=st.sampled_from([NodeState.DOWN, NodeState.READY]))
    def node_state(self, node_id: str, state: NodeState) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_state(node_id, state)

    @rule(
        node_id=st.sampled_from(NODES),
        availability=st.sampled_from([Availability.ACTIVE, Availability.DRAIN]),
    )
    def availability(self, node_id: str, availability: Availability) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_availability(node_id, availability)

    @rule(node_id=st.sampled_from(NODES))
    def join_or_leave(self, node_id: str) -> None:
        if self.world.tables.get(Node, node_id):
            self.world.set_state(node_id, NodeState.DOWN)
            self.world.remove_node(node_id)
            # Its slot of the global job goes with it.
            gone = {key for key in self.completed["s-global"] if key[1] == node_id}
            self.completed["s-global"] -= gone
        else:
            self.world.put(make_node(node_id, cpu=4 * CPU))

    @rule(node_id=st.sampled_from(NODES))
    def freeze(self, node_id: str) -> None:
        self.world.frozen ^= {node_id}

    @rule(pick=st.integers(0, 50))
    def preempt(self, pick: int) -> None:
        held = [
            t
            for t in sorted(self.world.tables.all(Task), key=lambda t: t.id)
            if is_live(t) and state_of(t) >= S.ASSIGNED
        ]
        if held:
            task = held[pick % len(held)]
            self.world.put(
                structs.replace(
                    task,
                    desired_state=S.SHUTDOWN,
                    stop_cause=StopCause.PREEMPTED,
                    stop_message="preempted by web (priority 5)",
                )
            )

    @rule(name=st.sampled_from(JOBS), cancelled=st.booleans())
    def cancel(self, name: str, cancelled: bool) -> None:
        service = self._alive(name)
        if service is not None and service.spec is not None and service.spec.job is not None:
            respec(self.world, service.id, cancelled=cancelled)

    @rule(name=st.sampled_from(JOBS))
    def again(self, name: str) -> None:
        service = self._alive(name)
        if service is not None and service.spec is not None and not service.pending_delete:
            self.world.update(service.id, service.spec)

    @rule(name=st.sampled_from(JOBS))
    def remove(self, name: str) -> None:
        service = self._alive(name)
        if service is not None and name != "plain":
            self.world.remove(service.id)

    @rule()
    def agents(self) -> None:
        self.world.agents()

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 25.0]))
    def time(self, seconds: float) -> None:
        self.world.clock.advance(seconds=seconds)

    @rule()
    def tick(self) -> None:
        world = self.world
        world.clock.advance(seconds=0.001)
        before = {t.id: t for t in world.tables.all(Task)}
        world.tick()
        self._attempts_wait(before)
        while world.controller.has_work(world.clock.now_ns()):
            if not world.tick():
                break
        world.controller.dirty.update(s.id for s in self._jobs())
        world.controller._books.look_at_all()
        tasks = {t.id: t for t in world.tables.all(Task)}
        services = {s.id: s for s in world.tables.all(Service)}
        world.tick()
        assert services == {s.id: s for s in world.tables.all(Service)}
        for task in world.tables.all(Task):
            then = tasks.pop(task.id, None)
            # Who waits may be given a place that another's reservation kept until now; all else is
            # the same as after the first time.
            placed = then is not None and is_unplaced(then)
            assert placed or task == then, "reconciling twice is the same as once"
        assert not tasks

    def _attempts_wait(self, before: dict[str, Task]) -> None:
        """An attempt that follows a failure is made when its delay is over."""
        now_ns = self.world.clock.now_ns()
        for task in self.world.tables.all(Task):
            if task.id in before or not task.restarts_ns:
                continue
            assert task.restarts_ns[-1] <= now_ns
            siblings = [
                t
                for t in before.values()
                if (t.service_id, t.job_iteration) == (task.service_id, task.job_iteration)
                and state_of(t) == S.FAILED
                and t.meta is not None
                and t.meta.created_at_ns < now_ns
                and len(t.restarts_ns) == len(task.restarts_ns) - 1
            ]
            if task.service_id != "s-gang":
                siblings = [t for t in siblings if _slot(t) == _slot(task)]
            attempts = len(task.restarts_ns) - 1
            backs_off = task.service_id != "s-docker"
            least_ns = (self.delay_s << attempts if backs_off else self.delay_s) * SECOND
            for failed in siblings:
                if failed.stop_cause == StopCause.UNSPECIFIED and failed.status is not None:
                    assert now_ns - failed.status.timestamp_ns >= least_ns

    @rule()
    def lost_commit(self) -> None:
        draft = self.world.draft()
        self.world.controller.tick(draft)
        self.world.controller.undo(self.world.tables)

    @rule()
    def new_leader(self) -> None:
        self.world.controller.reset(self.world.tables)

    # ------------------------------------------------------------ always

    @precondition(lambda self: hasattr(self, "world"))
    @invariant()
    def safe(self) -> None:
        self.world.controller.check_invariants(self.world.tables)
        self._states()
        self._gang()
        self._attempts()
        self._never_again()
        self._bounds()

    def _states(self) -> None:
        now = {t.id: t for t in self.world.tables.all(Task)}
        changed = [t for t in (*self.seen.values(), *now.values()) if now.get(t.id) != t]
        changed += [t for t in now.values() if self.seen.get(t.id) != t]
        self._tell(changed)
        for task in now.values():
            before = self.seen.get(task.id)
            if before is not None:
                assert before.desired_state <= task.desired_state
                assert state_of(before) <= state_of(task)
        self.seen = now

    def _tell(self, changed: list[Task]) -> None:
        """A status from a tally that was kept from change to change says what all tasks say."""
        for service in self._jobs():
            tally = self.tallies.pop(service.id, None)
            for task in changed:
                if tally is not None and task.service_id == service.id:
                    tally.note(task, self.world.tables)
            tally = Tally.of(self.world.tables, service, tally)
            if tally is None:
                continue
            self.tallies[service.id] = tally
            tally.check_invariants(self.world.tables, service)
            now_ns = self.world.clock.now_ns()
            told = service_status(self.world.tables, service, now_ns, tally=tally)
            expected = service_status(self.world.tables, service, now_ns)
            # Where several things are in the way, their order may differ.
            assert sorted(told.reasons) == sorted(expected.reasons)
            assert structs.replace(told, reasons=()) == structs.replace(expected, reasons=())

    def _gang(self) -> None:
        """Told to run: all that have not completed, or none. When one does not go on, it is the
        next tick that tells the others, so that is looked at after one (`tick` does many).
        """
        service = self._alive("gang")
        if service is None or service.spec is None or service.pending_delete:
            return
        assert service.spec.mode is not None
        assert service.spec.mode.replicated_job is not None
        total = service.spec.mode.replicated_job.total_completions
        assert total is not None
        tasks = [
            t
            for t in self.world.tables.by(Task, "service", service.id)
            if t.job_iteration == service.job_iteration and t.desired_state != S.REMOVE
        ]
        complete = {t.slot for t in tasks if state_of(t) == S.COMPLETE}
        round_ = [t for t in tasks if t.slot not in complete]
        told = {t.slot for t in round_ if t.desired_state == S.COMPLETE}
        begun = {t.slot for t in round_ if state_of(t) == S.RUNNING and is_live(t)}
        assert begun <= told
        if begun:
            # Each slot of the gang was told to run in the same commit: a task of each exists that
            # was, whatever has become of it since.
            assert {t.slot for t in round_} | complete == set(range(1, total + 1))
            held = {t.slot for t in round_ if is_live(t) and t.desired_state == S.READY}
            assert not held, "some were told to run, others wait"

    def _attempts(self) -> None:
        for (service_id, iteration, slot), failures in self.own_failures.items():
            service = self.world.tables.get(Service, service_id)
            if service is not None and service.job_iteration == iteration:
                assert failures <= ATTEMPTS + 1, (service_id, slot)

    def _never_again(self) -> None:
        """A slot that has completed gets no new task; one that was there is stopped."""
        for service in self._jobs():
            done = self.completed[service.id]
            for task in self.world.tables.by(Task, "service", service.id):
                key = (task.job_iteration, _slot(task))
                if key in done and task.id not in self.known:
                    raise AssertionError(f"{task.id} was made in slot {key} that has completed")
        for task in self.world.tables.all(Task):
            if state_of(task) == S.COMPLETE and self.world.tables.get(Node, task.node_id):
                self.completed[task.service_id].add((task.job_iteration, _slot(task)))
        self.known = {t.id for t in self.world.tables.all(Task)}

    known: set[str] = set()  # replaced, never changed

    def _bounds(self) -> None:
        """No more at a time than the job allows; lost ones aside."""
        for name, most in (("plain", self.at_once), ("docker", 2)):
            live = {
                _slot(t)
                for t in self.world.tables.by(Task, "service", f"s-{name}")
                if is_live(t) and self._current(t)
            }
            assert len(live) <= most

    def _current(self, task: Task) -> bool:
        service = self.world.tables.get(Service, task.service_id)
        return service is not None and service.job_iteration == task.job_iteration

    # ------------------------------------------------------------ at last

    def teardown(self) -> None:
        """All nodes come back; whatever runs completes. Each job comes to an end, and the leader
        has nothing left to do.
        """
        if not hasattr(self, "world"):
            return
        world = self.world
        world.frozen.clear()
        for node in list(world.tables.all(Node)):
            world.set_state(node.id, NodeState.READY)
            world.set_availability(node.id, Availability.ACTIVE)
        for i in range(3):
            world.put(make_node(f"spare{i}", cpu=16 * CPU))
        for _ in range(40):
            world.pass_time(5, step=1)
            for task in list(world.tables.all(Task)):
                if state_of(task) == S.RUNNING and is_live(task):
                    end(world, task)
            self.safe()
        world.pass_time(30, step=5)
        for service in self._jobs():
            status = service.job_status
            assert status is not None
            assert status.state in ENDED, status
            cancelled = service.spec is not None and service.spec.job is not None
            cancelled = cancelled and service.spec.job.cancelled  # type: ignore[union-attr]
            if status.state == JobState.CANCELLED:
                assert cancelled
            for task in world.tables.by(Task, "service", service.id):
                assert states.ended(state_of(task)) or not is_live(task)
                assert states.ended(state_of(task)), task
            keep_ns = service.spec.job.keep_ns if service.spec and service.spec.job else None
            if keep_ns is not None:
                assert world.clock.now_ns() < status.ended_at_ns + keep_ns + SECOND
        world.controller.dirty.update(s.id for s in self._jobs())
        world.controller._books.look_at_all()
        assert world.tick() == 0


def _slot(task: Task) -> int | str:
    return task.slot or task.node_id


TestJobs = Jobs.TestCase
TestJobs.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
