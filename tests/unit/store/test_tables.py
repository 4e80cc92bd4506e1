from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from manager.store import STACK_LABEL, Change, Draft, Stale, Tables, slot_key
from manager.store.tables import BY_CLASS, BY_KIND
from swarm import errors
from swarm.v1 import (
    Kind,
    Message,
    Meta,
    Node,
    NodeDescription,
    NodeSpec,
    Secret,
    SecretSpec,
    Service,
    ServiceSpec,
    Task,
    TaskState,
)

INDEXED: dict[type[Any], tuple[str, ...]] = {
    Task: ("service", "node", "slot"),
    Service: ("name", "stack", "stack_id"),
    Node: ("name",),
}


def commit(tables: Tables, draft: Draft) -> tuple[Change, ...]:
    """As the store does it, without an engine."""
    revision = tables.revision + 1
    changes = [
        (c.kind, c.id, c.new and replace(c.new, meta=replace(c.new.meta, version=revision)))
        for c in draft.changes()
    ]
    return tables.apply(revision, changes)


def loaded(*objects: Any) -> Tables:
    tables = Tables()
    draft = Draft(tables, now_ns=1)
    for o in objects:
        draft.put(o)
    commit(tables, draft)
    return tables


def contents(view: Any) -> dict[Any, Any]:
    """Everything that a view shows, whichever way it is asked."""
    out: dict[Any, Any] = {}
    for cls, indexes in INDEXED.items():
        objects = {o.id: o for o in view.all(cls)}
        assert len(objects) == view.count(cls) == len(list(view.all(cls)))
        assert all(view.get(cls, id_) == o for id_, o in objects.items())
        out[cls] = {id_: replace(o, meta=None) for id_, o in objects.items()}
        for index in indexes:
            keys = {key for o in objects.values() for key in BY_CLASS[cls].indexes[index](o)}
            for key in keys:
                found = view.by(cls, index, key)
                assert len(found) == len({o.id for o in found})
                out[cls, index, key] = {o.id for o in found}
            assert view.by(cls, index, "no such key") == []
    return out


ids_ = st.sampled_from(["a", "b", "c", "d"])
names = st.sampled_from(["web", "db", "cache"])
tasks = st.builds(
    Task,
    id=ids_,
    service_id=ids_,
    node_id=st.sampled_from(["", "n1", "n2"]),
    slot=st.integers(0, 2),
    desired_state=st.sampled_from(TaskState),
)
services = st.builds(
    Service,
    id=ids_,
    stack_id=st.sampled_from(["", "s"]),
    spec=st.builds(
        ServiceSpec,
        name=names,
        labels=st.dictionaries(st.just(STACK_LABEL), st.sampled_from(["", "app"])),
    ),
)
nodes = st.builds(
    Node,
    id=ids_,
    spec=st.none() | st.builds(NodeSpec, name=names),
    description=st.none() | st.builds(NodeDescription, hostname=names),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), tasks | services | nodes),
        st.tuples(st.just("delete"), st.tuples(st.sampled_from(list(INDEXED)), ids_)),
        st.tuples(st.just("commit"), st.none()),
    ),
    max_size=40,
)


def play(script: list[Any]) -> list[list[tuple[Kind, str, Message | None]]]:
    """Runs a script of writes against a model; returns the commits."""
    tables = Tables()
    model: dict[type, dict[str, Any]] = {cls: {} for cls in INDEXED}
    commits = []
    draft = Draft(tables, now_ns=1)
    for verb, what in [*script, ("commit", None)]:
        match verb:
            case "put":
                cls = type(what)
                taken = cls is Service and any(
                    o.spec.name == what.spec.name and o.id != what.id for o in model[cls].values()
                )
                current = draft.get(cls, what.id)
                # A writer replaces what it has read.
                what = replace(what, meta=current.meta if current else None)
                if taken:
                    with pytest.raises(errors.Conflict, match=r"name '\w+' is taken by"):
                        draft.put(what)
                else:
                    model[cls][what.id] = replace(draft.put(what), meta=None)
            case "delete":
                cls, id_ = what
                if id_ in model[cls]:
                    draft.delete(cls, id_)
                    del model[cls][id_]
            case _:
                before = contents(draft)
                changes = commit(tables, draft)
                commits.append([(c.kind, c.id, c.new) for c in changes])
                tables.check_invariants()
                assert contents(tables) == before
                draft = Draft(tables, now_ns=tables.revision)
        shown = contents(draft)
        assert {cls: shown[cls] for cls in INDEXED} == model
    return commits


