"""How a manager's state comes to be: with a new cluster, or as what is left of one that has lost
its other managers for good.
"""

from __future__ import annotations

from pathlib import Path

import structlog
from msgspec import structs

from manager import place as places
from manager.ca import NewCluster, Sealer, load_or_make_key, new_cluster
from manager.opening import Node as Site
from manager.place import Place
from manager.restore import REVISIONS_MIN, SEAL_FILE, STORE_FILE, only_manager
from manager.store import Draft, Store
from manager.store.engines import etcd_binary
from manager.store.engines.embedded import EmbeddedEngine
from manager.store.engines.etcd import EtcdEngine
from manager.store.engines.etcd_client import EtcdClient
from manager.store.engines.etcd_fill import raise_base
from swarm import errors
from swarm.clock import Clock
from swarm.ids import Rng
from swarm.v1 import InitRequest
from swarm.vault import Vault

log = structlog.get_logger("manager")

DATA_PATH_PORT = 4789  # Swarm's
SUBNET_SIZE = 24  # Swarm's


async def bootstrap(
    state_dir: Path,
    request: InitRequest,
    *,
    vault: Vault,
    hostname: str,
    advertise_addr: str,
    clock: Clock,
    rng: Rng,
) -> NewCluster:
    """Makes a new cluster and writes its first objects, all of them or none.

    Raises Invalid, and Unsupported for what this version does not have.
    """
    if request.force_new_cluster:
        raise errors.Conflict(
            "--force-new-cluster goes on with the state of a cluster that has lost its other "
            "managers, and this node is in no cluster; leave the flag out to make a new one"
        )
    if request.spec is not None and request.spec.external_cas:
        raise errors.Unsupported(
            "external CAs are not offered: certificates are signed by the cluster's own root alone"
        )
    to = _engine_wanted(request)
    new = new_cluster(
        now_ns=clock.now_ns(),
        rng=rng,
        spec=request.spec,
        hostname=hostname,
        advertise_addr=advertise_addr,
        data_path_port=request.data_path_port or DATA_PATH_PORT,
        availability=request.availability,
        engine=EmbeddedEngine.name,
        addr_pool=request.default_addr_pool,
        subnet_size=request.subnet_size or SUBNET_SIZE,
    )
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Where etcd was asked for by name there is no cluster without it.
    place = Place(format=places.FORMAT, to=to, fresh=request.store == places.ETCD)
    if request.etcd is not None:
        prefix = request.etcd.prefix or f"{places.PREFIX}/{new.cluster.id}"
        place = place.reached_by(structs.replace(request.etcd, prefix=prefix), vault)
        place = structs.replace(place, fresh=True)
    elif to:
        place = structs.replace(place, prefix=places.PREFIX)
    sealer = Sealer(load_or_make_key(state_dir / SEAL_FILE, vault))
    store = Store(EmbeddedEngine(state_dir / STORE_FILE, clock), clock, seal=sealer)
    await store.open()
    try:

        def fill(draft: Draft) -> None:
            draft.put(new.cluster)
            draft.put(new.keyring)
            draft.put(new.node)

        await store.update(fill)
    finally:
        await store.close()
    places.save(state_dir, place)
    return new


def _engine_wanted(request: InitRequest) -> str:
    """Where the new state is to go; empty: it stays in the embedded store. Raises Invalid,
    Unsupported (no etcd here).
    """
    if request.store not in ("", "auto", places.EMBEDDED, places.ETCD):
        raise errors.Invalid(
            f"store {request.store!r} is none: give auto, {places.EMBEDDED} or {places.ETCD}"
        )
    if request.etcd is not None:
        if not request.etcd.endpoints:
            raise errors.Invalid("give the endpoints of the etcd to use, as host:port")
        if request.store == places.EMBEDDED:
            raise errors.Invalid("etcd's endpoints are of no use with the embedded store")
        return places.ETCD
    if request.store == places.ETCD:
        check_etcd()
    found = request.store != places.EMBEDDED and etcd_binary.binary() is not None
    return places.ETCD if found else ""


def check_etcd() -> None:
    """Raises Unsupported where this machine has no etcd."""
    if etcd_binary.binary() is None:
        raise errors.Unsupported(
            f"several managers need etcd, and it is not here; {etcd_binary.INSTALL}"
        )


async def force_new_cluster(site: Site, vault: Vault, clock: Clock) -> list[str]:
    """Makes this manager the only one of its cluster, with the state that it has, while nothing of
    it runs; the names of those that are workers afterwards. What the others had agreed on without
    this one is lost; so that no version means two things, revisions go on far above.

    Raises Conflict, Unsupported, Corrupt, Unavailable.
    """
    place = places.load(site.folder)
    if place is None or place.engine == places.EMBEDDED:
        raise errors.Conflict(
            "--force-new-cluster goes on with the state of a cluster that has lost its other "
            "managers, and the embedded store has one manager: on its node the cluster is still "
            "there (`swarmctl info`), and where its state is lost or damaged, a backup brings it "
            "back: `swarmctl swarm restore FILE`"
        )
    if not place.own_member:
        raise errors.Unsupported(
            "this cluster's state is in an etcd that swarmd does not run: bring that back, and "
            "the managers go on by themselves"
        )
    member = site.member()
    if not place.voter or not member.initialized:
        raise errors.Conflict(
            "this manager had not been let in yet and knows nothing of the cluster; use "
            "--force-new-cluster on another one"
        )
    await member.start(
        key_pem=site.key_pem,
        certificate_pem=site.certificate_pem,
        root_ca_pem=site.root_ca_pem,
        peers={},
        force_new_cluster=True,
    )
    try:
        return await _alone(site, place, member.endpoint, vault, clock)
    finally:
        await member.stop()


async def _alone(site: Site, place: Place, endpoint: str, vault: Vault, clock: Clock) -> list[str]:
    client = EtcdClient([endpoint])
    try:
        await raise_base(client, prefix=place.prefix, by=REVISIONS_MIN)
    except BaseException:
        await client.close()
        raise
    engine = EtcdEngine(client, clock=clock, writer=site.node_id, prefix=place.prefix)
    sealer = Sealer(load_or_make_key(site.folder / SEAL_FILE, vault))
    store = Store(engine, clock, seal=sealer)
    gone: list[str] = []
    try:
        await store.open()

        def change(draft: Draft) -> None:
            gone[:] = only_manager(draft, site.node_id, site.advertise_addr, engine=places.ETCD)

        await store.update(change)
    finally:
        await store.close()
    log.warning("cluster_forced", node_id=site.node_id, managers_lost=gone)
    return gone
