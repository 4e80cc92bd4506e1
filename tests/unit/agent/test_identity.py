"""The identity's file, and when certificates are renewed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec import structs

from agent import identity as ids
from swarm import errors, tls
from swarm.clock import SECOND_NS, ManualClock
from swarm.ids import seeded_rng
from swarm.v1 import IssueNodeCertificateRequest, IssueNodeCertificateResponse, NodeRole
from swarm.vault import Vault, new_unlock_key
from tests.fakes.waiting import until

DAY_S = 86400
LIFE_S = 90 * DAY_S
STEP_S = 2 * DAY_S
CHECK_S = 0.002


class Issuer:
    """A manager that issues certificates, or fails."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.root_pem, self.key_pem = tls.new_root(now_ns=clock.now_ns(), cluster_id="c")
        self.issued_at_s: list[float] = []
        self.asked = 0
        self.failing = False

    async def issue(self, request: IssueNodeCertificateRequest) -> IssueNodeCertificateResponse:
        self.asked += 1
        if self.failing:
            raise errors.Unavailable("no manager answers")
        self.issued_at_s.append(self.clock.monotonic_s())
        return IssueNodeCertificateResponse(
            node_id="n",
            certificate_pem=tls.sign(
                tls.load_csr(request.csr_pem),
                root_pem=self.root_pem,
                root_key_pem=self.key_pem,
                common_name="n",
                unit=tls.OU_WORKER,
                organization="c",
                now_ns=self.clock.now_ns(),
                lifetime_ns=LIFE_S * SECOND_NS,
            ),
            root_ca_pem=self.root_pem,
            role=NodeRole.WORKER,
        )


class Node:
    def __init__(self, seed: int = 1) -> None:
        self.clock = ManualClock()
        self.issuer = Issuer(self.clock)
        self.wake = asyncio.Event()
        self.seed = seed
        self.identity = ids.Identity(
            format=ids.FORMAT,
            node_id="n",
            cluster_id="c",
            role=NodeRole.WORKER,
            key_pem=tls.new_key_pem(),
            certificate_pem="",
            root_ca_pem=self.issuer.root_pem,
            listen_addr="127.0.0.1:1",
            advertise_addr="127.0.0.1:1",
            data_path_addr="127.0.0.1",
        )

    async def replace(self, identity: ids.Identity) -> None:
        self.identity = identity

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """With its certificate kept renewed."""
        self.identity = await ids.renew(self.identity, issue=self.issuer.issue)
        self.issuer.issued_at_s.clear()
        self.issuer.asked = 0
        running = asyncio.create_task(
            ids.keep_renewed(
                lambda: self.identity,
                self.replace,
                clock=self.clock,
                rng=seeded_rng(self.seed),
                wake=self.wake,
                issue=self.issuer.issue,
                check_s=CHECK_S,
            )
        )
        try:
            yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("seed", range(4))
async def test_certificate_is_renewed_between_half_and_four_fifths_of_its_life(seed: int) -> None:
    node = Node(seed)
    async with node.kept():
        for _ in range(2 * 45):
            node.clock.advance(seconds=STEP_S)
            await asyncio.sleep(4 * CHECK_S)
    renewed = node.issuer.issued_at_s
    assert 2 <= len(renewed) <= 4
    gaps = [b - a for a, b in zip([0.0, *renewed], renewed, strict=False)]
    # The clock moves in steps here; the certificate began an hour before it was issued.
    assert all(0.5 * LIFE_S - STEP_S <= gap <= 0.8 * LIFE_S + STEP_S for gap in gaps), gaps


async def test_machine_that_slept_past_the_time_renews_when_it_wakes() -> None:
    node = Node()
    async with node.kept():
        await asyncio.sleep(4 * CHECK_S)
        assert node.issuer.asked == 0
        node.clock.advance(seconds=0.95 * LIFE_S)  # no timer has run meanwhile
        await until(lambda: node.issuer.issued_at_s)
    assert not node.identity.outdated


async def test_clock_set_back_and_forth_renews_once() -> None:
    node = Node()
    async with node.kept():
        node.clock.advance(seconds=-30 * DAY_S)
        await asyncio.sleep(4 * CHECK_S)
        assert node.issuer.asked == 0
        node.clock.advance(seconds=30 * DAY_S + 0.9 * LIFE_S)
        await until(lambda: node.issuer.issued_at_s)
        await asyncio.sleep(4 * CHECK_S)
    assert node.issuer.asked == 1


async def test_what_was_asked_for_at_once_is_tried_until_it_succeeds() -> None:
    node = Node()
    async with node.kept():
        node.issuer.failing = True
        node.wake.set()
        await until(lambda: node.issuer.asked == 1)
        node.issuer.failing = False
        await until(lambda: node.issuer.issued_at_s)


async def test_identity_is_outdated_once_another_root_signs() -> None:
    node = Node()
    async with node.kept():
        assert not node.identity.outdated
        new_pem, _ = tls.new_root(now_ns=node.clock.now_ns(), cluster_id="c")
        known = structs.replace(node.identity, root_ca_pem=new_pem + node.issuer.root_pem)
        assert known.outdated
        assert known.issuer == tls.load_certificates(node.issuer.root_pem)[0]


# ---------------------------------------------------------------- the file


async def saved(tmp_path: Path, vault: Vault | None) -> ids.Identity:
    node = Node()
    identity = await ids.renew(node.identity, issue=node.issuer.issue)
    ids.save(tmp_path, identity, vault)
    return identity


async def test_identity_is_read_back_with_its_key_sealed_or_not(tmp_path: Path) -> None:
    identity = await saved(tmp_path, None)
    assert ids.load(tmp_path) == identity
    vault = Vault(tmp_path / "node.key")
    vault.make()
    identity = await saved(tmp_path, vault)
    assert ids.load(tmp_path) == identity
    assert "PRIVATE KEY" not in (tmp_path / ids.FILE).read_text()


async def test_locked_identity_tells_who_it_is_and_no_more(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "node.key")
    vault.make()
    identity = await saved(tmp_path, vault)
    vault.lock_with((new_unlock_key(),))
    locked = ids.load(tmp_path)
    assert locked is not None
    assert (locked.locked, locked.node_id, locked.key_pem) == (True, identity.node_id, "")


async def test_sealed_identity_without_its_key_is_named(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "node.key")
    vault.make()
    await saved(tmp_path, vault)
    vault.forget()
    with pytest.raises(
        errors.Invalid,
        match=r"identity\.json is damaged: its key is sealed, and .*node\.key is gone",
    ):
        ids.load(tmp_path)
    vault.make()
    with pytest.raises(errors.Invalid, match="sealed with another key"):
        ids.load(tmp_path)
