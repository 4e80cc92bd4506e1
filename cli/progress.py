"""Progress of services on stderr: a live display on a terminal, plain lines elsewhere.

`rows` is what both show, as values; the rest draws. The live display counts down by itself while
tasks are watched; plain lines come when a service's state changes, not with every number, so that a
build's log stays short. rich is imported for the live display only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from cli.verdict import done
from swarm.clock import SECOND_NS
from swarm.quantities import format_duration, parse_duration
from swarm.v1 import ServiceStatus, TaskState, UpdateState

if TYPE_CHECKING:
    from cli.converge import Display
    from cli.settings import Terminal
    from cli.verdict import Progress
    from swarm.clock import Clock

__all__ = ["Row", "make_display", "rows"]

BAR_WIDTH = 20  # characters
ROWS_MAX = 30  # services shown at once; the rest is a number
REFRESH_PER_SECOND = 8
REPEAT_EVERY_S = 5.0  # between plain lines of a service that differ in their numbers only
# Reasons that only count states, or say that tasks are watched or not all replaced yet: the display
# does so itself.
_COUNTED = re.compile(
    r"\d+ of \d+ (replicas?|tasks?|nodes?) "
    r"(((is|are) )?[a-z]+|.* must keep running for .*|.* not yet on the current version)"
)
_NEXT_TRY = re.compile(r"next try in ([0-9.hmµn]*s)\b")
_NOW = "next try now"
_NUMBER = re.compile(r"\d+")
_RUNNING = TaskState.RUNNING.name.lower()
_COMPLETE = TaskState.COMPLETE.name.lower()


@dataclass(frozen=True, slots=True)
class Row:
    """One service's line."""

    name: str
    done: int
    total: int
    # A value of cli.verdict.Progress.
    progress: str
    # "2 starting, 1 preparing"
    states: str
    reasons: tuple[str, ...]
    # What `done` counts: running, completed, or updated.
    unit: str = "running"
    # Seconds until it counts as converged if its tasks go on running; 0: that is not what it waits
    # for.
    settles_in_s: int = 0


def rows(
    statuses: Sequence[ServiceStatus],
    progress: Mapping[str, Progress],
    *,
    removing: bool,
    elapsed_s: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row per service in order of name. `elapsed_s`: by service, how old its status is."""
    ages = elapsed_s or {}
    return [
        _row(
            status,
            progress[status.service_id].value,
            ages.get(status.service_id, 0.0),
            removing=removing,
        )
        for status in sorted(statuses, key=lambda status: status.name)
    ]


def _row(status: ServiceStatus, progress: str, elapsed_s: float, *, removing: bool) -> Row:
    number, unit = done(status)
    already = _COMPLETE if unit == "completed" else _RUNNING
    counted = sorted(
        ((state, number) for state, number in status.states.items() if number and state != already),
        key=lambda pair: (
            TaskState[pair[0].upper()] if pair[0].upper() in TaskState.__members__ else 0
        ),
    )
    states = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in counted)
    if removing:
        left = status.stopping
        noun = "task" if left == 1 else "tasks"
        return Row(status.name, 0, 0, progress, f"{left} {noun} left" if left else "", ())
    if status.stopping:
        states = ", ".join(filter(None, (states, f"{status.stopping} stopping")))
    # "2 of 3 replicas starting" says what the states say already.
    update = status.update_status
    under_way = update.message if update and update.state is UpdateState.UPDATING else ""
    reasons = tuple(
        _counted_down(reason, elapsed_s)
        for reason in status.reasons
        if not _COUNTED.fullmatch(reason) and reason != under_way
    )
    settles_in_s = 0
    if status.settles_in_ns:
        # It is over when the manager says so, not before.
        settles_in_s = max(1, math.ceil(status.settles_in_ns / SECOND_NS - elapsed_s))
    return Row(status.name, number, status.desired, progress, states, reasons, unit, settles_in_s)


def _counted_down(reason: str, elapsed_s: float) -> str:
    """A reason that says when the next try is, so long after it was said."""

    def left(found: re.Match[str]) -> str:
        try:
            left_s = math.ceil(parse_duration(found[1]) / SECOND_NS - elapsed_s)
        except ValueError:
            return found[0]  # of another version: it is shown as it came
        return f"next try in {format_duration(left_s * SECOND_NS)}" if left_s > 0 else _NOW

    return _NEXT_TRY.sub(left, reason)


class NoDisplay:
    """Shows nothing; for --quiet."""

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


def make_display(
    terminal: Terminal, clock: Clock, *, removing: bool = False, quiet: bool = False
) -> Display:
    """The display that fits the terminal of stderr."""
    if quiet:
        return NoDisplay()
    if terminal.interactive:
        return LiveDisplay(terminal, clock, removing=removing)
    return PlainDisplay(clock, removing=removing)


class PlainDisplay:
    """A line whenever a service's state changes; for files and pipes. Lines that differ in their
    numbers only, and those of a service that goes round in a circle, come again after
    `REPEAT_EVERY_S` at the earliest.
    """

    def __init__(self, clock: Clock, *, removing: bool = False) -> None:
        self._clock = clock
        self._removing = removing
        # By service: its last line, and when each of its lines was written, numbers left out.
        self._last: dict[str, str] = {}
        self._written_s: dict[tuple[str, str], float] = {}

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        now_s = self._clock.monotonic_s()
        for row in rows(statuses, progress, removing=self._removing):
            line = plain_line(row, removing=self._removing)
            if line == self._last.get(row.name):
                continue
            key = row.name, _NUMBER.sub("", line)
            written_s = self._written_s.get(key)
            if written_s is not None and now_s - written_s < REPEAT_EVERY_S:
                continue
            self._last[row.name] = line
            self._written_s[key] = now_s
            click.echo(line, err=True)

    def close(self) -> None:
        """Nothing is left open."""


def plain_line(row: Row, *, removing: bool = False) -> str:
    """ "app_web: 3/5 running, 2 starting; no suitable node …"."""
    if row.progress == "removed":
        return f"{row.name}: removed"
    if removing:
        return f"{row.name}: removing" + (f", {row.states}" if row.states else "")
    line = f"{row.name}: {row.done}/{row.total} {row.unit}"
    if row.progress == "stuck":
        line += ", stuck"
    elif row.progress != "going":
        return f"{line}, {row.progress}"
    elif _watched(row):
        # Without the seconds: the next line says when they are over.
        line += ", verifying"
    elif row.states:
        line += f", {row.states}"
    return f"{line}; {row.reasons[0]}" if row.reasons and not row.settles_in_s else line


def _watched(row: Row) -> bool:
    """Whether all that is left is to see that its tasks go on running."""
    at_rest = row.total and row.done == row.total and not row.states and not row.reasons
    return bool(row.settles_in_s or at_rest)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest statuses, and when each service's came: one that comes again, because another
    service has changed, goes on counting from then.
    """

    statuses: tuple[ServiceStatus, ...] = ()
    progress: Mapping[str, Progress] = field(default_factory=dict)
    at_s: Mapping[str, float] = field(default_factory=dict)

    def next(
        self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress], now_s: float
    ) -> _Seen:
        """With the statuses that came now."""
        before = {status.service_id: status for status in self.statuses}
        at_s = {
            status.service_id: self.at_s[status.service_id]
            if before.get(status.service_id) == status
            else now_s
            for status in statuses
        }
        return _Seen(tuple(statuses), dict(progress), at_s)

    def rows(self, now_s: float, *, removing: bool) -> list[Row]:
        elapsed_s = {id_: now_s - at_s for id_, at_s in self.at_s.items()}
        return rows(self.statuses, self.progress, removing=removing, elapsed_s=elapsed_s)


