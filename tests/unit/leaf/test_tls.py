import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from swarm import errors, tls
from swarm.clock import SECOND_NS

NOW_NS = 1_800_000_000 * SECOND_NS


@pytest.fixture
def root() -> tuple[str, str]:
    return tls.new_root(now_ns=NOW_NS, cluster_id="c1")


def test_a_token_survives_printing_and_parsing(root):
    token = tls.JoinToken(tls.root_digest(root[0]), "0123456789abcdefghijklmno")
    assert tls.JoinToken.parse(str(token)) == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SWMTKN-1-abc-def",
        "SWMTKN-2-" + "a" * 50 + "-" + "b" * 25,
        "SWMTKN-1-" + "A" * 50 + "-" + "b" * 25,
        "SWMTKN-1-" + "a" * 50 + "-" + "b" * 24,
    ],
)
def test_what_is_no_token_is_refused_with_its_form(text):
    with pytest.raises(errors.Invalid, match="SWMTKN-1-<50 characters>"):
        tls.JoinToken.parse(text)


def test_both_sides_derive_the_same_ca_from_a_token():
    secret = "0123456789abcdefghijklmno"
    ours, theirs = (tls.load_certificates(tls.token_ca(secret)[0])[0] for _ in range(2))
    assert ours.subject == theirs.subject
    assert tls.public_key_der(ours) == tls.public_key_der(theirs)


def test_a_join_certificate_is_issued_by_its_tokens_ca_alone(root):
    token = tls.JoinToken(tls.root_digest(root[0]), "a" * 25)
    certificate = tls.load_certificates(tls.join_certificate(token)[0])[0]
    own = tls.load_certificates(tls.token_ca("a" * 25)[0])[0]
    other = tls.load_certificates(tls.token_ca("b" * 25)[0])[0]
    assert tls.issued_by(certificate, own)
    assert not tls.issued_by(certificate, other)
    assert not tls.issued_by(certificate, tls.load_certificates(root[0])[0])


def test_a_signed_certificate_says_who_it_is_for(root):
    pem = tls.sign(
        tls.load_csr(tls.csr_pem(tls.new_key_pem())),
        root_pem=root[0],
        root_key_pem=root[1],
        common_name="n1",
        unit=tls.OU_WORKER,
        organization="c1",
        now_ns=NOW_NS,
        lifetime_ns=90 * 86400 * SECOND_NS,
    )
    leaf, issuer = tls.load_certificates(pem)
    said = tls.facts(leaf)
    assert (said.common_name, said.unit, said.organization) == ("n1", tls.OU_WORKER, "c1")
    assert tls.SERVER_NAME not in said.names
    assert said.not_after_ns - NOW_NS == 90 * 86400 * SECOND_NS
    assert tls.issued_by(leaf, issuer)


def test_only_managers_certificates_carry_the_server_name(root):
    pem = tls.sign(
        tls.load_csr(tls.csr_pem(tls.new_key_pem())),
        root_pem=root[0],
        root_key_pem=root[1],
        common_name="n1",
        unit=tls.OU_MANAGER,
        organization="c1",
        now_ns=NOW_NS,
        lifetime_ns=3600 * SECOND_NS,
    )
    assert tls.SERVER_NAME in tls.facts(tls.load_certificates(pem)[0]).names


def test_a_request_signed_by_another_key_is_refused():
    key = tls.load_key(tls.new_key_pem())
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    good = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    forged = bytearray(good)
    forged[-4] ^= 1
    pem = x509.load_der_x509_csr(bytes(forged)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(errors.Invalid, match="not signed by its own"):
        tls.load_csr(pem.decode())


@pytest.mark.parametrize("text", ["", "garbage", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_garbage_is_no_request_key_or_certificate(text):
    for load in (tls.load_csr, tls.load_key, tls.load_certificates):
        with pytest.raises(errors.Invalid):
            load(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 2377)),
        ("10.0.0.1:99", ("10.0.0.1", 99)),
        ("host.example:2378", ("host.example", 2378)),
        ("[::1]:5", ("::1", 5)),
        ("[fe80::1]", ("fe80::1", 2377)),
        ("::1", ("::1", 2377)),
    ],
)
def test_addresses_are_split(text, expected):
    assert tls.split_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a b", "host:", "host:0", "host:65536", "host:http", "a:1:2x"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(errors.Invalid, match="host:port"):
        tls.split_address(text)
