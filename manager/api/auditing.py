"""What a client asks of the audit trail, checked and in the trail's own words."""

from __future__ import annotations

from typing import Final

from manager.api.filters import merge
from manager.api.problems import nearest
from swarm import errors
from swarm.audit import FILTERS, Query
from swarm.v1 import ListAuditRequest

LIMIT_MAX: Final = 10_000  # records kept in memory to find the newest


def audit_query(request: ListAuditRequest) -> Query:
    """Raises Invalid."""
    if not 0 <= request.limit <= LIMIT_MAX:
        raise errors.Invalid(f"limit {request.limit}: from 1 to {LIMIT_MAX}, or 0 for all")
    if request.until_ns and request.since_ns > request.until_ns:
        raise errors.Invalid("since is later than until: there is nothing between them")
    wanted = {k: frozenset(v) for k, v in merge(request.filters).items()}
    for key in sorted(wanted):
        if key not in FILTERS:
            raise errors.Invalid(
                f"invalid filter {key!r} for audit records; accepted are {', '.join(FILTERS)}"
                f"{nearest(key, FILTERS)}"
            )
    return Query(
        since_ns=request.since_ns,
        until_ns=request.until_ns,
        limit=request.limit,
        filters=wanted,
    )
