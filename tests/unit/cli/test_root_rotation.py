"""What is said of a rotation's progress."""

from __future__ import annotations

from cli.commands.swarm_ca import progress
from swarm import tls
from swarm.v1 import Cluster, Node, NodeDescription, NodeState, NodeStatus

OLD, NEW = (tls.new_root(now_ns=1_800_000_000 * 10**9, cluster_id="c")[0] for _ in "on")
CLUSTER = Cluster(id="c", root_ca_pem=NEW + OLD, root_rotation_in_progress=True)


def node(name: str, root_pem: str, state: NodeState = NodeState.READY) -> Node:
    key = tls.public_key_der(tls.load_certificates(root_pem)[0])
    return Node(
        id=name,
        description=NodeDescription(hostname=f"host-{name}", cert_issuer_public_key=key),
        status=NodeStatus(state=state),
    )


def told(*nodes: Node) -> str:
    return progress(CLUSTER, {n.id: n for n in nodes})


def test_nodes_that_are_waited_for_are_named_with_their_state():
    assert told(node("a", NEW), node("b", OLD, NodeState.DOWN), node("c", OLD)) == (
        "1 of 3 nodes have a certificate of the new root; waiting for host-b (down), host-c"
    )


def test_many_are_counted():
    text = told(*(node(str(n), OLD) for n in range(8)))
    assert text.startswith("0 of 8 nodes")
    assert text.endswith("host-4 and 3 more")


def test_node_that_never_came_up_is_waited_for_by_its_id():
    never = Node(id="n9", status=NodeStatus(state=NodeState.UNKNOWN))
    assert told(never) == "0 of 1 node has a certificate of the new root; waiting for n9 (unknown)"


def test_nothing_is_waited_for_once_all_have_it():
    assert told(node("a", NEW)) == "1 of 1 node has a certificate of the new root"
