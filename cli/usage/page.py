"""One page of `swarmctl top`: figures and a state in, lines out, as many and as wide as the
terminal has room for.

From top to bottom: what the cluster uses (one line where the page is low), what could not be
measured, the table, and a line that says which keys there are. A terminal of any size gets a page
that fits; the table keeps its title and at least one row for as long as there are three lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import click

from cli.table import text_width
from cli.usage.keys import State
from cli.usage.meter import ClusterFigures, Figures
from cli.usage.rows import GAP, Row, View, bytes_size, fitting

__all__ = ["Look", "page", "room", "shortened"]

LOW = 16  # lines; a lower page has one line for the cluster
BAR_MAX = 32  # characters
PROBLEMS_MAX = 3  # lines; one on a low page
MEASURED_ROWS = 500  # of so many rows the columns' widths are taken
# The first ones are what a person needs at least.
_KEYS = (
    ("q", "quit"),
    ("h", "help"),
    ("n", "nodes"),
    ("s", "services"),
    ("t", "tasks"),
    ("<>", "sort"),
    ("r", "reverse"),
    ("/", "filter"),
    ("p", "pause"),
)
_HELP = (
    "n  s  t        nodes, services, tasks",
    "up down j k    scroll by a row; PgUp PgDn by a page",
    "Home g, End G  to the first row, to the last",
    "< > left right sort by the column before or after; o: choose one",
    "r              reverse the order",
    "/              show only rows that contain a text; Esc: all again",
    "i              what was transferred in all, or per second",
    "p space        pause, and go on",
    "Ctrl-L         draw anew",
    "h ?            this page; any key leaves it",
    "q Ctrl-C       quit",
    "",
    "CPU % of a task or service: 100% is one CPU; of a node: all its CPUs.",
    "GPU %: the mean load of the GPUs held. Reserved: what specs set aside.",
)


@dataclass(frozen=True, slots=True)
class Look:
    """The page that there is."""

    rows: int
    columns: int
    colour: bool
    # "14:03:22"
    clock: str
    interval: str
    # What else is to be said: that nobody answers, or nothing was measured yet.
    notice: str = ""


def page(state: State, figures: Figures, rows: Sequence[Row], look: Look) -> list[str]:
    """At most `look.rows` lines. `rows` are the state's, arranged."""
    if state.mode == "help":
        lines = [shortened(line, look.columns) for line in _HELP[: max(look.rows - 1, 0)]]
        return [*lines, _styled(shortened("any key goes back", look.columns), look, dim=True)]
    top = _top(state, figures, len(rows), look)
    space = max(look.rows - len(top) - 2, 1)
    first = max(0, min(state.first, len(rows) - space))
    lines = [*top, *_table(state, rows, first, space, look, gpus=bool(figures.cluster.gpus))]
    lines += [""] * (look.rows - 1 - len(lines))
    return [*lines[: max(look.rows - 1, 0)], _last(state, look)][-look.rows :]


def room(state: State, figures: Figures, count: int, look: Look) -> int:
    """How many of `count` rows are seen at a time."""
    return max(look.rows - len(_top(state, figures, count, look)) - 2, 1)


# ------------------------------------------------------------------ the cluster


def _top(state: State, figures: Figures, count: int, look: Look) -> list[str]:
    cluster = figures.cluster
    notices = [look.notice] if look.notice else []
    # A sentence is not cut off while there is room to read it whole.
    most = PROBLEMS_MAX if look.rows >= LOW else 1
    said = [
        _styled(line, look, fg="yellow")
        for text in [*notices, *figures.problems]
        for line in _folded(f"! {text}", look.columns)
    ]
    if len(said) > most:
        more = _styled(shortened(f"! and {len(said) - most + 1} lines more", look.columns), look)
        said = [*said[: most - 1], more] if most > 1 else said[:1]
    if look.rows < 6:
        return said[:1] if look.rows > 3 else []
    if look.rows < LOW:
        return [_line(_brief(cluster), _where(state, look, count), look), *said]
    lines = [_line(_counts(cluster), _where(state, look, count), look)]
    lines += [_gauge(*part, look) for part in _gauges(cluster)]
    return [*lines, *said, ""]


