"""What a service's spec refers to: secrets, configs and networks, by id or by name.

`resolve` fills in both ids and names, so that the stored spec says exactly which object is meant
and a rename or a new version of a secret is a change of the template. `users` is the other
direction: who uses an object. How a commit relies on either: manager/control/uses.py.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TypeVar

from msgspec import structs

from manager.api.lookup import nearest_name, quoted, served, spec_of, task_of, word
from manager.api.names import PREDEFINED_NETWORKS
from manager.api.problems import Finder
from manager.control import ids_used
from manager.store import View
from swarm import states
from swarm.v1 import (
    Config,
    ConfigReference,
    FileTarget,
    Kind,
    Network,
    NetworkAttachmentSpec,
    Secret,
    SecretReference,
    Service,
    ServiceRevision,
    ServiceSpec,
    StackRevision,
    Task,
)

# Names, by kind, that are declared beside the spec.
Declared = Set[tuple[Kind, str]]
_U = TypeVar("_U", Secret, Config, Network)
_FILE_MODE = 0o444


def resolve(
    find: Finder, view: View, spec: ServiceSpec, *, declared: Declared = frozenset()
) -> ServiceSpec:
    """The spec with every reference resolved; what does not exist is noted, unless it is
    `declared`: then it is told elsewhere why it does not exist.
    """
    task = task_of(spec)
    networks = tuple(_network(find, view, i, n, declared) for i, n in enumerate(task.networks))
    container = task.container
    if container is not None:
        container = structs.replace(
            container,
            secrets=tuple(
                _secret(find, view, i, s, declared) for i, s in enumerate(container.secrets)
            ),
            configs=tuple(
                _config(find, view, i, c, declared) for i, c in enumerate(container.configs)
            ),
        )
    if networks and container is not None and container.network_mode:
        find.add(
            "network_mode",
            f"{container.network_mode!r} and networks exclude each other; give one of them",
        )
    return structs.replace(spec, task=structs.replace(task, networks=networks, container=container))


def _network(
    find: Finder, view: View, index: int, attachment: NetworkAttachmentSpec, declared: Declared
) -> NetworkAttachmentSpec:
    if not attachment.target:
        return attachment  # noted by validate
    found = _one(view, Network, attachment.target, attachment.target)
    if found is None and (Kind.NETWORK, attachment.target) in declared:
        return attachment
    if found is None:
        hint = f"create it first{nearest_name(view, Network, attachment.target)}"
        if attachment.target in PREDEFINED_NETWORKS:
            hint = (
                f"each engine has one, the cluster has not; set network_mode: {attachment.target}"
            )
            if attachment.target not in ("host", "none"):
                hint = "each engine has one, the cluster has not; name a network of the cluster"
        find.add(f"networks[{index}]", f"network {attachment.target!r} not found; {hint}")
        return attachment
    return structs.replace(attachment, target=found.id)


def _secret(
    find: Finder, view: View, index: int, reference: SecretReference, declared: Declared
) -> SecretReference:
    found = _one(view, Secret, reference.secret_id, reference.secret_name)
    if found is None:
        if (Kind.SECRET, reference.secret_name) not in declared:
            ref = reference.secret_name or reference.secret_id
            _note_missing(find, view, Kind.SECRET, index, ref)
        return reference
    name = _name(found, reference.secret_name)
    return structs.replace(
        reference,
        secret_id=found.id,
        secret_name=name,
        file=reference.file or _default_file(name),
    )


def _config(
    find: Finder, view: View, index: int, reference: ConfigReference, declared: Declared
) -> ConfigReference:
    found = _one(view, Config, reference.config_id, reference.config_name)
    if found is None:
        if (Kind.CONFIG, reference.config_name) not in declared:
            ref = reference.config_name or reference.config_id
            _note_missing(find, view, Kind.CONFIG, index, ref)
        return reference
    name = _name(found, reference.config_name)
    file = reference.file
    if file is None and not reference.runtime:
        file = _default_file(f"/{name}")
    return structs.replace(reference, config_id=found.id, config_name=name, file=file)


def _name(found: Secret | Config, said: str) -> str:
    """The name to store beside the id. An earlier version goes by the name that it had when the
    spec was made: going back to that spec brings exactly that spec back.
    """
    assert found.spec is not None
    return said if found.superseded and said else found.spec.name


def _default_file(name: str) -> FileTarget:
    """Where Docker puts it when nothing else is said."""
    return FileTarget(name=name, uid="0", gid="0", mode=_FILE_MODE)


def _note_missing(find: Finder, view: View, kind: Kind, index: int, ref: str) -> None:
    what = word(kind)
    if ref:
        hint = nearest_name(view, served(kind), ref)
        find.add(f"{what}s[{index}]", f"{what} {ref!r} not found; create it first{hint}")
    else:
        find.add(f"{what}s[{index}]", f"the {what}'s name is missing")


def _one(view: View, cls: type[_U], id_: str, name: str) -> _U | None:
    """By id where one is given and exists, else by exact name. No prefixes: a stored spec must not
    change its meaning when a new object is made.
    """
    found = view.get(cls, id_) if id_ else None
    if found is None and name:
        found = next(iter(view.by(cls, "name", name)), None)
    return found


# ---------------------------------------------------------------- the other direction


def users(view: View, id_: str) -> list[str]:
    """Who uses an object now, as phrases for a message: services whose spec names it, and those
    with tasks that still run an earlier spec which does.
    """
    out = []
    for service in sorted(view.all(Service), key=lambda s: spec_of(s).name):
        if id_ in ids_used(spec_of(service)):
            leaving = " (being removed)" if service.pending_delete else ""
            out.append(f"{quoted(service)}{leaving}")
        elif _used_by_earlier(view, service, id_):
            out.append(f"{quoted(service)} (tasks of an earlier spec still run)")
    return out


def _used_by_earlier(view: View, service: Service, id_: str) -> bool:
    versions = {
        r.spec_version
        for r in view.by(ServiceRevision, "service", service.id)
        if r.spec_version != service.spec_version and r.spec and id_ in ids_used(r.spec)
    }
    return bool(versions) and any(
        t.spec_version in versions and not (t.status and states.ended(t.status.state))
        for t in view.by(Task, "service", service.id)
    )


def kept_ids(view: View) -> set[str]:
    """Ids used by any spec the store still holds: current ones, those to roll back to, those that
    tasks refer to, and those of stacks' histories. Some 10 ms for 2,000 services of ten versions.
    """
    out: set[str] = set()
    services = set()
    for service in view.all(Service):
        services.add(service.id)
        out |= ids_used(service.spec)
    for revision in view.all(ServiceRevision):
        if revision.service_id in services:
            out |= ids_used(revision.spec)
    for deployed in view.all(StackRevision):
        out.update(deployed.secret_ids.values())
        out.update(deployed.config_ids.values())
    return out
