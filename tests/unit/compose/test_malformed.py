"""Files that nobody meant: whatever is in them, they load or say where they are wrong, at once."""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli.compose import ComposeError, Problem, load
from cli.compose.keys import ROOT, SERVICE

FULL = (Path(__file__).parent / "data" / "full.yml").read_text()
ENVIRONMENT = {"SET": "value", "HOME": "/home/user"}
# A load of the full file takes some milliseconds; what takes a hundred times that is a defect.
CPU_S_MAX = 1.0
_WORDS = [
    *("services", "&a", "*a", "<<", "'", '"', "{", "}", "[", "]", ": ", "- ", "\t", "${", "$$"),
    *("!!int", "!!binary", "!reset", "!override", "|", ">", "#", "~", "-1", "9" * 30, "true"),
    *("\u2028", "\ufeff", "%", "@", "image", "null", "---\n", "...\n", "1-65535", "²", "0x", ".."),
]
WRONG: list[Any] = [
    *(None, True, False, 0, -1, 7, 1.5, 10**30, "", " ", "text", "5", "a:b", "/a", "${", "$SET"),
    *("..", "²", "1-2", "a=b", "-5s", "1e9", "é\n", [], {}, [[]], [None], [1], ["a"], {"a": "b"}),
    *({"a": {"b": {}}}, [{"a": 1}], {"x-a": 1}),
]


def outcome(path: Path, text: str) -> None:
    """Loads the file; fails when that is neither a stack nor a list of problems with places."""
    found: tuple[Problem, ...] = ()
    start = time.process_time()
    try:
        load([str(path)], stack="st", environment=ENVIRONMENT, profiles=["main"])
    except ComposeError as error:
        found = error.problems
    took = time.process_time() - start
    lines = re.split("\r\n|[\n\r\x85\u2028\u2029]", text)
    for problem in found:
        assert problem.message
        assert problem.file
        assert 1 <= problem.line <= len(lines) + 1, problem
        assert problem.column >= 1, problem
        assert problem.render()
    assert took < CPU_S_MAX


def outcome_of(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "compose.yml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    outcome(path, path.read_bytes().decode("utf-8", "replace"))


def test_a_letter_beyond_ascii_is_no_base64(tmp_path: Path) -> None:
    outcome_of(tmp_path, "services: {web: {image: !!binary ²}}")


def test_the_full_file_loads_and_has_every_key_of_a_service(tmp_path: Path) -> None:
    path = tmp_path / "compose.yml"
    path.write_text(FULL)
    found = load([str(path)], stack="st", environment=ENVIRONMENT, profiles=["main"])
    assert [each.name for each in found.spec.services] == ["st_web", "st_db", "st_base"]
    used = set().union(*(each for each in yaml.safe_load(FULL)["services"].values()))
    usable = {name for name, key in SERVICE.items() if not key.reason}
    assert usable - used == {"cgroupns_mode", "env_file", "label_file", "network_mode"}


# ------------------------------------------------------------------ wrong values in every place


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*path, key))


TREE = yaml.safe_load(FULL)
PLACES = list(places(TREE))


def with_wrong(place: tuple[str | int, ...], wrong: Any) -> str:
    if not place:
        return json.dumps(wrong)
    tree = copy.deepcopy(TREE)
    at: Any = tree
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = wrong
    return json.dumps(tree, indent=1)


@pytest.mark.parametrize("part", range(40))
def test_a_wrong_value_in_any_place_has_a_place(part: int, tmp_path: Path) -> None:
    rng = random.Random(part)
    for place in PLACES[part::40]:
        for wrong in rng.sample(WRONG, 3):
            outcome_of(tmp_path, with_wrong(place, wrong))


def test_a_wrong_value_for_any_key_of_a_service_has_a_place(tmp_path: Path) -> None:
    rng = random.Random(1)
    for name in SERVICE:
        for wrong in rng.sample(WRONG, 8):
            tree = {"services": {"web": {"image": "a", name: wrong}}}
            outcome_of(tmp_path, json.dumps(tree))


# ------------------------------------------------------------------ damaged text


