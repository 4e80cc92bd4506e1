"""Keys, certificates and credentials as both ends of a connection need them.

Every connection between nodes is mutual TLS. A certificate says who it is for: common name = node
id (or a person's name), organizational unit = role, organization = cluster id. Managers'
certificates carry the DNS name `swarm-manager`, which is the name every client expects, so that
addresses may change.

A node that has no certificate yet proves that it knows a join token without sending it: both sides
derive the same small CA from the token's secret (`token_ca`); the joiner presents a certificate
signed with it. The token's first half is the digest of the cluster's root certificate, which the
joiner checks before it trusts the manager. Swarm sends the secret in the request instead (SwarmKit,
design/nodes.md); here it never leaves the node.

Clocks are not read here: callers pass times.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
import secrets
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from swarm import errors
from swarm.clock import SECOND_NS
from swarm.ids import base36

SERVER_NAME = "swarm-manager"
OU_MANAGER = "swarm-manager"
OU_WORKER = "swarm-worker"
OU_ADMIN = "swarm-admin"
OU_JOIN = "swarm-join"

_CURVE = ec.SECP256R1()
_CURVE_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_DIGEST_LENGTH = 50  # 256 bits in base 36
_SECRET_LENGTH = 25
_TOKEN = re.compile(r"SWMTKN-1-([0-9a-z]{50})-([0-9a-z]{25})")
# Join certificates depend on the token alone, so they need no clock.
_JOIN_VALID = (
    datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC),
    datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
)


# ------------------------------------------------------------------ keys and requests


def new_key_pem() -> str:
    """A fresh private key (EC P-256), PKCS #8, not encrypted."""
    return _key_pem(ec.generate_private_key(_CURVE))


