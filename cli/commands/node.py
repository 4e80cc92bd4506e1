"""`swarmctl node`: the cluster's hosts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import click
import msgspec

from cli.commands.rebalance import of_node
from cli.connection import Connection, call
from cli.format import Record, print_rows
from cli.gpu_view import list_gpus, totals
from cli.lazy import Group
from cli.objects import get_each, inspect_all, list_objects, name_of, raise_all, remove_all
from cli.options import (
    Ref,
    TaskList,
    format_option,
    key_values,
    list_options,
    make_filters,
    task_list_options,
)
from cli.pretty import describe_node, manager_word
from cli.settings import settings
from cli.tasks import list_tasks
from swarm.errors import Conflict, Invalid, NotFound, SwarmError
from swarm.gpus import WHOLE, format_share
from swarm.v1 import (
    Availability,
    GetInfoRequest,
    GetRequest,
    GpuUsage,
    Kind,
    Node,
    NodeRole,
    NodeSpec,
    RuntimeProblem,
    Spec,
    UpdateRequest,
)

COLUMNS = (
    ("ID", "_ID"),
    ("HOSTNAME", "Hostname"),
    ("STATUS", "Status"),
    ("AVAILABILITY", "_Availability"),
    ("MANAGER STATUS", "ManagerStatus"),
    ("ENGINE VERSION", "EngineVersion"),
)
# RuntimeProblem.cause in a table; `node inspect` has the sentence.
PROBLEMS = {"engine_unresponsive": "not answering", "disk_full": "disk full"}
ATTEMPTS = 5  # of an update against concurrent ones
NODES = click.argument("nodes", nargs=-1, required=True, type=Ref("node"), metavar="NODE...")


@click.group(cls=Group)
def group() -> None:
    """Manage nodes."""


@group.command("ls")
@list_options("id", "name", "label", "node.label", "role", "membership")
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool) -> None:
    """List nodes; * marks the one that answers. GPUS: free ones, of how many."""

    async def work(connection: Connection) -> tuple[list[Node], str, Sequence[GpuUsage]]:
        nodes = await list_objects(connection, Kind.NODE, filters=make_filters(filters))
        info = await connection.control.get_info(GetInfoRequest())
        has_gpus = any(node.description and node.description.gpus for node in nodes)
        return nodes, info.node_id, await list_gpus(connection) if has_gpus else ()

    nodes, self_id, gpus = call(work)
    shares = totals(gpus)
    rows = [node_row(node, self_id, shares.get(node.id, (0, 0))) for node in nodes]
    rows.sort(key=lambda row: (str(row["Hostname"]), str(row["ID"])))
    if form == "json":
        rows = [Record({k: v for k, v in row.items() if not k.startswith("_")}) for row in rows]
    columns = (*COLUMNS, ("GPUS", "GPUs")) if shares else COLUMNS
    print_rows(rows, columns, form=form, quiet=quiet, terminal=settings().terminal())


def node_row(node: Node, self_id: str, gpus: tuple[int, int]) -> Record:
    """A row of `node ls`; `gpus`: free shares, and how many there are."""
    description, status, manager = node.description, node.status, node.manager_status
    assert node.spec is not None
    engine = description.engine if description else None
    mine = node.id == self_id
    labels = node.spec.labels
    return Record(
        _ID=f"{node.id} {'*' if mine else ''}",
        ID=node.id,
        Self=mine,
        Hostname=name_of(node),
        Status=status.state.name.capitalize() if status else "Unknown",
        Availability=node.spec.availability.name.capitalize(),
        _Availability=_availability(node),
        RuntimeProblems="; ".join(p.message for p in _problems(node)),
        ManagerStatus=manager_word(node),
        EngineVersion=engine.version if engine else "",
        Engine=engine.name if engine else "",
        AgentVersion=description.agent_version if description else "",
        Runtimes=",".join(description.runtimes) if description else "",
        Addr=status.addr if status else "",
        Message=status.message if status else "",
        Role=node.spec.role.name.lower(),
        ManagerAddr=manager.addr if manager else "",
        StoreVersion=manager.engine_version if manager else "",
        GPUs=f"{format_share(gpus[0])}/{gpus[1]}" if gpus[1] else "",
        GPUsFree=gpus[0] / WHOLE,
        GPUsTotal=gpus[1],
        Labels=",".join(f"{k}={v}" for k, v in sorted(labels.items())),
        Label=lambda key: labels.get(key, ""),
    )


def _problems(node: Node) -> Sequence[RuntimeProblem]:
    return node.description.runtime_problems if node.description is not None else ()


def _availability(node: Node) -> str:
    """ "Active", "Active (docker: not answering)"."""
    assert node.spec is not None
    word = node.spec.availability.name.capitalize()
    short = (
        # The first is the node's runtime; the rest are what that offers to run containers with.
        f"{''.join(p.runtimes[:1])}: {PROBLEMS.get(p.cause, p.cause.replace('_', ' '))}"
        for p in _problems(node)
    )
    found = ", ".join(dict.fromkeys(short))
    return f"{word} ({found})" if found else word


@group.command()
@click.argument("nodes", nargs=-1, type=Ref("node"), metavar="[NODE...]")
@task_list_options("id", "name", "label", "desired-state")
def ps(nodes: tuple[str, ...], *, wanted: TaskList) -> None:
    """List the tasks of nodes; of the one that answers when none is named."""

    async def work(connection: Connection) -> list[SwarmError]:
        refs = await _with_self(connection, nodes or ("self",))
        found, problems = await get_each(connection, Kind.NODE, refs)
        ids = [answer.object.node.id for answer in found if answer.object and answer.object.node]
        if ids:
            await list_tasks(connection, settings(), wanted, node=ids)
        return problems

    raise_all(call(work))


async def _with_self(connection: Connection, refs: tuple[str, ...]) -> list[str]:
    """The references with `self` replaced by the answering node's id."""
    if "self" not in refs:
        return list(refs)
    info = await connection.control.get_info(GetInfoRequest())
    return [info.node_id if ref == "self" else ref for ref in refs]


