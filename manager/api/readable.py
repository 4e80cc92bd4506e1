"""Specs as people can compare them: names in place of networks' ids, and digests of the content in
place of the ids of secrets and configs. What field_diff.py takes; never what is stored.
"""

from __future__ import annotations

import msgspec
from msgspec import structs

from manager.api.field_diff import DIGEST_DIGITS
from manager.api.lookup import task_of
from manager.ca import Sealer
from manager.store import View
from swarm.v1 import Config, Network, Secret, ServiceSpec


class Readable:
    """Remembers the digests that it has worked out: contents never change."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer
        self._contents: dict[tuple[type[Secret] | type[Config], str], str] = {}

    def service(self, view: View, spec: ServiceSpec) -> ServiceSpec:
        """The spec for people, with what the view knows of what it refers to."""
        task = task_of(spec)
        container = task.container
        if container is not None and (container.secrets or container.configs):
            container = structs.replace(
                container,
                secrets=tuple(
                    structs.replace(r, secret_id=self._content(view, Secret, r.secret_id))
                    for r in container.secrets
                ),
                configs=tuple(
                    structs.replace(r, config_id=self._content(view, Config, r.config_id))
                    for r in container.configs
                ),
            )
        networks = tuple(
            structs.replace(n, target=_network_name(view, n.target)) for n in task.networks
        )
        return structs.replace(
            spec, task=structs.replace(task, container=container, networks=networks)
        )

    def _content(self, view: View, cls: type[Secret] | type[Config], id_: str) -> str:
        """A digest of all that tasks see of a secret or config; the id of one that is gone."""
        key = (cls, id_)
        found = self._contents.get(key)
        if found is None:
            o: Secret | Config | None = view.get(cls, id_)
            if o is None or o.spec is None:
                return id_
            digest = o.digest if isinstance(o, Secret) else self._sealer.digest(o.spec.data)
            if o.spec.templating is not None:
                templating = msgspec.json.encode(o.spec.templating)
                digest = self._sealer.digest(digest.encode() + templating)
            found = self._contents[key] = short(digest)
        return found


def short(digest: str) -> str:
    """As many digits as show that two contents differ."""
    return digest[:DIGEST_DIGITS]


def _network_name(view: View, target: str) -> str:
    network = view.get(Network, target)
    return network.spec.name if network is not None and network.spec is not None else target
