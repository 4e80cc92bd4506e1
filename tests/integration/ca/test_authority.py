"""Who may call what, over real connections: a real store, real TLS, every kind of caller."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from msgspec import structs

from agent import identity as ids
from manager.ca import Authority, new_cluster, objects, rotation
from manager.store import Draft, Store
from manager.store.engines.embedded import EmbeddedEngine
from swarm import errors, rpc, tls
from swarm.clock import SECOND_NS, SystemClock
from swarm.ids import system_rng
from swarm.limits import JOINS, Limits
from swarm.rpc import Channel
from swarm.v1 import (
    Availability,
    Caller,
    GetInfoRequest,
    InitRequest,
    IssueClientCertificateRequest,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from swarm.v1 import services as sv

HOUR_NS = 3600 * SECOND_NS
# Of all services that the contract has, so that a new one is in it from its first day.
TABLES: tuple[tuple[rpc.Method, ...], ...] = tuple(
    table for name, table in sorted(vars(sv).items()) if name.endswith("_METHODS")
)


class Reached(Exception):
    """The call passed the check of its caller."""


class Anything:
    """Implements every method: says that it was reached."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        method = next(m for t in TABLES for m in t if m.name == name)
        return self._stream if method.server_streams else self._unary

    async def _unary(self, request: Any, context: rpc.Context) -> Any:
        raise errors.Exhausted("reached")

    async def _stream(self, request: Any, context: rpc.Context) -> AsyncIterator[Any]:
        raise errors.Exhausted("reached")
        yield


class Cluster:
    """A manager's port with its authority."""

    def __init__(self, store: Store, authority: Authority) -> None:
        self.store, self.authority = store, authority
        self.address = ""
        self.server_certificate = ("", "")
        self._offered: tuple[str, str, str] | None = None

    def offer(self) -> Any:
        """What the port shows and trusts, asked for each connection; None: what it did before.
        gRPC's core fails now and then where this changes while connections are being made.
        """
        pem, key = self.server_certificate
        offered = (key, self.authority.chain(pem), self.authority.trusted_pem())
        if offered == self._offered:
            return None
        self._offered = offered
        return grpc.ssl_server_certificate_configuration(
            [(key.encode(), offered[1].encode())], offered[2].encode()
        )

    def offer_fresh(self) -> None:
        """The manager has renewed its own certificate."""
        manager_id = next(n.id for n in self.store.all(Node) if n.manager_status)
        self.server_certificate = self.signed(manager_id, tls.OU_MANAGER)

    def presented_roots(self) -> set[str]:
        chain = tls.presented(self.address, timeout_s=5)
        return {c for c in chain if tls.issuer_of(c, c) is not None}

    async def reached(self, certificate: tuple[str, str], trusted_pem: str) -> None:
        """Renews over a new connection that trusts just these roots."""
        pem, key = certificate
        credentials = tls.client_credentials(trusted_pem, key, pem)
        request = IssueNodeCertificateRequest(csr_pem=tls.csr_pem(tls.new_key_pem()))
        async with Channel.tls(self.address, credentials, server_name=tls.SERVER_NAME) as channel:
            await sv.CertificatesClient(channel).issue_node_certificate(request, timeout_s=5)

    @property
    def root_pem(self) -> str:
        return objects(self.store)[0].root_ca_pem

    def signed(self, name: str, unit: str, *, lifetime_ns: int = HOUR_NS) -> tuple[str, str]:
        """(certificate, key) signed by the cluster's root."""
        cluster, keyring = objects(self.store)
        key = tls.new_key_pem()
        certificate = tls.sign(
            tls.load_csr(tls.csr_pem(key)),
            root_pem=tls.split_pem(cluster.root_ca_pem)[0],
            root_key_pem=keyring.root_ca_key_pem,
            common_name=name,
            unit=unit,
            organization=cluster.id,
            now_ns=SystemClock().now_ns(),
            lifetime_ns=lifetime_ns,
            cross_pem=cluster.root_cross_pem,
        )
        return certificate, key

    def channel(self, certificate: tuple[str, str]) -> Channel:
        pem, key = certificate
        credentials = tls.client_credentials(self.root_pem, key, pem)
        return Channel.tls(self.address, credentials, server_name=tls.SERVER_NAME)

    async def join(self, token: str, etcd_version: str = "3.4.23") -> ids.Identity:
        return await ids.join(
            token=token,
            addresses=[self.address],
            hostname="w",
            availability=Availability.ACTIVE,
            listen_addr="127.0.0.1:2377",
            advertise_addr="127.0.0.1:2377",
            data_path_addr="127.0.0.1",
            etcd_version=etcd_version,
        )


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    clock = SystemClock()
    store = Store(EmbeddedEngine(tmp_path / "store.db", clock), clock)
    await store.open()
    new = new_cluster(
        now_ns=clock.now_ns(),
        rng=system_rng(),
        spec=None,
        hostname="m",
        advertise_addr="127.0.0.1:2377",
        data_path_port=4789,
        availability=Availability.ACTIVE,
        engine="embedded",
    )
    await store.update(lambda d: [d.put(o) for o in (new.cluster, new.keyring, new.node)])
    authority = Authority(store, clock)
    server = rpc.server()
    limits = Limits(clock)
    others = [
        rpc.handler(t, Anything(), authority.authorize, limits=limits)
        for t in TABLES
        if t is not sv.CERTIFICATES_METHODS
    ]
    real = rpc.handler(sv.CERTIFICATES_METHODS, authority, authority.authorize, limits=limits)
    server.add_generic_rpc_handlers((*others, real))

    made = Cluster(store, authority)
    made.server_certificate = (new.certificate_pem, new.key_pem)
    credentials = grpc.dynamic_ssl_server_credentials(made.offer(), made.offer, True)
    made.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    yield made
    await server.stop(0)
    await store.close()


