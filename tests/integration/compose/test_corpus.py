"""The corpus against the docker CLI: what it takes becomes the same for both, what it refuses is
listed with its reason.

`docker stack deploy` against an engine that keeps what it is sent shows what the converter makes of
a file, and `docker stack config` prints its normal form. Both need the CLI, but no engine. Every
difference must be one of DIFFERENCES, and each of
these must occur: so the list neither hides a fault nor outlives its reason.
"""

from __future__ import annotations

import base64
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from cli.compose import dump
from cli.docker_json import service_spec
from swarm.v1 import ConfigSpec, NetworkSpec, SecretSpec, StackSpec
from tests.corpus.cases import BY_NAME, CASES, loaded
from tests.integration.compose.fake_engine import Deployed, deploy, docker, docker_is_missing

_MISSING = docker_is_missing()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-")

# Stacks that the docker CLI does not take, and a part of what it says. None of the others may fail.
REFUSED_BY_DOCKER = {
    "extends-family": "forbidden properties",  # extends
    "gitea": "RUNNER_TOKEN is missing a value",  # .env is not read
    "home-automation": "forbidden properties",  # cpus, mem_limit
    "ignored-by-docker": "property cgroupns_mode is not allowed",
    "include-parts": "property include is not allowed",
    "interpolation-more": "interpolat",  # ${A:+b} and nested variables
    "legacy-v2": "forbidden properties",  # and the version
    "overrides": "depends_on must be a list",
    "photos": "property devices is not allowed",  # reservations.devices
    "processes": "depends_on must be a list",
    "profiles": "depends_on must be a list",
    "training-gang": "forbidden properties",  # cpuset
    "vault": "is not allowed",  # name and app_protocol of a port
    "vllm": "property devices is not allowed",
}
TAKEN = [case.name for case in CASES if case.name not in REFUSED_BY_DOCKER]
_CONTAINER = r"services\.[^/]+/TaskTemplate/ContainerSpec"
# Where we differ on purpose: a pattern over the path, and why.
DIFFERENCES = {
    r"services\.[^/]+/DependsOn": "Docker drops depends_on",
    _CONTAINER
    + "/(Privileged|Devices|ShmSize|PidMode|UsernsMode|NetworkMode|SecurityOpt|Domainname"
    + "|MacAddress|Expose)": "keys that Docker drops with a warning",
    _CONTAINER + "/Mounts/.*/BindOptions/SELinux": "Docker drops z and Z of a volume",
    _CONTAINER + "/Mounts/(/tmp|/scratch)/.*": "Docker drops tmpfs",
    r"services\.[^/]+/(Update|Rollback)Config/Deadline": "Docker has no deadlines",
    r"services\.[^/]+/TaskTemplate/RestartPolicy/MaxDelay": "Docker's delay does not grow",
    r"services\.st_plex/TaskTemplate/Networks": "Docker drops network_mode: host",
}

Difference = tuple[str, Any, Any]


@functools.cache
def sent_by_docker(name: str) -> Deployed:
    case, spec = BY_NAME[name], loaded(name).spec
    return deploy(
        case.paths,
        environment=case.environment,
        external=(*spec.external_networks, *spec.external_secrets, *spec.external_configs),
    )


def as_docker(spec: StackSpec) -> dict[str, Any]:
    """The objects that we would make, in the shape of Docker's create requests."""
    found = {f"services.{s.name}": service_spec(s) for s in spec.services}
    found |= {f"networks.{n.name}": _network(n) for n in spec.networks}
    found |= {f"secrets.{s.name}": _data(s) for s in spec.secrets}
    return found | {f"configs.{c.name}": _data(c) for c in spec.configs}


def _network(spec: NetworkSpec) -> dict[str, Any]:
    assert spec.driver is not None
    ipam = spec.ipam
    return {
        "Name": spec.name,
        "Labels": spec.labels,
        "Driver": spec.driver.name,
        "Options": spec.driver.options,
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "EnableIPv6": spec.ipv6,
        "IPAM": {
            "Driver": ipam.driver.name if ipam.driver else "",
            "Config": [{"Subnet": c.subnet} for c in ipam.configs],
        }
        if ipam is not None
        else None,
    }


def _data(spec: SecretSpec | ConfigSpec) -> dict[str, Any]:
    return {
        "Name": spec.name,
        "Labels": spec.labels,
        "Data": base64.b64encode(spec.data).decode(),
        "Templating": {"Name": spec.templating.name} if spec.templating else None,
    }


