"""Figures as tables: the columns of each view, and in which order the rows stand.

Columns, their titles and how amounts are written are Docker's (`docker stats`: memory in powers of
1024, transfers in powers of 1000); what Docker has no column for follows the same pattern. The
fields of a row are what `--format` may name: the texts of the columns and, with names of their
own, the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cli.format import Record
from cli.table import text_width
from cli.tasks import natural
from cli.usage.meter import Figures, Flow, NodeFigures, ServiceFigures, TaskFigures

__all__ = [
    "GAP",
    "VIEWS",
    "Column",
    "View",
    "arranged",
    "bytes_size",
    "fitting",
    "human_size",
    "records",
    "with_rates",
]

Row = NodeFigures | ServiceFigures | TaskFigures
UNKNOWN = "-"
GAP = 2  # characters between columns
NAME_MIN = 12  # a shorter name is hard to tell from others


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a view."""

    title: str
    field: str
    text: Callable[[Any], str]
    # What it is sorted by; None stands last in either direction.
    key: Callable[[Any], Any]
    # Where the terminal is narrow, columns with high numbers go first; 0 stays.
    rank: int
    # A name: may be shortened, stands left, sorts upwards at first.
    name: bool = False
    # Characters that it takes in any case, lest the table jump as amounts change.
    least: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """One table."""

    name: str
    rows: Callable[[Figures], Sequence[Row]]
    columns: tuple[Column, ...]
    sort: str
    # What the filter looks at.
    words: Callable[[Any], str]
    # Fields that are no columns.
    more: Callable[[Any], dict[str, Any]]

    def column(self, field: str) -> int:
        """Its number; -1: there is none. Titles are understood as well, in any case."""
        wanted = _plain(field)
        for number, column in enumerate(self.columns):
            if wanted in (_plain(column.field), _plain(column.title), _ALIASES.get(column.field)):
                return number
        return -1


