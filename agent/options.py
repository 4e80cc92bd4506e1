"""The command line of swarmd."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.gpus import inventory
from swarm import __version__, errors, logs
from swarm.audit import Copy, copy_to
from swarm.files import SOCKET_PATH_MAX

RELAY_PORT = 7946  # Swarm's port for traffic between nodes
PEER_PORT = 2380  # etcd's own


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says of the node."""

    state_dir: Path
    hostname: str
    docker_socket: str  # empty: no container engine
    runtimes: tuple[str, ...]  # of docker, process; the first is the default
    relay_port: int
    engine_labels: Mapping[str, str]
    peer_port: int = PEER_PORT  # where other managers' etcd reaches this node's
    gpu_inventory: Path | None = None  # a file that declares GPUs


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    state_dir: Path
    socket: Path
    settings: Settings
    metrics_addr: str
    audit_copies: tuple[Copy, ...] = ()


def default_paths() -> tuple[Path, Path]:
    """State folder and socket: the system's for root, the user's own otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/swarm"), Path("/run/swarm/swarmd.sock")
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "swarm"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return home, (Path(runtime) / "swarm" if runtime else home) / "swarmd.sock"


def parse(argv: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    """Reads the command line; exits with a message and status 2 when it is wrong."""
    state_dir, socket_path = default_paths()
    parser = argparse.ArgumentParser(
        prog="swarmd",
        description="The daemon of one node. `swarmctl swarm init` makes a cluster, "
        "`swarm join` joins one.",
    )
    add = parser.add_argument
    add("--version", action="version", version=f"swarmd {__version__}")
    add("--state-dir", type=Path, default=state_dir, metavar="DIR", help="default: %(default)s")
    add("--socket", type=Path, metavar="PATH", help=f"unix socket (default: {socket_path})")
    add("--socket-group", metavar="GROUP", help="group that may use the socket beside its owner")
    add(
        "--docker-socket",
        default="/var/run/docker.sock",
        metavar="PATH",
        help="Docker's or Podman's socket, or `none` (default: %(default)s)",
    )
    add(
        "--runtimes",
        default="docker,process",
        metavar="LIST",
        help="what may run tasks here, first is the default (default: %(default)s)",
    )
    add("--hostname", default=socket.gethostname(), help="the node's name (default: %(default)s)")
    add(
        "--relay-port",
        type=int,
        default=RELAY_PORT,
        metavar="PORT",
        help="where other nodes reach tasks here (default: %(default)s)",
    )
    add(
        "--peer-port",
        type=int,
        default=PEER_PORT,
        metavar="PORT",
        help="where other managers' etcd reaches this one's (default: %(default)s)",
    )
    add(
        "--label",
        action="append",
        default=[],
        metavar="K=V",
        help="engine label for constraints; repeatable",
    )
    add(
        "--gpu-inventory",
        type=Path,
        metavar="FILE",
        help="declares GPUs beside those that NVIDIA's driver tells of (YAML or JSON)",
    )
    add("--metrics-addr", default="", metavar="HOST:PORT", help="serve Prometheus metrics here")
    add(
        "--audit-log",
        action="append",
        default=[],
        metavar="PATH|syslog:",
        help="write the audit trail here too, beside the state folder's audit/; repeatable",
    )
    add("--log-level", choices=logs.LEVELS, default="info", help="default: %(default)s")
    add("--log-format", choices=logs.FORMATS, default="auto", help="default: %(default)s")
    given = parser.parse_args(argv)
    labels = {}
    for label in given.label:
        key, equals, value = label.partition("=")
        if not key or not equals:
            parser.error(f"--label {label!r} is not of the form key=value")
        labels[key] = value
    runtimes = tuple(r.strip() for r in given.runtimes.split(",") if r.strip())
    if not runtimes or set(runtimes) - {"docker", "process"}:
        parser.error(f"--runtimes {given.runtimes!r}: name docker, process or both")
    for option, port in (("--relay-port", given.relay_port), ("--peer-port", given.peer_port)):
        if not 0 < port < 65536:
            parser.error(f"{option} {port}: a port is from 1 to 65535")
    state = given.state_dir.absolute()
    at = (given.socket or (socket_path if state == state_dir else state / "swarmd.sock")).absolute()
    if len(os.fsencode(at)) > SOCKET_PATH_MAX:
        parser.error(
            f"--socket {at}: longer than the {SOCKET_PATH_MAX} bytes a socket's path may have"
        )
    settings = Settings(
        state_dir=state,
        hostname=given.hostname,
        docker_socket="" if given.docker_socket == "none" else given.docker_socket,
        runtimes=runtimes,
        relay_port=given.relay_port,
        engine_labels=labels,
        peer_port=given.peer_port,
        gpu_inventory=given.gpu_inventory and given.gpu_inventory.absolute(),
    )
    try:
        copies = tuple(copy_to(text) for text in given.audit_log)
        if settings.gpu_inventory is not None:
            inventory.read(settings.gpu_inventory)  # told now, not to who joins a cluster later
    except (errors.Invalid, errors.Unavailable) as error:
        parser.error(error.message)
    return Options(state, at, settings, given.metrics_addr, copies), given
