"""The table of fields, and what the runtime says to specs that it cannot honour."""

from __future__ import annotations

import msgspec
import pytest

from agent.runtime.process.fields import (
    CONTAINER,
    TASK,
    How,
    Powers,
    capability_mask,
    check,
    no_new_privileges,
)
from swarm.v1 import (
    BindOptions,
    ContainerSpec,
    CredentialSpec,
    DeviceMapping,
    Driver,
    HealthConfig,
    Mount,
    NetworkAttachmentSpec,
    Privileges,
    SeccompOpts,
    TaskSpec,
    TmpfsOption,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)

USER = Powers(root=False, isolated=False)
ROOT = Powers(root=True, isolated=True)


def task(**fields: object) -> TaskSpec:
    return TaskSpec(container=ContainerSpec(**{"command": ("x",), **fields}))  # type: ignore[arg-type]  # checked by the struct


def test_the_tables_name_every_field_of_the_contract() -> None:
    assert list(CONTAINER) == [f.name for f in msgspec.structs.fields(ContainerSpec)]
    assert list(TASK) == [f.name for f in msgspec.structs.fields(TaskSpec)]


def test_a_plain_command_has_no_problems() -> None:
    assert check(task(), USER) == []
    assert check(task(), ROOT) == []


SET = {str: "value", int: 7, bool: True, dict: {"k": "v"}, tuple: ("value",)}


@pytest.mark.parametrize(
    "name", [n for n, how in CONTAINER.items() if how is How.REFUSED], ids=lambda n: n
)
def test_each_refused_field_is_named(name: str) -> None:
    value = SET[type(getattr(ContainerSpec(), name))]
    assert any(problem.startswith(name) for problem in check(task(**{name: value}), ROOT))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hostname", "h"),
        ("read_only", True),
        ("groups", ("g",)),
        ("mounts", (Mount(type="tmpfs", target="/x"),)),
        ("hosts", ("1.2.3.4 x",)),
        ("sysctls", {"net.core.somaxconn": "1"}),
        ("capability_drop", ("ALL",)),
        ("privileged", True),
        ("devices", (DeviceMapping(source="/dev/null"),)),
        ("shm_size_bytes", 1),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_needs_root_is_refused_without_and_taken_with(name: str, value: object) -> None:
    (problem,) = check(task(**{name: value}), USER)
    assert problem.startswith(name) and "needs root" in problem
    assert check(task(**{name: value}), ROOT) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image": "nginx"}, 'image "nginx"'),
        ({"command": ()}, "command: nothing to run"),
        ({"command": ("a\0b",)}, "zero byte"),
        ({"dir": "x"}, "absolute"),
        ({"healthcheck": HealthConfig(test=("CMD",))}, "healthcheck"),
        ({"healthcheck": HealthConfig(interval_ns=1)}, "no image whose test could be used"),
        ({"healthcheck": HealthConfig(test=("SHELL", "x"))}, "healthcheck"),
        ({"pid_mode": "host"}, "pid_mode"),
        ({"network_mode": "service:x"}, "network_mode"),
        ({"platform": "linux/riscv64"}, "platform"),
        ({"oom_score_adj": 2000}, "oom_score_adj"),
        ({"security_opt": ("seccomp=profile.json",)}, "security_opt"),
        ({"privileges": Privileges(credential_spec=CredentialSpec())}, "credential_spec"),
        ({"privileges": Privileges(seccomp=SeccompOpts(mode="custom"))}, "seccomp"),
        ({"capability_add": ("FLY",)}, 'capability "FLY"'),
        ({"ulimits": (Ulimit(name="wings", soft=1, hard=1),)}, 'ulimit "wings"'),
        ({"ulimits": (Ulimit(name="core", soft=2, hard=1),)}, "soft 2"),
        ({"mounts": (Mount(type="npipe", target="/x"),)}, "npipe"),
        ({"mounts": (Mount(type="bind", source="rel", target="/x"),)}, "absolute path"),
        ({"mounts": (Mount(type="bind", source="/a", target="/"),)}, "target"),
        ({"mounts": (Mount(type="bind", source="/a", target="/x/../y"),)}, "target"),
        (
            {
                "mounts": (
                    Mount(
                        type="bind",
                        source="/a",
                        target="/x",
                        bind_options=BindOptions(propagation="shared"),
                    ),
                )
            },
            "propagation",
        ),
        ({"mounts": (Mount(type="volume", source="../x", target="/x"),)}, "no name"),
        (
            {
                "mounts": (
                    Mount(
                        type="volume",
                        source="v",
                        target="/x",
                        volume_options=VolumeOptions(driver_config=Driver(name="nfs")),
                    ),
                )
            },
            "driver",
        ),
        (
            {
                "mounts": (
                    Mount(
                        type="tmpfs",
                        target="/x",
                        tmpfs_options=TmpfsOptions(options=(TmpfsOption(words=("huge",)),)),
                    ),
                )
            },
            "huge",
        ),
        ({"devices": (DeviceMapping(source="nvidia.com/gpu=0"),)}, "CDI"),
        ({"devices": (DeviceMapping(source="/dev/null", permissions="r"),)}, "permissions"),
        ({"sysctls": {"kernel.panic": "1"}}, "kernel.panic"),
        ({"sysctls": {"net.core.x": "1"}, "network_mode": "host"}, "net.core.x"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_had_is_told_with_its_value(fields: dict[str, object], words: str) -> None:
    problems = check(task(**fields), ROOT)
    assert len(problems) == 1 and words in problems[0]


def test_all_problems_are_told_at_once() -> None:
    assert len(check(task(image="x", hostname="h", user="u", pid_mode="host"), USER)) == 3


def test_log_drivers_and_network_options_are_judged() -> None:
    def problems(**fields: object) -> list[str]:
        container = ContainerSpec(command=("x",))
        return check(TaskSpec(container=container, **fields), USER)  # type: ignore[arg-type]  # checked by the struct

    assert problems(log_driver=Driver(name="json-file", options={"max-size": "10m"})) == []
    assert "syslog" in problems(log_driver=Driver(name="syslog"))[0]
    assert "max-age" in problems(log_driver=Driver(options={"max-age": "1"}))[0]
    assert "max-size" in problems(log_driver=Driver(options={"max-size": "ten"}))[0]
    assert problems(networks=(NetworkAttachmentSpec(target="n", aliases=("web",)),)) == []
    address = NetworkAttachmentSpec(target="n", ipv4_address="10.0.0.9")
    assert "ipv4_address" in problems(networks=(address,))[0]


@pytest.mark.parametrize(
    ("add", "drop", "privileged", "mask"),
    [
        ((), (), False, 0xA80425FB),
        ((), ("ALL",), False, 0),
        (("NET_ADMIN",), ("ALL",), False, 1 << 12),
        (("CAP_NET_ADMIN",), (), False, 0xA80425FB | 1 << 12),
        (("ALL",), ("chown",), False, (1 << 41) - 2),
        ((), (), True, (1 << 41) - 1),
    ],
)
def test_capabilities_are_dockers_with_the_changes_asked(
    add: tuple[str, ...], drop: tuple[str, ...], *, privileged: bool, mask: int
) -> None:
    spec = ContainerSpec(capability_add=add, capability_drop=drop, privileged=privileged)
    assert capability_mask(spec) == mask


def test_no_new_privileges_is_taken_from_both_places() -> None:
    assert no_new_privileges(ContainerSpec(security_opt=("no-new-privileges:true",)))
    assert no_new_privileges(ContainerSpec(privileges=Privileges(no_new_privileges=True)))
    assert not no_new_privileges(ContainerSpec())