def load_key(pem: str) -> ec.EllipticCurvePrivateKey:
    """Raises Invalid for anything but an EC key in PEM."""
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise errors.Invalid(f"not a private key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise errors.Invalid("the private key is not an elliptic-curve key")
    return key


def csr_pem(key_pem: str) -> str:
    """A certificate signing request; who it is for is decided by who signs."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "swarm-node")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return _pem(request.sign(load_key(key_pem), hashes.SHA256()))


def load_csr(pem: str) -> x509.CertificateSigningRequest:
    """Raises Invalid when it is not one, or its signature does not fit its key."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        good = request.is_signature_valid
    except (ValueError, TypeError) as error:
        raise errors.Invalid(f"not a certificate signing request in PEM: {error}") from None
    if not good or not isinstance(request.public_key(), ec.EllipticCurvePublicKey):
        raise errors.Invalid("the certificate signing request is not signed by its own EC key")
    return request


# ------------------------------------------------------------------ certificates


@dataclass(frozen=True, slots=True)
class Facts:
    """What a certificate says."""

    common_name: str
    unit: str
    organization: str
    not_before_ns: int
    not_after_ns: int
    issuer_subject_der: bytes
    names: tuple[str, ...]


def load_certificates(pem: str) -> tuple[x509.Certificate, ...]:
    """All certificates of a PEM text, in order. Raises Invalid when there is none."""
    try:
        return tuple(x509.load_pem_x509_certificates(pem.encode()))
    except ValueError as error:
        raise errors.Invalid(f"not a certificate in PEM: {error}") from None


def facts(certificate: x509.Certificate) -> Facts:
    """What a certificate says; attributes that are missing are empty."""

    def attribute(oid: x509.ObjectIdentifier) -> str:
        found = certificate.subject.get_attributes_for_oid(oid)
        return str(found[0].value) if found else ""

    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = tuple(extension.value.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        names = ()
    return Facts(
        common_name=attribute(NameOID.COMMON_NAME),
        unit=attribute(NameOID.ORGANIZATIONAL_UNIT_NAME),
        organization=attribute(NameOID.ORGANIZATION_NAME),
        not_before_ns=_ns(certificate.not_valid_before_utc),
        not_after_ns=_ns(certificate.not_valid_after_utc),
        issuer_subject_der=certificate.issuer.public_bytes(),
        names=names,
    )


def public_key_der(certificate: x509.Certificate) -> bytes:
    """The certificate's public key, SubjectPublicKeyInfo."""
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's key signed the certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # cryptography names several; each of them means no
        return False
    return True


def new_root(*, now_ns: int, cluster_id: str) -> tuple[str, str]:
    """A root CA for a cluster, valid for 20 years: (certificate, private key)."""
    key = ec.generate_private_key(_CURVE)
    certificate = _authority(
        key,
        # A name of its own: TLS finds issuers by name, and during a rotation there are several.
        name=f"swarm-ca-{secrets.token_hex(8)}",
        organization=cluster_id,
        serial=x509.random_serial_number(),
        # Nodes whose clock is behind must trust it as well.
        valid=(_time(now_ns - 3600 * SECOND_NS), _time(now_ns + 20 * 365 * 86400 * SECOND_NS)),
        path_length=1,  # room for `cross_signed`
    )
    return _pem(certificate), _key_pem(key)


def cross_signed(root_pem: str, *, by_pem: str, by_key_pem: str, now_ns: int) -> str:
    """A root's name and key in a certificate that another root has signed. Whoever trusts only the
    other one is led by it to what the first one issues.
    """
    root, by = load_certificates(root_pem)[0], load_certificates(by_pem)[0]
    until = min(root.not_valid_after_utc, by.not_valid_after_utc)
    return _pem(
        x509.CertificateBuilder()
        .subject_name(root.subject)
        .issuer_name(by.subject)
        .public_key(root.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_ns - 3600 * SECOND_NS))
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(load_key(by_key_pem), hashes.SHA256())
    )


def check_root(root_pem: str, key_pem: str, *, now_ns: int) -> str:
    """A root CA that somebody brings along, in the form in which it is kept. Raises Invalid with
    the reason why it cannot be a cluster's.
    """
    found = load_certificates(root_pem)
    if len(found) != 1:
        raise errors.Invalid(f"it must hold one certificate, it holds {len(found)}")
    root = found[0]
    if not isinstance(root.public_key(), ec.EllipticCurvePublicKey):
        raise errors.Invalid("its key must be an elliptic-curve key, such as EC P-256")
    if load_key(key_pem).public_key() != root.public_key():
        raise errors.Invalid("the private key is not that of the certificate")
    if not issued_by(root, root):
        raise errors.Invalid("it must be a root, signed with its own key")
    try:
        limits = root.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        limits = x509.BasicConstraints(ca=False, path_length=None)
    if not limits.ca:
        raise errors.Invalid("it is not the certificate of a CA (basicConstraints CA:TRUE)")
    if limits.path_length == 0:
        raise errors.Invalid(
            "its path length is 0, so that a later rotation could not lead from it to the next "
            "root; use pathlen:1, or none"
        )
    if not _ns(root.not_valid_before_utc) <= now_ns < _ns(root.not_valid_after_utc):
        raise errors.Invalid(
            f"it is valid from {root.not_valid_before_utc:%Y-%m-%d} to "
            f"{root.not_valid_after_utc:%Y-%m-%d} only"
        )
    return _pem(root)


def split_pem(pem: str) -> tuple[str, ...]:
    """Each certificate of a PEM text on its own, in order. Raises Invalid when there is none."""
    return tuple(_pem(certificate) for certificate in load_certificates(pem))


def subject_der(certificate: x509.Certificate) -> bytes:
    """The name of whom the certificate is for."""
    return certificate.subject.public_bytes()


def issuer_of(pem: str, roots_pem: str) -> x509.Certificate | None:
    """The one of the roots that issued the first certificate; None: another did."""
    certificate = load_certificates(pem)[0]
    roots = load_certificates(roots_pem)
    return next((root for root in roots if issued_by(certificate, root)), None)


def sign(
    request: x509.CertificateSigningRequest,
    *,
    root_pem: str,
    root_key_pem: str,
    common_name: str,
    unit: str,
    organization: str,
    now_ns: int,
    lifetime_ns: int,
    host: str = "",
    cross_pem: str = "",
) -> str:
    """A certificate for the request's key: PEM of the certificate followed by the root's. `host`:
    the address or name that a peer which checks it will have dialled; none: only the role is
    checked, as this project's own clients do. `cross_pem`: the root as another one signed it; it
    comes before the root, for TLS takes the first issuer that fits.
    """
    root = load_certificates(root_pem)[0]
    names: list[x509.GeneralName] = [x509.DNSName(common_name), x509.DNSName(unit)]
    if host:
        names.append(_general_name(host))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_subject(common_name, unit, organization))
        .issuer_name(root.subject)
        .public_key(request.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now_ns - 3600 * SECOND_NS))
        .not_valid_after(_time(now_ns + lifetime_ns))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(ca=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.CLIENT_AUTH]
                + ([ExtendedKeyUsageOID.SERVER_AUTH] if unit == OU_MANAGER else [])
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(load_key(root_key_pem), hashes.SHA256())
    )
    return _pem(certificate) + cross_pem + root_pem


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def root_digest(root_pem: str) -> str:
    """What a join token pins: SHA-256 of the root certificate, 50 characters of base 36."""
    der = load_certificates(root_pem)[0].public_bytes(serialization.Encoding.DER)
    return base36(int.from_bytes(hashlib.sha256(der).digest(), "big"), length=_DIGEST_LENGTH)


