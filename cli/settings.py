"""What one swarmctl process was told: by options, by the environment, by its terminal.

Read once by cli/main.py and handed on as click's context object; commands get it with
`settings()`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from swarm.clock import Clock

__all__ = ["Settings", "Terminal", "settings"]


@dataclass(frozen=True, slots=True)
class Terminal:
    """A stream's terminal; `width` None: no terminal, no limit."""

    width: int | None
    colour: bool

    @property
    def interactive(self) -> bool:
        return self.width is not None


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of the root command over the environment."""

    host: str | None
    context_name: str | None
    debug: bool
    environment: Mapping[str, str]
    # Reads may be answered from what the manager knows, however old it is.
    stale: bool = False

    @classmethod
    def from_environment(
        cls,
        environment: Mapping[str, str],
        *,
        host: str | None,
        context_name: str | None,
        debug: bool,
        stale: bool = False,
    ) -> Settings:
        if host and context_name:
            raise click.UsageError("--host and --context exclude each other; give one of them.")
        stale = stale or _flag(environment, "SWARM_STALE")
        return cls(host, context_name, debug, environment, stale)

    @property
    def config_dir(self) -> Path:
        """Where contexts are kept."""
        env = self.environment
        if env.get("SWARM_CONFIG"):
            return Path(env["SWARM_CONFIG"])
        base = env.get("XDG_CONFIG_HOME")
        return (Path(base) if base else Path(env.get("HOME", "~")).expanduser() / ".config") / (
            "swarmctl"
        )

    @property
    def clock(self) -> Clock:
        from swarm.clock import SystemClock

        return SystemClock()

    def terminal(self, stream: str = "stdout") -> Terminal:
        """stdout's or stderr's terminal."""
        file = getattr(sys, stream)
        if not file.isatty():
            return Terminal(None, colour=False)
        import shutil

        colour = not self.environment.get("NO_COLOR") and self.environment.get("TERM") != "dumb"
        return Terminal(shutil.get_terminal_size((80, 24)).columns, colour=colour)


def _flag(environment: Mapping[str, str], name: str) -> bool:
    """1 or 0; unset is 0."""
    text = environment.get(name, "")
    if text not in ("", "0", "1"):
        raise click.UsageError(f"{name}: {text!r} is neither 1 nor 0.")
    return text == "1"


def settings() -> Settings:
    """Those of the running command."""
    found = click.get_current_context().find_object(Settings)
    assert found is not None, "the root command makes the settings"
    return found
