"""What leaves the manager: objects without secrets.

The one place that takes sealed data, keys and credentials off. Whatever the API sends goes through
`present`; a kind that is not named here is not sent.
"""

from __future__ import annotations

from typing import Any

from msgspec import structs

from swarm.v1 import (
    Cluster,
    Config,
    Meta,
    Network,
    Node,
    Object,
    Secret,
    SecretSpec,
    Service,
    ServiceRevision,
    Stack,
    StackRevision,
    StackSpec,
    Task,
    Volume,
)


def present(o: Any) -> Object:
    """The object as callers may see it."""
    match o:
        case Task():
            return Object(task=o)
        case Service():
            return Object(service=o)
        case Node():
            return Object(node=o)
        case Secret():
            bare = _without_data(o.spec) if o.spec else None
            meta = _seen(o.meta)
            return Object(secret=structs.replace(o, meta=meta, spec=bare, sealed=b"", digest=""))
        case Config():
            return Object(config=o)
        case Network():
            return Object(network=o)
        case Volume():
            return Object(volume=o)
        case Stack():
            return Object(stack=present_stack(o))
        case Cluster():
            return Object(cluster=_cluster(o))
        case ServiceRevision():
            return Object(service_revision=present_revision(o))
        case _:
            raise TypeError(f"{type(o).__name__} never leaves the manager")


def present_revision(revision: ServiceRevision) -> ServiceRevision:
    """Without the credentials that its image is pulled with."""
    return structs.replace(revision, meta=_seen(revision.meta), sealed_registry_auth=b"")


def _seen(meta: Meta | None) -> Meta | None:
    """At the version of the last change that showed; see lookup.seen_version."""
    if meta is None or not meta.seen_version:
        return meta
    return structs.replace(meta, version=meta.seen_version, seen_version=0)


def _without_data(spec: SecretSpec) -> SecretSpec:
    return structs.replace(spec, data=b"") if spec.data else spec


def present_stack(stack: Stack) -> Stack:
    """Without the data of its secrets, which it never holds."""
    return structs.replace(stack, spec=_stack_spec(stack.spec)) if stack.spec else stack


def present_stack_revision(revision: StackRevision) -> StackRevision:
    """Without the credentials that its images were pulled with."""
    spec = _stack_spec(revision.spec) if revision.spec else None
    return structs.replace(revision, meta=_seen(revision.meta), spec=spec, sealed_registry_auths={})


def _stack_spec(spec: StackSpec) -> StackSpec:
    if not any(s.data for s in spec.secrets):
        return spec
    return structs.replace(spec, secrets=tuple(_without_data(s) for s in spec.secrets))


def _cluster(cluster: Cluster) -> Cluster:
    if cluster.spec is None or not cluster.spec.signing_ca_key:
        return cluster
    return structs.replace(cluster, spec=structs.replace(cluster.spec, signing_ca_key=""))