@group.command()
@click.argument("nodes", nargs=-1, required=True, type=Ref("node"), metavar="self|NODE...")
@format_option
@click.option("--pretty", is_flag=True, help="Print for people.")
def inspect(nodes: tuple[str, ...], form: str, *, pretty: bool) -> None:
    """Show nodes; self is the one that answers."""
    refs = list(nodes)
    if "self" in refs:

        async def work(connection: Connection) -> list[str]:
            return await _with_self(connection, nodes)

        refs = call(work)
    describe = partial(describe_node, gpus=call(list_gpus)) if pretty else None
    inspect_all(Kind.NODE, refs, form=form, pretty=describe)


@group.command()
@click.argument("node", type=Ref("node"))
@click.option(
    "--availability",
    type=click.Choice(["active", "pause", "drain"]),
    help="active takes tasks; pause takes no new ones; drain moves its tasks away.",
)
@click.option("--role", type=click.Choice(["worker", "manager"]), help="Role of the node.")
@click.option("--label-add", multiple=True, metavar="KEY=VALUE", help="Add or change a label.")
@click.option("--label-rm", multiple=True, metavar="KEY", help="Remove a label.")
def update(
    node: str,
    availability: str | None,
    role: str | None,
    label_add: tuple[str, ...],
    label_rm: tuple[str, ...],
) -> None:
    """Change a node's availability, role or labels."""
    added = key_values(label_add, option="--label-add")

    def change(spec: NodeSpec) -> NodeSpec:
        labels = dict(spec.labels)
        for key in label_rm:
            if key not in labels:
                raise NotFound(
                    f"node {node!r} has no label {key!r} (labels: "
                    f"{', '.join(sorted(labels)) or 'none'})"
                )
            del labels[key]
        return msgspec.structs.replace(
            spec,
            labels=labels | added,
            role=NodeRole[role.upper()] if role else spec.role,
            availability=Availability[availability.upper()] if availability else spec.availability,
        )

    if not (availability or role or label_add or label_rm):
        raise Invalid("nothing to change: give --availability, --role, --label-add or --label-rm")

    async def work(connection: Connection) -> None:
        await _change(connection, node, change)

    call(work)
    click.echo(node)


async def _change(connection: Connection, ref: str, change: Callable[[NodeSpec], NodeSpec]) -> bool:
    """Changes a node's spec against its current version; False when nothing changes. Repeats when
    somebody else was faster.
    """
    for attempt in range(ATTEMPTS):
        [ref_] = await _with_self(connection, (ref,))
        answer = await connection.control.get(GetRequest(kind=Kind.NODE, ref=ref_))
        found = answer.object.node if answer.object else None
        assert found is not None and found.spec is not None and found.meta is not None
        spec = change(found.spec)
        if spec == found.spec:
            return False
        request = UpdateRequest(
            kind=Kind.NODE, id=found.id, version=found.meta.version, spec=Spec(node=spec)
        )
        try:
            await connection.control.update(request)
        except Conflict:
            if attempt == ATTEMPTS - 1 or not await _moved(connection, found):
                raise
        else:
            return True
    return False


async def _moved(connection: Connection, before: Node) -> bool:
    """Whether the node has changed since; else a conflict has another cause and repeats."""
    answer = await connection.control.get(GetRequest(kind=Kind.NODE, ref=before.id))
    return answer.object is not None and answer.object.node != before


@group.command()
@NODES
def promote(nodes: tuple[str, ...]) -> None:
    """Make nodes managers."""
    _set_role(nodes, NodeRole.MANAGER)


@group.command()
@NODES
def demote(nodes: tuple[str, ...]) -> None:
    """Make managers workers."""
    _set_role(nodes, NodeRole.WORKER)


def _set_role(nodes: tuple[str, ...], role: NodeRole) -> None:
    def change(spec: NodeSpec) -> NodeSpec:
        return msgspec.structs.replace(spec, role=role)

    async def work(connection: Connection) -> list[SwarmError]:
        problems: list[SwarmError] = []
        for ref in nodes:
            try:
                changed = await _change(connection, ref, change)
            except SwarmError as error:
                problems.append(error)
                continue
            name = role.name.lower()
            if not changed:
                click.echo(f"Node {ref} is already a {name}.")
            elif role is NodeRole.MANAGER:
                click.echo(f"Node {ref} promoted to a manager in the swarm.")
            else:
                click.echo(f"Manager {ref} demoted in the swarm.")
        return problems

    raise_all(call(work))


@group.command()
@NODES
@click.option("-f", "--force", is_flag=True, help="Although the node is up.")
def rm(nodes: tuple[str, ...], *, force: bool) -> None:
    """Remove nodes that have left or are lost."""
    remove_all(Kind.NODE, nodes, force=force)


group.add_command(of_node)
