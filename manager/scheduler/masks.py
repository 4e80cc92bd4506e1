"""What nodes are, a column for each condition that services put on them.

Whether a node satisfies a service's constraints, platforms and runtime, and whether its runtimes
take new tasks, changes with the node alone,
so it is worked out once and again only for nodes that changed: each change of a node is noted in a
log, and a column that is asked for catches up with what was noted since it was last asked. Columns
are by the table's row; a row that was given up may hold anything.

Invariant: a column that was asked for is what its condition says of each row's node as it is now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from manager.scheduler.constraints import Attribute, Constraint, normal_arch
from swarm.v1 import Node, NodeDescription

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

PROCESS_RUNTIME = "process"
COLUMNS_MAX = 4_096  # kept; beyond it the one asked for longest ago goes
_LOG_MAX = 4_096  # changes remembered beyond one a row; older columns are made anew


@dataclass(frozen=True, slots=True)
class Static:
    """What a service asks of the node itself. `platforms`: (os, architecture) in Go's spelling, ""
    any; `image` false: any runtime will do where none is named.
    """

    constraints: tuple[Constraint, ...] = ()
    platforms: tuple[tuple[str, str], ...] = ()
    runtime: str = ""
    image: bool = False
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Asked once a group; the constraints' own hashes take longer than the look-up.
        value = hash((tuple(c.text for c in self.constraints), self.platforms, self.runtime))
        object.__setattr__(self, "_hash", value)

    def __hash__(self) -> int:
        return self._hash

    def lacks(self, node: Node) -> tuple[str, str] | None:
        """The filter where the node falls out, and its detail; None: it is as asked."""
        for constraint in self.constraints:
            if not constraint.matches(node):
                return ("constraint", constraint.text)
        description = node.description
        if self.platforms and not self._platform_fits(description):
            return ("platform", self.platforms_text)
        runtimes = description.runtimes if description else ()
        return None if self.hindrance.among(runtimes) else ("runtime", self.runtime)

    @property
    def hindrance(self) -> Hindrance:
        """What may stand in the way for a while on a node that is as asked."""
        return Hindrance(self.runtime, self.image)

    def _platform_fits(self, description: NodeDescription | None) -> bool:
        platform = description.platform if description else None
        if platform is None:
            return False
        mine = (platform.os.lower(), normal_arch(platform.architecture))
        return any((not o or o == mine[0]) and (not a or a == mine[1]) for o, a in self.platforms)

    @property
    def platforms_text(self) -> str:
        """The platforms asked for, as people write them."""
        return " or ".join(f"{os or 'any'}/{arch or 'any'}" for os, arch in self.platforms)


@dataclass(frozen=True, slots=True)
class Hindrance:
    """Whether runtimes that would do take new tasks just now (NodeDescription.runtime_problems).
    `runtime` and `image` as in Static.
    """

    runtime: str = ""
    image: bool = False

    def among(self, runtimes: Iterable[str]) -> list[str]:
        """Those of these runtimes that would do."""
        if self.runtime:
            return [r for r in runtimes if r == self.runtime]
        return [r for r in runtimes if r != PROCESS_RUNTIME or not self.image]

    def of(self, node: Node) -> str | None:
        """What is wrong with all that would do, as "docker: it does not answer"; None: nothing."""
        description = node.description
        if description is None or not description.runtime_problems:
            return None
        would_do = self.among(description.runtimes)
        wrong = {
            runtime: problem.message
            for problem in reversed(description.runtime_problems)
            for runtime in problem.runtimes or description.runtimes
        }
        if not would_do or not all(runtime in wrong for runtime in would_do):
            return None
        why = wrong[would_do[0]]
        told = why.startswith(f"{would_do[0]} ") and ": " in why
        return why if told else f"{' and '.join(would_do)}: {why}"


T = TypeVar("T")


class Column(Generic[T]):
    """A value of each node by row, as a number: `values[codes[row]]`."""

    __slots__ = ("_code", "_of", "at", "codes", "values")

    def __init__(self, of: Callable[[Node], T], first: Sequence[T] = ()) -> None:
        self._of = of
        self.values: list[T] = [*first]
        self._code: dict[T, int] = {value: i for i, value in enumerate(self.values)}
        self.codes: Ints = np.zeros(0, np.int64)
        self.at = -1  # how much of the log is in it; -1: nothing yet

    def set(self, row: int, node: Node) -> None:
        value = self._of(node)
        code = self._code.get(value)
        if code is None:
            code = self._code[value] = len(self.values)
            self.values.append(value)
        self.codes[row] = code

    def grow(self, rows: int) -> None:
        if len(self.codes) < rows:
            grown = np.zeros(rows, np.int64)
            grown[: len(self.codes)] = self.codes
            self.codes = grown


Key = Static | Hindrance | Attribute | Constraint | Callable[[Node], bool]


class Masks:
    """The columns, and the nodes they are made from."""

    def __init__(self) -> None:
        self._nodes: list[Node | None] = []  # by row
        self._log: list[int] = []  # rows that changed, the oldest first
        self._dropped = 0  # how much of the log was thrown away
        self._columns: dict[Key, Column[object]] = {}

    @property
    def changes(self) -> int:
        """How often a node has changed; equal: no column differs."""
        return self._dropped + len(self._log)

    def set(self, row: int, node: Node | None) -> None:
        """Takes a row's node, in a new version or not there any more."""
        while row >= len(self._nodes):
            self._nodes.append(None)
        self._nodes[row] = node
        self._log.append(row)
        if len(self._log) > len(self._nodes) + _LOG_MAX:
            half = len(self._log) // 2
            del self._log[:half]
            self._dropped += half

    def _current(self, key: Key, make: Callable[[], Column[object]]) -> Column[object]:
        column = self._columns.get(key)
        if column is None:
            while len(self._columns) >= COLUMNS_MAX:
                del self._columns[next(iter(self._columns))]
            column = self._columns[key] = make()
        elif len(self._columns) > COLUMNS_MAX // 2:
            self._columns[key] = self._columns.pop(key)  # asked for last
        now = self._dropped + len(self._log)
        if column.at == now:
            return column
        column.grow(len(self._nodes))
        behind = now - column.at
        if column.at < self._dropped or behind > len(self._nodes):
            rows: Sequence[int] = range(len(self._nodes))
        else:
            rows = self._log[column.at - self._dropped :]
        for row in rows:
            node = self._nodes[row]
            if node is not None:
                column.set(row, node)
        column.at = now
        return column

    def lacks(self, static: Static) -> Column[object]:
        """By row, where the node falls out (see Static.lacks); code 0: nowhere."""
        return self._current(static, lambda: Column[object](static.lacks, (None,)))

    def hinders(self, hindrance: Hindrance) -> Column[object]:
        """By row, what stands in the way for a while (see Hindrance.of); code 0: nothing."""
        return self._current(hindrance, lambda: Column[object](hindrance.of, (None,)))

    def suits(self, static: Static) -> Bools:
        """By row, whether the node is as asked, and nothing stands in the way."""
        asked = self.lacks(static).codes == 0
        return np.asarray(asked & (self.hinders(static.hindrance).codes == 0), np.bool_)

    def holds(self, constraint: Constraint) -> Bools:
        """By row, whether one condition on the node holds."""
        column = self._current(
            constraint, lambda: Column[object](constraint.matches, (False, True))
        )
        return np.asarray(column.codes == 1, np.bool_)

    def true_of(self, test: Callable[[Node], bool]) -> Bools:
        """By row, what a function of the module level says of the node."""
        column = self._current(test, lambda: Column[object](test, (False, True)))
        return np.asarray(column.codes == 1, np.bool_)

    def values(self, attribute: Attribute) -> tuple[Ints, list[str]]:
        """By row, a code of the node's value, and the values by code."""
        column = self._current(attribute, lambda: Column[object](attribute.of))
        return column.codes, column.values  # type: ignore[return-value]  # `of` gives text
