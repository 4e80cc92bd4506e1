"""`swarmctl queue`: the queues that jobs wait in, with their quotas and shares.

Queues are part of the cluster's settings (ClusterSpec.scheduling.queues); `default` is always
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec

from cli.cluster import get_cluster, update_cluster
from cli.connection import Connection, call
from cli.format import Record, print_rows
from cli.lazy import Group
from cli.options import BYTES, CPUS, Ref, format_option, quiet_names_option
from cli.settings import settings
from swarm.errors import Conflict, Invalid, NotFound
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import (
    ClusterSpec,
    ListQueuesRequest,
    ListQueuesResponse,
    QueueSpec,
    QueueUsage,
    SchedulingConfig,
)

ATTEMPTS = 5  # of a change against concurrent ones
DEFAULT_QUEUE = "default"
MILLION = 1_000_000
COLUMNS = (
    ("NAME", "Name"),
    ("WEIGHT", "Weight"),
    ("SHARE", "Share"),
    ("RUNNING", "Running"),
    ("WAITING", "Waiting"),
    ("CPUS", "CPUs"),
    ("MEMORY", "Memory"),
    ("GPUS", "GPUs"),
    ("TASKS", "Tasks"),
)


@click.group(cls=Group)
def group() -> None:
    """Manage the queues of jobs: quotas and fair shares."""


@group.command("ls")
@format_option
@quiet_names_option
def ls(form: str, *, quiet: bool) -> None:
    """List queues.

    RUNNING and WAITING count jobs. CPUS, MEMORY, GPUS and TASKS are what the jobs hold, of what
    they may hold where that is limited. SHARE is the largest part that they hold of any of the
    cluster's resources, divided by the weight: the queue with the lowest is next.
    """

    async def work(connection: Connection) -> ListQueuesResponse:
        return await connection.control.list_queues(ListQueuesRequest())

    print_rows(
        [_row(queue) for queue in call(work).queues],
        COLUMNS,
        form=form,
        quiet=quiet,
        terminal=settings().terminal(),
        identifier="Name",
    )


def _row(usage: QueueUsage) -> Record:
    spec = usage.spec or QueueSpec()
    return Record(
        Name=spec.name,
        Weight=spec.weight or 1,
        Share=f"{usage.fair_share * 100 / MILLION:.3g}%",
        Running=usage.jobs_running,
        Waiting=len(usage.waiting),
        Next=", ".join(usage.waiting),
        CPUs=_of(usage.cpu_nano, spec.cpu_nano, format_cpus),
        Memory=_of(usage.memory_bytes, spec.memory_bytes, format_bytes),
        GPUs=_of(usage.gpu_nano, spec.gpu_nano, format_cpus),
        Tasks=_of(usage.tasks, spec.tasks, str),
    )


def _of(used: int, quota: int, shown: Callable[[int], str]) -> str:
    """ "3/8"; without a quota "3"."""
    return f"{shown(used)}/{shown(quota)}" if quota else shown(used)


@group.command("set")
@click.argument("name", type=Ref("queue"))
@click.option("--weight", type=click.IntRange(min=1), help="Its share, against the others' (1).")
@click.option("--cpus", "cpu_nano", type=CPUS, help="Most CPUs its jobs hold; 0: no limit.")
@click.option("--memory", "memory_bytes", type=BYTES, help="Most memory; 0: no limit.")
@click.option(
    "--gpus",
    "gpu_nano",
    type=CPUS,
    metavar="GPUS",
    help="Most GPUs, in parts as well; 0: no limit.",
)
@click.option("--tasks", type=click.IntRange(min=0), help="Most tasks; 0: no limit.")
def set_queue(name: str, **given: Any) -> None:
    """Make a queue, or change one: only what is given changes."""
    changes = {key: value for key, value in given.items() if value is not None}

    def change(queues: dict[str, QueueSpec]) -> dict[str, QueueSpec]:
        known = name in queues or name == DEFAULT_QUEUE
        if known and not changes:
            raise Invalid(
                f"queue {name!r} exists and nothing is to be changed: give at least one option"
            )
        before = queues.get(name, QueueSpec(name=name))
        return {**queues, name: msgspec.structs.replace(before, **changes)}

    call(lambda connection: _change(connection, change))
    click.echo(name)


@group.command("rm")
@click.argument("names", nargs=-1, required=True, type=Ref("queue"), metavar="QUEUE...")
def rm(names: Sequence[str]) -> None:
    """Remove queues that no jobs are in."""
    if DEFAULT_QUEUE in names:
        raise Invalid(
            f"queue {DEFAULT_QUEUE!r} is always there; change its limits with `swarmctl queue set "
            f"{DEFAULT_QUEUE}`"
        )

    def change(queues: dict[str, QueueSpec]) -> dict[str, QueueSpec]:
        for name in names:
            if name not in queues:
                known = ", ".join([DEFAULT_QUEUE, *sorted(set(queues) - {DEFAULT_QUEUE})])
                raise NotFound(f"there is no queue {name!r} (queues: {known})")
        return {name: spec for name, spec in queues.items() if name not in names}

    call(lambda connection: _change(connection, change))
    for name in names:
        click.echo(name)


async def _change(
    connection: Connection, change: Callable[[dict[str, QueueSpec]], dict[str, QueueSpec]]
) -> None:
    """Changes the queues, against the cluster as it is; again when somebody else was faster."""
    for attempt in range(1, ATTEMPTS + 1):
        before = await get_cluster(connection)
        spec = before.spec or ClusterSpec()
        scheduling = spec.scheduling or SchedulingConfig()
        queues = change({queue.name: queue for queue in scheduling.queues})
        scheduling = msgspec.structs.replace(
            scheduling, queues=tuple(queues[name] for name in sorted(queues))
        )
        try:
            await update_cluster(
                connection, before, msgspec.structs.replace(spec, scheduling=scheduling)
            )
        except Conflict:
            if attempt == ATTEMPTS:
                raise
        else:
            return
