"""The container of a service: each key about its program and what surrounds it."""

from __future__ import annotations

import ipaddress
import re

from cli.compose import storage
from cli.compose.around import NAMESPACE_LABEL, Surroundings, strings_of
from cli.compose.at import At
from cli.compose.problems import listed, nearest
from swarm.v1 import (
    ContainerSpec,
    DeviceMapping,
    DnsConfig,
    Driver,
    HealthConfig,
    Privileges,
    Ulimit,
)

HEALTH_NS_MIN = 1_000_000  # Docker's


def container_spec(at: At, around: Surroundings, image: str, network_mode: str) -> ContainerSpec:
    def text(key: str) -> str:
        found = at.set_at(key)
        return found.text() if found is not None else ""

    def truth(key: str) -> bool:
        found = at.set_at(key)
        return found.truth() if found is not None else False

    def number(key: str, least: int | None = None, most: int | None = None) -> int:
        found = at.set_at(key)
        return found.integer(least=least, most=most) if found is not None else 0

    def size(key: str) -> int:
        found = at.set_at(key)
        return found.size() if found is not None else 0

    def texts(key: str) -> tuple[str, ...]:
        found = at.set_at(key)
        return found.texts() if found is not None else ()

    def choice(key: str, *accepted: str) -> str:
        found = at.set_at(key)
        return found.choice(accepted) if found is not None else ""

    grace, init = at.set_at("stop_grace_period"), at.set_at("init")
    swappiness, pull = at.set_at("mem_swappiness"), _pull_policy(at)
    capability_add, capability_drop = _capabilities(texts("cap_add"), texts("cap_drop"))
    configs, credential = storage.configs(at, around)
    return ContainerSpec(
        image=image,
        labels=dict(sorted({**strings_of(at, "labels"), NAMESPACE_LABEL: around.stack}.items())),
        command=texts("entrypoint"),
        args=texts("command"),
        hostname=text("hostname"),
        env=_environment(at),
        dir=_folder(at),
        user=text("user"),
        groups=texts("group_add"),
        privileges=Privileges(credential_spec=credential),
        init=init.truth() if init is not None else None,
        stop_signal=_signal(at),
        tty=truth("tty"),
        open_stdin=truth("stdin_open"),
        read_only=truth("read_only"),
        mounts=storage.mounts(at, around),
        stop_grace_period_ns=grace.duration() if grace is not None else None,
        healthcheck=_healthcheck(at),
        hosts=_hosts(at),
        dns=_dns(at, texts("dns_search"), texts("dns_opt")),
        secrets=storage.secrets(at, around),
        configs=configs,
        isolation=text("isolation"),
        sysctls=strings_of(at, "sysctls"),
        capability_add=capability_add,
        capability_drop=capability_drop,
        ulimits=_ulimits(at),
        oom_score_adj=number("oom_score_adj", -1000, 1000),
        privileged=truth("privileged"),
        devices=_devices(at),
        shm_size_bytes=size("shm_size"),
        ipc_mode=namespace_of(at, "ipc", "host", "private", "shareable", "none"),
        pid_mode=namespace_of(at, "pid", "host"),
        userns_mode=choice("userns_mode", "host"),
        uts_mode=choice("uts", "host"),
        cgroupns_mode=choice("cgroup", "host", "private")
        or choice("cgroupns_mode", "host", "private"),
        network_mode=network_mode,
        security_opt=_security(at),
        cgroup_parent=text("cgroup_parent"),
        domainname=text("domainname"),
        mac_address=_mac(at),
        oom_kill_disable=truth("oom_kill_disable"),
        pull_policy=pull,
        platform=text("platform"),
        expose=texts("expose"),
        annotations=strings_of(at, "annotations"),
        storage_opt=strings_of(at, "storage_opt"),
        cpuset=text("cpuset"),
        cpu_shares=number("cpu_shares", 0),
        memory_swap_bytes=_swap(at),
        memory_reservation_bytes=size("mem_reservation"),
        memory_swappiness=swappiness.integer(least=0, most=100) if swappiness else None,
        device_cgroup_rules=texts("device_cgroup_rules"),
    )


def _environment(at: At) -> tuple[str, ...]:
    """ "K=V", sorted; K alone where neither file nor caller has a value."""
    found = at.set_at("environment")
    if found is None or not found.is_map():
        return ()
    values = {}
    for name, value in found.items():
        if not name or "=" in name:
            value.fail(f'"{name}" is not the name of a variable', "a name has no = in it")
        values[name] = name if value.node.value is None else f"{name}={value.value_text()}"
    return tuple(sorted(values.values()))


