"""`swarmctl top`: what nodes, services and tasks use, live.

The figures, the rows and the page are cli/usage's, which is pure; here they meet the manager and
the terminal. The page is drawn with a dozen plain control sequences, and not with rich: a page is a
list of lines that fits by construction, keys are needed as well, and rich's live display neither
reads keys nor saves anything here, while importing it takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from cli import terminal
from cli.connection import Connection, call
from cli.following import Patience
from cli.format import print_rows
from cli.lazy import Command
from cli.objects import list_objects, name_of
from cli.options import DURATION, Ref, make_filters
from cli.services import STACK_LABEL, fetch_services
from cli.settings import Settings, settings
from cli.usage.keys import Keys, State, press
from cli.usage.meter import Figures, Inventory, Meter
from cli.usage.page import Look, page, room
from cli.usage.rows import VIEWS, Row, View, arranged, records
from swarm.clock import SECOND_NS
from swarm.errors import Invalid, NotFound, Unavailable
from swarm.quantities import format_duration
from swarm.v1 import GetRequest, Kind, StatsRequest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

PERIOD_NS_MIN = SECOND_NS // 5
KNOW_S = 5.0  # how often nodes and services are asked for
KNOW_SHARE = 20  # and that takes at most one of so many parts of the time
DRAW_S = 0.2  # between pages that only measurements change
TICK_S = 1.0  # between pages when nothing comes
ESCAPE_S = 0.05  # what comes later does not belong to the Escape that was typed
NOTHING_YET = "waiting for the first measurements"


class _Word(Ref):
    """A view or a reference; completes both."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        views = [CompletionItem(name) for name in VIEWS if name.startswith(incomplete)]
        given = ctx.params.get(param.name or "") or ()
        if "nodes" in given:
            return Ref("node").shell_complete(ctx, param, incomplete)
        names = super().shell_complete(ctx, param, incomplete)
        return names if given else views + names


@click.command(cls=Command)
@click.option(
    "--sort", default="", metavar="COLUMN", help="Sort by this column: name, cpu, mem, net …"
)
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option(
    "--interval",
    "period_ns",
    type=DURATION,
    default="1s",
    show_default=True,
    help="Between two measurements; at least 200ms.",
)
@click.option("--no-stream", is_flag=True, help="Measure once, print a table, end.")
@click.option(
    "--format",
    "form",
    default="",
    metavar="FORMAT",
    help="Lines instead of a page: table, json, a Go template, or `table TEMPLATE`.",
)
@click.argument(
    "words", nargs=-1, type=_Word("service", "task"), metavar="[nodes|services|tasks] [REF...]"
)
def command(
    words: tuple[str, ...],
    sort: str,
    period_ns: int,
    form: str,
    *,
    reverse: bool,
    no_stream: bool,
) -> int:
    """Show what tasks use just now; or nodes, or services.

    REF is a node where nodes are shown, else a service, a task, a stack or a node. On a terminal
    the page is live and takes keys, h tells which; elsewhere, and with --format, a table is printed
    again and again.
    """
    view, refs = (VIEWS[words[0]], words[1:]) if words[:1] and words[0] in VIEWS else (None, words)
    view = view or VIEWS["tasks"]
    column = view.column(sort or view.sort)
    if column < 0:
        known = ", ".join(column.field for column in view.columns)
        raise Invalid(f"--sort {sort!r}: {view.name} have no such column; there are {known}")
    if period_ns < PERIOD_NS_MIN:
        raise Invalid(f"--interval {format_duration(period_ns)}: at least 200ms")
    state = State(view.name, sorts={view.name: column}, reverse=reverse)
    if form == "yaml":
        raise Invalid("--format yaml: write json, table or a template")
    live = not no_stream and not form and settings().terminal().interactive

    async def work(connection: Connection) -> int:
        chosen = await _choose(connection, view, refs)
        request = replace_period(chosen, period_ns, once=no_stream)
        source = Source(connection, request, period_ns / SECOND_NS, refs_given=bool(refs))
        if live:
            await Live(source, state, period_ns).run()
            return 0
        return await _lines(source, state, settings(), form, once=no_stream)

    try:
        return call(work)
    except KeyboardInterrupt:
        return 0  # the way to end it


def replace_period(request: StatsRequest, period_ns: int, *, once: bool) -> StatsRequest:
    """The request with how often to measure."""
    import msgspec

    return msgspec.structs.replace(request, period_ns=period_ns, once=once)


