"""What the node says of itself: the runtimes' descriptions and facts of the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from msgspec import structs

from agent.runtime.base import Description
from swarm import tls
from swarm.v1 import (
    EngineDescription,
    Gpu,
    NodeDescription,
    Platform,
    Resources,
    RuntimeProblem,
)


@dataclass(frozen=True, slots=True)
class About:
    """Facts that hold for as long as the agent runs."""

    hostname: str
    version: str
    # Where other nodes reach this one's relay; a host without port.
    data_path_addr: str = ""
    data_path_port: int = 0
    # Labels that constraints see as engine.labels.
    engine_labels: Mapping[str, str] = field(default_factory=dict)
    # Processes and threads that the machine can have; 0: not known.
    pids: int = 0
    # Of the etcd found on the machine; empty: there is none.
    etcd_version: str = ""


@dataclass(frozen=True, slots=True)
class Issuer:
    """Who issued the certificate that the node uses, DER."""

    subject: bytes = b""
    public_key: bytes = b""

    @classmethod
    def of(cls, root: x509.Certificate | None) -> Issuer:
        """None: a root that the node does not know."""
        return cls() if root is None else cls(tls.subject_der(root), tls.public_key_der(root))


def describe(
    about: About,
    runtimes: Sequence[Description],
    *,
    warnings: Iterable[str] = (),
    issuer: Issuer = Issuer(),  # frozen
    gpus: Sequence[Gpu] = (),
    problems: Sequence[RuntimeProblem] = (),
) -> NodeDescription:
    """The node's description; the first runtime's first value is the default.

    Runtimes on one machine share its CPUs and memory, so amounts are not added up: the largest
    counts. `warnings` come before those of the runtimes; each is told once.
    """
    names = dict.fromkeys(name for r in runtimes for name in r.runtimes)
    said = dict.fromkeys([*warnings, *(w for r in runtimes for w in r.warnings)])
    return NodeDescription(
        hostname=about.hostname,
        platform=platform_of_host(),
        resources=structs.replace(_resources([r.resources for r in runtimes]), pids=about.pids),
        engine=_engine(about, [r.engine for r in runtimes if r.engine is not None]),
        runtimes=tuple(names),
        agent_version=about.version,
        data_path_addr=about.data_path_addr,
        data_path_port=about.data_path_port,
        warnings=tuple(said),
        gpus=tuple(gpus),
        cert_issuer_subject=issuer.subject,
        cert_issuer_public_key=issuer.public_key,
        etcd_version=about.etcd_version,
        runtime_problems=tuple(problems),
    )


def pids_of_host(proc: Path = Path("/proc")) -> int:
    """How many processes and threads the kernel lets the machine have; 0: it does not say."""
    found = []
    for name in ("pid_max", "threads-max"):
        try:
            found.append(int((proc / "sys/kernel" / name).read_text()))
        except (OSError, ValueError):
            continue
    return min(found, default=0)


def platform_of_host() -> Platform:
    """What images must be made for to run here."""
    return Platform(architecture=platform.machine(), os=platform.system().lower())


def _resources(given: Sequence[Resources]) -> Resources:
    generic = {(g.kind, g.name): g for r in given for g in r.generic}
    return Resources(
        cpu_nano=max((r.cpu_nano for r in given), default=0),
        memory_bytes=max((r.memory_bytes for r in given), default=0),
        generic=tuple(generic.values()),
    )


def _engine(about: About, engines: Sequence[EngineDescription]) -> EngineDescription | None:
    if not engines:
        labels = dict(about.engine_labels)
        return EngineDescription(labels=labels) if labels else None
    engine = engines[0]
    return structs.replace(engine, labels={**engine.labels, **about.engine_labels})
