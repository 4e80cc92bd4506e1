"""Option types and options that several commands share.

Values are parsed into the contract's units here, once; a wrong one is a usage error that names the
option, the value and the accepted forms.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import click

from swarm import quantities
from swarm.errors import Invalid, NotFound, SwarmError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cli.connection import Connection
    from swarm.v1 import Filter, Kind

__all__ = [
    "BYTES",
    "CPUS",
    "DURATION",
    "Ref",
    "ServiceVersionRef",
    "StackRevisionRef",
    "TaskList",
    "detach_options",
    "filter_option",
    "format_option",
    "key_values",
    "list_options",
    "make_filters",
    "no_trunc_option",
    "quiet_names_option",
    "quiet_option",
    "read_input",
    "task_list_options",
    "timeout_option",
]

# click's types became generic in 8.2; older ones cannot be subscripted.
if TYPE_CHECKING:
    _IntType = click.ParamType[int]
    _TextType = click.ParamType[str]
else:
    _IntType = _TextType = click.ParamType

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
COMPLETE_S = 2.0  # somebody has pressed Tab and waits


class Quantity(_IntType):
    """A number with a unit, parsed by swarm.quantities."""

    def __init__(self, name: str, parse: Callable[[str], int]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


BYTES = Quantity("bytes", quantities.parse_bytes)
CPUS = Quantity("cpus", quantities.parse_cpus)
DURATION = Quantity("duration", quantities.parse_duration)


class Ref(_TextType):
    """A name, id or id prefix of objects; the name of a queue or a GPU. Completes names."""

    def __init__(self, kind: str, *more: str) -> None:
        self.name = kind
        self._kinds = (kind, *more)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        try:
            names = [name for kind in self._kinds for name in _names(ctx, kind)]
        except SwarmError:
            # A completion has nowhere to show an error; the command itself will.
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class _NumberRef(_IntType):
    """A number that belongs to an object, which another argument names; completes those kept."""

    # The argument that names the object, and the command that lists the numbers.
    holder = ""
    listed_by = ""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not value.isdecimal() or not int(value):
            self.fail(
                f"{value!r} is not a {self.name}; write its number, as `{self.listed_by}` shows "
                "it.",
                param,
                ctx,
            )
        return int(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        # An option still without its value leaves the arguments where they stood.
        held = ctx.params.get(self.holder) or next(iter(ctx.args), "")
        try:
            found = self._kept(ctx, held) if held else []
        except SwarmError:
            return []
        return [
            CompletionItem(number, help=text)
            for number, text in found
            if number.startswith(incomplete)
        ]

    def _kept(self, ctx: click.Context, held: str) -> list[tuple[str, str]]:
        """Those of the object, newest first, and what helps to choose."""
        raise NotImplementedError


class StackRevisionRef(_NumberRef):
    """A revision of the stack that the command's `stack` argument names."""

    name = "revision"
    holder = "stack"
    listed_by = "swarmctl stack history"

    def _kept(self, ctx: click.Context, held: str) -> list[tuple[str, str]]:
        return _revisions(ctx, held)


class ServiceVersionRef(_NumberRef):
    """An earlier version of the service that the command's `service` argument names."""

    name = "version"
    holder = "service"
    listed_by = "swarmctl service history"

    def _kept(self, ctx: click.Context, held: str) -> list[tuple[str, str]]:
        return _versions(ctx, held)


def _ask(ctx: click.Context, ask: Callable[[Connection], Awaitable[T]]) -> T:
    """What a manager answers while a line is being completed."""
    import asyncio
    import os

    from cli.connection import Connection, resolve
    from cli.settings import Settings

    root = ctx.find_root()
    settings = Settings.from_environment(
        os.environ,
        host=root.params.get("host"),
        context_name=root.params.get("context_name"),
        debug=False,
    )

    async def work() -> T:
        async with Connection(resolve(settings)) as connection:
            return await ask(connection)

    return asyncio.run(work())


def _names(ctx: click.Context, kind: str) -> list[str]:
    """Names of all objects of a kind."""
    from swarm.v1 import Kind, ListRequest, ListResponse

    async def ask(connection: Connection) -> ListResponse:
        request = ListRequest(kind=Kind[kind.upper()], filters=only)
        return await connection.control.list(request, timeout_s=COMPLETE_S)

    if kind == "queue":
        return _queues(ctx)
    if kind == "gpu":
        return _gpus(ctx)
    only: tuple[Filter, ...] = ()
    if kind == "job":
        kind, only = "service", make_filters((), mode=("replicated-job", "global-job"))
    found = []
    for item in _ask(ctx, ask).objects:
        thing = getattr(item, kind)
        if kind == "node":
            found.append(thing.spec.name or thing.description.hostname)
        else:
            found.append(thing.id if kind == "task" else thing.spec.name)
    return found


def _queues(ctx: click.Context) -> list[str]:
    """Names of the queues of jobs."""
    from swarm.v1 import ListQueuesRequest, ListQueuesResponse

    async def ask(connection: Connection) -> ListQueuesResponse:
        return await connection.control.list_queues(ListQueuesRequest(), timeout_s=COMPLETE_S)

    return [found.spec.name for found in _ask(ctx, ask).queues if found.spec is not None]


def _gpus(ctx: click.Context) -> list[str]:
    """Whole GPUs by host and index, instances by their UUID."""
    from swarm.v1 import ListGpusRequest, ListGpusResponse

    async def ask(connection: Connection) -> ListGpusResponse:
        return await connection.control.list_gpus(ListGpusRequest(), timeout_s=COMPLETE_S)

    return [
        found.gpu.uuid if found.gpu.parent_uuid else f"{found.hostname}/{found.gpu.index}"
        for found in _ask(ctx, ask).gpus
        if found.gpu is not None
    ]