async def call(channel: Channel, method: rpc.Method) -> None:
    """Calls a method with an empty request; raises what it answers."""

    async def requests() -> AsyncIterator[Any]:
        # Says nothing until the server has answered: gRPC loses the status of a call that ends
        # while its client writes.
        await asyncio.Event().wait()
        yield

    async with channel:
        if method.client_streams:
            stream = channel.stream_stream(method, method.response, requests(), 5)
        elif method.server_streams:
            stream = channel.unary_stream(method, method.response, method.request(), 5)
        else:
            await channel.unary_unary(method, method.response, method.request(), 5)
            return
        async for _ in stream:
            pass


async def test_every_rpc_refuses_every_caller_it_does_not_name(cluster: Cluster) -> None:
    """Walks all RPCs with every kind of certificate."""
    worker_id = (await cluster.join(cluster.authority.worker())).node_id
    manager_id = next(n.id for n in cluster.store.all(Node) if n.manager_status)
    token = tls.JoinToken.parse(cluster.authority.worker())
    manager_token = tls.JoinToken.parse(cluster.authority.manager())
    certificates = {
        Caller.MANAGER: cluster.signed(manager_id, tls.OU_MANAGER),
        Caller.WORKER: cluster.signed(worker_id, tls.OU_WORKER),
        Caller.ADMIN: cluster.signed("ann", tls.OU_ADMIN),
        Caller.JOIN_WORKER: tls.join_certificate(token),
        Caller.JOIN_MANAGER: tls.join_certificate(manager_token),
    }
    services = {method.path.split("/")[1] for table in TABLES for method in table}
    assert services >= {f"swarm.v1.{n}" for n in ("Control", "Dispatcher", "Local", "Managers")}
    let_in = 0
    for caller, certificate in certificates.items():
        for table in TABLES:
            for method in table:
                with pytest.raises(errors.SwarmError) as caught:
                    await call(cluster.channel(certificate), method)
                refused = isinstance(caught.value, errors.Denied) and "is not for" in str(
                    caught.value
                )
                assert refused == (caller not in method.callers), (
                    caller,
                    method.path,
                    caught.value,
                )
                let_in += not refused
    assert let_in > 20


async def test_a_node_joins_and_is_entered_in_the_store(cluster: Cluster) -> None:
    identity = await cluster.join(cluster.authority.worker())
    node = cluster.store.get(Node, identity.node_id)
    assert node is not None
    assert node.spec is not None
    assert node.spec.role == NodeRole.WORKER == identity.role
    assert node.certificate_expires_at_ns > SystemClock().now_ns()
    said = tls.facts(tls.load_certificates(identity.certificate_pem)[0])
    assert (said.common_name, said.unit) == (identity.node_id, tls.OU_WORKER)


async def test_a_rotated_token_is_refused_and_joined_nodes_stay(cluster: Cluster) -> None:
    old = cluster.authority.worker()
    joined = await cluster.join(old)
    await cluster.authority.rotate(worker=True, manager=False)
    with pytest.raises(errors.Unavailable, match="refused the join token"):
        await cluster.join(old)
    await cluster.join(cluster.authority.worker())
    assert (
        await ids.renew(structs.replace(joined, managers=(cluster.address,)))
    ).node_id == joined.node_id


