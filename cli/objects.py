"""What most commands need of the control API: get, list, inspect and remove objects of one kind.

`remove_all` and `inspect_all` go through all names and report every problem, as Docker does: one
wrong name does not hide the others.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click

from cli.connection import Connection, call
from cli.format import print_inspected
from cli.options import make_filters
from swarm.errors import NotManager, SwarmError, Unavailable
from swarm.v1 import Filter, GetRequest, GetResponse, Kind, ListRequest, RemoveRequest

__all__ = ["get_each", "inspect_all", "list_objects", "remove_all"]


Describe = Callable[[GetResponse], str]
# Asks for what a description needs beside the objects.
Prepare = Callable[[Connection, Sequence[GetResponse]], Awaitable[Describe]]


def attribute(kind: Kind) -> str:
    """The field of an Object that holds this kind."""
    return kind.name.lower()


async def list_objects(
    connection: Connection, kind: Kind, *, filters: Sequence[Filter] = ()
) -> list[Any]:
    """The structs of a kind that pass the filters, in the manager's order."""
    answer = await connection.control.list(ListRequest(kind=kind, filters=tuple(filters)))
    return [getattr(item, attribute(kind)) for item in answer.objects]


async def get_each(
    connection: Connection, kind: Kind, refs: Sequence[str]
) -> tuple[list[GetResponse], list[SwarmError]]:
    """What each reference names, and a problem for each that names nothing."""
    found: list[GetResponse] = []
    problems: list[SwarmError] = []
    for ref in refs:
        try:
            found.append(await connection.control.get(GetRequest(kind=kind, ref=ref)))
        except (NotManager, Unavailable):
            raise  # the same for every name: once is enough
        except SwarmError as error:
            problems.append(error)
    return found, problems


def inspect_all(
    kind: Kind,
    refs: Sequence[str],
    *,
    form: str,
    pretty: Describe | None = None,
    prepare: Prepare | None = None,
) -> None:
    """Prints Docker's JSON of each, or what `pretty` makes of it; `prepare` makes that in the same
    connection. Then raises the problems.
    """

    async def work(
        connection: Connection,
    ) -> tuple[list[GetResponse], list[SwarmError], Describe | None]:
        found, problems = await get_each(connection, kind, refs)
        describe = await prepare(connection, found) if prepare is not None and found else pretty
        return found, problems, describe

    found, problems, describe = call(work)
    if describe is not None or prepare is not None:
        if describe is not None and found:
            click.echo("\n\n".join(describe(answer) for answer in found))
    elif found or not problems or not form:
        from cli import docker_json  # large, and lists do without

        documents = [docker_json.from_answer(kind, answer) for answer in found]
        print_inspected(documents, form=form, known=docker_json.KNOWN)
    raise_all(problems)


def remove_all(kind: Kind, refs: Sequence[str], *, force: bool = False) -> None:
    """Removes each and prints its name as given; then raises the problems."""

    async def work(connection: Connection) -> list[SwarmError]:
        problems: list[SwarmError] = []
        for ref in refs:
            try:
                await connection.control.remove(RemoveRequest(kind=kind, ref=ref, force=force))
            except (NotManager, Unavailable):
                raise
            except SwarmError as error:
                problems.append(error)
            else:
                click.echo(ref)
        return problems

    raise_all(call(work))


def raise_all(problems: Sequence[SwarmError]) -> None:
    """Raises nothing, the one problem, or all of them."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ExceptionGroup("several", list(problems))


async def names_of(connection: Connection, kind: Kind, **filters: Sequence[str]) -> dict[str, str]:
    """Names by id; a node without a name shows its hostname."""
    found = await list_objects(connection, kind, filters=make_filters((), **filters))
    return {item.id: name_of(item) for item in found}


def name_of(item: Any) -> str:
    """What people call an object."""
    name = item.spec.name if item.spec else ""
    if not name and hasattr(item, "description") and item.description:
        name = item.description.hostname
    return str(name or item.id)
