"""Wrong input: each an error that names what is wrong and what is accepted; nothing is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import ENTRIES, root
from tests.integration.cli.conftest import Cli
from tests.integration.cli.fake import FakeCluster

CREATE = ("service", "create")
CASES: list[tuple[tuple[str, ...], str]] = [
    (("servce",), "Did you mean 'service'?"),
    (("service", "creat"), "Did you mean 'create'?"),
    (("node", "lst"), "there is no command 'lst'"),
    (("service", "ls", "--formt", "x"), "--format"),
    ((*CREATE, "--replics", "2", "x"), "--replicas"),
    ((*CREATE,), "Missing argument 'IMAGE'"),
    ((*CREATE, "--replicas", "-1", "x"), "-1"),
    ((*CREATE, "--replicas", "many", "x"), "'many' is not a valid integer"),
    ((*CREATE, "--mode", "swarmy", "x"), "'swarmy' is not one of"),
    ((*CREATE, "--mode", "global", "--replicas", "2", "x"), "--replicas can only be used with"),
    ((*CREATE, "--max-concurrent", "2", "x"), "--max-concurrent can only be used with"),
    ((*CREATE, "-p", "99999:80", "x"), "'99999' is not a port from 1 to 65535"),
    ((*CREATE, "-p", "80:0", "x"), "'0' is not a port"),
    ((*CREATE, "-p", "8080-8082:80-81", "x"), "3 published ports for 2 target ports"),
    ((*CREATE, "-p", "90-80", "x"), "ends before it begins"),
    ((*CREATE, "-p", "80:80/icmp", "x"), "'icmp' is not one of tcp, udp, sctp"),
    ((*CREATE, "-p", "127.0.0.1:80:80", "x"), "host-ip=10.0.0.1"),
    ((*CREATE, "-p", "target=80,mode=hosts", "x"), "neither ingress nor host"),
    ((*CREATE, "-p", "published=80", "x"), "target is missing"),
    ((*CREATE, "-p", "target=80,publshed=80", "x"), "did you mean 'published'?"),
    ((*CREATE, "-p", "80:80", "-p", "80:80", "x"), "is given twice"),
    ((*CREATE, "--mount", "type=bind,target=/a", "x"), "source is missing"),
    ((*CREATE, "--mount", "type=bind,source=a,target=/a", "x"), "not an absolute path"),
    ((*CREATE, "--mount", "source=a", "x"), "target is missing"),
    ((*CREATE, "--mount", "type=nfs,target=/a", "x"), "'nfs' is not one of bind, volume, tmpfs"),
    ((*CREATE, "--mount", "sorce=a,target=/a", "x"), "did you mean 'source'?"),
    ((*CREATE, "--mount", "target=/a,tmpfs-size=1m", "x"), "tmpfs-size is for type=tmpfs"),
    ((*CREATE, "--mount", "type=tmpfs,target=/a,tmpfs-mode=999", "x"), "not an octal number"),
    ((*CREATE, "--mount", "target=/a,readonly=maybe", "x"), "neither true nor false"),
    ((*CREATE, "--limit-cpu", "abc", "x"), "'abc' is not a number of CPUs"),
    ((*CREATE, "--limit-memory", "5Q", "x"), "'5Q' is not a size"),
    ((*CREATE, "--restart-delay", "10", "x"), "'10' is not a duration"),
    ((*CREATE, "--restart-condition", "sometimes", "x"), "'sometimes' is not one of"),
    ((*CREATE, "--update-order", "first", "x"), "'first' is not one of"),
    ((*CREATE, "--update-max-failure-ratio", "2", "x"), "not in the range"),
    ((*CREATE, "--constraint", "node.role=manager", "x"), "did you mean node.role == manager?"),
    ((*CREATE, "--constraint", "node.hostname =~ (a", "x"), "a ( is not closed"),
    ((*CREATE, "--constraint", "node.gpu.memory > big", "x"), "'big' is not a size"),
    ((*CREATE, "--placement-pref", "node.labels.zone", "x"), "spread=ATTRIBUTE"),
    ((*CREATE, "--placement-pref", "spread=zone", "x"), "unknown key 'zone'"),
    ((*CREATE, "--placement-pref", "spread=node.id,weight=1", "x"), "only an affinity has a"),
    ((*CREATE, "--placement-pref", "affinity=node.rol == a", "x"), "did you mean node.role?"),
    ((*CREATE, "--placement-pref", "affinity=node.id == a,weight=0", "x"), "-100 to 100, and not"),
    ((*CREATE, "--placement-pref", "affinity=node.id == a,weight=x", "x"), "-100 to 100, and not"),
    ((*CREATE, "--placement-strategy", "pack", "x"), "'pack' is not one of 'spread', 'binpack'"),
    ((*CREATE, "--generic-resource", "gpu=0", "x"), "0 of gpu can never be given"),
    ((*CREATE, "--generic-resource", "gpu", "x"), "KIND=NUMBER"),
    ((*CREATE, "--ulimit", "nofile=2:1", "x"), "above the hard limit"),
    ((*CREATE, "--ulimit", "nofile", "x"), "NAME=SOFT[:HARD]"),
    ((*CREATE, "--host", "db", "x"), "NAME:IP"),
    ((*CREATE, "--host", "db:10.0.0", "x"), "not an IP address"),
    ((*CREATE, "--secret", "source=,target=x", "x"), "source is missing"),
    ((*CREATE, "--secret", "source=a,mode=9", "x"), "not an octal number"),
    ((*CREATE, "--env-file", "/nope", "x"), "there is no such file"),
    ((*CREATE, "--env", "=1", "x"), "the name is empty"),
    ((*CREATE, "--label", "=1", "x"), "the key is empty"),
    ((*CREATE, "--no-healthcheck", "--health-cmd", "true", "x"), "exclude each other"),
    ((*CREATE, "--cap-add", "ALL", "--cap-drop", "all", "x"), "in --cap-add and in --cap-drop"),
    ((*CREATE, "--entrypoint", "'a", "x"), "no closing quotation"),
    ((*CREATE, "--timeout", "soon", "x"), "'soon' is not a duration"),
    (("service", "update", "web"), "nothing to change"),
    (("service", "update", "--rollback", "--force", "web"), "exclude each other"),
    (("service", "scale", "web"), "SERVICE=REPLICAS"),
    (("service", "scale", "web=x"), "SERVICE=REPLICAS"),
    (("service", "ls", "--filter", "name"), "KEY=VALUE"),
    (("service", "ls", "--filter", "nam=x"), "did you mean 'name'?"),
    (("service", "logs", "--tail", "few", "web"), "a number of lines, or all"),
    (("service", "logs", "--since", "yesterday", "web"), "is not a time"),
    (("events", "--filter", "type=pod"), "the types are"),
    (("events", "--format", "table"), "events come one by one"),
    (("node", "update", "web"), "nothing to change"),
    (("node", "update", "--availability", "sleepy", "n"), "'sleepy' is not one of"),
    (("node", "update", "--role", "foo", "n"), "'foo' is not one of"),
    (("secret", "create", "x"), "give a file with the secret's data"),
    (("config", "create", "x"), "give a file with the config's data"),
    (("network", "create", "--subnet", "10.0.0.1/24", "x"), "has host bits set"),
    (("network", "create", "--gateway", "10.0.0.1", "x"), "lies in no --subnet"),
    (("network", "create", "--subnet", "10.0.0.0/8", "--subnet", "10.1.0.0/16", "x"), "overlap"),
    (("stack", "deploy", "app"), "Missing option '-c'"),
    (("stack", "deploy", "-c", "/nope.yml", "app"), "/nope.yml"),
    (("stack", "deploy", "--dry-run", "-c", "/nope.yml", "app"), "/nope.yml"),
    (("stack", "diff", "app"), "Missing option '-c'"),
    (("stack", "diff", "-c", "/nope.yml", "app"), "/nope.yml"),
    (("stack", "rollback"), "Missing argument 'STACK'"),
    (("stack", "rollback", "app", "last"), "'last' is not a revision"),
    (("stack", "rollback", "--exit-code", "app"), "--exit-code is for a plan"),
    (("stack", "history", "--revision", "x", "app"), "'x' is not a revision"),
    (("stack", "wait", "--timeout", "soon", "app"), "'soon' is not a duration"),
    (("stack", "dif"), "Did you mean 'diff'?"),
    (("service", "wait"), "Missing argument 'SERVICE...'"),
    (("secret", "rotate", "x"), "Missing argument 'FILE|-'"),
    (("secret", "rotate", "x", "/nope"), "there is no such file"),
    (("secret", "ls", "--all", "--filter", "superseded=true"), "exclude each other"),
    (("swarm", "join", "10.0.0.1"), "Missing option '--token'"),
    (("swarm", "join-token", "boss"), "'boss' is not one of"),
    (("swarm", "init", "--cert-expiry", "1s"), "shortest lifetime"),
    (("swarm", "ca", "--cert-expiry", "2h"), "need --rotate"),
    (("exec", "-it", "web", "sh"), "not a terminal"),
    (("exec", "web"), "Missing argument"),
    (("context", "use", "../x"), "is not a context's name"),
    (("context", "create", "x", "--host", "http://x"), "is not an address"),
    (("completion", "powershell"), "'powershell' is not one of"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(c[0])[:60] for c in CASES])
def test_wrong_input_says_what_is_wrong(
    cli: Cli, cluster: FakeCluster, arguments: tuple[str, ...], message: str
) -> None:
    answer = cli(*arguments)
    assert answer.code in (2, 4), answer
    assert message in answer.err, answer
    assert answer.err.splitlines()[-1].strip()
    assert "Traceback" not in answer.err
    assert "Error: " in answer.err
    assert answer.out == ""
    changes = [type(call).__name__ for call in cluster.calls]
    assert not set(changes) & {
        "CreateRequest",
        "UpdateRequest",
        "DeployStackRequest",
        "InitRequest",
    }


def test_host_and_context_exclude_each_other(cli: Cli) -> None:
    answer = cli("--context", "x", "service", "ls")
    assert answer.code == 2 and "exclude each other" in answer.err


@pytest.mark.parametrize(
    ("host", "message", "code"),
    [
        ("unix:///nowhere/s", "there is no such socket. Start the daemon with `swarmd`", 9),
        ("unix:///etc/hostname", "is not a socket", 2),
        ("http://x", "write unix:///path or tcp://host:port", 2),
        ("tcp://10.0.0.1:99999", "no valid port", 2),
        ("tcp://10.0.0.1:2377", "needs a client certificate", 2),
    ],
)
def test_a_wrong_host_says_what_to_do(cli: Cli, host: str, message: str, code: int) -> None:
    from cli.main import run

    cli._capfd.readouterr()
    assert run(["--host", host, "service", "ls"]) == code
    err = cli._capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_dead_socket_is_told_from_a_missing_one(cli: Cli, tmp_path: Path) -> None:
    import socket

    from cli.main import run

    path = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    assert run(["--host", f"unix://{path}", "service", "ls"]) == 9
    assert "connection refused" in cli._capfd.readouterr().err


def test_a_defect_is_no_traceback_unless_it_is_asked_for(
    cli: Cli, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.info = None  # type: ignore[assignment]
    answer = cli("node", "ls")
    assert answer.code == 1
    assert "Traceback" not in answer.err and answer.err.startswith("Error: ")
    monkeypatch.setenv("SWARM_DEBUG", "1")
    assert "Traceback" in cli("node", "ls").err


def _commands() -> list[tuple[str, ...]]:
    import click

    found: list[tuple[str, ...]] = [()]

    def walk(command: click.Command, path: tuple[str, ...]) -> None:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None, name
                found.append((*path, name))
                walk(inner, (*path, name))

    walk(root, ())
    return found


@pytest.mark.parametrize("path", _commands(), ids=" ".join)
def test_every_command_has_help_that_reads_well(cli: Cli, path: tuple[str, ...]) -> None:
    out = cli.ok(*path, "--help")
    assert out.startswith("Usage: swarmctl")
    assert cli.ok(*path, "-h") == out
    text = out.split("\n")[2].strip()
    assert text[:1].isupper() and text.rstrip(".: "), "the first line says what it does"
    assert "Args:" not in out


def test_every_short_help_is_that_of_its_command() -> None:
    assert all(entry.help and entry.help[0].isupper() for entry in ENTRIES)


@pytest.mark.parametrize(
    "words",
    [("stack", "up"), ("stack", "down"), ("stack", "remove"), ("node", "list"), ("secret", "list")],
    ids=" ".join,
)
def test_other_names_that_docker_has_for_commands_are_understood(
    cli: Cli, words: tuple[str, str]
) -> None:
    assert cli.ok(*words, "--help").startswith(f"Usage: swarmctl {words[0]} ")
