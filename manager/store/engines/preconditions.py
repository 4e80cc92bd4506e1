"""Whether a commit may be: the judgement that engines without a server of their own share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from manager.store.engine import Deposed, Fence, Op, Stale

Versions = dict[tuple[int, str], int]
"""Each row's version by (table, id); a row that is absent, or at 0, does not exist."""


def problem(
    ops: Sequence[Op],
    requires: Sequence[Op],
    *,
    latest: Mapping[tuple[int, str], int],
    versions: Mapping[tuple[int, str], int],
) -> Stale | None:
    """What the commit relied on and is not so; `latest` goes before `versions`."""
    for checks in (requires, ops):
        for op in checks:
            if op.expected is None:
                continue
            key = (op.table, op.id)
            found = latest.get(key)
            if found is None:
                found = versions.get(key, 0)
            if found != op.expected:
                return Stale(
                    f"row {op.id!r} of table {op.table} is at version {found}, not at "
                    f"{op.expected}: it has changed meanwhile; read it again and repeat"
                )
    return None


def deposed(fence: Fence | None, present: Fence | None) -> Deposed | None:
    """Whether the commit comes from one who led once."""
    if fence is None or fence == present:
        return None
    leader = f"{present.node_id} leads in epoch {present.epoch}" if present else "nobody leads"
    return Deposed(
        f"node {fence.node_id} led in epoch {fence.epoch}, and now {leader}; leave the work to "
        "the leader"
    )
