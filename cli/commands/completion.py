"""`swarmctl completion`: the script that makes a shell complete commands, flags and names."""

from __future__ import annotations

import click

from cli.lazy import Command

_HINTS = {
    "bash": 'eval "$(swarmctl completion bash)"   in ~/.bashrc',
    "zsh": 'eval "$(swarmctl completion zsh)"   in ~/.zshrc',
    "fish": "swarmctl completion fish > ~/.config/fish/completions/swarmctl.fish",
}


@click.command(
    cls=Command,
    epilog="\b\n" + "\n".join(f"{shell}: {hint}" for shell, hint in _HINTS.items()),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the three"
    made = kind(ctx.find_root().command, {}, "swarmctl", "_SWARMCTL_COMPLETE")
    click.echo(made.source())
