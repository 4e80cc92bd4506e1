"""What one agent is told: the difference between what it knows and what the store holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from manager.ca import Sealer
from manager.dispatcher.assignments import Ledger, concerns_node
from manager.store import Draft
from swarm.v1 import (
    Assignments,
    Config,
    ConfigReference,
    ConfigSpec,
    ContainerSpec,
    ContainerStatus,
    Endpoint,
    EndpointSpec,
    Network,
    NetworkAttachment,
    NetworkAttachmentSpec,
    NetworkSpec,
    PortConfig,
    Secret,
    SecretReference,
    SecretSpec,
    Task,
    TaskSpec,
    TaskState,
    TaskStatus,
)
from tests.unit.dispatcher.tables import node, service, task, view

S = TaskState
SEALER = Sealer(b"k" * 32)
SECRET = Secret(id="sec", spec=SecretSpec(name="key"), sealed=SEALER.seal(b"hush"))
CONFIG = Config(id="cfg", spec=ConfigSpec(name="conf", data=b"a=1"))
USER = TaskSpec(
    container=ContainerSpec(
        image="i",
        secrets=(SecretReference(secret_id="sec", secret_name="key"),),
        configs=(ConfigReference(config_id="cfg", config_name="conf"),),
    )
)


def ids(message: Assignments | None) -> list[str]:
    return [a.task.id for a in message.tasks if a.task] if message else []


def change(draft: Draft, task_id: str, **fields: object) -> Task:
    stored = draft.get(Task, task_id)
    assert stored is not None
    return draft.put(structs.replace(stored, **fields))


def with_state(draft: Draft, task_id: str, state: TaskState) -> None:
    change(draft, task_id, status=TaskStatus(state=state))


def test_first_message_is_full_and_names_the_nodes_tasks_only() -> None:
    draft = view(node("n"), *service(), task("a"), task("b", node_id="m"), task("c"))
    message = Ledger("n", SEALER).full(draft)
    assert message.full
    assert message.sequence == 1
    assert ids(message) == ["a", "c"]


def test_empty_node_gets_an_empty_full_message() -> None:
    message = Ledger("n", SEALER).full(view(node("n")))
    assert message == Assignments(full=True, sequence=1)


def test_ended_task_is_named_until_it_is_deleted() -> None:
    draft = view(*service(), task("a", state=S.FAILED, desired=S.SHUTDOWN))
    ledger = Ledger("n", SEALER)
    assert ids(ledger.full(draft)) == ["a"]
    draft.delete(Task, "a")
    message = ledger.changed(draft, ["a"])
    assert message is not None
    assert message.removed_tasks == ("a",)


def test_orphaned_task_is_not_the_nodes_any_more() -> None:
    draft = view(*service(), task("a"), task("b", state=S.ORPHANED))
    ledger = Ledger("n", SEALER)
    assert ids(ledger.full(draft)) == ["a"]
    with_state(draft, "a", S.ORPHANED)
    message = ledger.changed(draft, ["a"])
    assert message is not None
    assert message.removed_tasks == ("a",)


def test_what_the_agent_reported_itself_is_not_sent_again() -> None:
    draft = view(*service(), task("a"))
    ledger = Ledger("n", SEALER)
    ledger.full(draft)
    with_state(draft, "a", S.RUNNING)
    assert ledger.changed(draft, ["a"]) is None


def test_desired_state_is_sent_and_counted() -> None:
    draft = view(*service(), task("a"))
    ledger = Ledger("n", SEALER)
    ledger.full(draft)
    change(draft, "a", desired_state=S.SHUTDOWN)
    message = ledger.changed(draft, ["a"])
    assert message is not None
    assert (ids(message), message.sequence, message.full) == (["a"], 2, False)
    assert ledger.changed(draft, ["a"]) is None


def test_secrets_and_configs_come_with_their_first_user_and_go_with_the_last() -> None:
    draft = view(SECRET, CONFIG, *service("s", USER), task("a"), task("b"))
    ledger = Ledger("n", SEALER)
    message = ledger.full(draft)
    assert [s.data for s in message.secrets] == [b"hush"]
    assert [c.data for c in message.configs] == [b"a=1"]
    with_state(draft, "a", S.FAILED)
    assert ledger.changed(draft, ["a"]) is None
    change(draft, "b", desired_state=S.SHUTDOWN)
    last = ledger.changed(draft, ["b"])
    assert last is not None
    assert (last.removed_secrets, last.removed_configs) == (("sec",), ("cfg",))
    draft.put(task("c"))
    again = ledger.changed(draft, ["c"])
    assert again is not None
    assert [s.id for s in again.secrets] == ["sec"]


def test_ended_tasks_bring_no_secrets() -> None:
    draft = view(SECRET, CONFIG, *service("s", USER), task("a", state=S.COMPLETE))
    message = Ledger("n", SEALER).full(draft)
    assert message.secrets == ()


def test_secret_sealed_with_another_key_is_left_out_and_the_rest_goes_on() -> None:
    other = structs.replace(SECRET, sealed=Sealer(b"x" * 32).seal(b"hush"))
    draft = view(other, CONFIG, *service("s", USER), task("a"))
    message = Ledger("n", SEALER).full(draft)
    assert message.secrets == ()
    assert ids(message) == ["a"]


def test_networks_come_by_attachment_name_or_id_and_go_with_the_last_task() -> None:
    spec = TaskSpec(
        container=ContainerSpec(image="i"),
        networks=(
            NetworkAttachmentSpec(target="front"),
            NetworkAttachmentSpec(target="net2"),
            NetworkAttachmentSpec(target="host"),
        ),
    )
    nets = [Network(id=f"net{i}", spec=NetworkSpec(name=n)) for i, n in enumerate("xyz")]
    nets[1] = structs.replace(nets[1], spec=NetworkSpec(name="front"))
    attached = structs.replace(task("a"), networks=(NetworkAttachment(network_id="net0"),))
    draft = view(*nets, *service("s", spec), attached)
    ledger = Ledger("n", SEALER)
    assert [n.id for n in ledger.full(draft).networks] == ["net0", "net1", "net2"]
    with_state(draft, "a", S.SHUTDOWN)
    assert ledger.changed(draft, ["a"]) is None
    draft.delete(Task, "a")
    message = ledger.changed(draft, ["a"])
    assert message is not None
    assert message.removed_networks == ("net0", "net1", "net2")


def test_changed_network_goes_to_its_users_only() -> None:
    net = Network(id="net", spec=NetworkSpec(name="back"))
    attached = structs.replace(task("a"), networks=(NetworkAttachment(network_id="net"),))
    draft = view(net, *service(), attached)
    user, other = Ledger("n", SEALER), Ledger("m", SEALER)
    user.full(draft)
    other.full(draft)
    message = user.changed(draft, [], ["net"])
    assert message is not None
    assert [n.id for n in message.networks] == ["net"]
    assert other.changed(draft, [], ["net"]) is None


def test_task_whose_spec_is_gone_is_still_sent() -> None:
    message = Ledger("n", SEALER).full(view(task("a", desired=S.REMOVE)))
    assert ids(message) == ["a"]
    assert message.tasks[0].spec is None


def test_ports_are_the_specs_own_with_the_given_numbers() -> None:
    wanted = (
        PortConfig(target_port=80),
        PortConfig(target_port=81, published_port=8081),
        PortConfig(target_port=82, publish_mode="host"),
    )
    given_ports = (PortConfig(target_port=80, published_port=30000, protocol="tcp"),)
    svc, revision = service()
    assert revision.spec is not None
    revision = structs.replace(
        revision, spec=structs.replace(revision.spec, endpoint=EndpointSpec(ports=wanted))
    )
    svc = structs.replace(svc, endpoint=Endpoint(ports=given_ports))
    ports = Ledger("n", SEALER).full(view(svc, revision, task("a"))).tasks[0].ports
    assert [p.published_port for p in ports] == [30000, 8081, 0]


def test_global_services_containers_are_named_by_node() -> None:
    draft = view(*service("agent"), structs.replace(task("a", service_id="agent"), slot=0))
    assert Ledger("n", SEALER).full(draft).tasks[0].name == "agent.n.a"


def test_a_running_tasks_new_address_does_not_concern_its_node() -> None:
    before = task("a", state=S.STARTING)
    after = structs.replace(
        before,
        status=TaskStatus(state=S.RUNNING, container=ContainerStatus(container_id="c")),
        networks=(NetworkAttachment(network_id="x", addresses=("10.0.0.2/24",)),),
    )
    assert not concerns_node(before, after)
    assert concerns_node(before, structs.replace(after, desired_state=S.SHUTDOWN))
    assert concerns_node(None, after)
    assert concerns_node(before, None)


class Model:
    """An agent that takes messages in and knows what it should know in the end."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskState] = {}
        self.secrets: set[str] = set()
        self.sequence = 0

    def take(self, message: Assignments | None) -> None:
        if message is None:
            return
        self.sequence += 1
        assert message.sequence == self.sequence
        if message.full:
            self.tasks, self.secrets = {}, set()
        for assignment in message.tasks:
            assert assignment.task is not None
            self.tasks[assignment.task.id] = assignment.task.desired_state
        for task_id in message.removed_tasks:
            del self.tasks[task_id]
        self.secrets -= set(message.removed_secrets)
        self.secrets |= {s.id for s in message.secrets}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "desire", "end", "delete", "move", "flush"]),
        st.sampled_from("abcd"),
        st.booleans(),
    ),
    max_size=40,
)


