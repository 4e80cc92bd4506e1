"""What a spec uses of the cluster's other objects, and how a commit relies on their being there.

That nobody uses an object is seen by looking at all services, and clashes with no row when somebody
begins to: `rely_on` and `rely_on_uses` make the two clash. Who resolves names to these ids, and who
asks whether an object may be removed: manager/api/references.py.
"""

from __future__ import annotations

import zlib

from manager.store import Draft, View
from swarm.v1 import Config, Network, Secret, ServiceSpec

Used = Secret | Config | Network

# An object's use and its removal meet in one of so many guards: few enough that none is ever taken
# away, so many that two objects rarely share one.
_GUARDS = 256


def ids_used(spec: ServiceSpec | None) -> set[str]:
    """Ids of all secrets, configs and networks of a stored spec."""
    task = spec.task if spec is not None else None
    if task is None:
        return set()
    out = {n.target for n in task.networks}
    container = task.container
    if container is not None and (container.secrets or container.configs):
        out.update(s.secret_id for s in container.secrets)
        out.update(c.config_id for c in container.configs)
    return out


def missing(view: View, spec: ServiceSpec | None) -> list[str]:
    """What a stored spec uses and does not exist any more, as phrases: `secret "key"`."""
    task = spec.task if spec is not None else None
    if task is None:
        return []
    found = [f'network "{n.target}"' for n in task.networks if view.get(Network, n.target) is None]
    if task.container is not None:
        for secret in task.container.secrets:
            if view.get(Secret, secret.secret_id) is None:
                found.append(f'secret "{secret.secret_name or secret.secret_id}"')
        for config in task.container.configs:
            if view.get(Config, config.config_id) is None:
                found.append(f'config "{config.config_name or config.config_id}"')
    return found


def rely_on(draft: Draft, spec: ServiceSpec, before: ServiceSpec | None) -> None:
    """The commit fails if what the resolved spec uses, and `before` did not, has meanwhile been
    seen to be unused.
    """
    for id_ in sorted(ids_used(spec) - ids_used(before)):
        found = _object(draft, id_)
        # None: a network that each host has by itself. Version 0: made by this very draft.
        if found is not None and found.meta is not None and found.meta.version:
            draft.guard(_guard_of(id_))


def rely_on_uses(draft: Draft, id_: str) -> None:
    """The commit fails if anybody has meanwhile begun to use the object. Called in one go with the
    look at who does, by whoever removes it, or changes all of its users.
    """
    draft.guard(_guard_of(id_))


def _guard_of(id_: str) -> str:
    return f"use/{zlib.crc32(id_.encode()) % _GUARDS:02x}"


def _object(view: View, id_: str) -> Used | None:
    return view.get(Secret, id_) or view.get(Config, id_) or view.get(Network, id_)