@given(steps)
def test_a_draft_reads_as_the_tables_do_after_its_commit(script: list[Any]) -> None:
    play(script)


@given(steps)
def test_the_same_commits_lead_to_the_same_tables(script: list[Any]) -> None:
    commits = play(script)
    one, two = Tables(), Tables()
    for revision, changes in enumerate(commits, start=1):
        assert one.apply(revision, changes) == two.apply(revision, changes)
    for cls in INDEXED:
        assert list(one.all(cls)) == list(two.all(cls))
    one.check_invariants()


@given(steps)
def test_a_change_tells_before_and_after(script: list[Any]) -> None:
    tables = Tables()
    for revision, changes in enumerate(play(script), start=1):
        before = {(k, i): tables.get(BY_KIND[k].cls, i) for k, i, _ in changes}
        for change in tables.apply(revision, changes):
            assert change.old == before[change.kind, change.id]
            assert change.new == tables.get(BY_KIND[change.kind].cls, change.id)
            assert change.old != change.new


def test_meta_is_kept_by_the_draft() -> None:
    tables = loaded(Task(id="t"))
    draft = Draft(tables, now_ns=5)
    current = draft.get(Task, "t")
    assert current is not None
    changed = draft.put(replace(current, slot=3))
    assert changed.meta == Meta(version=1, created_at_ns=1, updated_at_ns=5)
    assert draft.expected == {(Kind.TASK, "t"): 1}


def test_what_is_put_back_unchanged_is_not_written_but_relied_upon() -> None:
    tables = loaded(Task(id="t", slot=1))
    draft = Draft(tables, now_ns=5)
    draft.put(replace(next(iter(draft.all(Task)))))
    assert draft.changes() == ()
    assert draft.expected == {(Kind.TASK, "t"): 1}


def test_what_is_created_and_deleted_in_one_draft_is_not_written() -> None:
    draft = Draft(Tables(), now_ns=1)
    draft.put(Task(id="t"))
    draft.delete(Task, "t")
    assert draft.changes() == ()
    assert draft.get(Task, "t") is None
    assert draft.count(Task) == 0


def test_what_is_deleted_and_put_anew_is_one_change() -> None:
    tables = loaded(Task(id="t", slot=1))
    draft = Draft(tables, now_ns=5)
    draft.delete(Task, "t")
    new = draft.put(Task(id="t", slot=2))
    # The version is what the commit insists on; the object is another one.
    assert new.meta == Meta(version=1, created_at_ns=5, updated_at_ns=5)
    draft.put(replace(new, slot=2))
    assert [(c.id, c.old.slot, c.new.slot) for c in draft.changes()] == [("t", 1, 2)]


def test_an_object_read_before_another_commit_is_stale() -> None:
    tables = loaded(Task(id="t", slot=1))
    read = tables.get(Task, "t")
    assert read is not None
    other = Draft(tables, now_ns=2)
    other.put(replace(read, slot=2))
    commit(tables, other)
    late = Draft(tables, now_ns=3)
    with pytest.raises(Stale, match="task t was read at version 1 and is at version 2 now"):
        late.put(replace(read, slot=3))
    with pytest.raises(Stale):
        Draft(tables, now_ns=3).require(read)


def test_an_object_removed_meanwhile_does_not_come_back() -> None:
    tables = loaded(Task(id="t"))
    read = tables.get(Task, "t")
    assert read is not None
    other = Draft(tables, now_ns=2)
    other.delete(Task, "t")
    commit(tables, other)
    with pytest.raises(Stale, match="does not exist now"):
        Draft(tables, now_ns=3).put(replace(read, slot=3))


def test_an_open_draft_relies_on_what_it_read_first() -> None:
    tables = loaded(Task(id="t", slot=1))
    draft = Draft(tables, now_ns=2)
    draft.require(next(iter(tables.all(Task))))
    other = Draft(tables, now_ns=2)
    other.put(replace(next(iter(tables.all(Task))), slot=2))
    commit(tables, other)
    assert draft.expected == {(Kind.TASK, "t"): 1}