async def test_the_manager_token_makes_a_manager_whose_certificate_names_its_host(
    cluster: Cluster,
) -> None:
    joined = await cluster.join(cluster.authority.manager())
    node = cluster.store.get(Node, joined.node_id)
    assert node is not None and node.spec is not None
    assert joined.role == node.spec.role == NodeRole.MANAGER
    assert node.manager_status is None  # it does not serve yet
    certificate = tls.load_certificates(joined.certificate_pem)[0]
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(tls.split_address(joined.advertise_addr)[0])
    ]


async def test_a_manager_that_was_demoted_can_renew_and_nothing_else(cluster: Cluster) -> None:
    joined = await cluster.join(cluster.authority.manager())
    joined = structs.replace(joined, managers=(cluster.address,))

    def demote(draft: Draft) -> None:
        node = draft.get(Node, joined.node_id)
        assert node is not None and node.spec is not None
        draft.put(structs.replace(node, spec=structs.replace(node.spec, role=NodeRole.WORKER)))

    await cluster.store.update(demote)
    async with joined.channel(cluster.address) as channel:
        with pytest.raises(errors.Denied, match="not a manager any more"):
            await sv.ControlClient(channel).get_info(GetInfoRequest())
    renewed = await ids.renew(joined)
    assert (renewed.node_id, renewed.role) == (joined.node_id, NodeRole.WORKER)


async def test_a_manager_token_where_there_is_no_etcd_enters_no_node(cluster: Cluster) -> None:
    before = len(list(cluster.store.all(Node)))
    with pytest.raises(errors.Unsupported, match="there is no etcd on w; install"):
        await cluster.join(cluster.authority.manager(), etcd_version="")
    assert len(list(cluster.store.all(Node))) == before
    joined = await cluster.join(cluster.authority.worker(), etcd_version="")
    assert joined.role == NodeRole.WORKER


async def test_a_cluster_that_cannot_have_a_further_manager_enters_no_node(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise errors.Unsupported("several managers need etcd")

    monkeypatch.setattr(cluster.authority, "_check_admits", refuse)
    with pytest.raises(errors.Unsupported, match="need etcd"):
        await cluster.join(cluster.authority.manager())
    assert cluster.store.count(Node) == 1


async def test_another_clusters_token_is_refused_before_anything_is_sent(cluster: Cluster) -> None:
    foreign = tls.JoinToken("0" * 50, tls.JoinToken.parse(cluster.authority.worker()).secret)
    with pytest.raises(errors.Denied, match="another cluster"):
        await cluster.join(str(foreign))


async def test_a_tokens_knower_cannot_sign_itself_a_managers_certificate(cluster: Cluster) -> None:
    """The token's CA is trusted by TLS; what its certificates claim must not be."""
    token = tls.JoinToken.parse(cluster.authority.worker())
    ca_pem, ca_key = tls.token_ca(token.secret)
    manager_id = next(n.id for n in cluster.store.all(Node) if n.manager_status)
    key = tls.new_key_pem()
    forged = tls.sign(
        tls.load_csr(tls.csr_pem(key)),
        root_pem=ca_pem,
        root_key_pem=ca_key,
        common_name=manager_id,
        unit=tls.OU_MANAGER,
        organization=objects(cluster.store)[0].id,
        now_ns=SystemClock().now_ns(),
        lifetime_ns=HOUR_NS,
    )
    async with cluster.channel((forged, key)) as channel:
        with pytest.raises(errors.Denied, match="nodes that join as workers"):
            await sv.ControlClient(channel).get_info(GetInfoRequest(), timeout_s=5)


async def test_an_expired_certificate_is_refused(cluster: Cluster) -> None:
    worker = await cluster.join(cluster.authority.worker())
    expired = cluster.signed(worker.node_id, tls.OU_WORKER, lifetime_ns=-60 * SECOND_NS)
    async with cluster.channel(expired) as channel:
        with pytest.raises(errors.Unavailable, match="does not answer"):
            await sv.CertificatesClient(channel).issue_node_certificate(
                IssueNodeCertificateRequest(csr_pem=tls.csr_pem(tls.new_key_pem())), timeout_s=5
            )


async def test_a_foreign_certificate_is_refused(cluster: Cluster) -> None:
    root_pem, root_key = tls.new_root(now_ns=SystemClock().now_ns(), cluster_id="other")
    key = tls.new_key_pem()
    foreign = tls.sign(
        tls.load_csr(tls.csr_pem(key)),
        root_pem=root_pem,
        root_key_pem=root_key,
        common_name="n",
        unit=tls.OU_MANAGER,
        organization="other",
        now_ns=SystemClock().now_ns(),
        lifetime_ns=HOUR_NS,
    )
    async with cluster.channel((foreign, key)) as channel:
        with pytest.raises(errors.Unavailable):
            await sv.ControlClient(channel).get_info(GetInfoRequest(), timeout_s=5)


async def test_a_removed_node_is_locked_out_at_once(cluster: Cluster) -> None:
    worker = structs.replace(
        await cluster.join(cluster.authority.worker()), managers=(cluster.address,)
    )
    await ids.renew(worker)
    await cluster.store.update(lambda d: d.delete(Node, worker.node_id))
    with pytest.raises(errors.Denied, match="was removed from the cluster"):
        await ids.renew(worker)


async def test_a_worker_renews_for_itself_whatever_it_asks(cluster: Cluster) -> None:
    worker = structs.replace(
        await cluster.join(cluster.authority.worker()), managers=(cluster.address,)
    )
    renewed = await ids.renew(worker)
    assert renewed.node_id == worker.node_id
    assert renewed.certificate_pem != worker.certificate_pem
    assert cluster.store.count(Node) == 2


async def test_a_person_gets_a_client_certificate_from_another_person(cluster: Cluster) -> None:
    key = tls.new_key_pem()
    async with cluster.channel(cluster.signed("ann", tls.OU_ADMIN)) as channel:
        answer = await sv.CertificatesClient(channel).issue_client_certificate(
            IssueClientCertificateRequest(csr_pem=tls.csr_pem(key), name="bob"), timeout_s=5
        )
    async with cluster.channel((answer.certificate_pem, key)) as channel:
        with pytest.raises(errors.Exhausted, match="reached"):
            await sv.ControlClient(channel).get_info(GetInfoRequest(), timeout_s=5)
        with pytest.raises(errors.Denied, match="is not for people"):
            await sv.LocalClient(channel).init(InitRequest(), timeout_s=5)


async def test_garbage_on_the_port_disturbs_nobody(cluster: Cluster) -> None:
    host, port = tls.split_address(cluster.address)
    for garbage in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"\0" * 100,
        b"\xff" * 5000,
    ):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(garbage)
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    await cluster.join(cluster.authority.worker())


