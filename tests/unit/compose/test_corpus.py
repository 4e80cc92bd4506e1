"""Every stack of the corpus: what it is read as, told by golden files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.compose import dump, load, normal_form
from swarm.v1 import StackSpec
from tests.corpus.cases import BY_NAME as CASES
from tests.corpus.cases import CORPUS, STACK, check_golden, loaded, names, readable, shown

CASES_MIN = 48


def ordered(spec: StackSpec) -> StackSpec:
    """With its objects by name: a normal form sorts them."""

    def named(objects: Any) -> tuple[Any, ...]:
        return tuple(sorted(objects, key=lambda each: each.name))

    return msgspec.structs.replace(
        spec,
        services=named(spec.services),
        networks=named(spec.networks),
        secrets=named(spec.secrets),
        configs=named(spec.configs),
        volumes=named(spec.volumes),
        external_networks=tuple(sorted(spec.external_networks)),
        external_secrets=tuple(sorted(spec.external_secrets)),
        external_configs=tuple(sorted(spec.external_configs)),
    )


def test_the_corpus_is_whole() -> None:
    """A folder without compose.yml would be left out without a word."""
    folders = {p.name for p in CORPUS.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert folders == set(CASES)
    assert len(CASES) >= CASES_MIN


@pytest.mark.parametrize("name", names())
def test_a_stack_is_read_as_its_golden_spec(name: str) -> None:
    case, found = CASES[name], loaded(name)
    check_golden(case, "spec.yml", shown(readable(found.spec)))


@pytest.mark.parametrize("name", names())
def test_a_stack_gives_its_golden_warnings(name: str) -> None:
    """What is read differently from how it looks is told, and nothing else is."""
    check_golden(CASES[name], "warnings.txt", "".join(f"{w}\n" for w in loaded(name).warnings))


@pytest.mark.parametrize("name", names())
def test_a_stack_has_its_golden_normal_form(name: str) -> None:
    case = CASES[name]
    check_golden(case, "normal.yml", dump(case.normal_form().document))


@pytest.mark.parametrize("name", names())
def test_the_exact_form_is_the_same_stack_anywhere(name: str) -> None:
    """Without the case's folder and profiles, and with no variables but those that secrets are
    taken from; and it is its own exact form.
    """
    case = CASES[name]
    own = case.folder / ".env"
    text = dump(case.normal_form(exact=True).document)
    given: dict[str, Any] = {
        "environment": {k: v for k, v in case.variables.items() if k.startswith("DATABASE_")},
        "env_files": [own] if own.exists() else [],
        "stdin": text,
        "project_directory": Path("/nonexistent"),
    }
    assert ordered(load(["-"], stack=STACK, **given).spec) == ordered(loaded(name).spec)
    assert dump(normal_form(["-"], exact=True, stack=STACK, **given).document) == text
