"""Hostile peers against real daemons: strangers, members that were taken over, joiners with the
wrong token, on every port that a manager and a worker open.

Each test sends its inputs while an ordinary client works, says what each must be answered, and ends
with a look at the daemons (`Scene.check_calm`): alive, small, nothing kept open, nothing told.
Inputs come from seeds (inputs.py), so a failure names the one that did it.
"""

from __future__ import annotations

import asyncio
import gzip
import random
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from swarm import errors, limits, tls
from swarm.clock import SECOND_NS, SystemClock
from swarm.rpc import Channel, Method
from swarm.v1 import (
    AgentMessage,
    Caller,
    GetInfoRequest,
    Hello,
    IssueClientCertificateRequest,
    IssueNodeCertificateRequest,
    NodeDescription,
    NodeRole,
    RelayFrame,
)
from swarm.v1 import services as sv
from swarm.v1.structs import encode
from tests.integration.security import inputs
from tests.integration.security.scene import Certificate, Scene, answer_to, connect, connect_tls

pytestmark = pytest.mark.root  # tasks of the process runtime get namespaces of their own

HOUR_NS = 3600 * SECOND_NS
SEEDS = 40  # for each port
AT_ONCE = 40
METHODS: tuple[Method, ...] = tuple(
    m for name, table in sorted(vars(sv).items()) if name.endswith("_METHODS") for m in table
)
ON_PORT = tuple(m for m in METHODS if "/swarm.v1.Local/" not in m.path)
# What a manager may answer to a message that is nonsense; the rest would be a defect of its own.
SENSIBLE = {
    "OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "DEADLINE_EXCEEDED",
}  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    made = Scene(tmp_path_factory.mktemp("hostile"))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture(autouse=True)
async def calm(scene: Scene) -> AsyncIterator[None]:
    """An ordinary client works all the while, and afterwards all is as it was."""
    async with scene.used():
        yield
    await scene.check_calm()


def lost_status(method: Method, code: str) -> bool:
    """grpc.aio loses the status of a call that the server ends while the client writes."""
    return method.client_streams and code == "INTERNAL"


async def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """All of them, so many at a time."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(job: Callable[[], Any]) -> Any:
        async with room:
            return await job()

    return await asyncio.gather(*(one(job) for job in jobs))


# ---------------------------------------------------------------- strangers


async def test_garbage_on_every_port_is_refused_or_cut_off(scene: Scene) -> None:
    ports = scene.ports()
    assert len(ports) >= 7

    async def one(name: str, where: str, seed: int) -> None:
        try:
            connection = await connect(where)
        except OSError as error:
            raise AssertionError(f"{name} takes no connections: {error}") from None
        answer = await answer_to(connection, inputs.garbage(seed), timeout_s=15)
        assert answer is not None, f"{name}, seed {seed}: the connection was kept open"
        assert b" 200 OK" not in answer[:20], (name, seed, answer[:200])
        assert scene.secret.encode() not in answer
        if name.startswith("relay"):
            assert answer in (b"", b"\3"), (name, seed, answer)

    jobs = [partial(one, n, w, s) for n, w in ports.items() for s in range(SEEDS)]
    random.Random(1).shuffle(jobs)
    assert len(jobs) >= 280
    await at_once(jobs)


def signed(
    unit: str, *, name: str = "ann", organization: str = "o", lifetime_ns: int = HOUR_NS,
    root: tuple[str, str] | None = None,
) -> Certificate:  # fmt: skip
    """(certificate with its root, key), of a root of the stranger's own unless one is given."""
    now_ns = SystemClock().now_ns()
    root_pem, root_key = root or tls.new_root(now_ns=now_ns, cluster_id=organization)
    key = tls.new_key_pem()
    pem = tls.sign(
        tls.load_csr(tls.csr_pem(key)),
        root_pem=root_pem,
        root_key_pem=root_key,
        common_name=name,
        unit=unit,
        organization=organization,
        now_ns=now_ns,
        lifetime_ns=lifetime_ns,
    )
    return pem, key


