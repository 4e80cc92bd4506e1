"""Lines of `inspect --pretty`, indented as Docker's CLI does."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["label_lines", "line"]

WIDTH = 16  # of a title and what follows it, where nothing else is asked for


def line(title: str, value: object, *, width: int = WIDTH, indent: int = 0) -> str:
    """ "Title:     value"; a title that leaves no room has one space."""
    return f"{' ' * indent}{title + ':':<{width - indent - 1}} {value}".rstrip()


def label_lines(labels: Mapping[str, str], title: str = "Labels") -> list[str]:
    if not labels:
        return []
    return [f"{title}:", *(f" {key}={value}" for key, value in sorted(labels.items()))]
