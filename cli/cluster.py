"""The cluster's settings as several commands read and change them."""

from __future__ import annotations

import csv
from typing import Any

import click
import msgspec

from cli.connection import Connection
from cli.options import read_input
from swarm.clock import SECOND_NS
from swarm.errors import Invalid
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    ExternalCa,
    GetRequest,
    Kind,
    RaftConfig,
    Spec,
    UpdateRequest,
)

__all__ = ["HOUR_NS", "change_cluster", "external_ca", "get_cluster", "update_cluster"]

HOUR_NS = 3600 * SECOND_NS


def change_cluster(spec: ClusterSpec, given: dict[str, Any]) -> ClusterSpec:
    """The spec with the options that were given. Raises Invalid."""
    changes: dict[str, Any] = {}
    for option, field in (
        ("cert_expiry", "node_cert_expiry_ns"),
        ("dispatcher_heartbeat", "heartbeat_period_ns"),
        ("task_history_limit", "task_history_limit"),
        ("autolock", "autolock_managers"),
        ("data_key_lifetime", "data_key_lifetime_ns"),
    ):
        if given.get(option) is not None:
            changes[field] = given[option]
    if given.get("rotate_data_key"):
        changes["data_key_force_rotate"] = spec.data_key_force_rotate + 1
    lifetime = given.get("data_key_lifetime")
    if lifetime and lifetime < HOUR_NS:
        raise Invalid("--data-key-lifetime: the shortest lifetime of data keys is 1h; 0: 90 days")
    expiry = given.get("cert_expiry")
    if expiry is not None and expiry < HOUR_NS:
        raise Invalid("--cert-expiry: the shortest lifetime of node certificates is 1h")
    if given.get("external_ca"):
        changes["external_cas"] = tuple(external_ca(text) for text in given["external_ca"])
    raft = spec.raft or RaftConfig(
        snapshot_interval=10000,
        log_entries_for_slow_followers=500,
        election_tick=10,
        heartbeat_tick=1,
    )
    if given.get("snapshot_interval") is not None:
        raft = msgspec.structs.replace(raft, snapshot_interval=given["snapshot_interval"])
    if given.get("max_snapshots") is not None:
        raft = msgspec.structs.replace(raft, keep_old_snapshots=given["max_snapshots"])
    if raft != spec.raft:
        changes["raft"] = raft
    return msgspec.structs.replace(spec, **changes)


def external_ca(text: str) -> ExternalCa:
    """`protocol=cfssl,url=https://ca.example.com,cacert=FILE`. Raises Invalid."""
    found: dict[str, str] = {}
    for word in next(csv.reader([text]), []):
        key, separator, value = word.strip().partition("=")
        if not separator:
            raise Invalid(f"--external-ca {text!r}: {word!r} is not key=value")
        found[key.lower()] = value
    protocol, url = found.pop("protocol", ""), found.pop("url", "")
    if protocol != "cfssl" or not url:
        raise Invalid(f"--external-ca {text!r}: write protocol=cfssl,url=URL")
    path = found.pop("cacert", "")
    pem = read_input(path, what="external CA's certificate").decode() if path else ""
    return ExternalCa(protocol=protocol, url=url, options=found, ca_cert=pem)


async def get_cluster(connection: Connection) -> Cluster:
    """The cluster as it is."""
    answer = await connection.control.get(GetRequest(kind=Kind.CLUSTER))
    found = answer.object.cluster if answer.object else None
    assert found is not None and found.spec is not None and found.meta is not None
    return found


async def update_cluster(connection: Connection, before: Cluster, spec: ClusterSpec) -> int:
    """Gives the cluster another spec, unless somebody else has meanwhile; its version then."""
    assert before.meta is not None
    answer = await connection.control.update(
        UpdateRequest(
            kind=Kind.CLUSTER, id=before.id, version=before.meta.version, spec=Spec(cluster=spec)
        )
    )
    for warning in answer.warnings:
        click.echo(f"Warning: {warning}", err=True)
    return answer.version