async def test_a_message_above_the_limit_is_refused_with_the_limit(cluster: Cluster) -> None:
    worker = await cluster.join(cluster.authority.worker())
    async with worker.channel(cluster.address) as channel:
        with pytest.raises(errors.Exhausted, match="limit of 33554432 bytes"):
            await sv.CertificatesClient(channel).issue_node_certificate(
                IssueNodeCertificateRequest(csr_pem="x" * (33 << 20)), timeout_s=10
            )


# ---------------------------------------------------------------- a rotation of the root


async def rotate(cluster: Cluster) -> None:
    await cluster.store.update(rotation.begin)
    cluster.offer_fresh()


async def finish(cluster: Cluster) -> None:
    """As when every node has reported a certificate of the new root."""

    def change(draft: Draft) -> None:
        new = tls.load_certificates(objects(draft)[0].root_ca_pem)[0]
        issued = NodeDescription(cert_issuer_public_key=tls.public_key_der(new))
        for node in list(draft.all(Node)):
            draft.put(structs.replace(node, description=issued))
        assert rotation.finish(draft)

    await cluster.store.update(change)


async def test_node_that_knows_only_the_old_root_renews_at_a_manager_of_the_new_one(
    cluster: Cluster,
) -> None:
    """The manager's chain leads to the old root, and the old certificate is still let in."""
    worker = structs.replace(
        await cluster.join(cluster.authority.worker()), managers=(cluster.address,)
    )
    old = tls.split_pem(worker.root_ca_pem)
    await rotate(cluster)
    assert tls.split_pem(worker.root_ca_pem) == old
    assert cluster.presented_roots().isdisjoint(old), "the manager shows the new root only"
    renewed = await ids.renew(worker)
    assert not renewed.outdated
    assert tls.split_pem(renewed.root_ca_pem)[1:] == old
    assert worker.issuer != renewed.issuer


