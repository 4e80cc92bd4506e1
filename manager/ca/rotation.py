"""Replacing the cluster's root CA while everything goes on.

A rotation adds a new root, which signs from then on, beside the old one, which stays trusted; the
old one also signs the new one's name and key, so that whoever has heard of nothing yet is led to
the new certificates all the same (SwarmKit does it likewise: ca/reconciler.go). Agents learn of the
new root in their session and renew. Once each node in the cluster reports a certificate of the new
root, the old one is dropped. A node that is down holds the end up until it is back or removed.

Invariants: the first root of Cluster.root_ca_pem belongs to Keyring.root_ca_key_pem and signs.
While a rotation is under way the second one belongs to Keyring.old_root_ca_key_pem and is the one
that every member trusts. Everything that is decided here is a function of a draft or view; any
manager may run `Rotations`, as finishing twice is the same as once.

Departure from Swarm: join tokens change when the rotation begins, not when it ends. They pin the
root that signs, and a rotation is often begun because keys have leaked.
"""

from __future__ import annotations

import asyncio

import structlog
from msgspec import structs

from manager.ca.objects import objects
from manager.store import Draft, Store, View, WatchLost
from swarm import errors, tls
from swarm.v1 import Kind, Node

log = structlog.get_logger("ca")

RETRY_S = 1.0  # after a store that could not write


def begin(draft: Draft, *, root_pem: str = "", root_key_pem: str = "") -> None:
    """Begins to replace the root, by the given one or by a fresh one; a rotation that is under way
    is superseded. All join tokens change. Raises Invalid for a root that cannot be the cluster's.
    """
    cluster, keyring = objects(draft)
    roots = tls.split_pem(cluster.root_ca_pem)
    if root_pem:
        root_pem = tls.check_root(root_pem, root_key_pem, now_ns=draft.now_ns)
        _check_new(root_pem, roots)
    else:
        root_pem, root_key_pem = tls.new_root(now_ns=draft.now_ns, cluster_id=cluster.id)
    superseded: tuple[str, ...] = ()
    if cluster.root_rotation_in_progress:
        old_pem, old_key_pem = roots[1], keyring.old_root_ca_key_pem
        superseded = tuple(r for r in (roots[0], *roots[2:]) if _in_use(draft, r))
    else:
        old_pem, old_key_pem = roots[0], keyring.root_ca_key_pem
    cross_pem = tls.cross_signed(
        root_pem, by_pem=old_pem, by_key_pem=old_key_pem, now_ns=draft.now_ns
    )
    draft.put(
        structs.replace(
            cluster,
            root_ca_pem="".join((root_pem, old_pem, *superseded)),
            root_cross_pem=cross_pem,
            root_rotation_in_progress=True,
        )
    )
    draft.put(
        structs.replace(
            keyring,
            root_ca_key_pem=root_key_pem,
            old_root_ca_key_pem=old_key_pem,
            worker_token_secret=tls.new_token_secret(),
            manager_token_secret=tls.new_token_secret(),
        )
    )


def _check_new(root_pem: str, roots: tuple[str, ...]) -> None:
    new = tls.load_certificates(root_pem)[0]
    for pem in roots:
        known = tls.load_certificates(pem)[0]
        if tls.public_key_der(known) == tls.public_key_der(new):
            raise errors.Invalid("the cluster has this root's key already; make a new key")
        if known.subject == new.subject:
            raise errors.Invalid(
                f"its subject {new.subject.rfc4514_string()!r} is that of a root the cluster has; "
                "TLS tells roots apart by it, so give the new one another"
            )


def _in_use(view: View, root_pem: str) -> bool:
    key = tls.public_key_der(tls.load_certificates(root_pem)[0])
    return any(_issuer(node) == key for node in view.all(Node))


def waiting(view: View) -> list[Node]:
    """The nodes without a certificate of the root that signs, in order of id."""
    cluster, _ = objects(view)
    key = tls.public_key_der(tls.load_certificates(cluster.root_ca_pem)[0])
    return sorted(
        (n for n in view.all(Node) if not n.revoked and _issuer(n) != key), key=lambda n: n.id
    )


def _issuer(node: Node) -> bytes:
    return node.description.cert_issuer_public_key if node.description else b""


def finish(draft: Draft) -> bool:
    """Drops the old roots once nobody needs them; whether it did."""
    cluster, keyring = objects(draft)
    if not cluster.root_rotation_in_progress or waiting(draft):
        return False
    draft.put(
        structs.replace(
            cluster,
            root_ca_pem=tls.split_pem(cluster.root_ca_pem)[0],
            root_cross_pem="",
            root_rotation_in_progress=False,
        )
    )
    draft.put(structs.replace(keyring, old_root_ca_key_pem=""))
    return True


class Rotations:
    """Ends rotations. `run` until cancelled."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._left: int | None = None

    async def run(self) -> None:
        """Follows the cluster and its nodes."""
        while True:
            with self._store.watch(("kind", Kind.CLUSTER), ("kind", Kind.NODE)) as watch:
                await self._look()
                try:
                    async for _ in watch:
                        await self._look()
                    return  # the store was closed
                except WatchLost:
                    continue

    async def _look(self) -> None:
        while objects(self._store)[0].root_rotation_in_progress:
            left = len(waiting(self._store))
            if left != self._left:
                log.debug("root_rotation", nodes_left=left)
                self._left = left
            if left:
                return
            try:
                if await self._store.update(finish):
                    log.info("root_rotated", revision=self._store.revision)
            except (errors.Unavailable, errors.TimedOut, errors.Conflict) as error:
                log.warning("root_rotation_not_finished", reason=error.message, retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
        self._left = None