def strange_certificates(scene: Scene) -> dict[str, Certificate | None]:
    """Of nobody in the cluster, whatever they say."""
    cluster_id, manager_id = scene.mole.cluster_id, scene.mole.node_id
    other = tls.JoinToken.parse(scene.tokens["worker"])
    forged = tls.JoinToken(other.digest, tls.new_token_secret())
    out: dict[str, Certificate | None] = {
        "none": None,
        "another token's": tls.join_certificate(forged),
    }
    for unit in (tls.OU_MANAGER, tls.OU_WORKER, tls.OU_ADMIN, "root"):
        mine = signed(unit, name=manager_id, organization=cluster_id)
        out[f"another root's, for {unit}"] = mine
        leaf = tls.split_pem(mine[0])[0]
        out[f"another root's, for {unit}, with the cluster's root"] = (
            leaf + scene.root_pem,
            mine[1],
        )
    own_pem, own_key = tls.new_root(now_ns=SystemClock().now_ns(), cluster_id=cluster_id)
    out["self-signed"] = (own_pem, own_key)
    named = signed("x" * 60, name="n" * 60, organization="'; drop table nodes; --")
    out["of odd names"] = named
    out["expired"] = signed(tls.OU_MANAGER, organization=cluster_id, lifetime_ns=-60 * SECOND_NS)
    return out


async def test_strangers_certificates_get_no_word_in(scene: Scene, tmp_path: Path) -> None:
    """On the manager's port and, where it runs one, on its etcd's."""
    request = inputs.HELLO + inputs.frame(
        inputs.HEADERS, inputs.END_HEADERS, 1, inputs.headers(*inputs.CALL)
    )

    async def one(what: str, where: str, certificate: Certificate | None, trust: str) -> None:
        try:
            connection = await connect_tls(where, certificate, tmp_path, trusted_pem=trust)
        except (ssl.SSLError, ConnectionError):
            return
        answer = await answer_to(connection, request, end=False)
        # With TLS 1.3 the server's refusal comes after the client thinks that all is well.
        assert answer in (b"", None) or b"grpc-status" not in answer, (what, where, answer)
        assert answer is not None, f"{what} at {where}: the connection was kept open"

    ports = [scene.api, *([scene.peer] if scene.peer else [])]
    await at_once(
        [
            partial(one, what, where, certificate, "")
            for what, certificate in strange_certificates(scene).items()
            for where in ports
        ]
    )


async def test_the_managers_etcd_takes_managers_only(scene: Scene, tmp_path: Path) -> None:
    """A worker's certificate is of the cluster's root, and is still no member of etcd."""
    if scene.peer is None:
        assert not Path("/usr/bin/etcd").exists(), "etcd is there, and the manager runs none"
        return
    request = b"GET /members HTTP/1.1\r\nHost: x\r\n\r\n"
    for certificate in (scene.mole_certificate, scene.ann, _joiner(scene, "worker")):
        try:
            connection = await connect_tls(scene.peer, certificate, tmp_path)
        except (ssl.SSLError, ConnectionError):
            continue
        answer = await answer_to(connection, request, end=False)
        assert answer is not None, "etcd keeps the connection open"
        assert b" 200 " not in answer, answer


