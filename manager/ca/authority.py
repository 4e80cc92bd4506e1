"""The cluster's root CA: who is at the other end of a connection, and who gets which certificate.

Owns the trust decisions: which roots a server accepts (the cluster's, and one small CA per join
token), what a certificate accepted by TLS stands for, and the issue of node and client
certificates. The keys live in the store's Keyring.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from msgspec import structs

from manager.ca.objects import objects, serving_role
from manager.store import Draft, Store, View
from manager.store.engines.etcd_binary import INSTALL
from swarm import errors, ids, tls
from swarm.clock import SECOND_NS, Clock
from swarm.ids import Rng, new_id
from swarm.rpc import Context, Identity, Method
from swarm.v1 import (
    Availability,
    Caller,
    Cluster,
    ClusterSpec,
    IssueClientCertificateRequest,
    IssueClientCertificateResponse,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    Keyring,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    RaftConfig,
    Reachability,
)
from swarm.vault import new_unlock_key

log = structlog.get_logger("ca")

NODE_CERT_EXPIRY_NS = 90 * 86400 * SECOND_NS  # Swarm's default
NODE_CERT_EXPIRY_NS_MIN = 3600 * SECOND_NS
CLIENT_CERT_EXPIRY_NS = 365 * 86400 * SECOND_NS
TASK_HISTORY_LIMIT = 5  # Swarm's default
_UNITS = {NodeRole.MANAGER: tls.OU_MANAGER, NodeRole.WORKER: tls.OU_WORKER}
_CALLERS = {
    tls.OU_MANAGER: Caller.MANAGER,
    tls.OU_WORKER: Caller.WORKER,
    tls.OU_ADMIN: Caller.ADMIN,
}


@dataclass(frozen=True, slots=True)
class NewCluster:
    """What a first manager needs to begin."""

    cluster: Cluster
    keyring: Keyring
    node: Node
    certificate_pem: str
    key_pem: str


def new_cluster(
    *,
    now_ns: int,
    rng: Rng,
    spec: ClusterSpec | None,
    hostname: str,
    advertise_addr: str,
    data_path_port: int,
    availability: Availability,
    engine: str,
    addr_pool: tuple[str, ...] = (),
    subnet_size: int = 24,
) -> NewCluster:
    """The objects of a new cluster with one manager. Raises Invalid for a spec that cannot be."""
    spec = _cluster_spec(spec or ClusterSpec())
    cluster_id, node_id = new_id(rng), new_id(rng)
    root_pem, root_key_pem = tls.new_root(now_ns=now_ns, cluster_id=cluster_id)
    key_pem = tls.new_key_pem()
    certificate_pem = tls.sign(
        tls.load_csr(tls.csr_pem(key_pem)),
        root_pem=root_pem,
        root_key_pem=root_key_pem,
        common_name=node_id,
        unit=tls.OU_MANAGER,
        organization=cluster_id,
        now_ns=now_ns,
        lifetime_ns=spec.node_cert_expiry_ns,
        host=tls.split_address(advertise_addr)[0],
    )
    return NewCluster(
        cluster=Cluster(
            id=cluster_id,
            spec=spec,
            root_ca_pem=root_pem,
            default_addr_pool=addr_pool or ("10.0.0.0/8",),
            subnet_size=subnet_size,
            data_path_port=data_path_port,
            store_engine=engine,
        ),
        keyring=Keyring(
            id=cluster_id,
            root_ca_key_pem=root_key_pem,
            worker_token_secret=tls.new_token_secret(),
            manager_token_secret=tls.new_token_secret(),
            relay_key=rng.getrandbits(256).to_bytes(32, "big"),
            unlock_key=new_unlock_key() if spec.autolock_managers else "",
        ),
        node=Node(
            id=node_id,
            spec=NodeSpec(role=NodeRole.MANAGER, availability=availability or Availability.ACTIVE),
            description=NodeDescription(hostname=hostname),
            status=NodeStatus(state=NodeState.UNKNOWN, addr=advertise_addr, since_ns=now_ns),
            manager_status=ManagerStatus(
                leader=True, reachability=Reachability.REACHABLE, addr=advertise_addr
            ),
            certificate_expires_at_ns=now_ns + spec.node_cert_expiry_ns,
        ),
        certificate_pem=certificate_pem,
        key_pem=key_pem,
    )


def _cluster_spec(spec: ClusterSpec) -> ClusterSpec:
    """The spec with Swarm's defaults filled in."""
    expiry_ns = spec.node_cert_expiry_ns or NODE_CERT_EXPIRY_NS
    if expiry_ns < NODE_CERT_EXPIRY_NS_MIN:
        raise errors.Invalid("the lifetime of node certificates must be at least 1h0m0s")
    return structs.replace(
        spec,
        name=spec.name or "default",
        task_history_limit=spec.task_history_limit or TASK_HISTORY_LIMIT,
        node_cert_expiry_ns=expiry_ns,
        raft=spec.raft
        or RaftConfig(
            snapshot_interval=10_000,
            keep_old_snapshots=0,
            log_entries_for_slow_followers=500,
            election_tick=10,
            heartbeat_tick=1,
        ),
    )


