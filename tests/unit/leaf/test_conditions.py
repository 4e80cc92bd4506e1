"""The grammar of conditions: whatever the text, a condition or Invalid; parts come back as written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import errors
from swarm.conditions import KEYS_FOR_PEOPLE, VALUES_MAX, Condition, parse_condition, parse_key

SPACE = st.text(" \t", max_size=2)
SOME_SPACE = st.text(" \t", min_size=1, max_size=2)
# Characters that Swarm takes in values; none of them begins or ends with a space.
WORD = st.text("abzAZ09:-_.*()?+[]\\^$|/", min_size=1, max_size=8)
LABEL = st.text("abzAZ09-_.", min_size=1, max_size=8)
TEXT_KEY = st.sampled_from(
    ["node.id", "node.hostname", "node.platform.os", "node.runtime", "service.name", "stack.name"]
) | st.builds(
    lambda prefix, label: prefix + label,
    st.sampled_from(["node.labels.", "engine.labels.", "service.labels.", "Node.Labels."]),
    LABEL,
)
NUMBER = st.decimals(-1000, 1000, places=2).map(str)


@st.composite
def written(draw: st.DrawFn) -> tuple[str, str, str, tuple[str, ...]]:
    """A condition as text, and its parts."""
    key = draw(TEXT_KEY)
    operator = draw(st.sampled_from(["==", "!=", "in", "not in", "<", ">="]))
    if operator in ("<", ">="):
        key = "node.labels." + draw(LABEL)
        values: tuple[str, ...] = (draw(NUMBER),)
        text = f"{key}{draw(SPACE)}{operator}{draw(SPACE)}{values[0]}"
    elif operator in ("==", "!="):
        values = (draw(WORD),)
        text = f"{key}{draw(SPACE)}{operator}{draw(SPACE)}{values[0]}"
    else:
        values = tuple(draw(st.lists(WORD, min_size=1, max_size=4, unique=True)))
        listed = ",".join(f"{draw(SPACE)}{value}{draw(SPACE)}" for value in values)
        word = operator.replace(" ", draw(SOME_SPACE))
        text = f"{key}{draw(SOME_SPACE)}{word}{draw(SPACE)}({listed})"
    return f"{draw(SPACE)}{text}{draw(SPACE)}", key, operator, values


@given(written())
def test_a_condition_comes_back_in_its_parts(
    parts: tuple[str, str, str, tuple[str, ...]],
) -> None:
    text, key, operator, values = parts
    found = parse_condition(text)
    assert (found.text, found.operator, found.values) == (text, operator, values)
    assert str(found.key).lower() == key.lower()
    assert str(found.key).endswith(found.key.label)
    assert again(found) == found
    assert hash(again(found)) == hash(found)


def again(condition: Condition) -> Condition:
    return parse_condition(condition.text)


@given(
    st.text(max_size=80)
    | st.text("node.labels gpu memory =!<>~ in not (a,b) 0123GiB*", max_size=40)
    | st.tuples(
        st.sampled_from([*KEYS_FOR_PEOPLE, "node.x", ""]),
        st.sampled_from(["==", "!=", "=~", "<", "<=", ">", ">=", " in ", " not in ", "=", "~"]),
        st.text(max_size=20) | st.from_regex(r"\(?[a-z0-9.,*+ ]{0,12}\)?", fullmatch=True),
    ).map("".join)
)
def test_any_text_is_a_condition_or_invalid(text: str) -> None:
    said = ""
    try:
        condition = parse_condition(text)
    except errors.Invalid as error:
        said = error.message
    else:
        assert again(condition) == condition
    assert not said or said.startswith("constraint ")
    assert len(said) < 900


@given(written(), st.lists(st.text("aAzZ019.-", max_size=4), max_size=3))
def test_negation_holds_where_the_other_does_not(
    parts: tuple[str, str, str, tuple[str, ...]], found: list[str]
) -> None:
    text, _, operator, _ = parts
    other = {"==": "!=", "!=": "==", "in": "not in", "not in": "in"}.get(operator)
    if other is None:
        return
    condition = parse_condition(text)
    opposite = parse_condition(f"{condition.key} {other} {text[_value_at(text, operator) :]}")
    assert condition.holds(found) != opposite.holds(found)


def _value_at(text: str, operator: str) -> int:
    return text.index("(") if operator.endswith("in") else text.index(operator) + len(operator)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node.role = manager", "did you mean node.role == manager?"),
        ("node.role", "expected one operator of ==, !=, in (A, B)"),
        ("node.labels.a in b", "a list stands in parentheses"),
        ("node.labels.a in (b", "a list stands in parentheses"),
        ("node.labels.a in ()", "value '' is empty"),
        ("node.labels.a in (b,)", "value '' is empty"),
        ("node.labels.a in (b;c)", "characters other than"),
        (f"node.labels.a in ({'b,' * VALUES_MAX}b)", "257 values are more than the limit"),
        ("node.role in (manager, boss)", "a role is manager or worker, not 'boss'"),
        ("node.ip in (10.0.0.1, x)", "neither an address nor a network"),
        ("node.labels.a < b", "'b' is not a number; write it such as 3 or 2.5"),
        ("node.labels.a < 1e3", "is not a number"),
        ("node.hostname < 3", "which node.hostname is not; it takes node.gpu.memory"),
        ("node.gpu.memory > much", "'much' is not a size"),
        ("node.gpu.memory == much", "'much' is not a size"),
        ("node.gpu.count >= 1.5", "is not a number of GPUs"),
        ("node.gpu.capability >= eight", "is not a compute capability"),
        ("node.gpu.capability =~ 8.*", "is a number; compare it with"),
        ("node.gpu.model == -", "is no model"),
        ("node.gpu.modell == A100", "did you mean node.gpu.model?"),
        ("node.hostname =~ (a", "is not a regular expression: a ( is not closed"),
        ("node.hostname =~", "the pattern is missing"),
        (f"node.hostname =~ {'a' * 300}", "more than the limit of 256"),
        ("service.nam == a", "did you mean service.name?"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        parse_condition(text)
    assert says in caught.value.message


def test_a_node_attribute_is_not_one_of_services() -> None:
    with pytest.raises(errors.Invalid) as caught:
        parse_key("service.name", "spread", of_tasks=False)
    assert "service" not in caught.value.message.partition("accepted are")[2]
