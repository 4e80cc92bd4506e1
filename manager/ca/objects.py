"""The two objects that there is one of: the cluster and its keys."""

from __future__ import annotations

from manager.store import View
from swarm import errors
from swarm.v1 import Cluster, Keyring


def objects(view: View) -> tuple[Cluster, Keyring]:
    """The cluster and its keys. Raises Internal when the store holds none."""
    cluster = next(iter(view.all(Cluster)), None)
    keyring = next(iter(view.all(Keyring)), None)
    if cluster is None or keyring is None:
        raise errors.Internal("the store holds no cluster; restore it from a backup")
    return cluster, keyring