def _counts(cluster: ClusterFigures) -> str:
    nodes = _plural(cluster.nodes, "node")
    if cluster.nodes_measured != cluster.nodes:
        nodes += f" ({cluster.nodes_measured} measured)"
    return (
        f"{nodes}, {_plural(cluster.services, 'service')}, {_plural(cluster.tasks, 'running task')}"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _brief(cluster: ClusterFigures) -> str:
    text = f"{cluster.nodes_measured}/{cluster.nodes}n {cluster.tasks}t"
    for name, share, _ in _gauges(cluster):
        text += f" {name.lower()} {'-' if share is None else f'{share:.0%}'}"
    return text


def _gauges(cluster: ClusterFigures) -> list[tuple[str, float | None, str]]:
    """Name, share that is in use, and what that is."""
    used = cluster.cpus_used
    share = used / cluster.cpus if used is not None and cluster.cpus else None
    text = f"{'-' if used is None else f'{used:.1f}'} of {_plural(cluster.cpus, 'CPU')}"
    if cluster.cpus_reserved:
        text += f", {cluster.cpus_reserved:.4g} reserved"
    found = [("CPU", share, text)]
    total = cluster.memory_total_bytes
    text = f"{bytes_size(cluster.memory_bytes)} of {bytes_size(total)}"
    if cluster.memory_reserved_bytes:
        text += f", {bytes_size(cluster.memory_reserved_bytes)} reserved"
    found.append(("Mem", cluster.memory_bytes / total if total else None, text))
    if cluster.gpus:
        load = cluster.gpu_percent
        text = f"{_plural(cluster.gpus, 'GPU')}, {cluster.gpus_held} held"
        found.append(("GPU", None if load is None else load / 100, text))
    return found


def _gauge(name: str, share: float | None, text: str, look: Look) -> str:
    width = min(BAR_MAX, look.columns - len(name) - len(text) - 12)
    number = "    -" if share is None else f"{share:5.0%}"
    if width < 5:
        return shortened(f"{name}{number}  {text}", look.columns)
    full = round(width * min(share or 0.0, 1.0))
    colour = "red" if (share or 0) >= 0.9 else "yellow" if (share or 0) >= 0.7 else "green"
    bar = _styled("|" * full, look, fg=colour) + " " * (width - full)
    return f"{name} [{bar}]{number}  {text}"


def _where(state: State, look: Look, count: int) -> str:
    if state.paused:
        return f"paused  {look.clock}"
    return f"every {look.interval}  {look.clock}"


def _line(left: str, right: str, look: Look) -> str:
    """Both where there is room, else the left one."""
    gap = look.columns - text_width(left) - text_width(right)
    return left + " " * gap + right if gap >= 2 else shortened(left, look.columns)


# ------------------------------------------------------------------ the table


def _table(
    state: State, rows: Sequence[Row], first: int, space: int, look: Look, *, gpus: bool
) -> list[str]:
    view = state.view
    near = rows[max(0, first - MEASURED_ROWS // 2) : first + space + MEASURED_ROWS // 2]
    cells = {id(row): [_shown(column.text(row)) for column in view.columns] for row in near}
    kept, widths = fitting(view, list(cells.values()), look.columns, gpus=gpus)
    heads = [column.title for column in view.columns]
    heads[state.sort] += _sign(state, view)
    head = shortened(_row(view, heads, kept, widths), look.columns)
    lines = [_styled(head.ljust(look.columns), look, reverse=True)]
    shown = rows[first : first + space]
    lines += [
        shortened(_row(view, cells[id(row)], kept, widths), look.columns).rstrip() for row in shown
    ]
    if not rows and state.only:
        lines.append(shortened(f"no {view.name} with {state.only!r}", look.columns))
    return lines


def _sign(state: State, view: View) -> str:
    """Which end is on top."""
    return "▲" if view.columns[state.sort].name is not state.reverse else "▼"


def _shown(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def _row(view: View, cells: Sequence[str], kept: Sequence[int], widths: Sequence[int]) -> str:
    parts = []
    for number in kept:
        width = widths[number]
        name = view.columns[number].name
        text = (_squeezed if name else shortened)(cells[number], width)
        padding = " " * (width - text_width(text))
        parts.append(text + padding if name else padding + text)
    return (" " * GAP).join(parts)


def shortened(text: str, width: int) -> str:
    """The text, of one that is too long its beginning and an ellipsis."""
    if text_width(text) <= width:
        return text
    if width < 1:
        return ""
    kept = text[: width - 1]
    while text_width(kept) > width - 1:
        kept = kept[:-1]
    return kept + "…"


def _squeezed(text: str, width: int) -> str:
    """The text, of one that is too long both ends: names differ at the end, by the slot's number
    first of all.
    """
    if text_width(text) <= width or width < 5:
        return shortened(text, width)
    end = text[-(width // 2) :]
    while text_width(end) > width // 2:
        end = end[1:]
    return shortened(text, width - text_width(end)) + end


def _folded(text: str, width: int) -> list[str]:
    import textwrap

    return [
        shortened(line, width)
        for line in textwrap.wrap(_shown(text), max(width, 10), subsequent_indent="  ")
    ]


# ------------------------------------------------------------------ the last line


def _last(state: State, look: Look) -> str:
    match state.mode:
        case "filter":
            return shortened(f"Filter: {state.only}_  Enter: done  Esc: all", look.columns)
        case "sort":
            names = "  ".join(
                f"{number % 10} {column.title}"
                for number, column in enumerate(state.view.columns, start=1)
            )
            return shortened(f"Sort by: {names}", look.columns)
    text, width = "", 0
    if state.only:
        text = f"Filter: {shortened(state.only, 20)}"
        width = text_width(text)
    for key, name in _KEYS:
        gap = "  " if width else ""
        if width + len(gap) + len(key) + 1 + len(name) > look.columns:
            break
        text += f"{gap}{_styled(key, look, bold=True)} {name}"
        width += len(gap) + len(key) + 1 + len(name)
    return text


def _styled(text: str, look: Look, **style: object) -> str:
    return click.style(text, **style) if look.colour and text else text  # type: ignore[arg-type]  # click's names
