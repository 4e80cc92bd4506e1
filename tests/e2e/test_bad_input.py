"""What people get wrong: each gives a clear answer with what to do, and changes nothing."""

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm.rpc import Channel
from swarm.v1 import Kind, ListRequest, encode
from swarm.v1.services import ControlClient
from tests.e2e.local import Node

GOOD = """\
services:
  web:
    runtime: process
    command: sleep 1000
    deploy: {replicas: 1}
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    folder = tmp_path_factory.mktemp("n")
    manager, worker = Node(folder, "m", "127.0.0.1"), Node(folder, "w", "127.0.0.2")
    with contextlib.ExitStack() as stack:
        for node in (manager, worker):
            stack.callback(node.close)
            node.start()
        manager.init()
        worker.join(manager)
        (folder / "good.yml").write_text(GOOD)
        manager.ok("stack", "deploy", "-c", folder / "good.yml", "app")
        manager.ok("secret", "create", "taken", "/etc/hostname")
        yield manager, worker


def everything(node: Node) -> list[bytes]:
    """All that the cluster holds and that a user could change."""
    kinds = (Kind.SERVICE, Kind.SECRET, Kind.CONFIG, Kind.NETWORK, Kind.VOLUME, Kind.STACK)

    async def read() -> list[bytes]:
        async with Channel.unix(str(node.socket)) as channel:
            lists = [await ControlClient(channel).list(ListRequest(kind=k)) for k in kinds]
        return [encode(o) for answer in lists for o in answer.objects]

    return asyncio.run(read())


def compose(*lines: str, service: str = "web") -> str:
    head = ["services:", f"  {service}:", "    runtime: process", "    command: sleep 1000"]
    return "\n".join([*head, *(f"    {line}" for line in lines)]) + "\n"


# name -> (compose text, words of the answer)
STACKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bad yaml": ("services:\n  web: [\n", ("bad.yml:3:1", "closing bracket")),
    "tab": ("services:\n\tweb: {}\n", ("bad.yml:2:1",)),
    "not a mapping": ("- a\n- b\n", ("bad.yml:1",)),
    "empty": ("", ("bad.yml", "services")),
    "key twice": (compose("tty: true", "tty: false"), ("bad.yml:6:5", "tty")),
    "unknown key": (compose("comand: x"), ("bad.yml:5:5", "comand", "command")),
    "unknown section": ("servces: {}\n" + GOOD, ("bad.yml:1:1", "servces", "services")),
    "wrong type": (
        compose("command: {a: b}", service="x").replace("    command: sleep 1000\n", ""),
        ("bad.yml:4:",),
    ),
    "bad port": (compose('ports: ["99999:80"]'), ("bad.yml:5:", "99999", "65535")),
    "port is a word": (compose('ports: ["http:80"]'), ("bad.yml:5:", "http")),
    "negative replicas": (compose("deploy: {replicas: -1}"), ("bad.yml:5:", "-1")),
    "replicas is a word": (compose("deploy: {replicas: many}"), ("bad.yml:5:", "many")),
    "bad duration": (compose("stop_grace_period: tens"), ("bad.yml:5:", "tens", "10s")),
    "bad size": (
        compose("deploy: {resources: {limits: {memory: 5Q}}}"),
        ("bad.yml:5:", "5Q", "512M"),
    ),
    "too little memory": (
        compose("deploy: {resources: {limits: {memory: 1M}}}"),
        ("bad.yml:5:", "4"),
    ),
    "bad cpus": (compose("deploy: {resources: {limits: {cpus: abc}}}"), ("bad.yml:5:", "abc")),
    "bad condition": (
        compose("deploy: {restart_policy: {condition: sometimes}}"),
        ("bad.yml:5:", "on-failure"),
    ),
    "bad mode": (compose("deploy: {mode: swarmy}"), ("bad.yml:5:", "swarmy", "replicated")),
    "global with replicas": (
        compose("deploy: {mode: global, replicas: 2}"),
        ("bad.yml:5:", "replicas"),
    ),
    "bad constraint": (
        compose('deploy: {placement: {constraints: ["node.role=manager"]}}'),
        ("bad.yml:5:", "=="),
    ),
    "bad order": (
        compose("deploy: {update_config: {order: first}}"),
        ("bad.yml:5:", "start-first"),
    ),
    "undefined network": (compose("networks: [nope]"), ("bad.yml:5:", "nope")),
    "undefined secret": (compose("secrets: [nope]"), ("bad.yml:5:", "nope")),
    "missing secret file": (
        compose("secrets: [s]") + "secrets: {s: {file: ./nope.txt}}\n",
        ("bad.yml:6:", "nope.txt"),
    ),
    "missing env file": (compose("env_file: ./nope.env"), ("bad.yml:5:", "nope.env")),
    "variable required": (
        compose("hostname: ${TAG:?tag must be set}"),
        ("bad.yml:5:", "tag must be set"),
    ),
    "external network missing": (
        compose("networks: [out]") + "networks: {out: {external: true}}\n",
        ("out", "external"),
    ),
    "external secret missing": (
        compose("secrets: [s]") + "secrets: {s: {external: true}}\n",
        ("secret 's'", "swarmctl secret create"),
    ),
    "no image": ("services: {web: {command: x}}\n", ("bad.yml:1:", "image")),
    "build only": ("services: {web: {build: .}}\n", ("bad.yml:1:", "build")),
    "version 4": ('version: "4"\n' + GOOD, ("bad.yml:1:", "4")),
    "alias bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
        "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\nx-e: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n" + GOOD,
        ("bad.yml",),
    ),
}


@pytest.mark.parametrize("case", STACKS)
def test_a_bad_compose_file_is_refused_with_its_place(
    nodes: tuple[Node, Node], tmp_path: Path, case: str
) -> None:
    manager, _ = nodes
    text, words = STACKS[case]
    file = tmp_path / "bad.yml"
    file.write_text(text)
    before = everything(manager)
    done = manager.run("stack", "deploy", "-c", file, "app")
    assert done.returncode in (2, 4, 5), done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert everything(manager) == before


# name -> (arguments, exit code, words of the answer)
COMMANDS: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "unknown command": (("servise", "ls"), 2, ("servise", "service")),
    "unknown flag": (("service", "ls", "--frmat", "x"), 2, ("--frmat", "--format")),
    "service not found": (("service", "ps", "nope"), 4, ("nope", "not found")),
    "task not found": (("task", "inspect", "nope"), 4, ("nope",)),
    "node not found": (("node", "inspect", "nope"), 4, ("nope",)),
    "negative scale": (("service", "scale", "app_web=-1"), 2, ("-1",)),
    "scale without number": (("service", "scale", "app_web"), 2, ("SERVICE=REPLICAS",)),
    "name taken": (
        ("service", "create", "--runtime", "process", "--name", "app_web", "sleep", "1"),
        5,
        ("app_web", "already"),
    ),
    "bad name": (
        ("service", "create", "--runtime", "process", "--name", "a b", "sleep", "1"),
        2,
        ("a b",),
    ),
    "bad constraint": (
        (
            "service",
            "create",
            "--runtime",
            "process",
            "--constraint",
            "node.role=manager",
            "sleep",
            "1",
        ),
        2,
        ("==",),
    ),
    "bad publish": (
        ("service", "create", "--runtime", "process", "--publish", "80:99999", "sleep", "1"),
        2,
        ("99999",),
    ),
    "bad mount": (
        ("service", "create", "--mount", "type=bnd,target=/x", "busybox"),
        2,
        ("bnd", "bind"),
    ),
    "secret name taken": (("secret", "create", "taken", "/etc/hostname"), 5, ("taken",)),
    "secret file missing": (("secret", "create", "s", "/nope/nothing"), 4, ("/nope/nothing",)),
    "compose file missing": (("stack", "deploy", "-c", "/nope/a.yml", "app"), 2, ("/nope/a.yml",)),
    "bad availability": (
        ("node", "update", "--availability", "sleepy", "m"),
        2,
        ("sleepy", "drain"),
    ),
    "remove a live node": (("node", "rm", "w"), 5, ("not down", "--force")),
    "remove the manager": (("node", "rm", "--force", "m"), 5, ("manager",)),
    "demote the last manager": (("node", "demote", "m"), 2, ("last manager",)),
    "init twice": (("swarm", "init"), 5, ("already part of a swarm",)),
    "join twice": (("swarm", "join", "--token", "x", "127.0.0.1"), 5, ("already part of a swarm",)),
    "leave as last manager": (("swarm", "leave"), 5, ("--force",)),
    "unknown filter": (("service", "ls", "--filter", "colour=red"), 2, ("colour", "name")),
    "bad template": (("service", "ls", "--format", "{{.Name"), 2, ("{{",)),
    "unknown field": (("service", "ls", "--format", "{{.Nope}}"), 2, ("Nope",)),
    "remote without a context": (("--host", "tcp://127.0.0.1:1", "service", "ls"), 2, ("context",)),
    "no daemon": (
        ("--host", "unix:///nope/s.sock", "service", "ls"),
        9,
        ("/nope/s.sock", "swarmd"),
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_refused_and_changes_nothing(
    nodes: tuple[Node, Node], case: str
) -> None:
    manager, _ = nodes
    words, code, said = COMMANDS[case]
    before = everything(manager)
    done = manager.run(*words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in said:
        assert word in done.stderr, done.stderr
    assert done.stdout in ("", "[]\n"), "inspect prints what it found, as Docker's does"
    assert everything(manager) == before


@pytest.mark.parametrize(
    ("kind", "size"), [("secret", 512_001), ("config", 1_024_001), ("secret", 0)]
)
def test_an_oversize_or_empty_object_is_refused(
    nodes: tuple[Node, Node], tmp_path: Path, kind: str, size: int
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * size)
    done = nodes[0].run(kind, "create", "big", file)
    assert done.returncode == 2, done.stderr
    assert "bytes" in done.stderr
    assert "big" not in nodes[0].ok(kind, "ls", "--format", "{{.Name}}")


def test_a_message_above_the_limit_is_refused_by_name(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * (40 << 20))
    done = nodes[0].run("config", "create", "huge", file)
    assert done.returncode in (2, 11), done.stderr
    assert "bytes" in done.stderr


def test_a_worker_cannot_be_asked_about_the_cluster(nodes: tuple[Node, Node]) -> None:
    done = nodes[1].run("service", "ls")
    assert done.returncode == 9
    assert "Worker nodes can't be used to view or modify cluster state" in done.stderr


def test_no_swarm_no_answer_but_what_to_do(tmp_path: Path) -> None:
    node = Node(tmp_path, "alone", "127.0.0.3")
    node.start()
    try:
        done = node.run("service", "ls")
        assert done.returncode == 9
        assert 'Use "swarmctl swarm init" or "swarmctl swarm join"' in done.stderr
        for token, address, word in (
            ("garbage", "127.0.0.1:2377", "SWMTKN-1-"),
            (
                "SWMTKN-1-" + "0" * 50 + "-" + "0" * 25,
                "127.0.0.1:1",
                "no manager answers at 127.0.0.1:1",
            ),
            ("SWMTKN-1-" + "0" * 50 + "-" + "0" * 25, "nowhere:99999", "host:port"),
        ):
            done = node.run("swarm", "join", "--token", token, address)
            assert done.returncode in (2, 8, 9), done.stderr
            assert word in done.stderr
        assert "inactive" in node.ok("info")
        done = node.run("swarm", "leave")
        assert "not part of a swarm" in done.stderr
    finally:
        node.close()


def test_the_token_of_another_cluster_is_refused(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    manager, _ = nodes
    other = Node(tmp_path, "other", "127.0.0.4")
    other.start()
    try:
        token = manager.ok("swarm", "join-token", "-q", "worker").strip()
        forged = token.rsplit("-", 1)[0] + "-" + "0" * 25
        for wrong in (forged, token.replace(token[9:12], "zzz", 1)):
            done = other.run("swarm", "join", "--token", wrong, f"{manager.address}:{manager.port}")
            assert done.returncode in (8, 9), done.stderr
            assert "join-token" in done.stderr
        assert "inactive" in other.ok("info")
    finally:
        other.close()


def test_a_taken_port_undoes_the_init(tmp_path: Path) -> None:
    node = Node(tmp_path, "late", "127.0.0.5")
    node.start()
    try:
        with socket.socket() as holder:
            holder.bind((node.address, node.port))
            holder.listen()
            where = f"{node.address}:{node.port}"
            done = node.run("swarm", "init", "--listen-addr", where, "--advertise-addr", where)
            assert done.returncode == 9, done.stderr
            assert "port is taken" in done.stderr
        assert "inactive" in node.ok("info")
        node.init()
    finally:
        node.close()


def test_a_second_daemon_on_one_folder_is_refused(tmp_path: Path) -> None:
    node = Node(tmp_path, "one", "127.0.0.6")
    node.start()
    try:
        done = subprocess.run(node.words, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 5
        assert "another swarmd" in done.stderr
        assert "--state-dir" in done.stderr
        assert "inactive" in node.ok("info"), "the first one's socket must still answer"
    finally:
        node.close()


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("identity.json", b"{", ("identity.json", "damaged", "swarm join")),
        ("manager/store.db", b"SQLite format 3\0cut", ("store.db", "restore")),
        ("manager/seal.key", b"short", ("seal.key", "damaged", "backup")),
    ],
)
def test_damaged_state_is_named_and_left_alone(
    tmp_path: Path, file: str, damage: bytes, words: tuple[str, ...]
) -> None:
    node = Node(tmp_path, "hurt", "127.0.0.7")
    with contextlib.closing(node):
        node.start()
        node.init()
        node.stop(signal.SIGKILL)
        path = node.folder / "state" / file
        good = path.read_bytes()
        wal = path.with_name("store.db-wal")
        kept = wal.read_bytes() if wal.exists() and file.endswith("store.db") else None
        path.write_bytes(damage)
        if file == "identity.json":
            done = subprocess.run(
                node.words, capture_output=True, text=True, timeout=30, check=False
            )
            said, node.process = done.stderr, None
            assert done.returncode == 2
        else:
            node.start()
            done = node.run("node", "ls")
            assert done.returncode in (2, 9), done.stderr
            said = done.stderr
            node.stop()
        for word in words:
            assert word in said, said
        assert path.read_bytes() == damage
        path.write_bytes(good)
        if kept is not None:
            wal.write_bytes(kept)
        node.start()
        listed = node.ok("node", "ls")
        assert "Ready" in listed or "Unknown" in listed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--runtimes", "podman"), "docker, process"),
        (("--label", "novalue"), "key=value"),
        (("--relay-port", "70000"), "65535"),
        (("--state-dir", "/proc/nope"), "/proc/nope"),
        (("--socket", "/tmp/" + "x" * 120), "107 bytes"),
        (("--log-level", "loud"), "loud"),
    ],
)
def test_swarmd_refuses_bad_arguments(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    node = Node(tmp_path, "args", "127.0.0.8")
    done = subprocess.run(
        [*node.words, *words], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode in (1, 2, 9), done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
