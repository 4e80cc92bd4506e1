"""Progress of services on stderr: a live display on a terminal, plain lines elsewhere.

`rows` is what both show, as values; the rest draws. rich is imported for the live display only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from swarm.v1 import ServiceStatus, TaskState

if TYPE_CHECKING:
    from cli.converge import Display, Progress
    from cli.settings import Terminal

__all__ = ["Row", "make_display", "rows"]

BAR_WIDTH = 20  # characters
ROWS_MAX = 30  # services shown at once; the rest is a number
REFRESH_PER_SECOND = 8
_COUNTED = re.compile(r"\d+ of \d+ (replicas|tasks|nodes) [a-z]+")
_RUNNING = TaskState.RUNNING.name.lower()


@dataclass(frozen=True, slots=True)
class Row:
    """One service's line."""

    name: str
    done: int
    total: int
    # going, converged, removed, paused or rolled back.
    progress: str
    # "2 starting, 1 preparing"
    states: str
    reasons: tuple[str, ...]
    # What `done` counts: running, or updated while tasks of an earlier version run as well.
    unit: str = "running"


def rows(
    statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress], *, removing: bool
) -> list[Row]:
    """A row per service in order of name."""
    return [
        _row(status, progress[status.service_id].value, removing=removing)
        for status in sorted(statuses, key=lambda status: status.name)
    ]


def _row(status: ServiceStatus, progress: str, *, removing: bool) -> Row:
    counted = sorted(
        (
            (state, number)
            for state, number in status.states.items()
            if number and state != _RUNNING
        ),
        key=lambda pair: (
            TaskState[pair[0].upper()] if pair[0].upper() in TaskState.__members__ else 0
        ),
    )
    states = ", ".join(f"{number} {state}" for state, number in counted)
    if removing:
        left = status.stopping
        noun = "task" if left == 1 else "tasks"
        return Row(status.name, 0, 0, progress, f"{left} {noun} left" if left else "", ())
    if status.stopping:
        states = ", ".join(filter(None, (states, f"{status.stopping} stopping")))
    done = max(status.up_to_date, status.completed)
    # "2 of 3 replicas starting" says what the states say already.
    reasons = tuple(reason for reason in status.reasons if not _COUNTED.fullmatch(reason))
    unit = "updated" if status.running > status.up_to_date else "running"
    return Row(status.name, done, status.desired, progress, states, reasons, unit)


class NoDisplay:
    """Shows nothing; for --quiet."""

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing is open."""


def make_display(terminal: Terminal, *, removing: bool = False, quiet: bool = False) -> Display:
    """The display that fits the terminal of stderr."""
    if quiet:
        return NoDisplay()
    if terminal.interactive:
        return LiveDisplay(terminal, removing=removing)
    return PlainDisplay(removing=removing)


class PlainDisplay:
    """A line whenever a service's numbers or reasons change; for files and pipes."""

    def __init__(self, *, removing: bool = False) -> None:
        self._removing = removing
        self._shown: dict[str, str] = {}

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        for row in rows(statuses, progress, removing=self._removing):
            line = plain_line(row, removing=self._removing)
            if self._shown.get(row.name) != line:
                self._shown[row.name] = line
                click.echo(line, err=True)

    def close(self) -> None:
        """Nothing is left open."""


def plain_line(row: Row, *, removing: bool = False) -> str:
    """ "app_web: 3/5 running, 2 starting (no suitable node …)"."""
    if row.progress == "removed":
        return f"{row.name}: removed"
    if removing:
        return f"{row.name}: removing" + (f", {row.states}" if row.states else "")
    line = f"{row.name}: {row.done}/{row.total} {row.unit}"
    if row.progress != "going":
        return f"{line}, {row.progress}"
    if row.states:
        line += f", {row.states}"
    return f"{line} ({row.reasons[0]})" if row.reasons else line


class LiveDisplay:
    """A line per service that is drawn anew as things change."""

    def __init__(self, terminal: Terminal, *, removing: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live

        self._removing = removing
        console = Console(
            stderr=True,
            no_color=not terminal.colour,
            # The "^C" that a terminal echoes must not wrap: lines would be drawn one too low.
            width=max(1, terminal.width - len("^C")) if terminal.width else None,
            highlight=False,
        )
        self._height = console.size.height
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_SECOND, transient=False)
        self._live.start()

    def show(self, statuses: Sequence[ServiceStatus], progress: Mapping[str, Progress]) -> None:
        found = rows(statuses, progress, removing=self._removing)
        self._live.update(draw(found, limit=max(3, min(ROWS_MAX, self._height - 4))))

    def close(self) -> None:
        self._live.stop()


_COLOURS = {
    "going": "cyan",
    "converged": "green",
    "removed": "green",
    "paused": "red",
    "rolled back": "yellow",
}


def draw(found: Sequence[Row], *, limit: int) -> Any:
    """The rows as rich draws them; services that still move come first when there are too many."""
    from rich.console import Group
    from rich.spinner import Spinner
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
            mark = Spinner("dots", style=colour)
        numbers = f"{row.done}/{row.total}" if row.total else ""
        text = Text(row.progress if row.progress != "going" else row.states, style="dim")
        for reason in row.reasons if row.progress in ("going", "paused") else ():
            text.append(f"\n{reason}" if text.plain else reason, style="yellow")
        table.add_row(mark, Text(row.name), bar(row, colour), numbers, text)
    hidden = len(found) - len(shown)
    if not hidden:
        return table
    return Group(table, Text(f"  … and {hidden} more services", style="dim"))


def bar(row: Row, colour: str) -> Any:
    """The share that is done; nothing where no number is known."""
    from rich.text import Text

    if not row.total:
        return Text("")
    full = min(BAR_WIDTH, row.done * BAR_WIDTH // row.total)
    text = Text("━" * full, style=colour)
    text.append("─" * (BAR_WIDTH - full), style="bright_black")  # thin: told apart without colour
    return text