class LiveDisplay:
    """A line per service that is drawn anew as things change."""

    def __init__(self, terminal: Terminal, clock: Clock, *, removing: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._clock = clock
        self._removing = removing
        self._seen = _Seen()
        # One for all rows and frames: a new one would always show its first frame.
        self._spinner = Spinner("dots", style=_COLOURS["going"])
        console = Console(
            stderr=True,
            no_color=not terminal.colour,
            # The "^C" that a terminal echoes must not wrap: lines would be drawn one too low.
            width=max(1, terminal.width - len("^C")) if terminal.width else None,
            highlight=False,
        )
        self._height = console.size.height
        # Drawn anew some times a second, for the spinners and the seconds that are left.
        self._live = Live(
            console=console,
            refresh_per_second=REFRESH_PER_SECOND,
            transient=False,
            get_renderable=self._draw,
        )
        self._live.start()

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        self._seen = self._seen.next(statuses, progress, self._clock.monotonic_s())
        self._live.refresh()

    def _draw(self) -> Any:
        """Runs in rich's thread as well: it reads what `show` replaces whole."""
        found = self._seen.rows(self._clock.monotonic_s(), removing=self._removing)
        limit = max(3, min(ROWS_MAX, self._height - 4))
        return draw(found, limit=limit, spinner=self._spinner)

    def close(self) -> None:
        self._live.stop()


_COLOURS = {
    "going": "cyan",
    "converged": "green",
    "removed": "green",
    "paused": "red",
    "stuck": "red",
    "awaits a person": "yellow",
    "rolled back": "yellow",
    "superseded": "yellow",
}


def draw(found: Sequence[Row], *, limit: int, spinner: Any) -> Any:
    """The rows as rich draws them; services that still move come first when there are too many."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = list(found)
    if len(shown) > limit:
        shown = sorted(shown, key=lambda row: row.progress != "going")[:limit]
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(ratio=1, overflow="fold")
    for row in shown:
        colour = _COLOURS[row.progress]
        mark: Any = Text("✓" if row.progress in ("converged", "removed") else "!", style=colour)
        if row.progress == "going":
            mark = spinner
        numbers = f"{row.done}/{row.total}" if row.total else ""
        text = Text(_state(row), style="dim")
        told = row.progress in ("going", "paused", "stuck") and not row.settles_in_s
        for reason in row.reasons if told else ():
            text.append(f"\n{reason}" if text.plain else reason, style="yellow")
        table.add_row(mark, Text(row.name), bar(row, colour), numbers, text)
    hidden = len(found) - len(shown)
    if not hidden:
        return table
    return Group(table, Text(f"  … and {hidden} more services", style="dim"))


def _state(row: Row) -> str:
    """ "2 starting", "verifying, 4 s", "converged"."""
    if row.progress != "going":
        return row.progress
    if row.settles_in_s:
        return f"verifying, {row.settles_in_s} s"
    return "verifying" if _watched(row) else row.states


def bar(row: Row, colour: str) -> Any:
    """The share that is done; nothing where no number is known."""
    from rich.text import Text

    if not row.total:
        return Text("")
    full = min(BAR_WIDTH, row.done * BAR_WIDTH // row.total)
    text = Text("━" * full, style=colour)
    text.append("─" * (BAR_WIDTH - full), style="bright_black")  # thin: told apart without colour
    return text
