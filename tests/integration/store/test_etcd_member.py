"""Members of a real etcd over mutual TLS: founding, growing, shrinking, crashes, and who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from manager.store import Draft
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_member import Member, Removed, version
from swarm import errors, tls
from swarm.v1 import Task
from tests.etcd import Ca
from tests.integration.store.etcd_lab import Lab, eventually, open_lab, task_ids, until

pytestmark = pytest.mark.slow


def put(task: Task, draft: Draft) -> None:
    draft.put(task)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path.name) as made:
        yield made


async def test_a_cluster_grows_to_three_and_serves_from_each(lab: Lab) -> None:
    await lab.founded()
    first = await lab.store("n1")
    await first.update(lambda d: d.put(Task(id="before")))
    for name in ("n2", "n3"):
        await lab.grown(name)
    async with lab.of("n2") as members:
        assert [(p.name, p.learner) for p in await members.list()] == [
            ("n1", False),
            ("n2", False),
            ("n3", False),
        ]
    third = await lab.store("n3")
    assert task_ids(third) == {"before"}
    await third.update(lambda d: d.put(Task(id="after")))
    assert isinstance(first.engine, EtcdEngine)
    await first.engine.barrier()
    assert task_ids(first) == {"before", "after"}


async def test_a_killed_member_comes_back_and_two_of_three_go_on_without_it(lab: Lab) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    second = await lab.store("n2")
    pid = lab.members["n1"].pid
    lab.signal("n1", signal.SIGKILL)
    await eventually(lambda: second.update(lambda d: d.put(Task(id="t"))))
    first = await lab.store("n1")
    assert task_ids(first) == {"t"}
    assert lab.members["n1"].pid not in (pid, None)
    assert lab.members["n1"].problem == ""


async def test_a_member_that_is_removed_is_not_needed_for_the_quorum(lab: Lab) -> None:
    await lab.founded()
    await lab.grown("n2")
    await lab.remove("n2")
    await lab.stop("n2")
    async with lab.of("n1") as members:
        assert [p.name for p in await members.list()] == ["n1"]
        await members.remove("https://127.0.0.1:1")  # nobody is there
    store = await lab.store("n1")
    await eventually(lambda: store.update(lambda d: d.put(Task(id="t"))))


async def test_a_member_started_again_has_its_state(lab: Lab) -> None:
    member = await lab.founded()
    store = await lab.store("n1")
    await store.update(lambda d: d.put(Task(id="t")))
    await store.close()
    await lab.stop("n1")
    assert member.initialized
    again = Member(
        member._folder,
        node_id="n1",
        listen_host="127.0.0.1",
        peer_host="127.0.0.1",
        peer_port=tls.split_address(member._peer)[1],
    )
    lab.members["n1"] = again
    await lab.start("n1")
    assert task_ids(await lab.store("n1")) == {"t"}


@pytest.mark.parametrize("who", ["worker", "stranger", "nobody"])
async def test_only_managers_are_let_in_at_the_peers_port(
    lab: Lab, who: str, tmp_path: Path
) -> None:
    member = await lab.founded()
    ca = lab.ca if who == "worker" else Ca()
    unit = tls.OU_WORKER if who == "worker" else tls.OU_MANAGER
    key_pem, certificate_pem = ca.issue("n9", unit)
    context = ssl.create_default_context(cadata=lab.ca.root_pem)
    if who != "nobody":
        (tmp_path / "k").write_text(key_pem)
        (tmp_path / "c").write_text(certificate_pem)
        context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    host, port = tls.split_address(member._peer)

    def ask() -> bytes:
        with (
            socket.create_connection((host, port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            secure.sendall(b"GET /members HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return secure.recv(1000)

    try:
        assert await asyncio.to_thread(ask) == b""
    except (ssl.SSLError, ConnectionError):
        return


async def test_without_etcd_the_error_says_how_to_install_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manager.store.engines.etcd_binary.binary", lambda: None)
    with pytest.raises(errors.Unsupported, match="apt-get install etcd-server"):
        await lab.founded()


async def test_a_member_that_cannot_listen_says_why(lab: Lab) -> None:
    member = lab.make("n1")
    host, port = tls.split_address(member._peer)
    with (
        socket.create_server((host, port)),
        pytest.raises(errors.Unavailable, match="address already in use"),
    ):
        await lab.start("n1")


# ------------------------------------------------------------------ removed


async def test_a_member_that_is_removed_ends_and_says_so(lab: Lab) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    await lab.remove("n3")
    assert "removed" in await lab.removed("n3")
    assert lab.members["n3"].pid is None


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_member_that_was_away_while_it_was_removed_finds_out_later(
    lab: Lab, how: str
) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    if how == "stopped":
        await lab.stop("n3")
        await lab.remove("n3")
        with contextlib.suppress(Removed):  # that soon
            await lab.start("n3")
            await lab.removed("n3")
    else:
        lab.signal("n3", signal.SIGSTOP)
        await lab.remove("n3")
        lab.signal("n3", signal.SIGCONT)
        await lab.removed("n3")
    assert lab.members["n3"].pid is None


async def test_a_learner_that_is_removed_ends_and_says_so(lab: Lab) -> None:
    await lab.founded()
    await lab.learner("n2")
    await lab.remove("n2")
    await lab.removed("n2")


async def test_a_member_that_comes_when_it_is_not_expected_any_more_says_why(lab: Lab) -> None:
    await lab.founded()
    member = lab.make("n2")
    async with lab.of("n1") as members:
        known = await members.add(member.peer_url)
    await lab.remove("n2")
    with pytest.raises(errors.Unavailable, match="member count is unequal") as caught:
        await lab.start("n2", {p.name or "n2": p.url for p in known})
    assert "{" not in caught.value.message
    assert not member.initialized


# ------------------------------------------------------------------ restarts


async def test_a_restart_that_is_asked_for_is_no_failure(lab: Lab) -> None:
    member = await lab.founded()
    pid = member.pid
    await member.restart()
    await until(lambda: member.pid not in (pid, None) and not member.problem)
    store = await lab.store("n1")
    await eventually(lambda: store.update(lambda d: d.put(Task(id="t"))))


async def test_all_are_healthy_only_while_every_other_member_is_connected(lab: Lab) -> None:
    await lab.founded()
    async with lab.of("n1") as members:
        await eventually(members.list)
        assert await members.all_healthy()
        for name in ("n2", "n3"):
            await lab.grown(name)
        await lab.wait_healthy("n1")
        await lab.stop("n3")
        await lab.wait_healthy("n1", healthy=False)
        await lab.start("n3")
        for name in lab.members:
            await lab.wait_healthy(name)
    # Where there is no quorum none is.
    await lab.stop("n3")
    await lab.stop("n2")
    await lab.wait_healthy("n1", healthy=False)


async def test_members_restarted_in_turn_serve_all_the_while(lab: Lab) -> None:
    await lab.founded()
    for name in ("n2", "n3"):
        await lab.grown(name)
    stores = {name: await lab.store(name) for name in lab.members}
    for name, member in lab.members.items():
        other = next(n for n in lab.members if n != name)
        await lab.wait_healthy(name)
        await member.restart()
        write = partial(stores[other].update, partial(put, Task(id=f"after-{name}")))
        await eventually(write, within_s=5)
    await lab.wait_healthy("n1")
    assert isinstance(stores["n1"].engine, EtcdEngine)
    await eventually(stores["n1"].engine.barrier)
    assert task_ids(stores["n1"]) == {f"after-{n}" for n in lab.members}


# ------------------------------------------------------------------ certificates


def shown(member: Member, ca: Ca) -> bytes:
    """The certificate that the member shows to a peer that connects now."""
    context = ssl.create_default_context(cadata=ca.root_pem)
    host, port = tls.split_address(member._peer)
    with (
        socket.create_connection((host, port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return der


async def test_a_renewed_certificate_is_shown_without_a_restart(lab: Lab) -> None:
    member = await lab.founded()
    await lab.grown("n2")
    pid = member.pid
    before = await asyncio.to_thread(shown, member, lab.ca)
    for _ in range(3):
        key_pem, certificate_pem = lab.ca.issue("n1", tls.OU_MANAGER)
        assert not member.use_certificate(
            key_pem=key_pem, certificate_pem=certificate_pem, root_ca_pem=lab.ca.root_pem
        )
        after = await asyncio.to_thread(shown, member, lab.ca)
        # The root follows it.
        own, end, _ = certificate_pem.partition("-----END CERTIFICATE-----")
        assert after == ssl.PEM_cert_to_DER_cert(own + end) != before
    assert member.pid == pid
    # It also proves itself to others with it: connections to n2 are made anew.
    lab.signal("n2", signal.SIGKILL)
    await lab.wait_healthy("n1")


async def test_new_roots_hold_after_a_restart(lab: Lab) -> None:
    member = await lab.founded()
    other = Ca()
    key_pem, certificate_pem = lab.ca.issue("n1", tls.OU_MANAGER)
    both = lab.ca.root_pem + other.root_pem
    for _ in range(2):  # until it has been restarted
        assert member.use_certificate(
            key_pem=key_pem, certificate_pem=certificate_pem, root_ca_pem=both
        )
    pid = member.pid
    await member.restart()
    await until(lambda: member.pid not in (pid, None) and not member.problem)
    assert not member.use_certificate(
        key_pem=key_pem, certificate_pem=certificate_pem, root_ca_pem=both
    )
    # One whose certificate the other root has signed gets in.
    joiner = lab.make("n2")
    async with lab.of("n1") as members:
        known = await members.add(joiner.peer_url)
        key_pem, certificate_pem = other.issue("n2", tls.OU_MANAGER)
        lab.issued["n2"] = (key_pem, certificate_pem, both)
        await lab.start("n2", {p.name or "n2": p.url for p in known})
        await members.promote(joiner.peer_url)


async def test_the_nodes_key_is_never_on_the_disk(lab: Lab) -> None:
    member = lab.make("n1")
    folder = lab.folder / "n1"
    folder.mkdir(parents=True)
    for name in ("node.key", "node.crt", "root.crt"):
        (folder / name).write_text("of an earlier version")
    await lab.start("n1")
    key_pem, _, _ = lab.issued["n1"]
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert key_pem.splitlines()[1].encode() not in data
            assert b"PRIVATE KEY" not in data and b"of an earlier version" not in data
    assert member.pid is not None
    command = Path(f"/proc/{member.pid}/cmdline").read_bytes()
    assert b"PRIVATE" not in command and b"/proc/self/fd/" in command
    before = len(os.listdir("/proc/self/fd"))
    await lab.stop("n1")
    assert len(os.listdir("/proc/self/fd")) < before


# ------------------------------------------------------------------ addresses and versions


async def test_a_name_to_be_reached_at_and_any_address_to_listen_on(lab: Lab) -> None:
    await lab.founded()
    member = lab.make("n2", listen_host="0.0.0.0", peer_host="localhost")
    lab.issue("n2", host="localhost")
    async with lab.of("n1") as members:
        known = await members.add(member.peer_url)
        await lab.start("n2", {p.name or "n2": p.url for p in known})
        await members.promote(member.peer_url)
        urls = [p.url for p in await members.list()]
    assert any(url.startswith("https://localhost:") for url in urls)


async def test_a_name_cannot_be_listened_on(lab: Lab) -> None:
    lab.make("n1", listen_host="manager.example")
    with pytest.raises(errors.Invalid, match="listens on an address"):
        await lab.start("n1")


async def test_the_version_of_the_binary_is_known() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", await version())
    assert await version("/nonexistent/etcd") == ""


@pytest.mark.parametrize(("says", "found"), [("etcd Version: 3.3.25", "3.3.25"), ("eh", "")])
async def test_an_etcd_that_is_too_old_is_refused_with_the_reason(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, found: str
) -> None:
    old = tmp_path / "etcd"
    old.write_text(f"#!/bin/sh\necho '{says}'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert await version() == found
    lab.make("n1")
    with pytest.raises(errors.Unsupported, match=r"3\.4 or later"):
        await lab.start("n1")


async def test_a_folder_whose_path_is_too_long_for_a_socket_will_do(
    lab: Lab, tmp_path: Path
) -> None:
    member = lab.make("n1", folder=tmp_path / ("long" * 30))
    await lab.start("n1")
    assert "/proc/self/fd/" in member.endpoint
    store = await lab.store("n1")
    await store.update(lambda d: d.put(Task(id="t")))
    lab.signal("n1", signal.SIGKILL)
    await eventually(lambda: store.update(lambda d: d.put(Task(id="u"))))
    assert task_ids(store) == {"t", "u"}
