"""The cluster's settings as several commands read and change them."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from cli.connection import Connection
from swarm.clock import SECOND_NS
from swarm.errors import Invalid, Unsupported
from swarm.v1 import (
    Cluster,
    ClusterSpec,
    GetRequest,
    Kind,
    RaftConfig,
    RebalanceConfig,
    SchedulingConfig,
    Spec,
    UpdateRequest,
)

__all__ = ["HOUR_NS", "change_cluster", "get_cluster", "update_cluster"]

HOUR_NS = 3600 * SECOND_NS


def change_cluster(spec: ClusterSpec, given: dict[str, Any]) -> ClusterSpec:
    """The spec with the options that were given. Raises Invalid, Unsupported."""
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
        raise Unsupported(
            "--external-ca: certificates are signed by the cluster's own root alone. For a root of "
            "your own: `swarmctl swarm ca --rotate --ca-cert FILE --ca-key FILE`"
        )
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
    scheduling = _change_scheduling(spec.scheduling or SchedulingConfig(), given)
    if scheduling != (spec.scheduling or SchedulingConfig()):
        changes["scheduling"] = scheduling
    return msgspec.structs.replace(spec, **changes)


def _change_scheduling(config: SchedulingConfig, given: dict[str, Any]) -> SchedulingConfig:
    """How the scheduler chooses, with the options given; queues have a command of their own."""
    changes: dict[str, Any] = {}
    for option, field in (("placement_strategy", "strategy"), ("gpu_policy", "gpu_policy")):
        if given.get(option) is not None:
            changes[field] = given[option]
    rebalance, after_ns = given.get("rebalance"), given.get("rebalance_after")
    if rebalance is False and after_ns is not None:
        raise Invalid("--no-rebalance and --rebalance-after exclude each other")
    if rebalance is False:
        changes["rebalance"] = None
    elif rebalance or after_ns is not None:
        before = config.rebalance or RebalanceConfig()
        quiet_ns = before.quiet_ns if after_ns is None else after_ns
        changes["rebalance"] = RebalanceConfig(quiet_ns=quiet_ns)
    return msgspec.structs.replace(config, **changes)


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
