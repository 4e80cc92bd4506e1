"""The forms of names, by kind. Docker's rules, written once."""

from __future__ import annotations

import re

from manager.api.problems import Finder

SERVICE_CHARS_MAX = 63
SECRET_CHARS_MAX = 64
NETWORK_CHARS_MAX = 128
_DNS = re.compile(r"[a-zA-Z0-9]([a-zA-Z0-9_.-]*[a-zA-Z0-9])?")
_STACK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]*")
_NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
# What an engine makes on its own on every host.
PREDEFINED_NETWORKS = ("bridge", "host", "none", "default")


def check_service_name(find: Finder, name: str) -> None:
    if not name:
        find.add("name", "a service needs a name")
    elif len(name) > SERVICE_CHARS_MAX or not _DNS.fullmatch(name):
        find.add(
            "name",
            f"{name!r} must be valid as a DNS name: at most {SERVICE_CHARS_MAX} characters of "
            f"a-z, A-Z, 0-9, '-', '_' and '.', with a letter or digit first and last{_size(name)}",
        )


def check_secret_name(find: Finder, name: str) -> None:
    """Of secrets and configs."""
    if not name:
        find.add("name", "a name is missing")
    elif len(name) > SECRET_CHARS_MAX or not _DNS.fullmatch(name):
        find.add(
            "name",
            f"{name!r} is not a name: at most {SECRET_CHARS_MAX} characters of a-z, A-Z, 0-9, "
            f"'-', '_' and '.', with a letter or digit first and last{_size(name)}",
        )


def check_network_name(find: Finder, name: str) -> None:
    """Of networks and volumes."""
    if not name:
        find.add("name", "a name is missing")
    elif len(name) > NETWORK_CHARS_MAX or not _NETWORK.fullmatch(name):
        find.add(
            "name",
            f"{name!r} is not a name: at most {NETWORK_CHARS_MAX} characters of a-z, A-Z, 0-9, "
            f"'-', '_' and '.', with a letter or digit first{_size(name)}",
        )


def check_stack_name(find: Finder, name: str) -> None:
    if not name:
        find.add("name", "a stack needs a name")
    elif len(name) > SERVICE_CHARS_MAX or not _STACK.fullmatch(name):
        find.add(
            "name",
            f"{name!r} is not a stack name: at most {SERVICE_CHARS_MAX} characters of a-z, A-Z, "
            f"0-9, '-' and '_', with a letter or digit first{_size(name)}",
        )


def check_labels(find: Finder, labels: dict[str, str], field: str = "labels") -> None:
    if any(not key.strip() for key in labels):
        find.add(field, "a label has no name; write name=value")


def _size(name: str) -> str:
    return f" (it has {len(name)})" if len(name) > SERVICE_CHARS_MAX else ""
