"""The flags that say where tasks run: `--constraint`, `--placement-pref`, `--placement-strategy`.
Shared by services and jobs. What is given is read by the same grammar as in the manager
(swarm/conditions.py), so that a mistake is told with the flag's name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from cli.service_values import fail
from swarm.errors import Invalid
from swarm.v1 import PlacementPreference

__all__ = [
    "GPU_POLICY",
    "STRATEGY",
    "constraint",
    "preference",
    "preference_key",
    "preference_text",
    "squeezed",
]

_PREF = "--placement-pref"
_FORM = (
    "write spread=ATTRIBUTE, such as spread=node.labels.zone, or affinity=CONDITION[,weight=N], "
    'such as "affinity=node.labels.disk == ssd,weight=10"'
)
_WEIGHT_LAST = re.compile(r"(?P<rest>.*),\s*weight\s*=(?P<weight>[^,=()]*)", re.DOTALL)
_WEIGHT_FIRST = re.compile(r"\s*weight\s*=(?P<weight>[^,=()]*),(?P<rest>.*)", re.DOTALL)

if TYPE_CHECKING:
    _Choice = click.Choice[str]
else:
    _Choice = click.Choice


class _Strategy(_Choice):
    """A way to choose nodes; `default` is what the next higher level says: specs leave it empty."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found = super().convert(value, param, ctx)
        return "" if found == "default" else found


STRATEGY = _Strategy(["spread", "binpack", "default"])
GPU_POLICY = _Strategy(
    ["fgd", "fgd-paper", "best-fit", "dot-product", "packing", "spread", "default"]
)


def constraint(text: str) -> tuple[str]:
    """The constraint as given, once it has been read."""
    _check("--constraint", text, "constraint")
    return (text.strip(),)


def preference(text: str, *, option: str = _PREF) -> PlacementPreference:
    """`spread=node.labels.zone`, or `affinity=node.labels.disk == ssd,weight=10`."""
    weight = ""
    match = _WEIGHT_LAST.fullmatch(text) or _WEIGHT_FIRST.fullmatch(text)
    if match is not None:
        text, weight = match["rest"], match["weight"].strip()
    key, separator, value = (part.strip() for part in text.partition("="))
    if key == "spread" and separator and value:
        if match is not None:
            raise fail(option, text, "only an affinity has a weight; preferences go in order")
        _check(option, value, "spread")
        return PlacementPreference(spread=value)
    if key != "affinity" or not separator or not value:
        raise fail(option, text, _FORM)
    _check(option, value, "affinity")
    number = int(weight) if re.fullmatch(r"[+-]?\d{1,4}", weight, re.ASCII) else 0
    if match is not None and not (number and -100 <= number <= 100):
        raise fail(option, f"weight={weight}", "a weight is from -100 to 100, and not 0")
    return PlacementPreference(affinity=value, weight=number or 1)


def preference_key(given: PlacementPreference) -> str:
    """What a preference is replaced and removed by; a weight makes no other one of it."""
    return given.spread or f"affinity {squeezed(given.affinity)}"


def preference_text(given: PlacementPreference) -> str:
    """The preference as the flag takes it."""
    if given.affinity:
        return f"affinity={given.affinity},weight={given.weight or 1}"
    return f"spread={given.spread}"


def squeezed(text: str) -> str:
    """Without white space: what two spellings of a condition have in common."""
    return "".join(text.split())


def _check(option: str, text: str, subject: str) -> None:
    # Only who gives such a flag waits for the grammar.
    from swarm.conditions import parse_condition, parse_key

    try:
        if subject == "spread":
            parse_key(text, f"spread={text!r}", of_tasks=False)
        else:
            parse_condition(text, subject)
    except Invalid as error:
        end = "" if error.message.endswith("?") else "."
        raise click.BadParameter(f"{error.message}{end}", param_hint=f"'{option}'") from None