def _plain(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


_ALIASES = {
    "CPUPerc": "cpu",
    "MemUsage": "mem",
    "NetIO": "net",
    "BlockIO": "block",
    "GPUPerc": "gpu",
    "DiskUsage": "disk",
}


# ------------------------------------------------------------------ amounts


def bytes_size(count: float) -> str:
    """Docker's size of memory: "10.5MiB"."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 4)


def human_size(count: float) -> str:
    """Docker's size of what was transferred: "1.23kB"."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"), 3)


def _scaled(count: float, base: int, units: Sequence[str], digits: int) -> str:
    step = 0
    # What would be rounded up to four figures before the point belongs to the next unit.
    while count >= base - 0.5 and step < len(units) - 1:
        count /= base
        step += 1
    return f"{count:.{digits}g}{units[step]}"


def percent(value: float | None) -> str:
    """ "12.34%"; whole from a thousand on."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f}%" if value >= 1000 else f"{value:.2f}%"


def _share(part: int, whole: int) -> float | None:
    return part / whole * 100 if whole else None


def _of(part: int, whole: int) -> str:
    return f"{bytes_size(part)} / {bytes_size(whole) if whole else UNKNOWN}"


def _both(flow: Flow) -> str:
    if flow.in_bytes is None and flow.out_bytes is None:
        return UNKNOWN
    return f"{human_size(flow.in_bytes or 0)} / {human_size(flow.out_bytes or 0)}"


def _rates(flow: Flow) -> str:
    if flow.in_rate is None and flow.out_rate is None:
        return UNKNOWN
    return f"{human_size(flow.in_rate or 0)} / {human_size(flow.out_rate or 0)}"


def _total(flow: Flow) -> float | None:
    if flow.in_bytes is None and flow.out_bytes is None:
        return None
    return (flow.in_bytes or 0) + (flow.out_bytes or 0)


def _total_rate(flow: Flow) -> float | None:
    if flow.in_rate is None and flow.out_rate is None:
        return None
    return (flow.in_rate or 0) + (flow.out_rate or 0)


# ------------------------------------------------------------------ views


def _name(title: str, field: str, text: Callable[[Any], str], rank: int) -> Column:
    return Column(title, field, text, lambda row: natural(text(row)), rank, name=True)


def _amount(
    title: str,
    field: str,
    read: Callable[[NodeFigures], Any],
    text: Callable[[Any], str],
    rank: int,
    *,
    least: int = 0,
) -> Column:
    """Of a node, unknown where it was not measured."""
    return Column(
        title,
        field,
        lambda node: text(read(node)) if node.measured else UNKNOWN,
        lambda node: read(node) if node.measured else None,
        rank,
        least=least,
    )


def _flow_columns(first_rank: int) -> tuple[Column, ...]:
    return (
        Column(
            "NET I/O",
            "NetIO",
            lambda r: _both(r.network),
            lambda r: _total(r.network),
            first_rank,
            least=15,
        ),
        Column(
            "BLOCK I/O",
            "BlockIO",
            lambda r: _both(r.disk),
            lambda r: _total(r.disk),
            first_rank + 2,
            least=15,
        ),
    )


NODES = View(
    "nodes",
    lambda figures: figures.nodes,
    (
        _name("NODE", "Name", lambda n: n.name, 0),
        _name("STATUS", "Status", lambda n: n.state or UNKNOWN, 4),
        _amount("CPU %", "CPUPerc", lambda n: n.cpu_percent, percent, 0, least=7),
        _amount("CPUS", "CPUs", lambda n: n.cpus, str, 6),
        Column(
            "MEM USAGE / TOTAL",
            "MemUsage",
            lambda n: _of(n.memory_bytes, n.memory_total_bytes) if n.measured else UNKNOWN,
            lambda n: n.memory_bytes if n.measured else None,
            3,
            least=17,
        ),
        _amount(
            "MEM %", "MemPerc", lambda n: _share(n.memory_bytes, n.memory_total_bytes), percent, 0
        ),
        _amount(
            "DISK %", "DiskPerc", lambda n: _share(n.disk_bytes, n.disk_total_bytes), percent, 5
        ),
        _amount("GPUS", "GPUs", lambda n: n.gpus, str, 7),
        _amount("GPU %", "GPUPerc", lambda n: n.gpu_percent, percent, 2),
        _amount("TASKS", "Tasks", lambda n: n.tasks, str, 1),
    ),
    "Name",
    lambda n: f"{n.name} {n.id}",
    lambda n: {
        "ID": n.id,
        "DiskUsage": _of(n.disk_bytes, n.disk_total_bytes) if n.measured else UNKNOWN,
        "GPUMemUsage": _of(n.gpu_memory_bytes, n.gpu_memory_total_bytes) if n.gpus else UNKNOWN,
    },
)

SERVICES = View(
    "services",
    lambda figures: figures.services,
    (
        _name("NAME", "Name", lambda s: s.name, 0),
        Column(
            "REPLICAS",
            "Replicas",
            lambda s: str(s.tasks) if s.running is None else f"{s.running}/{s.desired}",
            lambda s: s.tasks if s.running is None else s.running,
            1,
        ),
        Column(
            "CPU %",
            "CPUPerc",
            lambda s: percent(s.cpu_percent),
            lambda s: s.cpu_percent,
            0,
            least=7,
        ),
        Column(
            "MEM USAGE",
            "MemUsage",
            lambda s: bytes_size(s.memory_bytes),
            lambda s: s.memory_bytes,
            0,
        ),
        *_flow_columns(4),
        Column("PIDS", "PIDs", lambda s: str(s.pids), lambda s: s.pids, 5),
        Column("GPUS", "GPUs", lambda s: str(s.gpus), lambda s: s.gpus, 7),
        Column("GPU %", "GPUPerc", lambda s: percent(s.gpu_percent), lambda s: s.gpu_percent, 3),
    ),
    "CPUPerc",
    lambda s: s.name,
    lambda s: {"Tasks": s.tasks, "NetRate": _rates(s.network), "BlockRate": _rates(s.disk)},
)

TASKS = View(
    "tasks",
    lambda figures: figures.tasks,
    (
        _name("NAME", "Name", lambda t: t.name, 0),
        _name("NODE", "Node", lambda t: t.node, 2),
        Column(
            "CPU %",
            "CPUPerc",
            lambda t: percent(t.cpu_percent),
            lambda t: t.cpu_percent,
            0,
            least=7,
        ),
        Column(
            "MEM USAGE / LIMIT",
            "MemUsage",
            lambda t: _of(t.memory_bytes, t.memory_limit_bytes),
            lambda t: t.memory_bytes,
            3,
            least=17,
        ),
        Column(
            "MEM %",
            "MemPerc",
            lambda t: percent(_share(t.memory_bytes, t.memory_limit_bytes)),
            lambda t: _share(t.memory_bytes, t.memory_limit_bytes),
            1,
        ),
        *_flow_columns(5),
        Column("PIDS", "PIDs", lambda t: str(t.pids), lambda t: t.pids, 6),
        Column("GPU %", "GPUPerc", lambda t: percent(t.gpu_percent), lambda t: t.gpu_percent, 4),
    ),
    "CPUPerc",
    lambda t: f"{t.name} {t.node} {t.id}",
    lambda t: {
        "ID": t.id,
        "Service": t.service,
        "NodeID": t.node_id,
        "GPUs": len(t.gpus),
        "NetRate": _rates(t.network),
        "BlockRate": _rates(t.disk),
    },
)

VIEWS = {view.name: view for view in (NODES, SERVICES, TASKS)}


def with_rates(view: View) -> View:
    """The same with what is transferred in a second in place of what was in all."""
    changed = {
        "NetIO": ("NET I/O /s", lambda r: _rates(r.network), lambda r: _total_rate(r.network)),
        "BlockIO": ("BLOCK I/O /s", lambda r: _rates(r.disk), lambda r: _total_rate(r.disk)),
    }
    columns = tuple(
        Column(changed[c.field][0], c.field, changed[c.field][1], changed[c.field][2], c.rank)
        if c.field in changed
        else c
        for c in view.columns
    )
    return View(view.name, view.rows, columns, view.sort, view.words, view.more)


def arranged(
    view: View, figures: Figures, *, sort: int, reverse: bool, only: str = ""
) -> list[Row]:
    """The rows that contain `only`, by the column `sort`: names upwards, amounts the largest first,
    unless `reverse`; what is not known last. Equal ones stay in order of name.
    """
    rows = [row for row in view.rows(figures) if only.lower() in view.words(row).lower()]
    column = view.columns[sort]
    known = [(column.key(row), row) for row in rows]
    unknown = [row for key, row in known if key is None]
    ordered = sorted(
        (pair for pair in known if pair[0] is not None),
        key=lambda pair: pair[0],
        reverse=reverse is column.name,
    )
    return [row for _, row in ordered] + unknown


def records(view: View, rows: Sequence[Row]) -> list[Record]:
    """What `--format` may name."""
    return [
        Record(
            {column.field: column.text(row) for column in view.columns}
            | view.more(row)
            | {"Raw": _raw(asdict(row))}
        )
        for row in rows
    ]


def _raw(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers behind the texts, named as in the rest of the JSON."""
    return {
        "".join(word.capitalize() for word in name.split("_")): _raw(value)
        if isinstance(value, dict)
        else value
        for name, value in values.items()
    }


def titles(view: View) -> list[str]:
    """Of the columns, each with room for the sign of the one that is sorted by."""
    return [f"{column.title} " for column in view.columns]


def fitting(
    view: View, cells: Sequence[Sequence[str]], width: int, *, gpus: bool
) -> tuple[list[int], list[int]]:
    """Which columns fit in so many characters, and how wide they are: the ones of highest rank go,
    then names are shortened. Without `gpus` there are no columns of GPUs.
    """
    widths = [
        max(column.least, *(text_width(row[number]) for row in (titles(view), *cells)))
        for number, column in enumerate(view.columns)
    ]
    kept = [n for n, c in enumerate(view.columns) if gpus or not c.field.startswith("GPU")]

    def excess() -> int:
        return sum(widths[n] for n in kept) + GAP * (len(kept) - 1) - width

    def give(number: int, least: int) -> None:
        widths[number] = max(min(least, widths[number]), widths[number] - max(excess(), 0))

    names = [n for n in kept if view.columns[n].name]
    while excess() > 0:
        room = sum(max(0, widths[n] - NAME_MIN) for n in names if n in kept)
        going = max(kept, key=lambda n: view.columns[n].rank)
        if excess() <= room or not view.columns[going].rank:
            break
        kept.remove(going)
    for number in sorted((n for n in names if n in kept), key=lambda n: -widths[n]):
        give(number, NAME_MIN)
    for number in (n for n in names if n in kept):
        give(number, 1)
    return kept, widths