class Authority:
    """Trust and certificates of one manager; implements the contract's Certificates service."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        check_admits: Callable[[], None] = lambda: None,
        external_etcd: bool = False,
    ) -> None:
        """`check_admits` raises Unsupported where the cluster cannot have a further manager.
        `external_etcd`: managers need none of their own.
        """
        self._store = store
        self._check_admits = check_admits
        self._external_etcd = external_etcd
        self._clock = clock
        # Certificates seen, by PEM: checking a signature costs 0.2 ms, and a node makes many calls.
        # TLS decides at the handshake which roots count, so what was good on a connection stays so
        # on that one when its root is dropped; no new connection gets this far with it.
        self._identified: dict[bytes, Identity] = {}

    # -------------------------------------------------------------- trust

    def trusted_pem(self) -> str:
        """What a server accepts clients by: the cluster's roots and the join tokens' CAs."""
        cluster, keyring = objects(self._store)
        return (
            cluster.root_ca_pem
            + _token_ca_pem(keyring.worker_token_secret)
            + _token_ca_pem(keyring.manager_token_secret)
        )

    def chain(self, certificate_pem: str) -> str:
        """What a server presents with its certificate: what leads from it to the roots that
        count now. A certificate keeps the chain it was issued with, and a rotation may be over.
        """
        cluster, _ = objects(self._store)
        return _chain(certificate_pem, cluster.root_ca_pem, cluster.root_cross_pem)

    def authorize(self, method: Method, auth: dict[str, list[bytes]]) -> Identity:
        """Who calls, if the method is for them. Raises Denied with the reason."""
        pem = next(iter(auth.get("x509_pem_cert", ())), b"")
        identity = self.identify(pem)
        try:
            self._check_may(identity, method)
        except errors.Denied as error:
            error.who = str(identity)
            raise
        return identity

    def _check_may(self, identity: Identity, method: Method) -> None:
        if identity.caller not in method.callers:
            allowed = ", ".join(sorted(c.name.lower().replace("_", "-") for c in method.callers))
            raise errors.Denied(
                f"{method.path.rsplit('/', 1)[1]} is not for {_spoken(identity.caller)}; "
                f"it is for: {allowed}"
            )
        if identity.node_id:
            self._check_member(identity, renews=method.name == "issue_node_certificate")

    def identify(self, pem: bytes) -> Identity:
        """What a certificate that passed TLS stands for. The issuer decides, not what the
        certificate says of itself.

        A join token's CA may sign anything, so its certificates are never taken for more than
        knowledge of the token.
        """
        if (known := self._identified.get(pem)) is not None:
            return known
        if not pem:
            raise errors.Denied("the connection has no client certificate")
        cluster, keyring = objects(self._store)
        certificate = tls.load_certificates(pem.decode())[0]
        if any(tls.issued_by(certificate, r) for r in tls.load_certificates(cluster.root_ca_pem)):
            identity = self._member(tls.facts(certificate), cluster)
            if len(self._identified) >= 10_000:  # renewals leave old certificates behind
                self._identified.clear()
            self._identified[pem] = identity
            return identity
        for secret, caller in (
            (keyring.worker_token_secret, Caller.JOIN_WORKER),
            (keyring.manager_token_secret, Caller.JOIN_MANAGER),
        ):
            ca = tls.load_certificates(_token_ca_pem(secret))[0]
            if tls.issued_by(certificate, ca):
                return Identity(caller, cluster_id=cluster.id)
        raise errors.Denied(
            "the certificate was issued by another cluster, with a join token that was rotated, or "
            "by a root CA that was"
        )

    def _member(self, facts: tls.Facts, cluster: Cluster) -> Identity:
        caller = _CALLERS.get(facts.unit)
        if caller is None or facts.organization != cluster.id:
            raise errors.Denied(f"the certificate's role {facts.unit!r} is unknown")
        if caller == Caller.ADMIN:
            return Identity(caller, name=facts.common_name, cluster_id=cluster.id)
        return Identity(caller, node_id=facts.common_name, cluster_id=cluster.id)

    def _check_member(self, identity: Identity, *, renews: bool) -> None:
        node = self._store.get(Node, identity.node_id)
        if node is None or node.revoked:
            raise errors.Removed(
                f"node {identity.node_id} was removed from the cluster; run `swarmctl swarm leave` "
                "on it, and join again with a fresh token"
            )
        # One that is a worker by now gets its new certificate by the old one.
        demoted = identity.caller == Caller.MANAGER and serving_role(node) != NodeRole.MANAGER
        if demoted and not renews:
            raise errors.Denied(
                f"node {identity.node_id} is not a manager any more; it must renew its certificate"
            )

    # -------------------------------------------------------------- tokens

    def worker(self) -> str:
        """The worker join token."""
        return self._token(objects(self._store)[1].worker_token_secret)

    def manager(self) -> str:
        """The manager join token."""
        return self._token(objects(self._store)[1].manager_token_secret)

    def _token(self, secret: str) -> str:
        cluster, _ = objects(self._store)
        return str(tls.JoinToken(tls.root_digest(cluster.root_ca_pem), secret))

    async def rotate(self, *, worker: bool, manager: bool) -> None:
        """Makes the old tokens worthless. Nodes that have joined keep their certificates."""

        def change(draft: Draft) -> None:
            _, keyring = objects(draft)
            if worker:
                keyring = structs.replace(keyring, worker_token_secret=tls.new_token_secret())
            if manager:
                keyring = structs.replace(keyring, manager_token_secret=tls.new_token_secret())
            draft.put(keyring)

        if worker or manager:
            await self._store.update(change)

    # -------------------------------------------------------------- the Certificates service

    async def issue_node_certificate(
        self, request: IssueNodeCertificateRequest, context: Context
    ) -> IssueNodeCertificateResponse:
        csr = tls.load_csr(request.csr_pem)
        joining = context.identity.caller in (Caller.JOIN_WORKER, Caller.JOIN_MANAGER)
        # The same key is the same node: a join whose answer was lost leaves none that nobody is.
        node_id = _id_of(csr, context.identity) if joining else context.identity.node_id
        wanted = NodeRole.WORKER
        if context.identity.caller == Caller.JOIN_MANAGER:
            self._check_admits()
            if not request.etcd_version and not self._external_etcd:
                raise errors.Unsupported(
                    "several managers keep the cluster's state in etcd, each with one of its own, "
                    f"and there is no etcd on {request.hostname or 'the node'}; {INSTALL}, there, "
                    "then join again. Or join as a worker (`swarmctl swarm join-token worker`)"
                )
            wanted = NodeRole.MANAGER

        def enter(draft: Draft) -> NodeRole:
            cluster, _ = objects(draft)
            expires_ns = draft.now_ns + _expiry_ns(cluster)
            node = draft.get(Node, node_id)
            if node is None:
                if not joining:
                    raise errors.Denied(f"node {node_id} is not in the cluster any more")
                node = _new_node(node_id, wanted, request, draft.now_ns)
            elif joining:
                _check_joins_again(node, wanted)
            draft.put(structs.replace(node, certificate_expires_at_ns=expires_ns))
            return serving_role(node)

        role = await self._store.update(enter)
        context.note(
            what="join" if joining else "renew",
            kind="node",
            name=request.hostname,
            object_id=node_id,
            revision=self._store.revision,
            role=role.name.lower(),
        )
        log.info("certificate_issued", node_id=node_id, role=role.name.lower(), joined=joining)
        cluster, _ = objects(self._store)
        # Managers are dialled by their address by other managers' etcd, which checks it.
        host = tls.split_address(request.addr)[0] if role == NodeRole.MANAGER else ""
        return IssueNodeCertificateResponse(
            node_id=node_id,
            certificate_pem=self._sign(csr, node_id, _UNITS[role], _expiry_ns(cluster), host),
            root_ca_pem=cluster.root_ca_pem,
            role=role,
            cluster_id=cluster.id,
            managers=manager_addrs(self._store),
        )

    async def issue_client_certificate(
        self, request: IssueClientCertificateRequest, context: Context
    ) -> IssueClientCertificateResponse:
        if not request.name or len(request.name) > 64:
            raise errors.Invalid("name the person the certificate is for, in 1 to 64 characters")
        csr = tls.load_csr(request.csr_pem)
        context.note(what="issue", kind="client_certificate", name=request.name)
        log.info(
            "client_certificate_issued", name=request.name, by=_spoken(context.identity.caller)
        )
        return IssueClientCertificateResponse(
            certificate_pem=self._sign(csr, request.name, tls.OU_ADMIN, CLIENT_CERT_EXPIRY_NS),
            root_ca_pem=objects(self._store)[0].root_ca_pem,
        )

    def _sign(self, csr: Any, name: str, unit: str, lifetime_ns: int, host: str = "") -> str:
        cluster, keyring = objects(self._store)
        return tls.sign(
            csr,
            root_pem=tls.split_pem(cluster.root_ca_pem)[0],
            root_key_pem=keyring.root_ca_key_pem,
            common_name=name,
            unit=unit,
            organization=cluster.id,
            now_ns=self._clock.now_ns(),
            lifetime_ns=lifetime_ns,
            host=host,
            cross_pem=cluster.root_cross_pem,
        )


def _new_node(
    node_id: str, role: NodeRole, request: IssueNodeCertificateRequest, now_ns: int
) -> Node:
    return Node(
        id=node_id,
        spec=NodeSpec(role=role, availability=request.availability or Availability.ACTIVE),
        description=NodeDescription(hostname=request.hostname),
        status=NodeStatus(state=NodeState.UNKNOWN, since_ns=now_ns),
    )


def _id_of(csr: Any, identity: Identity) -> str:
    """The id of the node that joins this cluster with this key."""
    text = b"swarm node 1" + identity.cluster_id.encode() + tls.public_key_der(csr)
    return ids.base36(int.from_bytes(hashlib.sha256(text).digest()[:16], "big"), length=ids.LENGTH)


def _check_joins_again(node: Node, wanted: NodeRole) -> None:
    """Raises Conflict unless the node may still be waiting for the answer to its join: afterwards
    it has a newer key, and whoever found the first one must not become it.
    """
    waits = node.status is None or node.status.state == NodeState.UNKNOWN
    if node.revoked or not waits or serving_role(node) != wanted:
        raise errors.Conflict(
            f"the key is that of node {node.id}, which has joined with it before; a node that "
            "joins makes a key of its own: run `swarmctl swarm join` again"
        )


def manager_addrs(view: View) -> tuple[str, ...]:
    """host:port of every manager, in order."""
    return tuple(
        sorted(n.manager_status.addr for n in view.all(Node) if n.manager_status is not None)
    )


def _expiry_ns(cluster: Cluster) -> int:
    return (cluster.spec and cluster.spec.node_cert_expiry_ns) or NODE_CERT_EXPIRY_NS


@functools.lru_cache(maxsize=4)
def _chain(certificate_pem: str, roots_pem: str, cross_pem: str) -> str:
    leaf_pem, signing_pem = tls.split_pem(certificate_pem)[0], tls.split_pem(roots_pem)[0]
    if tls.issuer_of(leaf_pem, signing_pem) is None:
        return certificate_pem  # of a root that is being replaced
    return leaf_pem + cross_pem + signing_pem


@functools.lru_cache(maxsize=16)
def _token_ca_pem(secret: str) -> str:
    return tls.token_ca(secret)[0]


def _spoken(caller: Caller) -> str:
    words: dict[Any, str] = {
        Caller.LOCAL: "local users",
        Caller.ADMIN: "people with a client certificate",
        Caller.MANAGER: "managers",
        Caller.WORKER: "workers",
        Caller.JOIN_WORKER: "nodes that join as workers",
        Caller.JOIN_MANAGER: "nodes that join as managers",
    }
    return words[caller]