def of_docker(sent: Deployed) -> dict[str, Any]:
    return {
        f"{kind}.{body['Name']}": body for kind, bodies in sent.bodies.items() for body in bodies
    }


_EMPTY: tuple[Any, ...] = (None, "", 0, False, {}, [])
# What the engine fills in, where the CLI sends nothing.
_DEFAULTS = {"Protocol": "tcp", "PublishMode": "ingress"}
# Of the engine, not of the file.
_IDS = frozenset(("SecretID", "ConfigID"))


# Lists whose order means nothing: Docker's own varies where a config is used twice.
_TOLD_APART_BY: dict[str, Callable[[dict[str, Any]], str]] = {
    "Mounts": lambda mount: str(mount["Target"]),
    "Secrets": lambda reference: str(reference["File"]["Name"]),
    "Configs": lambda reference: str(reference["File"]["Name"]),
}


def differences(path: str, ours: Any, theirs: Any) -> Iterator[Difference]:
    """What differs, by path. Empty and absent are the same to the engine."""
    if isinstance(ours, dict) or isinstance(theirs, dict):
        ours, theirs = ours or {}, theirs or {}
        if isinstance(ours, dict) and isinstance(theirs, dict):
            for key in sorted(ours.keys() | theirs.keys()):
                if key not in _IDS:
                    inner = f"{path}/{key}" if path else key
                    yield from differences(inner, ours.get(key), theirs.get(key))
            return
    if isinstance(ours, list | tuple) or isinstance(theirs, list | tuple):
        ours, theirs = list(ours or []), list(theirs or [])
        if name := _TOLD_APART_BY.get(path.rpartition("/")[2]):
            yield from differences(path, *({name(e): e for e in s} for s in (ours, theirs)))
            return
        if len(ours) == len(theirs):
            for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                yield from differences(f"{path}/{index}", one, other)
            return
    default = _DEFAULTS.get(path.rpartition("/")[2])
    if (ours or default) != (theirs or default) and not (ours in _EMPTY and theirs in _EMPTY):
        yield path, ours, theirs


def reason(path: str) -> str | None:
    return next((why for pattern, why in DIFFERENCES.items() if re.fullmatch(pattern, path)), None)


def of_stack(name: str) -> list[Difference]:
    sent = sent_by_docker(name)
    assert sent.code == 0, sent.error
    return list(differences("", as_docker(loaded(name).spec), of_docker(sent)))


@pytest.mark.parametrize("name", TAKEN)
def test_a_stack_becomes_what_docker_sends(name: str) -> None:
    found = [d for d in of_stack(name) if reason(d[0]) is None]
    assert not found, "\n".join(f"{path}: ours {a!r}, docker's {b!r}" for path, a, b in found)


def test_every_deliberate_difference_occurs() -> None:
    found = [d[0] for name in TAKEN for d in of_stack(name)]
    idle = [p for p in DIFFERENCES if not any(re.fullmatch(p, path) for path in found)]
    assert not idle


class _Printed(yaml.SafeLoader):
    """Reads what the docker CLI prints, by the YAML 1.2 rules that it prints by: PyYAML's own would
    make times of `22:22` and booleans of `on`.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, _pattern in (
    ("bool", r"true|false"),
    ("null", r"null|~|"),
    ("int", r"[-+]?[0-9]+"),
    ("float", r"[-+]?([0-9]*\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?"),
):
    _Printed.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None
    )


def config_of_docker(name: str) -> subprocess.CompletedProcess[str]:
    case = BY_NAME[name]
    files = [word for path in case.paths for word in ("-c", str(path))]
    return docker("stack", "config", *files, environment=case.environment)


@pytest.mark.parametrize("name", TAKEN)
def test_a_normal_form_is_what_docker_prints(name: str) -> None:
    printed = config_of_docker(name)
    assert printed.returncode == 0, printed.stderr
    theirs = yaml.load(printed.stdout, Loader=_Printed)
    form = BY_NAME[name].normal_form().document
    assert form == theirs
    assert yaml.load(dump(form), Loader=_Printed) == theirs


@pytest.mark.parametrize("name", REFUSED_BY_DOCKER)
def test_what_docker_refuses_it_refuses_for_the_reason_listed(name: str) -> None:
    done = config_of_docker(name)
    assert done.returncode != 0
    assert REFUSED_BY_DOCKER[name] in done.stderr
