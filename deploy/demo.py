"""A cluster of three nodes on this machine with the example stack on it: `make demo`, `make demo-
stop`.

Each node is a swarmd process with a state folder of its own below .demo/, listening on 127.0.0.1,
.2 and .3. The example runs on Docker where an engine answers and the example's image can be had,
else on the process runtime, which needs neither.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from swarm.files import SOCKET_PATH_MAX

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HOME = ROOT / ".demo"
STACK = "app"
PORT = 4000
IMAGE = "busybox:latest"
NODES = {"n1": "127.0.0.1", "n2": "127.0.0.2", "n3": "127.0.0.3"}
START_TIMEOUT_S = 20.0
PULL_TIMEOUT_S = 30.0
ASK_TIMEOUT_S = 10.0


class DemoError(Exception):
    """What went wrong and what to do."""


def socket_path(name: str) -> Path:
    """Beside the node's state; elsewhere where the checkout's path is too long for a socket."""
    near = HOME / name / "swarmd.sock"
    if len(os.fsencode(near)) <= SOCKET_PATH_MAX:
        return near
    mark = hashlib.sha256(os.fsencode(HOME)).hexdigest()[:8]
    return Path("/tmp") / f"swarm-demo-{os.getuid()}-{mark}" / f"{name}.sock"


def swarmctl(
    name: str, *words: str, quiet: bool = False, shown: bool = False, check: bool = True
) -> str:
    """Runs swarmctl against a node; its answer, which is empty when it is shown as it comes.
    Progress goes to the terminal unless quiet.
    """
    done = subprocess.run(
        [BIN / "swarmctl", "--host", f"unix://{socket_path(name)}", *words],
        stdout=None if shown else subprocess.PIPE,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )
    if check and done.returncode != 0:
        raise DemoError(
            f"`swarmctl {' '.join(words)}` ended with {done.returncode}: "
            f"{(done.stderr or '').strip() or 'see above'}; "
            f"the nodes' logs are {HOME}/n?/swarmd.log"
        )
    return done.stdout or ""


# ------------------------------------------------------------------ nodes


def pid_of(name: str) -> int | None:
    """The pid of a node's swarmd, if it runs."""
    try:
        pid = int((HOME / name / "pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(HOME / name) in command else None


def start_node(name: str, runtimes: str) -> None:
    """Starts a node's swarmd unless it runs already."""
    folder = HOME / name
    folder.mkdir(parents=True, exist_ok=True)
    path = socket_path(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if pid_of(name) is None:
        with (folder / "swarmd.log").open("ab") as output:
            process = subprocess.Popen(
                [
                    BIN / "swarmd",
                    *("--state-dir", folder, "--socket", path),
                    *("--hostname", name, "--runtimes", runtimes, "--log-format", "text"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        (folder / "pid").write_text(str(process.pid))


def ended(name: str) -> bool:
    return pid_of(name) is None


def enter(name: str, *words: str) -> None:
    """Waits until a node's socket answers, and makes or joins the cluster unless it is in it."""
    path = socket_path(name)
    wait_until(lambda: answers(path), f"{name} does not start; see {HOME / name}/swarmd.log")
    if swarm_state(name) == "inactive":
        address = NODES[name]
        listen = ("--listen-addr", address, "--advertise-addr", address)
        swarmctl(name, "swarm", words[0], *listen, *words[1:], quiet=True)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def wait_until(
    condition: Callable[[], bool], otherwise: str, timeout_s: float = START_TIMEOUT_S
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(otherwise)
        time.sleep(0.02)


def swarm_state(name: str) -> str:
    return swarmctl(name, "info", "--format", "{{.Swarm.LocalNodeState}}", quiet=True).strip()


def free_port(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


# ------------------------------------------------------------------ runtime


async def docker_trouble() -> str:
    """Why the example cannot run on Docker; empty: it can."""
    import aiodocker

    path = Path("/var/run/docker.sock")
    if not path.exists():
        return "no Docker Engine answers at /var/run/docker.sock"
    try:
        async with aiodocker.Docker(url=f"unix://{path}") as engine:
            async with asyncio.timeout(5):
                await engine.version()
            try:
                await engine.images.inspect(IMAGE)
            except aiodocker.DockerError:
                print(f"pulling {IMAGE} …")
                async with asyncio.timeout(PULL_TIMEOUT_S):
                    await engine.images.pull(IMAGE)
    except (aiodocker.DockerError, OSError) as error:
        return f"Docker cannot provide {IMAGE}: {getattr(error, 'message', error)}"
    except TimeoutError:
        return f"Docker does not provide {IMAGE} within {PULL_TIMEOUT_S:g} s"
    return ""


# ------------------------------------------------------------------ up and down


def up() -> None:
    """Starts what does not run yet, deploys, and shows that it works."""
    trouble = asyncio.run(docker_trouble())
    if trouble:
        print(f"{trouble}; running the example on the process runtime instead")
    example = "deploy/examples/web-process.yml" if trouble else "deploy/examples/web.yml"
    first, *others = NODES
    if pid_of(first) is None and not free_port(NODES[first], 2377):
        raise DemoError(
            "port 2377 on 127.0.0.1 is taken, perhaps by another cluster's manager; stop that first"
        )
    began = time.monotonic()
    print(f"starting three nodes ({', '.join(f'{n} on {a}' for n, a in NODES.items())}) …")
    for name in NODES:
        start_node(name, "process" if trouble else "docker,process")
    enter(first, "init")
    token = swarmctl(first, "swarm", "join-token", "-q", "worker", quiet=True).strip()
    with ThreadPoolExecutor() as pool:
        manager = f"{NODES[first]}:2377"
        list(pool.map(lambda name: enter(name, "join", "--token", token, manager), others))
    stacks = swarmctl(first, "stack", "ls", "--format", "{{.Name}}", quiet=True).split()
    if STACK not in stacks and not all(free_port(a, PORT) for a in NODES.values()):
        raise DemoError(f"port {PORT} is taken; free it, or change it in {example}")
    print(f"$ swarmctl stack deploy -c {example} {STACK}")
    swarmctl(first, "stack", "deploy", "-c", str(ROOT / example), STACK, shown=True)
    print(f"converged {time.monotonic() - began:.1f} s after the first node was started\n")
    show_answers()
    for words in (("stack", "services", STACK), ("service", "ps", f"{STACK}_web")):
        print(f"\n$ swarmctl {' '.join(words)}")
        print(swarmctl(first, *words), end="")
    print_next()


def show_answers() -> None:
    """Asks every node's published port, and shows which replicas answered."""
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + ASK_TIMEOUT_S
    for address in NODES.values():
        for _ in range(5):
            seen[ask(address, deadline)] += 1
    print(f"asked port {PORT} of each node five times; answers by replica:")
    for who, times in sorted(seen.items()):
        print(f"  {times:2}  {who}")
    if len(seen) < 2:
        raise DemoError("all answers came from one replica")


def ask(address: str, deadline: float) -> str:
    while True:
        try:
            with urllib.request.urlopen(f"http://{address}:{PORT}/", timeout=5) as response:
                return str(response.read().decode(errors="replace").strip().splitlines()[0])
        except (OSError, urllib.error.URLError, IndexError) as error:
            if time.monotonic() > deadline:
                raise DemoError(f"http://{address}:{PORT}/ does not answer: {error}") from None
            time.sleep(0.05)


def print_next() -> None:
    where = os.path.relpath(socket_path("n1"))
    print(
        f"""
The cluster goes on running. Try:
  export PATH=$PWD/.venv/bin:$PATH SWARM_HOST=unix://$PWD/{where}
  swarmctl service scale {STACK}_web=8
  swarmctl service logs {STACK}_web
  swarmctl node update --availability drain n3 && swarmctl service ps {STACK}_web
  swarmctl stack rm {STACK}
  make demo-stop"""
    )


def down() -> None:
    """Ends the tasks, the nodes, and removes their state."""
    if not HOME.exists():
        print("no demo is running")
        return
    for name in reversed(NODES):
        pid = pid_of(name)
        if pid is None:
            continue
        swarmctl(name, "swarm", "leave", "--force", quiet=True, check=False)
        os.kill(pid, signal.SIGTERM)
        wait_until(partial(ended, name), f"{name} (pid {pid}) does not end")
    for name in NODES:
        with contextlib.suppress(FileNotFoundError):
            socket_path(name).unlink()
    subprocess.run(["rm", "-rf", "--one-file-system", HOME], check=True)
    print("the demo's cluster is gone")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    parser.add_argument("action", choices=("up", "down"))
    action = parser.parse_args().action
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # in step with what swarmctl says on stderr
    try:
        up() if action == "up" else down()
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
