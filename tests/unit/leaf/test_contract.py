import pytest
from google.protobuf.message import DecodeError

from swarm import states
from swarm.ids import base36, is_id, new_id, seeded_rng
from swarm.v1 import (
    ContainerSpec,
    Global,
    Object,
    Replicated,
    ServiceMode,
    ServiceSpec,
    Task,
    TaskSpec,
    TaskState,
    decode,
    encode,
    services,
)


def test_absent_and_empty_stay_apart_on_the_wire():
    for mode in (
        None,
        ServiceMode(),
        ServiceMode(global_service=Global()),
        ServiceMode(replicated=Replicated()),
        ServiceMode(replicated=Replicated(replicas=0)),
    ):
        spec = ServiceSpec(name="a", mode=mode)
        assert decode(ServiceSpec, encode(spec)) == spec
    for init in (None, False, True):
        spec = ServiceSpec(task=TaskSpec(container=ContainerSpec(init=init)))
        assert decode(ServiceSpec, encode(spec)) == spec


def test_garbage_is_no_message():
    with pytest.raises(DecodeError):
        decode(Object, b"\xff\xff\xff\xff")


def test_every_method_names_its_callers():
    tables = [getattr(services, n) for n in services.__all__ if n.endswith("_METHODS")]
    assert len(tables) == 5
    for table in tables:
        for method in table:
            assert method.callers, method.path


def test_states_only_grow():
    for before, after in states.LEGAL.items():
        assert all(a > before for a in after), before
    assert set(states.LEGAL) | {TaskState.UNSPECIFIED, TaskState.REMOVE} == set(TaskState)


def test_ended_tasks_never_change():
    assert all(not states.LEGAL[s] for s in states.TERMINAL)


def test_ids_have_dockers_form_and_follow_the_seed():
    rng = seeded_rng(7)
    made = [new_id(rng) for _ in range(100)]
    assert len(set(made)) == 100
    assert all(is_id(i) for i in made)
    assert made[0] == new_id(seeded_rng(7))
    assert base36(35, length=3) == "00z"


def test_structs_are_frozen():
    with pytest.raises(AttributeError):
        Task(id="a").id = "b"  # type: ignore[misc]  # what must not work


# What changes nothing and gives no key away. Everything else is on record, whatever comes of it.
NOT_AUDITED = {
    "GetInfo", "Get", "List", "PlanStack", "GetStackHistory", "GetServiceHistory", "WatchServices",
    "Watch", "ExplainTask", "Stats",
    "Logs", "ListAudit", "ListGpus", "ListQueues", "GetNodeInfo", "Session", "Relay",
    "Forward",  # what it carries was on record where it was asked for
}  # fmt: skip


def test_every_method_that_changes_something_is_audited() -> None:
    tables = [getattr(services, name) for name in dir(services) if name.endswith("_METHODS")]
    plain = {m.path.rsplit("/", 1)[1] for table in tables for m in table if not m.audited}
    assert plain == NOT_AUDITED
