"""The command `python -m deploy.testbed`: hosts up, down, cut off, healed, and their daemons."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

from deploy.testbed.bed import Bed
from deploy.testbed.host import DIRECTIONS, Host, dumps
from deploy.testbed.processes import TestbedError
from deploy.testbed.registry import Registry

DAEMONS = ("dockerd", "swarmd")


def main(argv: list[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        return int(given.do(given) or 0)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deploy.testbed", description=__doc__)
    parser.add_argument("--name", default="bed", help="which bed (default: %(default)s)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="make hosts with a Docker Engine each")
    up.add_argument("hosts", type=int, help="how many")
    up.add_argument("--subnet", default="", help="a /24; default: a free one of 10.77.0.0/16")
    up.add_argument("--bridge", default="", help="the bridge's name")
    up.add_argument("--no-docker", action="store_true", help="namespaces only")
    up.add_argument("--swarmd", action="store_true", help="start swarmd on each host too")
    up.add_argument("--registry", action="store_true", help="a registry on host 1, port 5000")
    up.set_defaults(do=_up)
    commands.add_parser("down", help="remove all of it").set_defaults(do=_down)
    commands.add_parser("status", help="what runs, as JSON").set_defaults(do=_status)

    cut = _on_host(commands.add_parser("cut", help="cut a host off"))
    cut.add_argument("--direction", choices=DIRECTIONS, default="both")
    cut.set_defaults(do=lambda g: _host(g).cut(g.direction))
    _on_host(commands.add_parser("heal", help="undo cut")).set_defaults(
        do=lambda g: _host(g).heal()
    )
    kill = _on_daemon(commands.add_parser("kill", help="kill -9 a daemon"))
    kill.add_argument("--signal", default="KILL", help="another signal: STOP, CONT, HUP …")
    kill.set_defaults(do=_kill)
    _on_daemon(commands.add_parser("stop", help="stop a daemon gently")).set_defaults(
        do=lambda g: _host(g).stop(g.daemon)
    )
    _on_daemon(commands.add_parser("start", help="start a daemon again")).set_defaults(do=_start)
    run = _on_host(commands.add_parser("exec", help="run a command on a host"))
    run.add_argument("command", nargs=argparse.REMAINDER)
    run.set_defaults(do=_exec)
    return parser


def _on_host(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("host", type=int, help="its number, from 1")
    return parser


def _on_daemon(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _on_host(parser).add_argument("daemon", choices=DAEMONS)
    return parser


def _host(given: argparse.Namespace) -> Host:
    return Bed.open(given.name, create=False).host(given.host)


def _up(given: argparse.Namespace) -> None:
    bed = Bed.open(given.name, subnet=given.subnet, bridge=given.bridge)
    if given.no_docker:
        hosts = tuple(bed.host(index) for index in range(1, given.hosts + 1))
    else:
        hosts = bed.docker_hosts(given.hosts)
    for host in hosts:
        if given.swarmd:
            host.start_swarmd()
    if given.registry:
        Registry(hosts[0]).start()
    for host in hosts:
        print(f"{host.name} {host.address} DOCKER_HOST=unix://{host.docker_socket}")


def _down(given: argparse.Namespace) -> None:
    Bed.open(given.name, create=False).down()


def _status(given: argparse.Namespace) -> None:
    bed = Bed.open(given.name, create=False)
    hosts = [host.describe() for host in bed.hosts()]
    whole = {"name": bed.name, "bridge": bed.bridge, "subnet": str(bed.subnet), "hosts": hosts}
    print(dumps(whole), end="")


def _kill(given: argparse.Namespace) -> None:
    try:
        number = signal.Signals[f"SIG{given.signal.upper().removeprefix('SIG')}"]
    except KeyError:
        raise TestbedError(f"there is no signal {given.signal!r}") from None
    _host(given).kill(given.daemon, number)


def _start(given: argparse.Namespace) -> None:
    host = _host(given)
    if given.daemon == "dockerd":
        host.start_docker()
    else:
        host.start_swarmd()


def _exec(given: argparse.Namespace) -> int:
    words = [word for word in given.command if word != "--"] or [os.environ.get("SHELL", "sh")]
    return subprocess.run(_host(given).command(*words), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