async def _choose(connection: Connection, view: View, refs: Sequence[str]) -> StatsRequest:
    """What the references name. Raises NotFound with the first that names nothing."""
    found: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    kinds = (Kind.NODE,) if view.name == "nodes" else _KINDS
    for ref in refs:
        for kind in kinds:
            try:
                answer = await connection.control.get(GetRequest(kind=kind, ref=ref))
            except NotFound:
                continue
            held = answer.object
            if kind is Kind.STACK:
                assert held is not None and held.stack is not None
                wanted = make_filters((), label=[f"{STACK_LABEL}={name_of(held.stack)}"])
                services = await list_objects(connection, Kind.SERVICE, filters=wanted)
                found[Kind.SERVICE] += [service.id for service in services]
            else:
                item = getattr(held, kind.name.lower())
                found[kind].append(item.id)
            break
        else:
            *most, last = (kind.name.lower() for kind in kinds)
            what = f"{', '.join(most)} or {last}" if most else last
            raise NotFound(f"no such {what}: {ref}")
    return StatsRequest(
        services=tuple(found[Kind.SERVICE]),
        tasks=tuple(found[Kind.TASK]),
        nodes=tuple(found[Kind.NODE]),
    )


_KINDS = (Kind.SERVICE, Kind.TASK, Kind.STACK, Kind.NODE)


class Source:
    """Where figures come from: the measurements, taken up again when the manager goes, and the
    objects, asked for every few seconds.
    """

    def __init__(
        self, connection: Connection, request: StatsRequest, period_s: float, *, refs_given: bool
    ) -> None:
        self._connection = connection
        self._request = request
        self._chosen = refs_given
        self._meter = Meter(period_s)
        self.period_s = period_s
        # Why nothing comes; empty: it comes.
        self.lost = ""

    @property
    def complete(self) -> bool:
        """There are rates."""
        return self._meter.complete()

    def figures(self) -> Figures:
        """As they are now."""
        return self._meter.figures(_now_s())

    async def know(self) -> None:
        """Asks for the objects."""
        nodes, services = await asyncio.gather(
            list_objects(self._connection, Kind.NODE), fetch_services(self._connection, ())
        )
        request = self._request
        if request.nodes:
            nodes = [node for node in nodes if node.id in request.nodes]
        if self._chosen:
            services = [pair for pair in services if pair[0].id in request.services]
        expected = not self._chosen or bool(request.nodes)
        self._meter.know(Inventory.of(nodes, services, expected=expected))

    async def keep_knowing(self) -> None:
        """Asks again and again. What cannot be had just now is as it was."""
        while True:
            began_s = _now_s()
            with contextlib.suppress(Unavailable):
                await self.know()
            await asyncio.sleep(max(KNOW_S, KNOW_SHARE * (_now_s() - began_s)))

    async def measurements(self) -> AsyncIterator[None]:
        """Goes on with each answer. Raises Unavailable when nobody has answered for long."""
        patience = Patience()
        while True:
            try:
                async for answer in self._connection.control.stats(self._request):
                    patience.answered()
                    self.lost = ""
                    self._meter.take(answer, _now_s())
                    yield
            except Unavailable as error:
                self.lost = f"no manager answers, trying again: {error.message}"
                yield
                await patience.wait(error)
            else:
                return


def _now_s() -> float:
    return asyncio.get_running_loop().time()


# ------------------------------------------------------------------ lines


async def _lines(source: Source, state: State, told: Settings, form: str, *, once: bool) -> int:
    """Prints tables: one, or one each period; the exit code."""
    await source.know()
    knowing = asyncio.create_task(source.keep_knowing())
    printed_s = 0.0
    measured = False
    try:
        async for _ in source.measurements():
            now_s = _now_s()
            measured = measured or source.complete
            if not once and source.complete and now_s - printed_s >= source.period_s * 0.9:
                if printed_s and form in ("", "table"):
                    click.echo()
                printed_s = now_s
                _print(source.figures(), state, told, form)
    finally:
        knowing.cancel()
        await asyncio.gather(knowing, return_exceptions=True)
    figures = source.figures()
    if once or not printed_s:
        _print(figures, state, told, form)
    for problem in figures.problems:
        click.echo(f"Warning: {problem}", err=True)
    return 1 if once and figures.problems and not measured else 0


def _print(figures: Figures, state: State, told: Settings, form: str) -> None:
    rows = arranged(state.view, figures, sort=state.sort, reverse=state.reverse)
    columns = tuple((column.title, column.field) for column in state.view.columns)
    print_rows(records(state.view, rows), columns, form=form, terminal=told.terminal())
    sys.stdout.flush()


# ------------------------------------------------------------------ a page