async def test_thousands_of_connections_that_say_nothing_keep_nobody_out(scene: Scene) -> None:
    begun = []
    try:
        for name, where in scene.ports().items():
            count = 1_000 if name == "api" else 200
            for _ in range(count // 50):
                begun += await asyncio.gather(*(connect(where) for _ in range(50)))
        assert len(begun) >= 2_000
        async with scene.channel(scene.ann) as channel:
            await sv.ControlClient(channel).get_info(GetInfoRequest(), timeout_s=15)
    finally:
        for _, writer in begun:
            writer.transport.abort()


async def test_who_sends_a_byte_a_second_is_cut_off(scene: Scene) -> None:
    """It costs a connection for so long, and nobody else anything."""

    async def trickle(name: str, where: str, data: bytes) -> None:
        reader, writer = await connect(where)

        async def send() -> None:
            for byte in data:
                writer.write(bytes([byte]))
                await asyncio.sleep(1)

        sending = asyncio.ensure_future(send())
        try:
            async with asyncio.timeout(30):
                while await reader.read(4096):
                    pass
        except ConnectionError:
            pass
        except TimeoutError:
            raise AssertionError(f"{name} still reads after 30 s") from None
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.transport.abort()

    hello = inputs.client_hello(random.Random(1))
    slow = b"GET /metrics HTTP/1.1\r\n" + b"X-A: b\r\n" * 20
    jobs = [
        trickle("api", scene.api, data)
        for data in (hello, inputs.H2_PREFACE, slow)
        for _ in range(10)
    ]
    for name, where in scene.ports().items():
        if name.startswith("relay"):
            jobs += [trickle(name, where, b"SWR1" + bytes(50)) for _ in range(10)]
        elif name.startswith("metrics"):
            jobs += [trickle(name, where, slow) for _ in range(10)]
    # etcd waits for as long as they like; they cost it a file each, and nobody else anything.
    peers = [scene.peer] * 10 if scene.peer else []
    patient = [asyncio.ensure_future(trickle("etcd", where, hello)) for where in peers]
    try:
        await asyncio.gather(*jobs)
    finally:
        for one in patient:
            one.cancel()
        await asyncio.gather(*patient, return_exceptions=True)


# ---------------------------------------------------------------- joiners


def _joiner(scene: Scene, role: str) -> Certificate:
    return tls.join_certificate(tls.JoinToken.parse(scene.tokens[role]))


async def status(channel: Any, method: Method, *bodies: bytes, timeout_s: float = 10) -> str:
    """What a call with these bytes as messages is answered, as gRPC's name of it."""

    async def stream() -> AsyncIterator[bytes]:
        for body in bodies:
            yield body
        # Says nothing more until the server has answered: gRPC loses the status of a call that
        # ends while its client writes.
        await asyncio.Event().wait()

    try:
        if method.client_streams:
            answers = channel.stream_stream(method.path)(stream(), timeout=timeout_s)
        elif method.server_streams:
            answers = channel.unary_stream(method.path)(bodies[0], timeout=timeout_s)
        else:
            await channel.unary_unary(method.path)(bodies[0], timeout=timeout_s)
            return "OK"
        async for _ in answers:
            return "OK"  # what follows may be without end
        return "OK"
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)


def raw(scene: Scene, certificate: Certificate) -> Any:
    """A channel that sends bytes as they are, of any size."""
    pem, key = certificate
    return grpc.aio.secure_channel(
        scene.api,
        tls.client_credentials(scene.root_pem, key, pem),
        options=(
            ("grpc.ssl_target_name_override", tls.SERVER_NAME),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ),
    )


async def test_tokens_are_for_joining_and_give_their_own_role_only(scene: Scene) -> None:
    for role in ("worker", "manager"):
        async with raw(scene, _joiner(scene, role)) as channel:
            for method in ON_PORT:
                if method.name != "issue_node_certificate":
                    code = await status(channel, method, b"")
                    assert code == "PERMISSION_DENIED" or lost_status(method, code), method.path
    # Whatever a certificate made from the worker's token says of itself, it joins a worker.
    token = tls.JoinToken.parse(scene.tokens["worker"])
    key = tls.new_key_pem()
    root = tls.token_ca(token.secret)
    forged = signed(
        tls.OU_MANAGER, name=scene.mole.node_id, organization=scene.mole.cluster_id, root=root
    )
    async with scene.channel(forged) as channel:
        answer = await sv.CertificatesClient(channel).issue_node_certificate(
            IssueNodeCertificateRequest(csr_pem=tls.csr_pem(key), hostname="f"), timeout_s=10
        )
        assert answer.role == NodeRole.WORKER
        assert answer.node_id != scene.mole.node_id
        with pytest.raises(errors.Denied, match="nodes that join as workers"):
            await sv.ControlClient(channel).get_info(GetInfoRequest(), timeout_s=10)
    who = {w for w, _ in scene.denied()}
    assert {"join-worker", "join-manager"} <= who


