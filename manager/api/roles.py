"""Who may become a manager, and who may cease to be one.

The role that a node should have is its spec's; the part that it has in the cluster's etcd follows
later: `manager_status` is there for as long as it has one (manager/keeper.py sees to it). So it is
`manager_status` that counts for the quorum, and the spec's role for what is asked for. A change of
role relies on all other managers as they are, so that two of them, asked for at two managers at the
same moment, cannot both be granted where only one may.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from manager.api.lookup import name_of, quoted
from manager.ca import serving_role
from manager.store import Draft, View
from manager.store.engines.etcd_member import INSTALL
from swarm import errors
from swarm.v1 import Cluster, Node, NodeRole, Reachability

__all__ = ["Here", "check_removable", "check_role", "is_manager", "is_reachable"]

EMBEDDED = "embedded"


@dataclass(frozen=True, slots=True)
class Here:
    """The manager that is asked."""

    node_id: str
    # The state is in an etcd that somebody else runs.
    external_etcd: bool = False


def is_manager(node: Node) -> bool:
    """Whether the node is to be a manager."""
    return node.spec is not None and node.spec.role == NodeRole.MANAGER


def check_role(draft: Draft, node: Node, role: NodeRole, *, here: Here) -> None:
    """Raises Unsupported (there is no etcd for a further manager), Invalid (the last manager),
    Conflict (too few managers would be left).
    """
    if role == NodeRole.MANAGER:
        _check_promotion(draft, node, here)
    else:
        _check_demotion(draft, node, here)


def _check_promotion(view: View, node: Node, here: Here) -> None:
    if here.external_etcd or is_manager(node):
        return
    own = view.get(Node, here.node_id)
    embedded = any(c.store_engine == EMBEDDED for c in view.all(Cluster))
    # Where several managers run already, each of them has one.
    needed = [own, node] if embedded and own is not None else [node]
    without = [n for n in needed if not (n.description and n.description.etcd_version)]
    if not without:
        return
    names = _listed(name_of(n) for n in without)
    raise errors.Unsupported(
        f"{quoted(node)} cannot be promoted: several managers keep the cluster's state in etcd, "
        f"and there is no etcd on {names}; {INSTALL}, there, then promote the node again"
    )


def _check_demotion(draft: Draft, node: Node, here: Here) -> None:
    managers = [n for n in draft.all(Node) if n.id != node.id and is_manager(n)]
    for other in managers:
        draft.require(other)
    if not managers:
        raise errors.Invalid(
            f"{quoted(node)}: attempting to demote the last manager of the swarm; promote another "
            "node first"
        )
    if node.manager_status is None or here.external_etcd:
        return  # it has no part in the quorum
    # Those that are being demoted as well will be gone too.
    voters = [n for n in managers if n.manager_status is not None]
    up = [n for n in voters if is_reachable(n)]
    needed = len(voters) // 2 + 1
    if len(up) >= needed:
        return
    gone = [n for n in voters if not is_reachable(n)]
    if gone:
        names = _listed(name_of(n) for n in gone)
        why = (
            f"of the {len(voters)} that would remain, {needed} must be reachable, and "
            f"{names} {'is' if len(gone) == 1 else 'are'} not"
        )
        hint = f"start swarmd on {names} again, or demote what is gone for good first"
    else:
        names = _listed(name_of(n) for n in managers)
        why = f"{names} {'is' if len(managers) == 1 else 'are'} promoted, but not a member yet"
        hint = "wait until `swarmctl node ls` shows it as reachable, then try again"
    raise errors.Conflict(
        f"{quoted(node)}: can't remove member from the raft: this would result in a loss of "
        f"quorum: {why}; {hint}"
    )


def is_reachable(node: Node) -> bool:
    """Whether the leader reaches this manager."""
    status = node.manager_status
    return status is not None and status.reachability == Reachability.REACHABLE


def check_removable(node: Node) -> None:
    """Raises Conflict for a manager, and for one that is still on its way to be a worker."""
    name = name_of(node)
    if is_manager(node):
        raise errors.Conflict(
            f"node {name} ({node.id}) is a cluster manager and a member of the raft cluster; it "
            f"must be demoted to worker before removal (`swarmctl node demote {name}`)"
        )
    if serving_role(node) == NodeRole.MANAGER:
        raise errors.Conflict(
            f"node {name} ({node.id}) is being demoted and still a member of the raft cluster; "
            "try again when `swarmctl node ls` shows no manager status for it"
        )


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"
