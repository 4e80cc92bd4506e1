"""The two objects that there is one of: the cluster and its keys."""

from __future__ import annotations

from manager.store import View
from swarm import errors
from swarm.v1 import Cluster, Keyring, Node, NodeRole


def objects(view: View) -> tuple[Cluster, Keyring]:
    """The cluster and its keys. Raises Internal when the store holds none."""
    cluster = next(iter(view.all(Cluster)), None)
    keyring = next(iter(view.all(Keyring)), None)
    if cluster is None or keyring is None:
        raise errors.Internal("the store holds no cluster; restore it from a backup")
    return cluster, keyring


def serving_role(node: Node) -> NodeRole:
    """What the node is now: one that is to be a worker stays a manager until the others have let it
    go, for up to then its voice counts among theirs.
    """
    if node.manager_status is not None:
        return NodeRole.MANAGER
    return node.spec.role if node.spec is not None else NodeRole.UNSPECIFIED
