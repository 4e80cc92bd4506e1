"""What may be said about where tasks run: constraints, preferences, strategies; and the cluster's
own choice of them.
"""

from __future__ import annotations

from manager.api.problems import Finder
from manager.scheduler import parse_constraint, parse_spread
from manager.scheduler.gpus import POLICIES
from swarm import errors
from swarm.clock import SECOND_NS
from swarm.v1 import ClusterSpec, Placement, PlacementPreference, ServiceMode

STRATEGIES = ("spread", "binpack")
WEIGHT_MAX = 100  # of an affinity; the least is its negative
AFFINITIES_MAX = 64  # of one service: each is asked of every node
QUIET_NS_MAX = 30 * 24 * 3600 * SECOND_NS


def check_placement(find: Finder, placement: Placement, mode: ServiceMode) -> None:
    for i, text in enumerate(placement.constraints):
        try:
            parse_constraint(text)
        except errors.Invalid as error:
            find.add(f"constraints[{i}]", error.message)
    for i, preference in enumerate(placement.preferences):
        _check_preference(find, f"preferences[{i}]", preference)
    affinities = sum(bool(p.affinity) for p in placement.preferences)
    if affinities > AFFINITIES_MAX:
        find.add(
            "preferences", f"{affinities} affinities are more than the limit of {AFFINITIES_MAX}"
        )
    find.one_of("strategy", placement.strategy, STRATEGIES)
    find.not_negative("max_replicas_per_node", placement.max_replicas, "a number of tasks")
    if placement.max_replicas and mode.replicated is None and mode.replicated_job is None:
        find.add("max_replicas_per_node", "only services with a number of replicas can have it")


def _check_preference(find: Finder, where: str, preference: PlacementPreference) -> None:
    spread, affinity, weight = preference.spread, preference.affinity, preference.weight
    if spread and affinity:
        find.add(where, "spread and affinity exclude each other; write them as two preferences")
        return
    try:
        if affinity:
            parse_constraint(affinity, "affinity")
        else:
            parse_spread(spread)
    except errors.Invalid as error:
        find.add(f"{where}.{'affinity' if affinity else 'spread'}", error.message)
    if weight and not affinity:
        find.add(f"{where}.weight", "only an affinity has a weight; preferences are tried in order")
    if not -WEIGHT_MAX <= weight <= WEIGHT_MAX:
        find.add(f"{where}.weight", f"{weight} is not from -{WEIGHT_MAX} to {WEIGHT_MAX}")


def check_scheduling(find: Finder, spec: ClusterSpec) -> None:
    """The cluster's own choice, queues aside."""
    scheduling = spec.scheduling
    if scheduling is None:
        return
    find = find.at("scheduling")
    find.one_of("strategy", scheduling.strategy, STRATEGIES)
    find.one_of("gpu_policy", scheduling.gpu_policy, POLICIES)
    if scheduling.rebalance is not None:
        quiet_ns = scheduling.rebalance.quiet_ns
        find.not_negative("rebalance.quiet", quiet_ns, "a duration")
        if quiet_ns > QUIET_NS_MAX:
            find.add("rebalance.quiet", "30 days are the most; leave rebalance out to have none")