def _revisions(ctx: click.Context, stack: str) -> list[tuple[str, str]]:
    """Revisions of a stack, newest first, and who deployed them."""
    from swarm.v1 import GetStackHistoryRequest, GetStackHistoryResponse

    async def ask(connection: Connection) -> GetStackHistoryResponse:
        request = GetStackHistoryRequest(stack=stack)
        return await connection.control.get_stack_history(request, timeout_s=COMPLETE_S)

    return [(str(found.revision), found.who) for found in _ask(ctx, ask).revisions]


def _versions(ctx: click.Context, service: str) -> list[tuple[str, str]]:
    """Versions that a service can go back to, newest first, and what they run."""
    from swarm.v1 import GetServiceHistoryRequest, GetServiceHistoryResponse

    async def ask(connection: Connection) -> GetServiceHistoryResponse:
        request = GetServiceHistoryRequest(service=service)
        return await connection.control.get_service_history(request, timeout_s=COMPLETE_S)

    found = []
    for version in _ask(ctx, ask).versions[1:]:
        revision = version.revision
        task = revision.spec.task if revision is not None and revision.spec is not None else None
        image = task.container.image.partition("@")[0] if task and task.container else ""
        if revision is not None:
            found.append((str(revision.spec_version), image))
    return found


# ------------------------------------------------------------------ shared options

format_option = click.option(
    "--format",
    "form",
    default="",
    metavar="FORMAT",
    help="table, json, yaml, a Go template, or `table TEMPLATE`.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
quiet_names_option = click.option("-q", "--quiet", is_flag=True, help="Print names only.")
no_trunc_option = click.option("--no-trunc", is_flag=True, help="Print whole ids and digests.")


def filter_option(*keys: str) -> Callable[[F], F]:
    """`--filter key=value`, repeatable; the keys are named in the help."""
    return click.option(
        "-f",
        "--filter",
        "filters",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Only those that match; keys: {', '.join(keys)}.",
        callback=lambda ctx, param, values: _check_filters(values, keys),
    )


def _check_filters(values: Sequence[str], keys: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not value:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE, such as {keys[0]}=web.")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise click.BadParameter(
                f"{text!r}: there is no filter {key!r}{hint} (keys: {', '.join(keys)})."
            )
        pairs.append((key, value))
    return tuple(pairs)


def make_filters(pairs: Iterable[tuple[str, str]], **more: Sequence[str]) -> tuple[Filter, ...]:
    """The request's filters; values of one key together."""
    from swarm.v1 import Filter

    values: dict[str, list[str]] = {key: list(extra) for key, extra in more.items()}
    for key, value in pairs:
        values.setdefault(key, []).append(value)
    return tuple(Filter(key=key, values=tuple(many)) for key, many in values.items())


def list_options(*keys: str) -> Callable[[F], F]:
    """--filter, --format and -q of a list command."""

    def decorate(function: F) -> F:
        return filter_option(*keys)(format_option(quiet_option(function)))

    return decorate


@dataclass(frozen=True, slots=True)
class TaskList:
    """How a list of tasks was asked for."""

    filters: tuple[tuple[str, str], ...] = ()
    form: str = ""
    quiet: bool = False
    no_trunc: bool = False
    resolve: bool = True


def task_list_options(*keys: str) -> Callable[[F], F]:
    """The options of a command that lists tasks, filters by these keys; it gets them as one
    `wanted: TaskList`.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def gathered(
            *,
            filters: tuple[tuple[str, str], ...],
            form: str,
            quiet: bool,
            no_trunc: bool,
            no_resolve: bool,
            **arguments: Any,
        ) -> Any:
            wanted = TaskList(filters, form, quiet, no_trunc, resolve=not no_resolve)
            return function(**arguments, wanted=wanted)

        resolving = click.option("--no-resolve", is_flag=True, help="Show ids instead of names.")
        options = (filter_option(*keys), format_option, quiet_option, no_trunc_option, resolving)
        for option in reversed(options):
            gathered = option(gathered)
        return cast("F", gathered)

    return decorate


def detach_options(*, until: str = "the services have converged") -> Callable[[F], F]:
    """-d and --timeout of commands that wait."""

    def decorate(function: F) -> F:
        function = timeout_option(until=until)(function)
        return click.option("-d", "--detach", is_flag=True, help=f"Do not wait until {until}.")(
            function
        )

    return decorate


def timeout_option(*, until: str = "the services have converged") -> Callable[[F], F]:
    """--timeout of commands that wait."""
    return click.option(
        "--timeout",
        "timeout_ns",
        type=DURATION,
        default="10m",
        show_default=True,
        help=f"How long to wait until {until}; 0: without end.",
    )


# ------------------------------------------------------------------ helpers


def key_values(texts: Iterable[str], *, option: str) -> dict[str, str]:
    """`k=v` or `k` (an empty value), as labels are written."""
    found: dict[str, str] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key:
            raise click.BadParameter(
                f"{text!r}: the key is empty; write KEY=VALUE.", param_hint=option
            )
        found[key] = value
    return found


def read_input(path: str, *, what: str) -> bytes:
    """A file's content, or standard input's for "-". Raises NotFound, Invalid."""
    if path == "-":
        if sys.stdin.isatty():
            click.echo(f"Reading the {what} from the terminal; end it with Ctrl-D.", err=True)
        source: IO[bytes] = sys.stdin.buffer
        return source.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise NotFound(f"{path}: there is no such file for the {what}") from None
    except OSError as error:
        raise Invalid(f"{path}: {(error.strerror or str(error)).lower()}") from None


def kind_of(name: str) -> Kind:
    """The contract's kind of a name such as "service"."""
    from swarm.v1 import Kind

    return Kind[name.upper()]
