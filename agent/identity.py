"""Who this node is: one private file in the state folder, replaced as a whole, so that it is never
half changed.

Owns the file's format and the renewal of the node's certificate. Joins go through `join`.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import structlog
from cryptography import x509

from swarm import errors, tls
from swarm.clock import SECOND_NS, Clock
from swarm.files import write_private
from swarm.ids import Rng
from swarm.rpc import Channel
from swarm.v1 import (
    Availability,
    IssueNodeCertificateRequest,
    IssueNodeCertificateResponse,
    NodeRole,
)
from swarm.v1.services import CertificatesClient
from swarm.vault import FILE as VAULT_FILE
from swarm.vault import Vault

log = structlog.get_logger("identity")

FORMAT = 1
FILE = "identity.json"
JOIN_TIMEOUT_S = 10.0
JOIN_PATIENCE_S = 50.0  # with a manager that lets others in first; `swarm join` waits for 60 s
JOIN_RETRY_S = 1.0
# Renewal happens at a random point between these shares of the certificate's life, so that nodes
# that joined together do not all come at once (SwarmKit ca/renewer.go does the same).
_RENEW_FROM, _RENEW_TO = 0.5, 0.8
# The clock is looked at this often, because a sleeping machine's timers do not run.
RENEW_CHECK_S = 60.0
# After a renewal that failed; doubles. The first pauses are short, since the end of a rotation of
# the root waits for this node.
_RENEW_RETRY_S_MIN, _RENEW_RETRY_S_MAX = 1.0, 30.0
_PURPOSE = b"swarm node private key"

Issue = Callable[[IssueNodeCertificateRequest], Awaitable[IssueNodeCertificateResponse]]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A node's membership. Addresses are host:port, data_path_addr a host.

    In the file of a manager the key lies sealed with the node's own (swarm.vault): `sealed_key` in
    place of `key_pem`. While that is locked, `key_pem` is empty, and nothing can be done as the
    node.
    """

    format: int
    node_id: str
    cluster_id: str
    role: NodeRole
    key_pem: str
    certificate_pem: str
    root_ca_pem: str
    listen_addr: str
    advertise_addr: str
    data_path_addr: str
    managers: tuple[str, ...] = ()
    sealed_key: str = ""  # base 64

    @property
    def locked(self) -> bool:
        return not self.key_pem

    @property
    def issuer(self) -> x509.Certificate | None:
        """The root that issued the certificate; None: none of those that are trusted."""
        return tls.issuer_of(self.certificate_pem, self.root_ca_pem)

    @property
    def outdated(self) -> bool:
        """Whether another root than the certificate's signs by now."""
        signing = tls.load_certificates(self.root_ca_pem)[0]
        return not tls.issued_by(tls.load_certificates(self.certificate_pem)[0], signing)

    def channel(self, address: str) -> Channel:
        """A connection to a manager as this node."""
        credentials = tls.client_credentials(self.root_ca_pem, self.key_pem, self.certificate_pem)
        return Channel.tls(address, credentials, server_name=tls.SERVER_NAME)


def load(state_dir: Path, vault: Vault | None = None) -> Identity | None:
    """The node's identity; None when it is in no cluster. `vault`: the node's key, if it was read
    already. Raises Invalid for a damaged file.
    """
    path = state_dir / FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        identity = msgspec.json.decode(data, type=Identity)
        if identity.sealed_key:
            identity = _opened(identity, vault or Vault(state_dir / VAULT_FILE))
        if not identity.locked:
            tls.load_key(identity.key_pem)
        tls.load_certificates(identity.certificate_pem)
        tls.load_certificates(identity.root_ca_pem)
    except (msgspec.DecodeError, ValueError, errors.Invalid) as error:
        raise errors.Invalid(
            f"{path} is damaged: {error}. Restore it from a backup; or, to join again as a new "
            "node, remove the file, remove the old node with `swarmctl node rm` on a manager, and "
            "use `swarmctl swarm join`"
        ) from None
    if identity.format != FORMAT:
        raise errors.Invalid(
            f"{path} has format {identity.format}, this version reads {FORMAT}; use the swarmd "
            "that wrote it, or a newer one"
        )
    return identity


