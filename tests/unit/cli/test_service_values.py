"""Values of service flags in Docker's short and long forms."""

from __future__ import annotations

import contextlib

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import service_values as values
from cli.gpu_flags import parse_gpus
from swarm.v1 import (
    BindOptions,
    DeviceMapping,
    Driver,
    Message,
    Mount,
    NetworkAttachmentSpec,
    PortConfig,
    TmpfsOptions,
    VolumeOptions,
)


def port(target: int, published: int = 0, **more: str) -> PortConfig:
    settings = {"protocol": "tcp", "publish_mode": "ingress", **more}
    return PortConfig(target_port=target, published_port=published, **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", [port(80)]),
        ("8080:80", [port(80, 8080)]),
        ("53:53/udp", [port(53, 53, protocol="udp")]),
        ("53:53/UDP", [port(53, 53, protocol="udp")]),
        ("8080-8081:80-81", [port(80, 8080), port(81, 8081)]),
        ("80-81", [port(80), port(81)]),
        (":80", [port(80)]),
        ("target=80", [port(80)]),
        (
            "published=8080,target=80,protocol=udp,mode=host",
            [port(80, 8080, protocol="udp", publish_mode="host")],
        ),
        (
            "published=8080,target=80,mode=host,host-ip=::1,name=web",
            [port(80, 8080, publish_mode="host", host_ip="::1", name="web")],
        ),
    ],
)
def test_ports(text: str, expected: list[PortConfig]) -> None:
    assert list(values.ports(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("target=/a", Mount(type="volume", target="/a")),
        (
            "type=bind,src=/x,dst=/a,ro",
            Mount(type="bind", source="/x", target="/a", read_only=True),
        ),
        (
            "type=bind,source=/x,destination=/a,bind-propagation=rslave,bind-recursive=disabled,readonly=false",
            Mount(
                type="bind",
                source="/x",
                target="/a",
                bind_options=BindOptions(propagation="rslave", non_recursive=True),
            ),
        ),
        (
            'source=v,target=/a,volume-nocopy,volume-label=k=v,volume-driver=nfs,"volume-opt=o=addr=1,rw",volume-subpath=s',
            Mount(
                type="volume",
                source="v",
                target="/a",
                volume_options=VolumeOptions(
                    no_copy=True,
                    labels={"k": "v"},
                    driver_config=Driver(name="nfs", options={"o": "addr=1,rw"}),
                    subpath="s",
                ),
            ),
        ),
        (
            "type=tmpfs,target=/a,tmpfs-size=1m,tmpfs-mode=1777",
            Mount(
                type="tmpfs",
                target="/a",
                tmpfs_options=TmpfsOptions(size_bytes=1 << 20, mode=0o1777),
            ),
        ),
    ],
)
def test_mounts(text: str, expected: Message) -> None:
    assert values.mount(text) == expected


def test_references() -> None:
    secret = values.secret_reference("key")
    assert secret.file is not None and (secret.file.name, secret.file.mode) == ("key", 0o444)
    config = values.config_reference("source=conf,target=/etc/x,uid=5,gid=6,mode=0400")
    assert config.file is not None and config.config_name == "conf"
    assert (config.file.name, config.file.uid, config.file.gid, config.file.mode) == (
        "/etc/x",
        "5",
        "6",
        0o400,
    )
    default = values.config_reference("conf")
    assert default.file is not None and default.file.name == "/conf"


def test_networks() -> None:
    assert values.network("front") == NetworkAttachmentSpec(target="front")
    assert values.network(
        "name=front,alias=a,alias=b,driver-opt=k=v,ip=10.0.0.5"
    ) == NetworkAttachmentSpec(
        target="front", aliases=("a", "b"), driver_opts={"k": "v"}, ipv4_address="10.0.0.5"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/dev/x", DeviceMapping(source="/dev/x", target="/dev/x", permissions="rwm")),
        ("/dev/x:/dev/y", DeviceMapping(source="/dev/x", target="/dev/y", permissions="rwm")),
        ("/dev/x:/dev/y:r", DeviceMapping(source="/dev/x", target="/dev/y", permissions="r")),
        ("/dev/x:rw", DeviceMapping(source="/dev/x", target="/dev/x", permissions="rw")),
        (
            "vendor.com/class=a",
            DeviceMapping(source="vendor.com/class=a", target="vendor.com/class=a"),
        ),
    ],
)
def test_devices(text: str, expected: DeviceMapping) -> None:
    assert values.device(text) == expected


@pytest.mark.parametrize("text", ["x", "/dev/x:/dev/y:z", "/dev/x:/a:/b", "/dev/x:"])
def test_wrong_devices(text: str) -> None:
    with pytest.raises(click.BadParameter):
        values.device(text)


@given(st.text(alphabet="0123456789-:/=,tcpudrgehosmblin. \"'", max_size=40))
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for parse in (
        values.ports,
        values.mount,
        values.network,
        values.secret_reference,
        values.ulimit,
        values.extra_host,
        parse_gpus,
        values.device,
    ):
        with contextlib.suppress(click.BadParameter):
            parse(text)