@given(STEPS)
def test_whatever_changes_the_agent_ends_up_knowing_what_the_store_holds(
    steps: list[tuple[str, str, bool]],
) -> None:
    draft = view(SECRET, CONFIG, *service("s", USER), *service("plain"))
    ledger, model = Ledger("n", SEALER), Model()
    model.take(ledger.full(draft))
    dirty: set[str] = set()
    for what, task_id, flag in steps:
        stored = draft.get(Task, task_id)
        if what == "put" and stored is None:
            draft.put(task(task_id, service_id="s" if flag else "plain"))
        elif what == "flush":
            model.take(ledger.changed(draft, dirty))
            dirty = set()
            continue
        elif stored is None:
            continue
        elif what == "desire":
            change(draft, task_id, desired_state=S.SHUTDOWN if flag else S.REMOVE)
        elif what == "end":
            with_state(draft, task_id, S.FAILED)
        elif what == "delete":
            draft.delete(Task, task_id)
        elif what == "move":
            change(draft, task_id, node_id="m" if flag else "n")
        dirty.add(task_id)
    model.take(ledger.changed(draft, dirty))
    mine = [t for t in draft.all(Task) if t.node_id == "n"]
    assert model.tasks == {t.id: t.desired_state for t in mine}
    needed = any(
        t.service_id == "s"
        and t.desired_state < S.SHUTDOWN
        and t.status is not None
        and t.status.state < S.COMPLETE
        for t in mine
    )
    assert model.secrets == ({"sec"} if needed else set())
