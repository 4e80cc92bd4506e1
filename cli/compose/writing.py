"""A normal form as YAML: in its order, and with quotes wherever a reader could take a string for
something else.

Readers differ: YAML 1.1 takes `yes` and `12:30` for a boolean and a number, gopkg.in/yaml.v3 (which
Docker uses) takes `0o17` and `1e3` for numbers, Python's yaml neither. A string is plain only where
all agree that it is one. Numbers and times are spelled as Go spells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import yaml

from cli.compose.at import go_float
from cli.compose.scalars import go_time, resolve

_WIDTH = 1 << 20  # long strings stay on their line


def dump(document: Mapping[str, object]) -> str:
    """The document as a YAML file, which reads back as the same."""
    text: str = yaml.dump(
        dict(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
        width=_WIDTH,
    )
    return text


def json_text(value: object) -> str:
    """What a time is in JSON; for json.dumps(default=)."""
    if isinstance(value, datetime):
        return _rfc3339(value)
    raise TypeError(f"a {type(value).__name__} is in no normal form")


class _Dumper(yaml.CSafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def plain(self, text: str) -> yaml.ScalarNode:
        """A scalar without quotes or tag, whatever this library's readers would make of it."""
        tag = self.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # of types-PyYAML
        return yaml.ScalarNode(tag, text)


def _string(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = None
    if "\n" in value.strip("\n"):
        style = "|"
    elif value and (not isinstance(resolve(value), str) or go_time(value) is not None):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    return dumper.plain(
        {"+Inf": ".inf", "-Inf": "-.inf", "NaN": ".nan"}.get(t := go_float(value), t)
    )


def _moment(dumper: _Dumper, value: datetime) -> yaml.ScalarNode:
    return dumper.plain(_rfc3339(value))


def _rfc3339(moment: datetime) -> str:
    """2001-12-14T21:59:43.1Z"""
    text = f"{moment:%Y-%m-%dT%H:%M:%S}"
    if moment.microsecond:
        text = f"{text}.{moment.microsecond:06}".rstrip("0")
    offset = moment.utcoffset()
    return f"{text}Z" if not offset else text + moment.isoformat()[-6:]


_Dumper.add_representer(str, _string)
_Dumper.add_representer(float, _float)
_Dumper.add_representer(datetime, _moment)
