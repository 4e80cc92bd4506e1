"""Changes of secrets, configs, networks, volumes, nodes and the cluster, as functions over a draft.

Each notes what is wrong with a spec, or puts the object. Secrets' data is sealed here and exists in
clear nowhere after.
"""

from __future__ import annotations

import ipaddress

from msgspec import structs

from manager.allocator import (
    driver_state,
    give_subnets,
    overlap,
    subnets_in_use,
)
from manager.api.lookup import name_of, quoted
from manager.api.names import check_labels
from manager.api.problems import Finder, Problems
from manager.api.references import users
from manager.api.roles import Here, check_removable, check_role
from manager.api.validate_jobs import check_queues
from manager.api.validate_objects import check_cluster, check_node
from manager.ca import Sealer, autolock, data_keys, rotation
from manager.control import rely_on_uses
from manager.store import Draft, View
from swarm import errors
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    Config,
    ConfigSpec,
    Network,
    NetworkSpec,
    Node,
    NodeRole,
    NodeSpec,
    NodeState,
    Secret,
    SecretSpec,
    Volume,
    VolumeSpec,
)

Used = Secret | Config | Network

# ---------------------------------------------------------------- creating


def create_secret(draft: Draft, spec: SecretSpec, *, new_id: str, sealer: Sealer) -> Secret:
    return draft.put(
        Secret(
            id=new_id,
            spec=structs.replace(spec, data=b""),
            sealed=sealer.seal_data(spec.data),
            digest=sealer.digest(spec.data),
        )
    )


def create_config(draft: Draft, spec: ConfigSpec, *, new_id: str) -> Config:
    return draft.put(Config(id=new_id, spec=spec))


def create_volume(draft: Draft, spec: VolumeSpec, *, new_id: str) -> Volume:
    return draft.put(Volume(id=new_id, spec=spec))


def create_network(draft: Draft, spec: NetworkSpec, *, new_id: str) -> Network:
    """A network with the subnets it asks for, or the lowest free one of the pool. Raises Exhausted
    when there is none.
    """
    cluster = next(iter(draft.all(Cluster)), Cluster())
    return draft.put(
        Network(
            id=new_id,
            spec=spec,
            ipam=give_subnets(
                draft,
                spec,
                pool=cluster.default_addr_pool,
                subnet_size=cluster.subnet_size,
            ),
            driver_state=driver_state(spec),
        )
    )


def check_subnets_free(find: Finder, view: View, spec: NetworkSpec) -> None:
    """Notes subnets that overlap with those of another network."""
    taken = subnets_in_use(view)
    for i, config in enumerate(spec.ipam.configs if spec.ipam else ()):
        try:
            subnet = ipaddress.ip_network(config.subnet)
        except ValueError:
            continue  # noted by validate
        for other, network in taken.items():
            if overlap(subnet, other):
                find.add(
                    f"ipam.config[{i}].subnet",
                    f"{subnet} overlaps with {other} of {quoted(network)}; choose another",
                )


# ---------------------------------------------------------------- updating


def update_secret(draft: Draft, secret: Secret, spec: SecretSpec, sealer: Sealer) -> None:
    """Only labels may change: tasks have been started with the data. Raises Invalid."""
    assert secret.spec is not None
    if spec.data and sealer.digest(spec.data) != secret.digest:
        _refuse_change(secret, "data")
    _check_only_labels(secret, secret.spec, structs.replace(spec, data=b""))
    draft.put(structs.replace(secret, spec=structs.replace(secret.spec, labels=spec.labels)))


def update_config(draft: Draft, config: Config, spec: ConfigSpec) -> None:
    """Only labels may change. Raises Invalid."""
    assert config.spec is not None
    if not spec.data:
        spec = structs.replace(spec, data=config.spec.data)
    if spec.data != config.spec.data:
        _refuse_change(config, "data")
    _check_only_labels(config, config.spec, spec)
    draft.put(structs.replace(config, spec=spec))


def update_network(draft: Draft, network: Network, spec: NetworkSpec) -> None:
    """Only labels may change. Raises Invalid."""
    assert network.spec is not None
    _check_only_labels(network, network.spec, spec)
    draft.put(structs.replace(network, spec=spec))


