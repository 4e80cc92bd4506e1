"""The corpus: compose files after the manner of real stacks, how each is loaded, and its readable
golden files.

A folder with a compose.yml is a case. What its load needs besides (further files, variables,
profiles) stands in its case.yml. Golden files never hold a path of this machine: the folder of a
case is written as <case>, the corpus as <corpus>.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cli.compose import Loaded, Normal, load, normal_form
from swarm.v1 import Message, SecretSpec

CORPUS = Path(__file__).parent
STACK = "st"
HOME = "/home/ada"
_UPDATE = "UPDATE_GOLDENS"


@dataclass(frozen=True, slots=True)
class Case:
    """One stack of the corpus."""

    name: str
    files: tuple[str, ...] = ("compose.yml",)
    variables: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return CORPUS / self.name

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.files]

    @property
    def environment(self) -> dict[str, str]:
        return {"HOME": HOME, **self.variables}

    def load(self) -> Loaded:
        return load(
            [str(path) for path in self.paths],
            stack=STACK,
            environment=self.environment,
            profiles=self.profiles,
        )

    def normal_form(self, *, exact: bool = False) -> Normal:
        return normal_form(
            [str(path) for path in self.paths],
            stack=STACK,
            environment=self.environment,
            profiles=self.profiles,
            exact=exact,
        )

    def portable(self, text: str) -> str:
        """The text without this machine's paths."""
        return text.replace(str(self.folder), "<case>").replace(str(CORPUS), "<corpus>")


def _case(folder: Path) -> Case:
    given: dict[str, Any] = {}
    path = folder / "case.yml"
    if path.exists():
        given = yaml.safe_load(path.read_text())
        unknown = given.keys() - {"files", "environment", "profiles"}
        assert not unknown, f"{path}: {unknown}"
    return Case(
        name=folder.name,
        files=tuple(given.get("files", ("compose.yml",))),
        variables={name: str(value) for name, value in given.get("environment", {}).items()},
        profiles=tuple(given.get("profiles", ())),
    )


CASES = tuple(_case(path.parent) for path in sorted(CORPUS.glob("*/compose.yml")))
BY_NAME = {case.name: case for case in CASES}


def readable(value: Any) -> Any:
    """A message as plain values: what is unset or empty is left out, bytes are text. Of a secret
    only the size and a digest are shown.
    """
    if isinstance(value, Message):
        found: dict[str, Any] = {}
        defaults = dict(zip(value.__struct_fields__, value.__struct_defaults__, strict=True))
        for name in value.__struct_fields__:
            given = getattr(value, name)
            # An empty message or mapping that was given differs from one that was not.
            if given == defaults[name] or (isinstance(given, dict) and not given):
                continue
            found[name] = readable(given)
        if isinstance(value, SecretSpec) and value.data:
            digest = hashlib.sha256(value.data).hexdigest()[:12]
            found["data"] = f"<{len(value.data)} bytes, sha256 {digest}>"
        return found
    if isinstance(value, dict):
        return {str(key): readable(each) for key, each in sorted(value.items())}
    if isinstance(value, list | tuple):
        return [readable(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return value


class _Dumper(yaml.SafeDumper):
    """Block style, texts of several lines as blocks, no aliases: a diff shows what changed."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def shown(value: Any) -> str:
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, indent=2
    )


def check_golden(case: Case, name: str, text: str) -> None:
    """Compares with the case's golden file of this name; writes it where UPDATE_GOLDENS is set."""
    path = case.folder / "golden" / name
    portable = case.portable(text)
    if os.environ.get(_UPDATE):
        path.parent.mkdir(exist_ok=True)
        path.write_text(portable)
        return
    assert path.exists(), f"{path} is missing; UPDATE_GOLDENS=1 writes it"
    assert portable == path.read_text(), f"{path} differs; if that is right, UPDATE_GOLDENS=1"


@functools.cache
def loaded(case: str) -> Loaded:
    """The case, loaded once for all tests that only look at it."""
    return BY_NAME[case].load()


def names(cases: Sequence[Case] = CASES) -> list[str]:
    return [case.name for case in cases]