async def test_joins_come_so_many_a_second_and_broken_ones_make_no_node(scene: Scene) -> None:
    """Requests that ask for nothing sensible, and one that is sent again and again."""
    found: Counter[str] = Counter()
    method = next(m for m in METHODS if m.name == "issue_node_certificate")
    rng = random.Random(3)
    async with raw(scene, _joiner(scene, "worker")) as channel:

        async def one(csr: str) -> None:
            body = IssueNodeCertificateRequest(csr_pem=csr, hostname="h" * 300)
            found[await status(channel, method, encode(body))] += 1

        bad = ["", "x" * 60_000, "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END", "\0" * 100]
        good = tls.csr_pem(tls.new_key_pem())
        at = rng.randrange(80, len(good) - 80)
        bad.append(good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :])
        await asyncio.gather(*(one(csr) for csr in bad * 20))
    assert set(found) == {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}, found
    assert 50 <= found["INVALID_ARGUMENT"] <= 90, found
    async with scene.channel(_joiner(scene, "manager")) as joining:
        nodes = set()
        for _ in range(5):
            with_manager = IssueNodeCertificateRequest(
                csr_pem=good, hostname="again", addr="127.0.0.74:1", etcd_version="3.4.23"
            )
            try:
                answer = await sv.CertificatesClient(joining).issue_node_certificate(
                    with_manager, timeout_s=10
                )
            except errors.Unsupported:
                continue  # one manager is all that this store has
            nodes.add(answer.node_id)
        assert len(nodes) <= 1, "a join that is sent again makes one node"


# ---------------------------------------------------------------- members that were taken over


@pytest.mark.parametrize("seed", range(2))
async def test_messages_that_are_none_are_refused_by_every_rpc(scene: Scene, seed: int) -> None:
    """To callers that it is for, as invalid; to others, before it is looked at."""
    callers = ((Caller.ADMIN, scene.ann), (Caller.WORKER, scene.mole_certificate))
    sent = 0
    for caller, certificate in callers:
        async with raw(scene, certificate) as channel:

            async def one(
                method: Method,
                what: str,
                body: bytes,
                caller: Caller = caller,
                channel: Any = channel,
            ) -> None:
                code = await status(channel, method, body)
                want = {"INVALID_ARGUMENT"} if caller in method.callers else {"PERMISSION_DENIED"}
                refused = code in want or lost_status(method, code)
                assert refused, (caller, method.path, what, seed, code)

            jobs = [
                partial(one, method, what, body)
                for method in ON_PORT
                for what, body in inputs.broken_messages(seed)
            ]
            sent += len(jobs)
            await at_once(jobs)
    assert sent >= 250


async def test_odd_messages_break_nothing(scene: Scene) -> None:
    async with raw(scene, scene.mole_certificate) as channel:

        async def one(method: Method, what: str, body: bytes) -> None:
            code = await status(channel, method, body, timeout_s=3)
            assert code in SENSIBLE or lost_status(method, code), (method.path, what, code)

        await at_once(
            [partial(one, m, what, body) for m in ON_PORT for what, body in inputs.odd_messages(7)]
        )
    reading = [m for m in ON_PORT if m.name in ("get_info", "get", "list", "logs", "watch", "exec")]
    async with raw(scene, scene.ann) as channel:
        await at_once(
            [partial(one, m, what, body) for m in reading for what, body in inputs.odd_messages(8)]
        )