async def test_all_pairs_of_old_and_new_certificates_and_roots_meet_until_the_end(
    cluster: Cluster,
) -> None:
    worker = await cluster.join(cluster.authority.worker())
    old = (worker.certificate_pem, worker.key_pem)
    old_root = worker.root_ca_pem
    await rotate(cluster)
    new = cluster.signed(worker.node_id, tls.OU_WORKER)
    new_root = tls.split_pem(cluster.root_pem)[0]
    for certificate in (old, new):
        for trusted in (old_root, new_root, cluster.root_pem):
            await cluster.reached(certificate, trusted)
    assert tls.why_strangers(cluster.address, old[0], old_root, timeout_s=5) == ""
    await finish(cluster)
    await cluster.reached(new, new_root)
    assert "was rotated" in tls.why_strangers(cluster.address, old[0], old_root, timeout_s=5)
    for certificate, trusted in ((old, new_root), (old, old_root)):
        with pytest.raises(errors.Unavailable):
            await cluster.reached(certificate, trusted)


async def test_connection_made_before_goes_on_when_the_old_root_is_dropped(
    cluster: Cluster,
) -> None:
    worker = await cluster.join(cluster.authority.worker())
    async with worker.channel(cluster.address) as channel:
        client = sv.CertificatesClient(channel)
        request = IssueNodeCertificateRequest(csr_pem=tls.csr_pem(tls.new_key_pem()))
        await client.issue_node_certificate(request, timeout_s=5)
        await rotate(cluster)
        await finish(cluster)
        await client.issue_node_certificate(request, timeout_s=5)
        await cluster.store.update(lambda d: d.delete(Node, worker.node_id))
        with pytest.raises(errors.Removed):
            await client.issue_node_certificate(request, timeout_s=5)


async def test_tokens_of_the_old_root_are_refused_from_the_begin_of_a_rotation(
    cluster: Cluster,
) -> None:
    old = cluster.authority.worker()
    await rotate(cluster)
    with pytest.raises(errors.Denied, match="root certificate was rotated since"):
        await cluster.join(old)
    forged = tls.JoinToken(
        tls.JoinToken.parse(cluster.authority.worker()).digest, tls.JoinToken.parse(old).secret
    )
    with pytest.raises(errors.Unavailable, match="refused the join token"):
        await cluster.join(str(forged))
    joined = await cluster.join(cluster.authority.worker())
    assert not joined.outdated
    await finish(cluster)
    await ids.renew(structs.replace(joined, managers=(cluster.address,)))


# ---------------------------------------------------------------- joins that come twice


async def ask_to_join(cluster: Cluster, token: str, csr_pem: str) -> IssueNodeCertificateResponse:
    certificate = tls.join_certificate(tls.JoinToken.parse(token))
    async with cluster.channel(certificate) as channel:
        return await sv.CertificatesClient(channel).issue_node_certificate(
            IssueNodeCertificateRequest(csr_pem=csr_pem, hostname="w"), timeout_s=5
        )


async def test_join_whose_answer_was_lost_gives_the_same_node_again(cluster: Cluster) -> None:
    token, csr = cluster.authority.worker(), tls.csr_pem(tls.new_key_pem())
    answers = await asyncio.gather(*(ask_to_join(cluster, token, csr) for _ in range(5)))
    assert len({a.node_id for a in answers}) == 1
    assert cluster.store.count(Node) == 2
    other = await ask_to_join(cluster, token, tls.csr_pem(tls.new_key_pem()))
    assert other.node_id != answers[0].node_id


async def test_more_nodes_than_may_join_at_once_join_one_after_the_other(cluster: Cluster) -> None:
    """As when a tool brings up a whole rack behind one address."""
    count, token = JOINS.burst + 40, cluster.authority.worker()
    begun_s = asyncio.get_running_loop().time()
    joined = await asyncio.gather(*(cluster.join(token) for _ in range(count)))
    assert len({i.node_id for i in joined}) == count
    assert asyncio.get_running_loop().time() - begun_s > (count - JOINS.burst) / JOINS.per_s


async def test_key_of_a_node_that_was_up_joins_no_more(cluster: Cluster) -> None:
    """Nor does it give a worker's token another role."""
    token, csr = cluster.authority.worker(), tls.csr_pem(tls.new_key_pem())
    node_id = (await ask_to_join(cluster, token, csr)).node_id

    def change(draft: Draft, **changes: Any) -> None:
        node = draft.get(Node, node_id)
        assert node is not None
        draft.put(structs.replace(node, **changes))

    up = NodeStatus(state=NodeState.READY)
    promoted = NodeSpec(role=NodeRole.MANAGER)
    for changes in ({"status": up}, {"status": None, "spec": promoted}):
        await cluster.store.update(partial(change, **changes))
        with pytest.raises(errors.Conflict, match="has joined with it before"):
            await ask_to_join(cluster, token, csr)
    await cluster.store.update(lambda d: d.delete(Node, node_id))
    assert (await ask_to_join(cluster, token, csr)).role == NodeRole.WORKER
