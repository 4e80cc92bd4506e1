"""What a DeployStackRequest asks for: files' spec, or an earlier revision, as one and the same.

A deploy and a plan begin here, so that a plan can never be of something else than what the deploy
would take.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from manager.api import history
from manager.api.lookup import find
from manager.ca import Sealer
from manager.store import STACK_LABEL, View
from swarm import errors
from swarm.v1 import DeployStackRequest, Stack, StackSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """The stack as it shall be. Holds secrets in clear: never to be stored or logged."""

    # With the data of secrets and configs; every object is labelled as the stack's.
    spec: StackSpec = field(repr=False)
    # Remove what the spec does not name.
    prune: bool
    # For the images of services that registry_auths does not name; empty: as before.
    registry_auth: str = field(default="", repr=False)
    registry_auths: Mapping[str, str] = field(default_factory=dict, repr=False)
    # The revision that is gone back to; 0: it is a deploy of files.
    rollback_to: int = 0


def resolve_request(view: View, request: DeployStackRequest, *, sealer: Sealer) -> Wanted:
    """What is asked for. Of a rollback: the spec of that revision, with the content and the
    credentials of then; credentials that the request names itself come first.

    Raises Invalid, NotFound (no such stack or revision), Conflict (nothing to go back to).
    """
    if (request.spec is None) == (request.rollback is None):
        raise errors.Invalid(
            "the request needs either the stack's spec or the revision to go back to, and has "
            + ("neither" if request.spec is None else "both")
        )
    if request.spec is not None:
        return Wanted(
            spec=labelled(request.spec),
            prune=request.prune,
            registry_auth=request.registry_auth,
            registry_auths=request.registry_auths,
        )
    assert request.rollback is not None
    back = request.rollback
    stack = find(view, Stack, back.stack)
    revision = history.chosen(view, stack, back.revision)
    auths = {} if request.registry_auth else dict(history.credentials(revision, sealer=sealer))
    return Wanted(
        spec=labelled(history.rebuilt(view, revision, sealer=sealer)),
        prune=True,
        registry_auth=request.registry_auth,
        registry_auths={**auths, **request.registry_auths},
        rollback_to=revision.revision,
    )


def labelled(spec: StackSpec) -> StackSpec:
    """Every object of the stack says so in its labels, whoever wrote the spec."""
    mark = {STACK_LABEL: spec.name}

    def all_of(specs: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(structs.replace(s, labels={**s.labels, **mark}) for s in specs)

    return structs.replace(
        spec,
        services=all_of(spec.services),
        networks=all_of(spec.networks),
        secrets=all_of(spec.secrets),
        configs=all_of(spec.configs),
        volumes=all_of(spec.volumes),
    )
