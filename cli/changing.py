"""Changing one service: looking up what its flags name, and updating it against its current
version. Shared by the commands of services and of jobs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from cli.connection import Connection
from cli.registry import auth_for
from cli.service_flags import Resolved, references
from cli.services import warn
from swarm.errors import Conflict
from swarm.v1 import GetRequest, Kind, Service, ServiceSpec, Spec, UpdateRequest

__all__ = ["auth_of", "change_service", "recorded", "resolve_names"]

ATTEMPTS = 5  # of a change against concurrent ones


async def resolve_names(connection: Connection, flags: Mapping[str, Any]) -> Resolved:
    """Ids of what the flags name. Raises NotFound."""
    secrets, configs, networks = references(flags)

    async def ids(kind: Kind, names: set[str]) -> dict[str, str]:
        found = {}
        for name in sorted(names):
            answer = await connection.control.get(GetRequest(kind=kind, ref=name))
            assert answer.object is not None
            found[name] = str(getattr(answer.object, kind.name.lower()).id)
        return found

    return Resolved(
        await ids(Kind.SECRET, secrets),
        await ids(Kind.CONFIG, configs),
        await ids(Kind.NETWORK, networks),
    )


def auth_of(image: str, flags: Mapping[str, Any]) -> str:
    return auth_for(image, os.environ) if flags.get("with_registry_auth") and image else ""


def recorded(image: str, flags: Mapping[str, Any]) -> str:
    """The image with the digest that its tag has now; as it is, with a warning, where no registry
    tells it.
    """
    never = flags.get("no_resolve_image") or os.environ.get("SWARM_RESOLVE_IMAGE") == "never"
    if never or not image or "@" in image:
        return image
    from cli.digests import Unresolved, pinned

    try:
        return pinned(image, os.environ)
    except Unresolved as error:
        warn(
            [
                f"the digest of image {image} is not recorded ({error}): each node finds out what "
                "the tag stands for, and they may run different versions"
            ]
        )
        return image


async def change_service(
    connection: Connection,
    ref: str,
    change: Callable[[ServiceSpec], ServiceSpec],
    *,
    rollback: bool = False,
    flags: Mapping[str, Any] | None = None,
) -> tuple[Service, int]:
    """Changes a service against its current version; the service as it was, and the new version.
    Repeats when somebody else was faster. `rollback`: to the version that the flags name, if any.
    """
    given = flags or {}
    attempt = 0
    while True:
        attempt += 1
        answer = await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=ref))
        found = answer.object.service if answer.object else None
        assert found is not None and found.spec is not None and found.meta is not None
        spec = change(found.spec)
        container = spec.task.container if spec.task else None
        request = UpdateRequest(
            kind=Kind.SERVICE,
            id=found.id,
            version=found.meta.version,
            spec=None if rollback else Spec(service=spec),
            rollback=rollback,
            rollback_to=given.get("rollback_to") or 0,
            pause_after=given.get("pause_after") or 0,
            registry_auth=auth_of(container.image if container else "", given),
        )
        try:
            done = await connection.control.update(request)
        except Conflict:
            if attempt == ATTEMPTS or rollback:
                raise
            now = await connection.control.get(GetRequest(kind=Kind.SERVICE, ref=found.id))
            if now.object is None or now.object.service is None or now.object.service == found:
                raise  # nobody else changed it: the conflict has another cause
            continue
        warn(done.warnings)
        return found, done.version