def test_iteration_does_not_see_the_writes_made_during_it() -> None:
    tables = loaded(*(Task(id=f"t{n}") for n in range(5)))
    draft = Draft(tables, now_ns=2)
    draft.put(Task(id="new"))
    seen = []
    for task in draft.all(Task):
        seen.append(task.id)
        draft.put(replace(task, slot=9))
        draft.put(Task(id=f"{task.id}-child"))
    assert sorted(seen) == ["new", "t0", "t1", "t2", "t3", "t4"]
    assert draft.count(Task) == 12


def test_a_draft_stands_on_a_draft() -> None:
    tables = loaded(Task(id="t", service_id="s"))
    below = Draft(tables, now_ns=2)
    below.put(Task(id="u", service_id="s"))
    above = Draft(below, now_ns=3)
    above.delete(Task, "t")
    assert [t.id for t in above.by(Task, "service", "s")] == ["u"]
    assert below.count(Task) == 2


def test_a_guard_is_at_what_it_was_when_it_was_looked_at() -> None:
    tables = Tables()
    tables.apply(3, [], guards={"port": 3})
    below = Draft(tables, now_ns=2)
    below.guard("port")
    tables.apply(4, [], guards={"port": 4, "subnets": 4})
    below.guard("port")
    above = Draft(below, now_ns=3)
    above.guard("port")
    above.guard("subnets")
    assert below.guards == {"port": 3}
    assert above.guards == {"port": 3, "subnets": 4}


def test_deleting_what_is_not_there_is_a_defect_of_the_caller() -> None:
    with pytest.raises(errors.InvariantError):
        Draft(Tables(), now_ns=1).delete(Task, "t")


def test_a_unique_name_is_unique_within_its_kind_only() -> None:
    draft = Draft(loaded(Service(id="s", spec=ServiceSpec(name="web"))), now_ns=2)
    draft.put(Secret(id="x", spec=SecretSpec(name="web")))
    with pytest.raises(errors.Conflict, match="service name 'web' is taken by s"):
        draft.put(Service(id="s2", spec=ServiceSpec(name="web")))
    assert draft.get(Service, "s2") is None


def test_a_name_is_free_once_its_owner_has_another() -> None:
    draft = Draft(loaded(Service(id="s", spec=ServiceSpec(name="web"))), now_ns=2)
    current = draft.get(Service, "s")
    assert current is not None
    draft.put(replace(current, spec=ServiceSpec(name="old")))
    draft.put(Service(id="s2", spec=ServiceSpec(name="web")))
    assert {o.id for o in draft.by(Service, "name", "web")} == {"s2"}


def test_tasks_of_a_global_service_are_slotted_by_node() -> None:
    assert slot_key(Task(service_id="s", slot=2, node_id="n")) == ("s", 2)
    assert slot_key(Task(service_id="s", node_id="n")) == ("s", "n")


def test_a_node_is_found_by_either_name() -> None:
    node = Node(id="n", spec=NodeSpec(name="blue"), description=NodeDescription(hostname="host1"))
    tables = loaded(node)
    assert [o.id for o in tables.by(Node, "name", "blue")] == ["n"]
    assert [o.id for o in tables.by(Node, "name", "host1")] == ["n"]


def test_revisions_only_grow() -> None:
    tables = loaded(Task(id="t"))
    with pytest.raises(errors.InvariantError, match="revision 0 after 1"):
        tables.apply(0, [])


def test_a_frozen_view_shows_all_and_stays_as_it_was():
    tables = loaded(
        Service(id="s", spec=ServiceSpec(name="web", labels={STACK_LABEL: "app"})),
        *(Task(id=f"t{i}", service_id="s", slot=i, node_id=f"n{i % 2}") for i in range(4)),
        Node(id="n1", description=NodeDescription(hostname="h1")),
    )
    frozen = tables.freeze()
    before = contents(tables)
    assert contents(frozen) == before
    draft = Draft(tables, now_ns=2)
    draft.delete(Task, "t0")
    draft.put(Task(id="t9", service_id="s", slot=9, node_id="n0"))
    commit(tables, draft)
    assert contents(frozen) == before
    assert frozen.revision == tables.revision - 1
