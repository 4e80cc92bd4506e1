"""Variables in values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.compose.interpolate import BadTemplate, substitute
from tests.unit.compose.helpers import container, document, loaded, marked, problems, service

ENVIRONMENT = {"A": "a", "EMPTY": "", "B": "b", "_X9": "x"}


def filled(text: str) -> tuple[str, list[str]]:
    unset: list[str] = []
    return substitute(text, ENVIRONMENT, lambda name, _: unset.append(name)), unset


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("plain", "plain"),
        ("$A", "a"),
        ("${A}", "a"),
        ("$A-$B", "a-b"),
        ("${_X9}y", "xy"),
        ("$A9", ""),
        ("$$A", "$A"),
        ("$$$A", "$a"),
        ("$$$$", "$$"),
        ("${A:-d}", "a"),
        ("${NO:-d}", "d"),
        ("${EMPTY:-d}", "d"),
        ("${EMPTY-d}", ""),
        ("${NO-d}", "d"),
        ("${NO:-}", ""),
        ("${NO-}", ""),
        ("${A:?e}", "a"),
        ("${EMPTY?e}", ""),
        ("${A:+c}", "c"),
        ("${EMPTY:+c}", ""),
        ("${EMPTY+c}", "c"),
        ("${NO+c}", ""),
        ("${NO:-${A}}", "a"),
        ("${NO:-${NO2:-${B}}}", "b"),
        ("${NO:-x${A}y$B}", "xayb"),
        ("${A:-${NO:?never asked}}", "a"),
        ("${NO:-$$A}", "$A"),
        ('${NO:-{"k": {}}}', '{"k": {}}'),
        ("${NO:-a:b}", "a:b"),
        ("${NO:-http://x/?q=1}", "http://x/?q=1"),
        ("${A}}", "a}"),
    ],
)
def test_forms(text: str, value: str) -> None:
    assert filled(text)[0] == value


@pytest.mark.parametrize(
    ("text", "unset"),
    [
        ("$NO", ["NO"]),
        ("${NO} ${NO2}", ["NO", "NO2"]),
        ("${NO:-}", []),
        ("${A:-$NO}", []),
        ("${NO:-$NO2}", ["NO2"]),
        ("${NO+$NO2}", []),
        ("$EMPTY", []),
    ],
)
def test_only_variables_that_are_used_and_have_no_default_are_unset(
    text: str, unset: list[str]
) -> None:
    assert filled(text)[1] == unset


@pytest.mark.parametrize(
    ("text", "message", "offset"),
    [
        ("a $", "begins no variable", 2),
        ("$ ", "begins no variable", 0),
        ("$1", "begins no variable", 0),
        ("${", "begins with a letter", 0),
        ("${}", "begins with a letter", 0),
        ("${1}", "begins with a letter", 0),
        ("${A", "no closing brace", 0),
        ("x${A:-b", "no closing brace", 1),
        ("${A:-${B}", "no closing brace", 0),
        ("${A b}", "cannot follow", 0),
        ("${A:}", "cannot follow", 0),
        ("${A!b}", "cannot follow", 0),
        ("${NO:?it must be set}", "NO is not set, and it is required: it must be set", 0),
        ("${EMPTY:?e}", "EMPTY is empty, and it is required: e", 0),
        ("${NO?}", "NO is not set, and it is required", 0),
        ("${NO:?set $A}", "required: set a", 0),
        ("${" * 30, "begins with a letter", 0),
        ("${A:-" * 30, "deeper than 20", 100),
    ],
)
def test_what_is_no_variable_is_refused(text: str, message: str, offset: int) -> None:
    with pytest.raises(BadTemplate, match=message.replace("?", r"\?")) as caught:
        filled(text)
    assert caught.value.offset == offset
    assert caught.value.hint


@given(st.text(st.characters(codec="utf-8", exclude_characters="$")))
def test_a_text_without_dollars_stays_as_it_is(text: str) -> None:
    assert filled(text) == (text, [])


@given(st.text())
def test_doubled_dollars_give_any_text_back(text: str) -> None:
    assert filled(text.replace("$", "$$")) == (text, [])


@given(st.text(alphabet="${}:-?+AEN_9 x"))
def test_any_text_is_filled_in_or_refused_within_its_bounds(text: str) -> None:
    offset = 0
    try:
        filled(text)
    except BadTemplate as error:
        offset = error.offset
    assert 0 <= offset <= len(text)


@given(st.text(st.characters(codec="utf-8", exclude_characters="${}")))
def test_a_default_is_the_value_of_an_unset_variable(text: str) -> None:
    assert filled(f"${{NO:-{text}}}")[0] == text
    assert filled(f"${{A:+{text}}}")[0] == text


def test_keys_are_not_interpolated() -> None:
    found = service("environment:\n  $A: ${A}\n", environment={"A": "x"})
    assert container(found).env == ("$A=x",)


def test_numbers_and_truths_may_come_from_variables() -> None:
    found = service(
        """
        tty: ${T}
        deploy:
          replicas: ${N:-2}
        ports:
          - target: ${P}
        """,
        environment={"T": "yes", "P": "80"},
    )
    assert container(found).tty
    assert found.mode is not None
    assert found.mode.replicated is not None
    assert found.mode.replicated.replicas == 2
    assert found.endpoint is not None
    assert found.endpoint.ports[0].target_port == 80


def test_an_unset_variable_gives_a_warning_with_its_place() -> None:
    found = loaded(document("hostname: a-$HOST_IS_UNSET"))
    assert found.warnings == (
        "stdin:4:17: the variable HOST_IS_UNSET is not set; an empty text is used",
    )


@pytest.mark.parametrize(
    "text",
    [
        "services: {web: {image: 'a:§${TAG:?}'}}",
        "services:\n  web:\n    image: a:§${TAG:?set it}\n",
        "services:\n  web:\n    image: a\n    command:\n      - |\n        one\n        two §${TAG:?}\n",
        'services:\n  web:\n    image: "a:§${TAG:?}"\n',
        "services:\n  web:\n    image: ${A:-x}§${A:?}\n",
        "services:\n  web:\n    image: a\n    hostname: §$ x\n",
    ],
)
def test_a_bad_variable_is_found_within_its_value(text: str) -> None:
    clean, line, column = marked(text)
    first = problems(clean).problems[0]
    assert (first.line, first.column) == (line, column)


def test_x_sections_are_filled_in_as_docker_does() -> None:
    text = "x-b: &b {K: $A}\n" + document("environment: *b")
    assert container(loaded(text, {"A": "1"}).spec.services[0]).env == ("K=1",)
    assert "the variable NO is not set" in problems("x-a: ${NO:?}\n" + text).message