# ------------------------------------------------------------------ join tokens


@dataclass(frozen=True, slots=True)
class JoinToken:
    """Leave to join: pins the cluster's root; the secret picks the role."""

    digest: str
    secret: str

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises Invalid with what a token looks like."""
        match = _TOKEN.fullmatch(text.strip())
        if match is None:
            raise errors.Invalid(
                "the join token is not valid: it has the form "
                "SWMTKN-1-<50 characters>-<25 characters>; "
                "`swarmctl swarm join-token worker` on a manager prints it"
            )
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"SWMTKN-1-{self.digest}-{self.secret}"


def new_token_secret() -> str:
    """The secret half of a new join token."""
    return base36(secrets.randbits(128), length=_SECRET_LENGTH)


def token_ca(secret: str) -> tuple[str, str]:
    """The CA that the knowers of a token's secret share: (certificate, private key)."""
    key = _token_key(secret)
    certificate = _authority(
        key, name=f"{OU_JOIN}-{_token_name(secret)}", organization="", serial=1, valid=_JOIN_VALID
    )
    return _pem(certificate), _key_pem(key)


def join_certificate(token: JoinToken) -> tuple[str, str]:
    """A certificate that proves knowledge of the token: (certificate, private key)."""
    ca_pem, ca_key_pem = token_ca(token.secret)
    ca = load_certificates(ca_pem)[0]
    key = ec.generate_private_key(_CURVE)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_subject("joining-node", OU_JOIN, ""))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_JOIN_VALID[0])
        .not_valid_after(_JOIN_VALID[1])
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(load_key(ca_key_pem), hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def fetch_root(address: str, token: JoinToken, *, timeout_s: float) -> str:
    """The root certificate that the manager at host:port presents, once it fits the token's digest.

    Blocking: call it in a thread. Raises Unavailable (nobody answers), Denied (another cluster's
    root).
    """
    for pem in presented(address, timeout_s=timeout_s):
        if root_digest(pem) == token.digest:
            return pem
    raise errors.Denied(
        f"the manager at {address} belongs to another cluster than the join token, or its root "
        "certificate was rotated since; get a fresh token with `swarmctl swarm join-token worker`"
    )


def presented(address: str, *, timeout_s: float) -> tuple[str, ...]:
    """The certificates that whoever listens at host:port presents, each as PEM, unchecked.

    Blocking: call it in a thread. Raises Unavailable.
    """
    # Python's ssl module gives the peer's chain from 3.13 on only.
    from OpenSSL import SSL  # needed when joining, and for messages, only

    host, port = split_address(address)
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    # Nothing is trusted yet: what comes is compared with the digest below.
    context.set_verify(SSL.VERIFY_NONE)
    context.set_alpn_protos([b"h2"])
    deadline_s = time.monotonic() + timeout_s
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as raw:
            raw.setblocking(False)
            connection = SSL.Connection(context, raw)
            connection.set_connect_state()
            while True:
                try:
                    connection.do_handshake()
                    break
                except SSL.WantReadError:
                    left_s = deadline_s - time.monotonic()
                    if left_s <= 0 or not select.select([raw], [], [], left_s)[0]:
                        raise TimeoutError("the TLS handshake takes too long") from None
            chain = connection.get_peer_cert_chain() or []
    except (OSError, SSL.Error) as error:
        raise errors.Unavailable(
            f"no manager answers at {address}: {error or type(error).__name__}; check the address, "
            "that swarmd runs there, and that the port is open"
        ) from None
    return tuple(_pem(certificate.to_cryptography()) for certificate in chain)


def why_strangers(address: str, certificate_pem: str, roots_pem: str, *, timeout_s: float) -> str:
    """Why a manager that listens at host:port and the holder of a certificate do not trust each
    other, as far as can be told without trust; empty: they might, or nobody listens. For messages
    alone. Blocking.
    """
    try:
        chain = presented(address, timeout_s=timeout_s)
    except errors.Unavailable:
        return ""
    if not chain:
        return ""
    mine = facts(load_certificates(certificate_pem)[0])
    if facts(load_certificates(chain[0])[0]).organization != mine.organization:
        return f"{address} belongs to another cluster"
    # A chain with a cross-signed root leads to one of ours as well.
    if all(issuer_of(pem, roots_pem) is None for pem in chain):
        return f"the root CA of the cluster at {address} was rotated, and this side missed it"
    return ""


# ------------------------------------------------------------------ gRPC credentials


def client_credentials(root_pem: str, key_pem: str, certificate_pem: str) -> Any:
    """Credentials for swarm.rpc.Channel.tls."""
    import grpc  # keeps this module light for tools that only make keys

    return grpc.ssl_channel_credentials(
        root_pem.encode(), key_pem.encode(), certificate_pem.encode()
    )


def split_address(address: str, *, default_port: int = 2377) -> tuple[str, int]:
    """host, port of "host", "host:port" or "[v6]:port". Raises Invalid."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.%]+)\]|([^:\[\]\s]+))(?::(\d{1,5}))?", address.strip())
    if match is None and re.fullmatch(r"[0-9a-fA-F:]+", address.strip()):
        return address.strip(), default_port
    port = int(match[3]) if match and match[3] else default_port
    if match is None or not 0 < port < 65536:
        raise errors.Invalid(
            f"{address!r} is not an address; write host:port, such as 10.0.0.1:2377"
        )
    return match[1] or match[2], port


def join_address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ------------------------------------------------------------------ helpers


def _token_key(secret: str) -> ec.EllipticCurvePrivateKey:
    if len(secret) != _SECRET_LENGTH:
        raise errors.Invalid("a join token's secret has 25 characters")
    # 48 bytes for a number below 2^256, so that the remainder is not biased (FIPS 186-5, A.2.1).
    derived = HKDF(hashes.SHA256(), 48, salt=None, info=b"swarm join token 1").derive(
        secret.encode()
    )
    number = int.from_bytes(derived, "big") % (_CURVE_ORDER - 1) + 1
    return ec.derive_private_key(number, _CURVE)


def _token_name(secret: str) -> str:
    return hashlib.sha256(b"swarm join token name 1" + secret.encode()).hexdigest()[:16]


def _authority(
    key: ec.EllipticCurvePrivateKey,
    *,
    name: str,
    organization: str,
    serial: int,
    valid: tuple[datetime.datetime, datetime.datetime],
    path_length: int = 0,
) -> x509.Certificate:
    subject = _subject(name, "", organization)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(common_name: str, unit: str, organization: str) -> x509.Name:
    attributes = [(NameOID.COMMON_NAME, common_name)]
    attributes += [(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []
    attributes += [(NameOID.ORGANIZATION_NAME, organization)] if organization else []
    return x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])


def _pem(thing: x509.Certificate | x509.CertificateSigningRequest) -> str:
    return thing.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def _time(at_ns: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at_ns // SECOND_NS, tz=datetime.UTC)


def _ns(time_: datetime.datetime) -> int:
    return round(time_.timestamp()) * SECOND_NS
