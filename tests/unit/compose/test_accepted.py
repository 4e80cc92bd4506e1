"""What the loader takes, the manager takes: a mistake is told with its place, and not later without
one. Files are read, and their specs go through the manager's own checks.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.compose import ComposeError, load
from manager.api.problems import Problems
from manager.api.validate import check_service, complete
from manager.api.validate_objects import check_config, check_network, check_secret, check_volume
from swarm.v1 import StackSpec
from tests.unit.compose.test_malformed import ENVIRONMENT, FULL, PLACES, WRONG

DATA = Path(__file__).parent / "data"


def refused(spec: StackSpec) -> list[str]:
    """What the manager would say about a stack."""
    problems = Problems()
    for service in spec.services:
        check_service(problems.of(service.name), complete(service))
    for network in spec.networks:
        check_network(problems.of(network.name), network)
    for secret in spec.secrets:
        check_secret(problems.of(secret.name), secret)
    for config in spec.configs:
        check_config(problems.of(config.name), config)
    for volume in spec.volumes:
        check_volume(problems.of(volume.name), volume)
    return [str(problem) for problem in problems.found]


def stack_of(text: str, tmp_path: Path) -> StackSpec | None:
    path = tmp_path / "compose.yml"
    path.write_text(text)
    try:
        return load([str(path)], stack="st", environment=ENVIRONMENT, profiles=["main"]).spec
    except ComposeError:
        return None


@pytest.mark.parametrize("text", [FULL, (DATA / "good.yml").read_text()], ids=["full", "good"])
def test_a_good_file_is_taken(text: str, tmp_path: Path) -> None:
    found = stack_of(text, tmp_path)
    assert found is not None
    assert refused(found) == []


@pytest.mark.parametrize("part", range(20))
def test_a_file_with_one_odd_value_is_taken_by_both_or_by_none(part: int, tmp_path: Path) -> None:
    rng = random.Random(1000 + part)
    tree = yaml.safe_load(FULL)
    for place in PLACES[1 + part :: 20]:
        for wrong in rng.sample(WRONG, 3):
            changed = copy.deepcopy(tree)
            at: Any = changed
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = wrong
            found = stack_of(json.dumps(changed), tmp_path)
            assert found is None or refused(found) == [], (place, wrong)
