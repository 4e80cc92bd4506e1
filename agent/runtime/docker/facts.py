"""What one engine can do, read once from its version and GET /info. Pure.

`describe` turns the same facts into what the node says of itself; what the engine would leave out
with only a warning (limits that the kernel cannot enforce) is said there, once per node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.runtime.base import Description
from agent.runtime.docker.engine import Version
from swarm.v1 import EngineDescription, EnginePlugin, Resources

# Keys of /info that are false where the kernel lacks the control, and what that means.
_CONTROLS = {
    "MemoryLimit": "memory limits are not enforced: the kernel has no memory cgroup",
    "SwapLimit": "limits on swap are not enforced: the kernel does not account for swap",
    "CpuCfsQuota": "CPU limits are not enforced: the kernel has no CFS quota",
    "PidsLimit": "limits on processes are not enforced: the kernel has no pids cgroup",
    "CPUShares": "cpu_shares has no effect: the kernel has no CPU shares",
    "CPUSet": "cpuset has no effect: the kernel has no cpuset cgroup",
    "OomKillDisable": "oom_kill_disable has no effect on this kernel",
}
_NO_HEALTHCHECKS = "podman: healthchecks do not run: they need systemd on this node"
# cgroup v2 has none of these by design; saying so on every modern node would be noise.
_ONLY_V1 = frozenset({"OomKillDisable"})


@dataclass(frozen=True, slots=True)
class Facts:
    """See the module."""

    api: tuple[int, int] = (1, 41)
    engine: str = "docker"
    release: str = ""
    runtimes: frozenset[str] = frozenset({"runc"})
    default_runtime: str = "runc"
    selinux: bool = False
    apparmor: bool = False
    nvidia: bool = False
    # False: the engine cannot run healthchecks here.
    healthchecks: bool = True
    # Whether containers outlive the engine.
    live_restore: bool = False
    # Where it keeps images and containers, if that can be seen from here.
    folder: Path | None = None
    warnings: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    plugins: tuple[EnginePlugin, ...] = ()
    cpus: int = 1
    memory_bytes: int = 0

    def needs(self, api: tuple[int, int], what: str, problem: Callable[[str], None]) -> bool:
        """Whether the engine's API is new enough for something; says so if it is not."""
        if self.api >= api:
            return True
        problem(
            f"{what} needs an engine with API {api[0]}.{api[1]}, this one "
            f"({self.engine} {self.release}) has {self.api[0]}.{self.api[1]}"
        )
        return False


def read_facts(version: Version, info: Mapping[str, Any], *, systemd: bool = True) -> Facts:
    """The facts from an engine's answers. Podman runs healthchecks with timers of systemd."""
    healthchecks = version.engine != "podman" or systemd
    security = [str(option) for option in info.get("SecurityOptions") or ()]
    runtimes = frozenset(str(name) for name in info.get("Runtimes") or ())
    default = str(info.get("DefaultRuntime") or "")
    pairs = (str(label).partition("=") for label in info.get("Labels") or ())
    plugins = [
        EnginePlugin(type=kind, name=str(name))
        for kind, names in sorted((info.get("Plugins") or {}).items())
        for name in names or ()
    ]
    return Facts(
        api=version.api,
        engine=version.engine,
        release=version.release,
        runtimes=runtimes | ({default} if default else set()),
        default_runtime=default,
        selinux=any("name=selinux" in option for option in security),
        apparmor=any("name=apparmor" in option for option in security),
        nvidia=any("nvidia" in name for name in (*runtimes, default)),
        healthchecks=healthchecks,
        live_restore=bool(info.get("LiveRestoreEnabled")),
        folder=Path(root) if (root := str(info.get("DockerRootDir") or "")) else None,
        warnings=_warnings(version, info) + (() if healthchecks else (_NO_HEALTHCHECKS,)),
        labels={key: value for key, _, value in pairs},
        plugins=tuple(plugins),
        cpus=int(info.get("NCPU") or 1),
        memory_bytes=int(info.get("MemTotal") or 0),
    )


def _warnings(version: Version, info: Mapping[str, Any]) -> tuple[str, ...]:
    v2 = str(info.get("CgroupVersion")) == "2"
    return tuple(
        f"{version.engine}: {text}"
        for key, text in _CONTROLS.items()
        if info.get(key) is False and not (v2 and key in _ONLY_V1)
    )


def describe(facts: Facts) -> Description:
    """What the node says of this runtime."""
    return Description(
        runtimes=("docker", *sorted(facts.runtimes)),
        resources=Resources(cpu_nano=facts.cpus * 1_000_000_000, memory_bytes=facts.memory_bytes),
        engine=EngineDescription(
            version=facts.release,
            labels=dict(facts.labels),
            plugins=facts.plugins,
            name=facts.engine,
        ),
        warnings=facts.warnings,
        folder=facts.folder,
    )