def _opened(identity: Identity, vault: Vault) -> Identity:
    if vault.locked:
        return identity
    if not vault.exists:
        raise errors.Invalid(f"its key is sealed, and {vault.path} is gone")
    sealed = base64.b64decode(identity.sealed_key, validate=True)
    key_pem = vault.open(sealed, purpose=_PURPOSE).decode()
    return msgspec.structs.replace(identity, key_pem=key_pem, sealed_key="")


def save(state_dir: Path, identity: Identity, vault: Vault | None = None) -> None:
    """Replaces the file; it is on the disk when this returns. With a vault, the key is sealed."""
    if vault is not None:
        sealed = base64.b64encode(vault.seal(identity.key_pem.encode(), purpose=_PURPOSE)).decode()
        identity = msgspec.structs.replace(identity, key_pem="", sealed_key=sealed)
    write_private(state_dir / FILE, msgspec.json.format(msgspec.json.encode(identity)))


def forget(state_dir: Path) -> None:
    """The node is in no cluster any more."""
    (state_dir / FILE).unlink(missing_ok=True)


async def join(
    *,
    token: str,
    addresses: Sequence[str],
    hostname: str,
    availability: Availability,
    listen_addr: str,
    advertise_addr: str,
    data_path_addr: str,
    etcd_version: str = "",
    key_pem: str = "",
) -> Identity:
    """Asks the managers for a certificate, one after the other. `etcd_version`: of the etcd found
    here; without one the node cannot be one of several managers. `key_pem`: of an earlier try,
    whose answer may have been lost: with the same key it is the same node.

    Raises Invalid (bad token or address), Denied (wrong token), Exhausted (too many join),
    Unavailable (none answers; says what each one said).
    """
    parsed = tls.JoinToken.parse(token)
    if not addresses:
        raise errors.Invalid(
            "name a manager to join: `swarmctl swarm join --token TOKEN HOST:2377`"
        )
    key_pem = key_pem or tls.new_key_pem()
    request = IssueNodeCertificateRequest(
        csr_pem=tls.csr_pem(key_pem),
        availability=availability,
        hostname=hostname,
        addr=advertise_addr,
        etcd_version=etcd_version,
    )
    problems: list[str] = []
    for address in addresses:
        target = tls.join_address(*tls.split_address(address))
        try:
            answer = await _admitted(target, parsed, request)
        except (errors.Unavailable, errors.TimedOut) as error:
            problems.append(_join_problem(target, error))
            continue
        return Identity(
            format=FORMAT,
            node_id=answer.node_id,
            cluster_id=answer.cluster_id,
            role=answer.role,
            key_pem=key_pem,
            certificate_pem=answer.certificate_pem,
            root_ca_pem=answer.root_ca_pem,
            listen_addr=listen_addr,
            advertise_addr=advertise_addr,
            data_path_addr=data_path_addr,
            managers=answer.managers or (target,),
        )
    raise errors.Unavailable("cannot join: " + "; ".join(problems))


async def _admitted(
    target: str, token: tls.JoinToken, request: IssueNodeCertificateRequest
) -> IssueNodeCertificateResponse:
    """The manager's answer. It lets so many in a second from each address (swarm.limits): where a
    thousand come at once, they come one after the other.
    """
    root_pem = await asyncio.to_thread(tls.fetch_root, target, token, timeout_s=JOIN_TIMEOUT_S)
    certificate_pem, key_pem = tls.join_certificate(token)
    credentials = tls.client_credentials(root_pem, key_pem, certificate_pem)
    patient_until_s = asyncio.get_running_loop().time() + JOIN_PATIENCE_S
    async with Channel.tls(target, credentials, server_name=tls.SERVER_NAME) as channel:
        client = CertificatesClient(channel)
        while True:
            try:
                return await client.issue_node_certificate(request, timeout_s=JOIN_TIMEOUT_S)
            except errors.Exhausted:
                if asyncio.get_running_loop().time() > patient_until_s:
                    raise
            await asyncio.sleep(JOIN_RETRY_S)