async def test_messages_above_the_limit_are_not_taken_in(scene: Scene) -> None:
    """Those of callers that may not call at all are not even read."""
    by_name = {m.name: m for m in METHODS}
    async with raw(scene, scene.ann) as ann, raw(scene, scene.mole_certificate) as mole:
        for name in ("create", "deploy_stack", "issue_client_certificate"):
            most = limits.request_bytes_max(by_name[name].path)
            body = b"\x0a" + bytes(most)
            assert await status(ann, by_name[name], body, timeout_s=30) == "RESOURCE_EXHAUSTED", (
                name
            )
        huge = bytes(60 << 20)
        assert await status(ann, by_name["create"], huge, timeout_s=30) == "RESOURCE_EXHAUSTED"
        codes = await asyncio.gather(
            *(
                status(mole, by_name["deploy_stack"], bytes(30 << 20), timeout_s=30)
                for _ in range(8)
            )
        )
        assert set(codes) <= {"PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}
        large = bytes(limits.request_bytes_max(by_name["session"].path) + 1)
        assert await status(mole, by_name["session"], large) == "RESOURCE_EXHAUSTED"


async def test_packed_messages_do_not_swell(scene: Scene, tmp_path: Path) -> None:
    """200 MB of nothing, packed to some KB."""
    packed = gzip.compress(bytes(200 << 20), 1)
    call = inputs.frame(
        inputs.HEADERS,
        inputs.END_HEADERS,
        1,
        inputs.headers(*inputs.CALL, ("grpc-encoding", "gzip")),
    )
    message = struct.pack(">BI", 1, len(packed)) + packed
    frames = b"".join(
        inputs.frame(inputs.DATA, 0, 1, message[at : at + 16_000])
        for at in range(0, len(message), 16_000)
    )

    async def one() -> None:
        connection = await connect_tls(scene.api, scene.mole_certificate, tmp_path)
        await answer_to(connection, inputs.HELLO + call + frames, timeout_s=3, end=False)

    await asyncio.gather(*(one() for _ in range(3)))


async def test_frames_that_break_http2_break_one_connection(scene: Scene, tmp_path: Path) -> None:
    async def one(name: str, data: bytes) -> None:
        connection = await connect_tls(scene.api, scene.mole_certificate, tmp_path)
        answer = await answer_to(connection, data, timeout_s=3, end=False)
        assert not answer or scene.secret.encode() not in answer, name

    attacks = list(inputs.h2_attacks())
    assert len(attacks) >= 40
    await at_once([partial(one, name, data) for name, data in attacks])


async def test_who_pings_without_end_is_dropped(scene: Scene, tmp_path: Path) -> None:
    connection = await connect_tls(scene.api, scene.mole_certificate, tmp_path)
    pings = inputs.HELLO + inputs.frame(inputs.PING, 0, 0, bytes(8)) * 1_000
    answer = await answer_to(connection, pings, end=False)
    assert answer is not None, "the connection was kept open"
    assert b"too_many_pings" in answer


async def test_a_worker_gets_at_nothing_that_is_not_its_own(scene: Scene) -> None:
    """Not the control API, not managers' talk, not another node's session, secrets or streams."""
    async with raw(scene, scene.mole_certificate) as channel:
        for method in ON_PORT:
            if Caller.WORKER not in method.callers:
                code = await status(channel, method, b"")
                assert code == "PERMISSION_DENIED" or lost_status(method, code), method.path
    async with scene.channel(scene.mole_certificate) as member:
        client = sv.DispatcherClient(member)

        async def hello() -> AsyncIterator[AgentMessage]:
            # In another node's name; who it is, is in its certificate.
            yield AgentMessage(hello=Hello(protocol=1, description=NodeDescription(hostname="w")))
            await asyncio.Event().wait()

        told = []
        async with asyncio.timeout(10):
            async for message in client.session(hello()):
                told.append(message)
                if message.assignments is not None:
                    break
        assert scene.secret not in repr(told)
        given = told[-1].assignments
        assert given is not None
        assert not given.tasks
        assert not given.secrets
        for relay_id in ("", "x" * 25, scene.mole.node_id, "\0", "r" * 100_000):

            async def frames(relay_id: str = relay_id) -> AsyncIterator[RelayFrame]:
                yield RelayFrame(hello=relay_id)
                await asyncio.Event().wait()

            with pytest.raises((errors.NotFound, errors.Invalid)):
                async for _ in client.relay(frames()):
                    pass
    mole = f"worker {scene.mole.node_id}"
    denied = {method for who, method in scene.denied() if who == mole}
    assert {"GetInfo", "DeployStack", "GetJoinTokens", "Backup"} <= denied


async def test_other_versions_of_the_protocol_are_refused(scene: Scene) -> None:
    async with scene.channel(scene.mole_certificate) as member:
        for first in (
            AgentMessage(),
            AgentMessage(hello=Hello()),
            AgentMessage(hello=Hello(protocol=2)),
            AgentMessage(hello=Hello(protocol=2**32 - 1, description=NodeDescription())),
        ):

            async def messages(first: AgentMessage = first) -> AsyncIterator[AgentMessage]:
                yield first
                await asyncio.Event().wait()

            with pytest.raises((errors.Invalid, errors.Unsupported)):
                async for _ in sv.DispatcherClient(member).session(messages(), timeout_s=15):
                    pass


async def test_a_member_that_loops_is_held_up_and_nobody_else(scene: Scene) -> None:
    """More calls than the limit, more streams than the limit, more refusals than the limit."""
    found: Counter[str] = Counter()
    by_name = {m.name: m for m in METHODS}
    bob = await _person(scene, "bob")
    async with raw(scene, bob) as channel:

        async def one(name: str, body: bytes = b"") -> None:
            found[await status(channel, by_name[name], body, timeout_s=30)] += 1

        begun_s = asyncio.get_running_loop().time()
        await at_once([partial(one, "get_info")] * 1_500)
        took_s = asyncio.get_running_loop().time() - begun_s
        assert found["OK"] >= 1_000, found
        assert found["OK"] <= 1_000 + 500 * took_s, found  # a slow machine may take them all
        assert set(found) <= {"OK", "RESOURCE_EXHAUSTED"}, found
        found.clear()
        streams = [channel.unary_stream("/swarm.v1.Control/Watch")(b"") for _ in range(200)]
        for stream in streams:
            await stream.read()
        await one("watch")
        assert set(found) == {"RESOURCE_EXHAUSTED"}
        for stream in streams:
            stream.cancel()
    found.clear()
    before = len(scene.denied())
    async with raw(scene, scene.mole_certificate) as channel:
        await asyncio.gather(*(one("backup") for _ in range(300)))
    assert found["RESOURCE_EXHAUSTED"] >= 100, found
    assert set(found) == {"PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}
    assert len(scene.denied()) - before < 200


async def _person(scene: Scene, name: str) -> Certificate:
    key = tls.new_key_pem()
    async with Channel.unix(str(scene.manager.socket)) as channel:
        answer = await sv.CertificatesClient(channel).issue_client_certificate(
            IssueClientCertificateRequest(csr_pem=tls.csr_pem(key), name=name), timeout_s=10
        )
    return answer.certificate_pem, key


# ---------------------------------------------------------------- the machine's own users


async def test_broken_messages_on_the_socket_are_refused(scene: Scene) -> None:
    """Whoever may open it is trusted, and may still have a defect."""
    for node in (scene.manager, scene.worker):
        options = (("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.insecure_channel(f"unix:{node.socket}", options=options) as channel:
            for method in METHODS:
                for what, body in inputs.broken_messages(5):
                    want = {"INVALID_ARGUMENT"}
                    if node is scene.worker and not method.without_manager:
                        want.add("UNAVAILABLE")  # it is no manager
                    if Caller.LOCAL not in method.callers:
                        want = {"PERMISSION_DENIED", "UNIMPLEMENTED"}
                    sent = () if method.client_streams and len(want) > 1 else (body,)
                    code = await status(channel, method, *sent)
                    assert code in want, (node.name, method.path, what, code)


def test_there_are_more_than_500_of_them() -> None:
    """Without those that are only many at once."""
    garbage = SEEDS * 7
    broken = 2 * 2 * len(ON_PORT) * len(list(inputs.broken_messages(0)))
    odd = len(ON_PORT) * len(list(inputs.odd_messages(0)))
    assert garbage + broken + odd + len(list(inputs.h2_attacks())) > 1_000