def damaged(seed: int) -> bytes:
    """The full file with one to five changes."""
    rng = random.Random(seed)
    data = bytearray(FULL.encode())
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data))
        lines = data.split(b"\n")
        row = rng.randrange(len(lines))
        match rng.randrange(11):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.randint(1, 40)]
            case 3:
                data[at:at] = rng.choice(_WORDS).encode()
            case 4:
                del data[at:]
            case 5:
                del lines[row]
                data = bytearray(b"\n".join(lines))
            case 6:
                lines.insert(row, lines[rng.randrange(len(lines))])
                data = bytearray(b"\n".join(lines))
            case 7:
                lines[row] = bytearray(b" " * rng.randint(0, 9)) + lines[row].lstrip()
                data = bytearray(b"\n".join(lines))
            case 8:
                lines[row] = bytearray(b"\t") + lines[row]
                data = bytearray(b"\n".join(lines))
            case 9:
                data = bytearray(data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n"])))
            case _:
                data[at:at] = bytes(data[at : at + rng.randint(1, 200)])
        data = data or bytearray(b" ")
    return bytes(data)


@pytest.mark.parametrize("part", range(30))
def test_a_damaged_file_loads_or_says_where_it_is_wrong(part: int, tmp_path: Path) -> None:
    for seed in range(part * 10, part * 10 + 10):
        outcome_of(tmp_path, damaged(seed))


@pytest.mark.parametrize("part", range(10))
def test_a_file_that_ends_early_loads_or_says_where_it_is_wrong(part: int, tmp_path: Path) -> None:
    data = FULL.encode()
    for end in range(part * 23, len(data), 230):
        outcome_of(tmp_path, data[:end])


# ------------------------------------------------------------------ any text at all

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
_KEYS = st.sampled_from([*SERVICE, *ROOT, "web", "x-a", "<<", "soft", "source", "type", "target"])
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(_WORDS),
    st.sampled_from(["80:80", "data:/data", "${A:-b}", "1m", "64M", "db", "all", "default"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(_KEYS | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.text())
@FUZZ
def test_any_text_loads_or_says_where_it_is_wrong(tmp_path: Path, text: str) -> None:
    outcome_of(tmp_path, text)


@given(st.binary())
@FUZZ
def test_any_bytes_load_or_say_where_they_are_wrong(tmp_path: Path, data: bytes) -> None:
    outcome_of(tmp_path, data)


@given(st.lists(st.sampled_from([*_WORDS, "a", "\n", "  ", "web:", "services:\n"]), max_size=40))
@FUZZ
def test_any_marks_load_or_say_where_they_are_wrong(tmp_path: Path, words: list[str]) -> None:
    outcome_of(tmp_path, "".join(words))


@given(st.dictionaries(_KEYS, _VALUES, max_size=6), _VALUES)
@FUZZ
def test_any_service_loads_or_says_where_it_is_wrong(
    tmp_path: Path, keys: dict[str, Any], other: Any
) -> None:
    tree = {"services": {"web": {"image": "a", **keys}, "db": other}, "volumes": {"data": None}}
    outcome_of(tmp_path, yaml.safe_dump(tree, allow_unicode=True, sort_keys=False))


# ------------------------------------------------------------------ files that want much


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [" + "x, " * 100 + "]\n" + "".join(f"b{i}: [{'*a, ' * 100}]\n" for i in range(100)),
        "".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 [x]\n" for i in range(2000)),
        "".join(
            f"a{i}: &a{i} {{a: *a{i - 1}, b: *a{i - 1}}}\n" if i else "a0: &a0 {a: x}\n"
            for i in range(40)
        ),
        "[" * 20000,
        "{" * 20000,
        "- " * 20000,
        "? " * 20000,
        "a: " + "[" * 500 + "]" * 500,
        "services: {web: {image: a, command: '" + "${A:-" * 5000 + "}" * 5000 + "'}}",
        "services: {web: {image: a, command: '" + "$" * 50000 + "'}}",
        "services: {web: {image: a, command: '" + "${A:-{" * 5000 + "'}}",
        "services: {web: {image: " + "a" * 200_000 + "}}",
        "services: {web: {image: " + "a-" * 100_000 + "}}",
        "services: {web: {image: a, command: " + "a" * 300_000 + "}}",
        "services: {web: {image: a, stop_grace_period: " + "1h" * 50_000 + "}}",
        "services: {web: {image: a, mem_limit: " + "1" * 100_000 + "}}",
        "services: {web: {image: a, cpus: 1e999999999}}",
        "services: {web: {image: a, cpus: '1e999999999'}}",
        "services: {web: {image: a, mem_limit: '1e99'}}",
        "services: {web: {image: a, shm_size: 1e400}}",
        "services: {web: {image: a, ports: ['1-65535:1-65535', '1-65535:1-65535/udp']}}",
        "services: {web: {image: a, environment: [" + "A=1, " * 20_000 + "]}}",
        "services: {web: {image: a, dns: [" + "1.1.1.1, " * 10_000 + "]}}",
        "services:\n"
        + "".join(f"  s{i}: {{image: a, depends_on: [s{i + 1}]}}\n" for i in range(999)),
        "services:\n" + "".join(f"  s{i}: {{image: a, imge: a}}\n" for i in range(1000)),
        "services:\n" + "".join(f"  s{i}: {{extends: s{i + 1}}}\n" for i in range(300)),
        "x: '" + "\n" * 100_000 + "'",
        'services: {web: {image: a, command: "' + "\\x41" * 50_000 + '"}}',
    ],
    ids=lambda text: re.sub(r"\s+", " ", text[:40]),
)
def test_a_file_that_wants_much_gets_an_answer_at_once(tmp_path: Path, text: str) -> None:
    outcome_of(tmp_path, text)
