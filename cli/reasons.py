"""Why tasks wait, on the screen: the scheduler's account as a table, as lines, and in one line.

The account counts each node at the filter where it falls out first. In a task's status it is one
sentence, "no suitable node (2 of 3 nodes short of memory: …; 1 node drained)", of which lists show
the first part: the manager puts first what somebody can most likely do something about.
"""

from __future__ import annotations

import re
import textwrap

from cli.table import layout
from swarm.gpus import format_share
from swarm.quantities import format_bytes, format_cpus
from swarm.v1 import ExplainTaskResponse, FilterResult

__all__ = ["brief", "explain_lines", "parts"]

_ACCOUNT = re.compile(
    r"(?P<before>.*?\bno suitable node[^(]*)\((?P<parts>.*)\)(?P<after>[^()]*)", re.S
)
# Filters whose detail is a text of the user's, which the reason repeats.
_IN_WORDS = frozenset({"constraint", "affinity", "platform"})
# Each filter's part begins with a number of nodes; there may be a "; " within one.
_NEXT = re.compile(r"; (?=\d+ (?:of \d+ )?nodes?\b)")


def parts(text: str) -> tuple[str, list[str]]:
    """What stands before the account, and its parts; none where the text holds no account."""
    match = _ACCOUNT.fullmatch(text)
    if match is None:
        return text, []
    return match["before"].strip(), _NEXT.split(match["parts"])


def brief(text: str) -> str:
    """The text with an account's first part only, and how many more there are."""
    match = _ACCOUNT.fullmatch(text)
    found = _NEXT.split(match["parts"]) if match is not None else []
    if match is None or len(found) < 2:
        return text
    more = len(found) - 1
    reasons = "reason" if more == 1 else "reasons"
    return f"{match['before']}({found[0]}; {more} more {reasons}){match['after']}"


def explain_lines(answer: ExplainTaskResponse, *, width: int | None) -> list[str]:
    """The whole answer on one task."""
    lines = _wrap(_lead(answer.summary) if answer.filters else answer.summary, width)
    if answer.decision:
        lines += ["", *_wrap(f"Placed: {answer.decision}", width)]
    if answer.queue:
        text = f"Queue: {answer.queue}, {_before(answer.queue_position)}"
        lines += ["", *_wrap(text, width)]
    for held in answer.held_back:
        lines += _wrap(f"Held back: {held}", width)
    if answer.filters:
        lines += ["", *_table(answer, width)]
    if answer.nodes_total:
        lines += ["", *_wrap(_sum(answer), width)]
    if answer.hint:
        lines += ["", *_wrap(answer.hint, width)]
    return lines


def _before(count: int) -> str:
    if not count:
        return "next in turn"
    return f"{count} {'job comes' if count == 1 else 'jobs come'} before it"


def _table(answer: ExplainTaskResponse, width: int | None) -> list[str]:
    never = any(result.never_nodes for result in answer.filters)
    rows = [["FILTER", "NODES OUT", *(["NEVER"] if never else ()), "NEEDED", "BEST FREE", "REASON"]]
    for result in answer.filters:
        name, count, *rest = _filter_row(result)
        rows.append([name, count, *([str(result.never_nodes or "")] if never else ()), *rest])
    return layout(rows, width=width, sentences=len(rows[0]) - 1)


def _sum(answer: ExplainTaskResponse) -> str:
    text = f"{answer.nodes_fit} of {answer.nodes_total} nodes fit now"
    if answer.never:
        return f"{text}, and none could later: not even if it were empty and ready."
    never = sum(result.never_nodes for result in answer.filters)
    if not never:
        return f"{text}."
    later = sum(result.nodes for result in answer.filters) - never
    could = f"{later} could later, " if later else ""
    return f"{text}; {could}{never} never (not even if empty and ready)."


def _lead(text: str) -> str:
    """The text without an account's parts, which the table shows."""
    match = _ACCOUNT.fullmatch(text)
    return f"{match['before'].strip()}{match['after']}" if match is not None else text


def _filter_row(result: FilterResult) -> list[str]:
    in_words = result.filter in _IN_WORDS or not result.detail
    name = result.filter if in_words else f"{result.filter} ({result.detail})"
    amounts = ["", ""]
    if result.needed or result.best:
        amounts = [_amount(result.detail, result.needed), _amount(result.detail, result.best)]
        if result.best_node:
            amounts[1] += f" on {result.best_node}"
    return [name, str(result.nodes), *amounts, result.message]


def _amount(dimension: str, value: int) -> str:
    match dimension:
        case "cpu":
            return format_cpus(value)
        case "memory" | "gpu_memory":
            return format_bytes(value)
        case "gpu_share":
            return format_share(value)
    return str(value)


def _wrap(text: str, width: int | None) -> list[str]:
    return textwrap.wrap(text, width) if width else [text]