def update_volume(draft: Draft, volume: Volume, spec: VolumeSpec) -> None:
    """Only labels may change. Raises Invalid."""
    assert volume.spec is not None
    _check_only_labels(volume, volume.spec, spec)
    draft.put(structs.replace(volume, spec=spec))


def _check_only_labels(
    o: Secret | Config | Network | Volume,
    before: SecretSpec | ConfigSpec | NetworkSpec | VolumeSpec,
    after: SecretSpec | ConfigSpec | NetworkSpec | VolumeSpec,
) -> None:
    for field in before.__struct_fields__:
        if field != "labels" and getattr(before, field) != getattr(after, field):
            _refuse_change(o, field)
    problems = Problems()
    check_labels(problems.of(quoted(o)), after.labels)
    problems.raise_any()


def _refuse_change(o: Secret | Config | Network | Volume, field: str) -> None:
    hint = "create another one under a new name and let the services use that"
    if field == "data" and isinstance(o, Secret | Config):
        kind = "secret" if isinstance(o, Secret) else "config"
        hint = (
            f"`swarmctl {kind} rotate` gives it new content and rolls the services that use it; "
            "a deploy of its stack does so too"
        )
    raise errors.Invalid(
        f"{quoted(o)}: {field} differs, and only updates to labels are allowed; {hint}"
    )


def update_node(draft: Draft, node: Node, spec: NodeSpec, *, here: Here) -> None:
    """Labels, availability, role. Raises Invalid, and what roles.check_role does."""
    problems = Problems()
    check_node(problems.of(quoted(node)), spec)
    problems.raise_any()
    before = node.spec.role if node.spec else NodeRole.WORKER
    if spec.role != before:
        check_role(draft, node, spec.role, here=here)
    draft.put(structs.replace(node, spec=spec))


def update_cluster(draft: Draft, cluster: Cluster, spec: ClusterSpec) -> None:
    """The cluster's settings. A root of one's own goes with its key, which is kept in the keyring
    and never in the settings. Raises Invalid, Conflict (too many data keys asked for).
    """
    old = cluster.spec or ClusterSpec()
    problems = Problems()
    check_cluster(problems.of("cluster"), spec, cluster)
    check_queues(problems.of("cluster"), draft, spec, old)
    problems.raise_any()
    key_pem = spec.signing_ca_key
    spec = structs.replace(spec, signing_ca_key="")
    draft.put(structs.replace(cluster, spec=spec))
    if spec.data_key_force_rotate != old.data_key_force_rotate:
        data_keys.begin(draft)
    if spec.autolock_managers != old.autolock_managers:
        autolock.switch(draft, on=spec.autolock_managers)
    own = spec.signing_ca_cert if spec.signing_ca_cert != old.signing_ca_cert or key_pem else ""
    if own or spec.ca_force_rotate != old.ca_force_rotate:
        try:
            rotation.begin(draft, root_pem=own, root_key_pem=key_pem)
        except errors.Invalid as error:
            problems.of("cluster").add("ca_cert", error.message)
            problems.raise_any()
            raise


# ---------------------------------------------------------------- removing


def remove_used(draft: Draft, o: Used) -> None:
    """A secret, config or network that nothing uses. Raises Conflict with the users."""
    found = users(draft, o.id)
    if found:
        raise errors.Conflict(
            f"{quoted(o)} is in use by {_listed(found)}; remove it from there, or remove the "
            "service, then try again"
        )
    rely_on_uses(draft, o.id)
    draft.delete(type(o), o.id)


def remove_node(draft: Draft, node: Node, *, force: bool) -> None:
    """A node that has left, or, by force, one that is up. Raises Conflict."""
    name = name_of(node)
    check_removable(node)
    state = node.status.state if node.status else NodeState.UNKNOWN
    if not force and state not in (NodeState.DOWN, NodeState.DISCONNECTED):
        raise errors.Conflict(
            f"node {name} ({node.id}) is not down and can't be removed; stop swarmd on it or run "
            "`swarmctl swarm leave` there first, or use --force"
        )
    draft.delete(Node, node.id)


def _listed(found: list[str], shown_max: int = 5) -> str:
    if len(found) > shown_max:
        found = [*found[:shown_max], f"{len(found) - shown_max} more"]
    return ", ".join(found)