def _join_problem(target: str, error: errors.SwarmError) -> str:
    """The manager drops a connection whose certificate no current token signed, which says nothing
    by itself.
    """
    if "handshak" in error.message or "Socket closed" in error.message:
        return (
            f"{target} refused the join token: it was rotated, or is for another cluster. Get the "
            "current one with `swarmctl swarm join-token worker` on a manager"
        )
    return error.message


async def keep_renewed(
    current: Callable[[], Identity],
    replace: Callable[[Identity], Awaitable[None]],
    *,
    clock: Clock,
    rng: Rng,
    wake: asyncio.Event,
    issue: Issue | None = None,
    one_at_a_time: asyncio.Lock | None = None,
    check_s: float = RENEW_CHECK_S,
) -> None:
    """Renews the node's certificate for as long as it runs; `wake` asks for a renewal at once (the
    role has changed, or another root signs). `issue`: see `renew`. `one_at_a_time` is held from a
    request until its answer is in its place. `check_s`: how often the clock is looked at.
    """
    one_at_a_time = one_at_a_time or asyncio.Lock()
    retry_s = _RENEW_RETRY_S_MIN
    while True:
        facts = tls.facts(tls.load_certificates(current().certificate_pem)[0])
        life_ns = facts.not_after_ns - facts.not_before_ns
        share = _RENEW_FROM + (_RENEW_TO - _RENEW_FROM) * rng.random()
        due_ns = facts.not_before_ns + int(life_ns * share)
        while clock.now_ns() < due_ns and not wake.is_set():
            await _wait(wake, min(check_s, max(0.0, (due_ns - clock.now_ns()) / SECOND_NS)))
        asked = wake.is_set()
        wake.clear()
        try:
            async with one_at_a_time:
                await replace(await renew(current(), issue=issue))
            retry_s = _RENEW_RETRY_S_MIN
        except errors.SwarmError as error:
            log.warning("certificate_not_renewed", reason=error.message, retry_s=retry_s)
            await _wait(wake, retry_s)
            retry_s = min(_RENEW_RETRY_S_MAX, retry_s * 2)
            if asked:
                wake.set()  # what it was asked for is still wanted


async def renew(identity: Identity, *, issue: Issue | None = None) -> Identity:
    """The identity with a fresh key and certificate, in the role that the cluster has for the node
    now.

    `issue` is the authority of a manager on this very node. It is asked directly, for over a
    connection a certificate that has expired meanwhile would be refused, and a cluster that was
    switched off for long could not be started any more.
    """
    key_pem = tls.new_key_pem()
    request = IssueNodeCertificateRequest(
        csr_pem=tls.csr_pem(key_pem), addr=identity.advertise_addr
    )
    answer = await (issue(request) if issue is not None else ask(identity, request))
    log.info("certificate_renewed", role=answer.role.name.lower())
    return msgspec.structs.replace(
        identity,
        key_pem=key_pem,
        certificate_pem=answer.certificate_pem,
        root_ca_pem=answer.root_ca_pem,
        role=answer.role,
        managers=answer.managers or identity.managers,
    )


async def ask(
    identity: Identity, request: IssueNodeCertificateRequest
) -> IssueNodeCertificateResponse:
    """The answer of the first manager that gives one."""
    problems: list[str] = []
    for address in identity.managers:
        try:
            async with identity.channel(address) as channel:
                return await CertificatesClient(channel).issue_node_certificate(
                    request, timeout_s=JOIN_TIMEOUT_S
                )
        except (errors.Unavailable, errors.TimedOut) as error:
            problems.append(error.message)
    raise errors.Unavailable("; ".join(problems) or "no manager is known")


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or the time is up."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