def _capabilities(
    add: tuple[str, ...], drop: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As Docker normalises them: CAP_NAME, sorted, ALL swallows the rest, adding beats dropping."""

    def normal(names: tuple[str, ...]) -> set[str]:
        found = set()
        for name in names:
            upper = name.strip().upper()
            found.add(upper if upper == "ALL" or upper.startswith("CAP_") else f"CAP_{upper}")
        return {"ALL"} if "ALL" in found else found

    added, dropped = normal(add), normal(drop)
    return tuple(sorted(added)), tuple(sorted(dropped - added))


def _signal(at: At) -> str:
    found = at.set_at("stop_signal")
    if found is None:
        return ""
    text = found.text()
    bare = text.upper().removeprefix("SIG")
    if not text or bare in _SIGNALS or _SIGNAL.fullmatch(bare):
        return text
    near = nearest(bare, (signal.lower() for signal in _SIGNALS))
    found.fail(
        f'"{text}" is not a signal',
        f"did you mean SIG{near.upper()}?" if near else "for example SIGTERM or SIGQUIT",
    )
    return text


_SIGNAL = re.compile(r"[1-9]|[1-5][0-9]|6[0-4]|RTMIN(\+[0-9]{1,2})?|RTMAX(-[0-9]{1,2})?")
# fmt: off
_SIGNALS = frozenset((
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL",
    "PIPE", "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP",
    "TTIN", "TTOU", "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
))
# fmt: on


def _healthcheck(at: At) -> HealthConfig | None:
    found = at.set_at("healthcheck")
    if found is None or not found.is_map():
        return None
    test = found.set_at("test")
    words = test.texts() if test is not None else ()
    if words and words[0] not in ("NONE", "CMD", "CMD-SHELL"):
        assert test is not None
        test.fail(
            f'the list must begin with NONE, CMD or CMD-SHELL, not "{words[0]}"',
            'write [CMD, program, argument], or [CMD-SHELL, "a line for the shell"]',
        )
    elif words and len(words) == 1 and words[0] != "NONE":
        assert test is not None
        test.fail(f"nothing follows {words[0]}", "add the command to run")

    def duration(key: str) -> int:
        value = found.set_at(key)
        number = value.duration() if value is not None else 0
        if value is not None and 0 < number < HEALTH_NS_MIN:
            value.fail(f"{value.shown()} is too short", "the least is 1ms")
        return number

    retries = found.set_at("retries")
    disable = found.set_at("disable")
    if disable is not None and disable.truth():
        # One of another file has the last word, whichever stands above.
        same_file = test is not None and test.mark.source is disable.mark.source
        if words and words != ("NONE",) and same_file:
            found.fail_key("disable", "disable and test exclude each other", "remove one of them")
        return HealthConfig(test=("NONE",))
    return HealthConfig(
        test=words,
        interval_ns=duration("interval"),
        timeout_ns=duration("timeout"),
        start_period_ns=duration("start_period"),
        start_interval_ns=duration("start_interval"),
        retries=retries.integer(least=0, most=2**31 - 1) if retries is not None else 0,
    )


def _hosts(at: At) -> tuple[str, ...]:
    """ "IP name" each."""
    found = at.set_at("extra_hosts")
    lines = []
    for each in found.elements() if found is not None else ():
        name, _, rest = each.text().partition(":")
        address = rest.strip().strip("[]")
        # What is no host and address at all is told where short forms are read.
        if name.split() == [name] and address != "host-gateway" and not is_address(address):
            each.fail(f'"{address}" is not an IP address', f'write "{name}:10.0.0.1"')
        lines.append(f"{address} {name}")
    return tuple(lines)


def is_address(text: str, version: int = 0) -> bool:
    """Whether it is an IP address, of one version if that is given."""
    try:
        return ipaddress.ip_address(text).version in (version or 4, version or 6)
    except ValueError:
        return False


def _folder(at: At) -> str:
    found = at.set_at("working_dir")
    text = found.text() if found is not None else ""
    if found is not None and text and not text.startswith("/") and "{{" not in text:
        found.fail(f'"{text}" is not an absolute path', f"write /{text}")
    return text


def _dns(at: At, search: tuple[str, ...], options: tuple[str, ...]) -> DnsConfig | None:
    found = at.set_at("dns")
    servers = found.texts() if found is not None else ()
    for each in found.elements() if found is not None else ():
        if each.node.value is not None and not is_address(each.node.text):
            each.fail(f"{each.shown()} is not an IP address", "for example 1.1.1.1")
    if not servers and not search and not options:
        return None
    return DnsConfig(nameservers=servers, search=search, options=options)


# github.com/docker/go-units
# fmt: off
_ULIMITS = (
    "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc",
    "rss", "rtprio", "rttime", "sigpending", "stack",
)
# fmt: on


def _ulimits(at: At) -> tuple[Ulimit, ...]:
    found = at.set_at("ulimits")
    limits = []
    for name, value in found.items() if found is not None else ():
        if name not in _ULIMITS and not name.startswith("x-"):
            near = nearest(name, _ULIMITS)
            assert found is not None
            found.fail_key(
                name,
                f'there is no limit "{name}"',
                f'did you mean "{near}"?' if near else f"known are {', '.join(_ULIMITS)}",
            )
        if not isinstance(value.node.value, dict):
            number = value.integer(least=-1)
            limits.append(Ulimit(name=name, soft=number, hard=number))
            continue
        soft, hard = value.set_at("soft"), value.set_at("hard")
        if soft is None or hard is None:
            value.fail("soft and hard are both needed", "write soft: 1024 and hard: 65536")
            continue
        low, high = soft.integer(least=-1), hard.integer(least=-1)
        if low > high != -1 or (low == -1 and high != -1):
            value.fail(f"the soft limit {low} is above the hard limit {high}", "raise hard")
        limits.append(Ulimit(name=name, soft=low, hard=high))
    return tuple(sorted(limits, key=lambda limit: limit.name))


def _devices(at: At) -> tuple[DeviceMapping, ...]:
    found = at.set_at("devices")
    mappings = []
    for device in found.elements() if found is not None else ():
        source, target, rights = (device.set_at(k) for k in ("source", "target", "permissions"))
        if source is None:
            device.lacks("source", "add source: /dev/NAME")
            continue
        permissions = rights.text() if rights is not None else ""
        if not set(permissions) <= set("rwm"):
            device.fail(f'"{permissions}" are not permissions', "write letters of rwm")
        mappings.append(
            DeviceMapping(
                source=source.text(empty=False),
                target=target.text() if target is not None else "",
                permissions=permissions,
            )
        )
    return tuple(mappings)


def namespace_of(at: At, key: str, *accepted: str) -> str:
    found = at.set_at(key)
    if found is None:
        return ""
    text = found.node.value
    if isinstance(text, str) and text.startswith(("service:", "container:")):
        found.fail(
            f'"{text}": tasks share no namespaces, because they may run on different hosts',
            f"write {listed(accepted)}, or put both programs into one image",
        )
        return ""
    return found.choice(accepted)


_SECURITY_OPTIONS = ("label", "seccomp", "apparmor", "systempaths", "credentialspec")


def _security(at: At) -> tuple[str, ...]:
    found = at.set_at("security_opt")
    if found is None or not found.is_list("- no-new-privileges:true"):
        return ()
    options = []
    for each in found.elements():
        text = each.text()
        name, separator, value = text.replace(":", "=", 1).partition("=")
        if "=" in text:
            name, separator, value = text.partition("=")
        if name == "no-new-privileges":
            if value.lower() != "false":
                options.append(name)
        elif name in _SECURITY_OPTIONS and separator:
            options.append(f"{name}={value}")
        elif text:
            each.fail(
                f'"{text}" is not a security option',
                "known are no-new-privileges, label=, seccomp=, apparmor= and systempaths=",
            )
    return tuple(options)


def _mac(at: At) -> str:
    found = at.set_at("mac_address")
    if found is None:
        return ""
    text = found.text(empty=False)
    parts = text.replace("-", ":").split(":")
    if text and (len(parts) != 6 or not all(_is_hex_byte(part) for part in parts)):
        found.fail(f'"{text}" is not a MAC address', 'write "02:42:ac:11:00:02" in quotes')
    return text


def _is_hex_byte(text: str) -> bool:
    return len(text) == 2 and all(c in "0123456789abcdefABCDEF" for c in text)


_TIMED_PULL = re.compile(r"refresh|daily|weekly|every_[0-9wdhms]+")


def _pull_policy(at: At) -> str:
    found = at.set_at("pull_policy")
    if found is None:
        return ""
    given = found.node.value
    if isinstance(given, str) and _TIMED_PULL.fullmatch(given):
        found.fail(
            f'"{given}": images are not pulled by the clock',
            "write always, missing or never, and deploy again for a newer image",
        )
        return ""
    if given == "build":
        found.fail(
            "a cluster runs images from a registry and does not build",
            "build and push the image first; write always, missing or never",
        )
        return ""
    word = found.choice(("always", "missing", "never", "if_not_present"))
    return "missing" if word == "if_not_present" else word


def _swap(at: At) -> int:
    found = at.set_at("memswap_limit")
    if found is None:
        return 0
    return -1 if str(found.node.value) == "-1" else found.size()


def log_driver(at: At) -> Driver | None:
    found = at.set_at("logging")
    if found is None or not found.is_map():
        return None
    driver = found.set_at("driver")
    return Driver(
        name=driver.text() if driver is not None else "", options=strings_of(found, "options")
    )
