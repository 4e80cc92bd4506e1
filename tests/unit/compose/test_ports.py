"""Short forms of ports."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.compose.ports import PROTOCOLS, ShortPort, parse_short
from swarm.v1 import PortConfig
from tests.unit.compose.helpers import document, loaded, problems, service


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("80", [("", 0, 80, "tcp")]),
        ("8080:80", [("", 8080, 80, "tcp")]),
        ("53:53/udp", [("", 53, 53, "udp")]),
        ("53:53/UDP", [("", 53, 53, "udp")]),
        ("9999/sctp", [("", 0, 9999, "sctp")]),
        ("127.0.0.1:8080:80", [("127.0.0.1", 8080, 80, "tcp")]),
        ("127.0.0.1::80", [("127.0.0.1", 0, 80, "tcp")]),
        ("[::1]:8080:80", [("::1", 8080, 80, "tcp")]),
        ("::1:8080:80", [("::1", 8080, 80, "tcp")]),
        ("80-82", [("", 0, 80, "tcp"), ("", 0, 81, "tcp"), ("", 0, 82, "tcp")]),
        ("7000-7001:80-81", [("", 7000, 80, "tcp"), ("", 7001, 81, "tcp")]),
        ("7000-7000:80", [("", 7000, 80, "tcp")]),
        ("7000-7001:80", [("", 7000, 80, "tcp"), ("", 7001, 80, "tcp")]),
        ("1:65535", [("", 1, 65535, "tcp")]),
        ("0:80", [("", 0, 80, "tcp")]),
        ("80/", [("", 0, 80, "tcp")]),
    ],
)
def test_forms(text: str, ports: list[tuple[str, int, int, str]]) -> None:
    assert parse_short(text) == [ShortPort(*port) for port in ports]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the target port is missing"),
        ("web", "the target port 'web' is not a number"),
        ("8080:", "the target port is missing"),
        ("99999", "99999 is not from 1 to 65535"),
        ("0-1:80-81", "the published port 0 is not from 1 to 65535"),
        ("80:0", "the target port 0"),
        ("-1", "the target port is missing"),
        ("80/tpc", "the protocol 'tpc' is not tcp, udp or sctp"),
        ("80/tcp/udp", "the protocol 'tcp/udp' is not"),
        ("8000-8010:80-81", "11 published ports cannot stand for 2 target ports"),
        ("80:80-82", "1 published ports cannot stand for 3 target ports"),
        ("82-80", "the range runs backwards"),
        ("300.0.0.1:80:80", "'300.0.0.1' is not an IP address"),
        ("localhost:80:80", "'localhost' is not an IP address"),
        ("[::1:80:80", "ends with ]:"),
        ("[::1]:1:2:3", "too many colons"),
        ("80:80:80:80", "is not an IP address"),
        ("1234567890", "is not a number"),
        ("٣", "is not a number"),
    ],
)
def test_what_is_no_port_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        parse_short(text)


numbers = st.integers(1, 65535)


@given(numbers, numbers, st.integers(0, 50), st.sampled_from(PROTOCOLS), st.booleans())
def test_a_range_gives_one_port_for_each_number(
    published: int, target: int, more: int, protocol: str, address: bool
) -> None:
    more = min(more, 65535 - published, 65535 - target)
    ip = "10.0.0.1" if address else ""
    text = f"{ip + ':' if ip else ''}{published}-{published + more}:{target}-{target + more}"
    assert parse_short(f"{text}/{protocol}") == [
        ShortPort(ip, published + i, target + i, protocol) for i in range(more + 1)
    ]


@given(st.text(alphabet="0123456789-:/.[]tcpud ", max_size=30))
def test_any_text_is_ports_in_bounds_or_refused(text: str) -> None:
    try:
        ports = parse_short(text)
    except ValueError:
        return
    assert ports
    for port in ports:
        assert 1 <= port.target <= 65535
        assert 0 <= port.published <= 65535


def ports_of(text: str) -> tuple[PortConfig, ...]:
    endpoint = service(f"ports: {text}").endpoint
    assert endpoint is not None
    return endpoint.ports


def test_ports_stand_in_the_order_of_what_they_publish() -> None:
    assert [p.published_port for p in ports_of('["9000:1", "80", "8000:2"]')] == [0, 8000, 9000]


def test_one_port_may_be_published_for_two_protocols() -> None:
    assert len(ports_of('["53:53", "53:53/udp"]')) == 2


def test_the_same_port_twice_counts_once() -> None:
    assert len(ports_of('["80:80", {target: 80, published: "80"}]')) == 1


def test_the_long_form_keeps_every_field() -> None:
    assert ports_of(
        "[{name: web, target: 80, published: '8080', protocol: udp, mode: host, host_ip: 10.0.0.1}]"
    ) == (
        PortConfig(
            name="web",
            target_port=80,
            published_port=8080,
            protocol="udp",
            publish_mode="host",
            host_ip="10.0.0.1",
        ),
    )


def test_an_address_counts_in_mode_host_only() -> None:
    found = loaded(document('ports: ["127.0.0.1:8080:80"]'))
    endpoint = found.spec.services[0].endpoint
    assert endpoint is not None
    assert endpoint.ports[0].host_ip == ""
    assert "the address 127.0.0.1 is not used" in found.warnings[0]


@pytest.mark.parametrize(("text", "target"), [("0x50", 80), ("0120", 80), ("8_0", 80)])
def test_a_number_is_its_value_however_it_is_written(text: str, target: int) -> None:
    endpoint = service(f"ports: [{text}]").endpoint
    assert endpoint is not None
    assert [port.target_port for port in endpoint.ports] == [target]


def test_ranges_have_an_end() -> None:
    assert "more than 20000 ports" in problems(document("ports: ['1-65535:1-65535']")).message


def test_a_minute_and_a_second_stay_a_port() -> None:
    endpoint = service("ports: [22:22]").endpoint
    assert endpoint is not None
    assert [(p.published_port, p.target_port) for p in endpoint.ports] == [(22, 22)]
