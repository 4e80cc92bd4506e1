"""Placing tasks on nodes, and saying why a task has none. Pure: a table in, decisions out."""

from manager.scheduler.constraints import (
    Attribute,
    Constraint,
    Neighbour,
    neighbour_of,
    normal_arch,
    parse_constraint,
    parse_spread,
)
from manager.scheduler.explain import (
    FOR_EVER,
    Account,
    account,
    ceiling,
    explain,
    pending_reason,
    reason,
)
from manager.scheduler.filters import (
    FILTERS,
    Rejection,
    barred,
    rejection,
    unavailable,
    unseen,
    unsuitable,
)
from manager.scheduler.masks import Hindrance
from manager.scheduler.nodeinfo import FAILURES_MAX, NodeInfo, node_name
from manager.scheduler.placement import ASSIGNED_MESSAGE, Group, Placement, others_left, place
from manager.scheduler.refusals import PERHAPS, PERHAPS_MAX, REFUSALS, refused, said
from manager.scheduler.requirement import NOTHING, Requirement, requirement_of, spec_of_version
from manager.scheduler.table import Claim, NodeTable

__all__ = [
    "ASSIGNED_MESSAGE",
    "FAILURES_MAX",
    "FILTERS",
    "FOR_EVER",
    "NOTHING",
    "PERHAPS",
    "PERHAPS_MAX",
    "REFUSALS",
    "Account",
    "Attribute",
    "Claim",
    "Constraint",
    "Group",
    "Hindrance",
    "Neighbour",
    "NodeInfo",
    "NodeTable",
    "Placement",
    "Rejection",
    "Requirement",
    "account",
    "barred",
    "ceiling",
    "explain",
    "neighbour_of",
    "node_name",
    "normal_arch",
    "others_left",
    "parse_constraint",
    "parse_spread",
    "pending_reason",
    "place",
    "reason",
    "refused",
    "rejection",
    "requirement_of",
    "said",
    "spec_of_version",
    "unavailable",
    "unseen",
    "unsuitable",
]
