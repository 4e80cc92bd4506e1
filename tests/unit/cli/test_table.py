"""Tables: Docker's columns, and sentences that are wrapped, never cut."""

from __future__ import annotations

import pytest

from cli.table import layout, text_width

HEADER = ["ID", "NAME", "ERROR", "PORTS"]
ERROR = "no suitable node: 3 nodes short of memory (need 512 MiB, best free 384 MiB on n3)"


def test_columns_are_ten_wide_and_three_apart() -> None:
    rows = [["ID", "NAME"], ["4cdgfyky7ozwh3htjfw0d12qv", "app_web"]]
    assert layout(rows) == [
        "ID                          NAME",
        "4cdgfyky7ozwh3htjfw0d12qv   app_web",
    ]
    assert layout([["A", "B", "C"], ["1", "2", "3"]]) == [
        "A         B         C",
        "1         2         3",
    ]


def test_spaces_at_the_end_are_left_out() -> None:
    assert layout([["A", "PORTS"], ["x", ""]]) == ["A         PORTS", "x"]


def test_nothing_is_nothing() -> None:
    assert layout([]) == []


def test_without_a_terminal_sentences_stay_on_their_line() -> None:
    assert ERROR in layout([HEADER, ["1", "web", ERROR, ""]], sentences=2)[1]


def test_a_narrow_terminal_wraps_the_sentence_inside_its_column() -> None:
    lines = layout([HEADER, ["1", "web", ERROR, "*:80->80/tcp"]], width=80, sentences=2)
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].endswith("*:80->80/tcp")
    start, end = lines[0].index("ERROR"), lines[0].index("PORTS")
    assert " ".join(line[start:end].strip() for line in lines[1:]) == ERROR


def test_a_very_narrow_terminal_puts_the_sentence_under_the_row() -> None:
    rows = [HEADER, ["1" * 25, "web", ERROR, ""], ["2" * 25, "db", "", ""]]
    lines = layout(rows, width=60, sentences=2)
    assert all(len(line) <= 60 for line in lines)
    assert "ERROR" not in lines[0]
    assert lines[2].startswith("    error: no suitable node")
    assert lines[-1].startswith("2222")
    assert " ".join(" ".join(lines[2:-1]).split()) == f"error: {ERROR}"


@pytest.mark.parametrize(
    ("text", "width"), [("abc", 3), ("日本", 4), ("e\u0301", 1), ("ü", 1), ("", 0)]
)
def test_width_counts_terminal_cells(text: str, width: int) -> None:
    assert text_width(text) == width


def test_a_table_without_sentences_stands_closer_where_it_is_too_wide() -> None:
    rows = [("ID", "NAME", "EMPTY", "LAST"), ("x" * 20, "web", "", "y")]
    assert layout(rows, width=48)[1] == "x" * 20 + "   web       " + " " * 10 + "y"
    assert layout(rows, width=40)[1] == "x" * 20 + "  web   " + " " * 7 + "y"
    assert layout(rows, width=30) == ["ID" + " " * 20 + "NAME  LAST", "x" * 20 + "  web   y"]
    assert layout(rows, width=20)[1] == "x" * 20 + "  web   y"