@dataclass(slots=True)
class _Shown:
    """What the last page was made of."""

    figures: Figures
    rows: list[Row]


class Live:
    """The live page: a loop that draws when something has changed."""

    def __init__(self, source: Source, state: State, period_ns: int) -> None:
        self._source = source
        self._state = state
        self._interval = format_duration(period_ns)
        self._told = settings()
        self._screen = sys.stdout.fileno()
        self._keys = Keys()
        self._changed = asyncio.Event()
        self._stale = True  # measurements have come since the figures were worked out
        self._anew = True  # what stands on the screen is not ours
        self._shown = _Shown(source.figures(), [])
        self._drawn: list[str] = []
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Until it is to end. Raises what ends the measurements."""
        await self._source.know()  # before the screen is taken: most errors show here
        with _keyboard() as keys, terminal.whole_screen(keys, self._screen, self._begin_anew):
            if keys is not None:
                self._loop.add_reader(keys, self._typed, keys)
            measuring = asyncio.create_task(self._measure())
            knowing = asyncio.create_task(self._source.keep_knowing())
            try:
                with terminal.watch_size(self._screen, lambda size: self._begin_anew()):
                    await self._draw(measuring)
            finally:
                if keys is not None:
                    self._loop.remove_reader(keys)
                for task in (measuring, knowing):
                    task.cancel()
                await asyncio.gather(measuring, knowing, return_exceptions=True)

    async def _draw(self, measuring: asyncio.Task[None]) -> None:
        while not self._state.ended:
            self._changed.clear()
            self._page()
            if measuring.done():
                await measuring
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()

    async def _measure(self) -> None:
        try:
            async for _ in self._source.measurements():
                if not self._stale:
                    self._stale = True
                    self._loop.call_later(DRAW_S, self._changed.set)
        finally:
            self._changed.set()

    def _begin_anew(self) -> None:
        self._anew = True
        # It may be called by a signal, in the middle of whatever the loop does.
        self._loop.call_soon_threadsafe(self._changed.set)

    def _look(self) -> Look:
        size = terminal.window_size(self._screen)
        figures = self._shown.figures
        began = bool(figures.cluster.nodes_measured or figures.problems)
        return Look(
            rows=size.rows,
            columns=size.columns,
            colour=self._told.terminal().colour,
            clock=_clock(self._told),
            interval=self._interval,
            notice=self._source.lost or ("" if began else NOTHING_YET),
        )

    def _page(self) -> None:
        state, shown = self._state, self._shown
        if not state.paused:
            shown.figures = self._source.figures()
            self._stale = False
        shown.rows = arranged(
            state.view, shown.figures, sort=state.sort, reverse=state.reverse, only=state.only
        )
        lines = page(state, shown.figures, shown.rows, self._look())
        anew, self._anew = self._anew, False
        terminal.write(self._screen, _painted(lines, self._drawn if not anew else None))
        self._drawn = lines

    def _typed(self, keys: int) -> None:
        try:
            data = os.read(keys, terminal.CHUNK_BYTES)
        except OSError:
            data = b""
        if not data:  # the terminal is gone
            self._state = replace(self._state, ended=True)
        self._press(self._keys.feed(data))
        if self._keys.waiting:
            self._loop.call_later(ESCAPE_S, lambda: self._press(self._keys.rest()))

    def _press(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key == "redraw":
                self._anew = True
                continue
            count = len(self._shown.rows)
            seen = room(self._state, self._shown.figures, count, self._look())
            self._state = press(self._state, key, rows=count, page=seen)
        self._changed.set()


def _painted(lines: Sequence[str], before: Sequence[str] | None) -> bytes:
    """What makes the screen show these lines; only those that differ are sent again."""
    parts = ["\x1b[2J"] if before is None else []
    for number, line in enumerate(lines):
        if before is None or number >= len(before) or before[number] != line:
            parts.append(f"\x1b[{number + 1};1H{line}\x1b[0m\x1b[K")
    if before is not None and len(before) > len(lines):
        parts.append(f"\x1b[{len(lines) + 1};1H\x1b[J")
    return "".join(parts).encode(errors="replace")


def _clock(told: Settings) -> str:
    import datetime

    at = datetime.datetime.fromtimestamp(told.clock.now_ns() / SECOND_NS).astimezone()
    return at.strftime("%H:%M:%S")


@contextlib.contextmanager
def _keyboard() -> Iterator[int | None]:
    """Where keys come from: standard input, or the terminal itself where that is something else."""
    if sys.stdin.isatty():
        yield sys.stdin.fileno()
        return
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
