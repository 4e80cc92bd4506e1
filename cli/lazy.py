"""Click as swarmctl uses it: commands that take flags as Docker does, and groups whose commands are
imported when they are used, so that help and simple commands start fast.

A group holds a table: name, where the command is, its short help, and the help section it stands
in. Help and completion of names read the table only.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["Command", "Entry", "Group", "LazyGroup"]

# Docker's other names of commands; understood, not shown.
ALIASES = {"list": "ls", "remove": "rm"}
_BOOLEAN = {"true": True, "1": True, "false": False, "0": False}


class Command(click.Command):
    """A command whose flags may also be written --flag=true and --flag=false, as Go's are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(
            ctx, list(self._without_values(args, interspersed=ctx.allow_interspersed_args))
        )

    def _without_values(self, args: list[str], *, interspersed: bool) -> Iterator[str]:
        options = {
            name: param
            for param in self.params
            if isinstance(param, click.Option)
            for name in param.opts
        }
        rest = iter(args)
        for word in rest:
            name, separator, value = word.partition("=")
            option = options.get(name)
            if word == "--" or (not word.startswith("-") and not interspersed):
                # What follows is somebody else's: it is handed on as it is.
                yield word
                yield from rest
            elif option is not None and option.is_flag and separator and value in _BOOLEAN:
                if _BOOLEAN[value]:
                    yield name
                elif option.secondary_opts:
                    yield option.secondary_opts[0]
            else:
                yield word
                if option is not None and not (option.is_flag or option.count or separator):
                    yield from islice(rest, 1)


class Group(click.Group):
    """A group that names the nearest command when one does not exist."""

    command_class = Command

    def __init__(
        self, *args: Any, aliases: Mapping[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self._aliases = ALIASES | dict(aliases or {})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.commands.get(cmd_name) or self.commands.get(self._aliases.get(cmd_name, ""))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        names = self.names(ctx)
        if name not in names and not name.startswith("-") and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def names(self, ctx: click.Context) -> list[str]:
        """All names that are understood."""
        shown = self.list_commands(ctx)
        return [*shown, *(alias for alias, name in self._aliases.items() if name in shown)]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of definition


@dataclass(frozen=True, slots=True)
class Entry:
    """One command of a lazy group. `target` is "module:attribute"."""

    name: str
    target: str
    help: str
    section: str = "Commands"
    # Other names it answers to; not shown.
    aliases: tuple[str, ...] = ()


class LazyGroup(Group):
    """A group over a table of entries."""

    def __init__(
        self,
        *args: Any,
        entries: tuple[Entry, ...] = (),
        **settings: Any,
    ) -> None:
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        super().__init__(*args, **settings)
        self._entries = {entry.name: entry for entry in entries}
        self._names = {name: entry for entry in entries for name in (entry.name, *entry.aliases)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = self._names.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def names(self, ctx: click.Context) -> list[str]:
        return list(self._names)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for entry in self._entries.values():
            sections.setdefault(entry.section, []).append((entry.name, entry.help))
        longest = max((len(name) for name in self._entries), default=0)
        for title, rows in sections.items():
            with formatter.section(title):
                # One column width for all sections.
                formatter.write_dl([(name.ljust(longest), text) for name, text in rows])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(entry.name, help=entry.help)
            for entry in self._entries.values()
            if entry.name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)
