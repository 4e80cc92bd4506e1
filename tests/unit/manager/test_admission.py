"""Being let in among the managers: what the asked one answers, and whom a newcomer asks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from manager import admission
from manager.admission import Admissions, Managers
from manager.ca import Sealer
from manager.store.engines.etcd_members import Peer
from swarm import errors
from swarm.rpc import Channel, Context, Identity
from swarm.v1 import (
    AdmitRequest,
    AdmitResponse,
    Caller,
    EnfranchiseRequest,
    EtcdAccess,
    EtcdPeer,
    ForwardFrame,
    RelayFrame,
)

KEY = bytes(range(32))
OWN = "https://m1:2380"
NEW = "https://m2:2380"
CONTEXT = Context(Identity(Caller.MANAGER, node_id="m2"), "ipv4:10.0.0.2:1")


class Members:
    def __init__(self, *peers: Peer) -> None:
        self.peers = list(peers)
        self.promoted: list[str] = []
        self.removed: list[str] = []

    async def list(self) -> tuple[Peer, ...]:
        return tuple(self.peers)

    async def add(self, url: str) -> tuple[Peer, ...]:
        if all(p.url != url for p in self.peers):
            self.peers.append(Peer(99, "", url, True))
        return tuple(self.peers)

    async def remove(self, url: str) -> None:
        self.removed.append(url)
        self.peers = [p for p in self.peers if p.url != url]

    async def promote(self, url: str) -> None:
        self.promoted.append(url)


class Nothing:
    async def forward(
        self, request: AsyncIterator[ForwardFrame], context: Context
    ) -> AsyncIterator[RelayFrame]:
        async for _ in request:
            yield RelayFrame(end=True)


async def at_once() -> None:
    """All is known already."""


def admissions(
    members: Members | None,
    access: EtcdAccess | None = None,
    begin_move: Callable[[], None] = lambda: None,
) -> Admissions:
    some: Any = members
    return Admissions(
        sealer=Sealer(KEY),
        prefix="/swarm",
        members=some,
        access=access,
        begin_move=begin_move,
        barrier=at_once,
        forwarding=Nothing(),
    )


def one() -> Members:
    return Members(Peer(1, "m1", OWN, False))


async def test_a_newcomer_is_added_and_told_what_it_takes() -> None:
    members = one()
    asked = admissions(members)
    for _ in range(2):  # asking again is harmless
        answer = await asked.admit(AdmitRequest(peer_url=NEW), CONTEXT)
        assert answer == AdmitResponse(
            seal_key=KEY,
            prefix="/swarm",
            peers=(EtcdPeer(name="m1", url=OWN), EtcdPeer(name="m2", url=NEW)),
        )
    assert len(members.peers) == 2
    await asked.enfranchise(EnfranchiseRequest(peer_url=NEW), CONTEXT)
    assert members.promoted == [NEW]


async def test_one_that_has_its_data_is_not_added_anew() -> None:
    members = Members(Peer(1, "m1", OWN, False), Peer(2, "m2", NEW, False))
    await admissions(members).admit(AdmitRequest(peer_url=NEW, has_data=True), CONTEXT)
    assert members.removed == []


async def test_a_voter_that_lost_its_data_comes_in_anew_without_its_vote() -> None:
    members = Members(Peer(1, "m1", OWN, False), Peer(2, "m2", NEW, False))
    await admissions(members).admit(AdmitRequest(peer_url=NEW), CONTEXT)
    assert members.removed == [NEW]
    assert members.peers[-1].learner


async def test_one_that_was_given_up_meanwhile_is_told_so() -> None:
    with pytest.raises(errors.Conflict, match="come in anew"):
        await admissions(one()).admit(AdmitRequest(peer_url=NEW, has_data=True), CONTEXT)


async def test_anothers_address_is_not_taken_over() -> None:
    members = one()
    with pytest.raises(errors.Conflict, match="node m1.*--peer-port"):
        await admissions(members).admit(AdmitRequest(peer_url=OWN), CONTEXT)
    assert members.peers == one().peers


@pytest.mark.parametrize("url", ["", "http://m2:2380", "m2:2380"])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(errors.Invalid, match="https URL"):
        await admissions(one()).admit(AdmitRequest(peer_url=url), CONTEXT)


async def test_an_embedded_cluster_begins_to_move() -> None:
    begun: list[bool] = []
    asked = admissions(None, begin_move=lambda: begun.append(True))
    with pytest.raises(errors.Unavailable, match="being moved to etcd"):
        await asked.admit(AdmitRequest(peer_url=NEW), CONTEXT)
    assert begun == [True]


async def test_where_the_etcd_is_anothers_its_access_is_told() -> None:
    access = EtcdAccess(endpoints=("e:2379",), prefix="/x", key_pem="k")
    answer = await admissions(None, access).admit(AdmitRequest(), CONTEXT)
    assert answer.etcd == access and answer.seal_key == KEY and answer.peers == ()
    await admissions(None, access).enfranchise(EnfranchiseRequest(), CONTEXT)


# ------------------------------------------------------------------ the newcomer's side


class Away:
    """Connections that say what a manager at this address says."""

    def __init__(self, says: dict[str, errors.SwarmError]) -> None:
        self.says = says
        self.asked: list[str] = []

    async def connect(self, address: str) -> Channel:
        self.asked.append(address)
        raise self.says[address]


async def test_all_others_are_asked_and_the_last_word_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "ADMIT_S", 0.0)
    away = Away({"b:1": errors.Unavailable("b is away"), "c:1": errors.Exhausted("c is busy")})
    managers = Managers(lambda: ("a:1", "b:1", "c:1"), "a:1", away.connect)
    with pytest.raises(errors.Unavailable, match="no manager lets this node in: c is busy"):
        await managers.admit(AdmitRequest(peer_url=NEW))
    assert away.asked[:2] == ["b:1", "c:1"]


async def test_a_refusal_ends_the_asking() -> None:
    away = Away({"b:1": errors.Unsupported("there is no etcd")})
    managers = Managers(lambda: ("b:1",), "a:1", away.connect)
    with pytest.raises(errors.Unsupported, match="there is no etcd"):
        await managers.admit(AdmitRequest(peer_url=NEW))
