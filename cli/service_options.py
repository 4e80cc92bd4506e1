"""The options of `service create` and `service update`, made from the tables of
cli/service_flags.py: create has `--env`, update `--env-add` and `--env-rm`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from cli.gpu_flags import gpu_options
from cli.options import ServiceVersionRef
from cli.service_flags import COUNT, LISTS, MAPS, SCALARS, Listed, Scalar

__all__ = [
    "create_decorators",
    "create_options",
    "decorated",
    "long_name",
    "pause_after_option",
    "update_options",
]

F = TypeVar("F", bound=Callable[..., Any])


def _scalar_option(scalar: Scalar) -> Callable[[F], F]:
    if scalar.type is bool:
        return click.option(
            f"--{scalar.flag}/--no-{scalar.flag}", scalar.name, default=None, help=scalar.help
        )
    return click.option(
        f"--{scalar.flag}", scalar.name, type=scalar.type, default=None, help=scalar.help
    )


def _parsed(listed: Listed) -> Callable[[click.Context, click.Parameter, Sequence[str]], Any]:
    def parse(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> list[Any]:
        try:
            return [entry for text in texts for entry in listed.parse(text)]
        except click.BadParameter as error:
            # The parser knows create's flag only; here the one that was used is named.
            error.param, error.param_hint, error.ctx = param, None, ctx
            raise

    return parse


def _common_options() -> list[Callable[[Any], Any]]:
    return [
        *(_scalar_option(scalar) for scalar in SCALARS),
        *gpu_options(),
        click.option("--replicas", type=COUNT, help="Number of tasks."),
        click.option("--max-concurrent", type=COUNT, help="Tasks of a job at once."),
        click.option("--entrypoint", help="Replace the image's entrypoint."),
        click.option("--health-cmd", help="Shell command that checks health."),
        click.option("--no-healthcheck", is_flag=True, help="Leave the image's healthcheck off."),
        click.option("--log-opt", multiple=True, metavar="KEY=VALUE", help="Log driver option."),
        click.option("--cap-add", multiple=True, metavar="CAP", help="Add a Linux capability."),
        click.option("--cap-drop", multiple=True, metavar="CAP", help="Drop a Linux capability."),
        click.option("--with-registry-auth", is_flag=True, help="Send registry credentials along."),
        click.option(
            "--no-resolve-image",
            is_flag=True,
            help="Leave it to the nodes what the image's tag stands for.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress display."),
    ]


def pause_after_option(function: F) -> F:
    """--pause-after of what changes services."""
    return click.option(
        "--pause-after",
        type=click.IntRange(min=1),
        metavar="N",
        help="Pause once N tasks are new and watched, until `service resume`.",
    )(function)


def create_options(function: F) -> F:
    """All flags of `service create`."""
    return decorated(function, create_decorators())


def create_decorators() -> list[Callable[[Any], Any]]:
    """The flags of `service create`, one each; `job run` has most of them."""
    decorators = _common_options()
    for listed in LISTS:
        names = [f"--{listed.flag}", f"{listed.name}_add", *filter(None, (listed.short,))]
        decorators.append(
            click.option(
                *names,
                multiple=True,
                metavar=listed.metavar,
                help=listed.help,
                callback=_parsed(listed),
            )
        )
    for flag, _, text, short in MAPS:
        name = f"{flag.replace('-', '_')}_add"
        names = [f"--{flag}", name, *filter(None, (short,))]
        decorators.append(click.option(*names, multiple=True, metavar="KEY=VALUE", help=text))
    decorators += [
        click.option("-e", "--env", "env_add", multiple=True, metavar="K=V", help="Variable."),
        click.option(
            "--env-file",
            multiple=True,
            type=click.Path(),
            metavar="FILE",
            help="Variables from a file.",
        ),
        click.option("--name", default="", help="Name of the service; else one is made up."),
        click.option(
            "--mode",
            type=click.Choice(["replicated", "global", "replicated-job", "global-job"]),
            default="replicated",
            show_default=True,
            help="How many tasks, and when they are finished.",
        ),
    ]
    return decorators


def update_options(function: F) -> F:
    """All flags of `service update`."""
    decorators = _common_options()
    for listed in LISTS:
        decorators.append(
            click.option(
                f"--{listed.flag}-add",
                multiple=True,
                metavar=listed.metavar,
                help=f"Add or replace. {listed.help}",
                callback=_parsed(listed),
            )
        )
        decorators.append(
            click.option(f"--{listed.flag}-rm", multiple=True, metavar="KEY", help="Remove one.")
        )
    for flag, _, text, _short in MAPS:
        adding = f"Add or change. {text}"
        decorators.append(
            click.option(f"--{flag}-add", multiple=True, metavar="KEY=VALUE", help=adding)
        )
        decorators.append(
            click.option(f"--{flag}-rm", multiple=True, metavar="KEY", help="Remove one.")
        )
    decorators += [
        click.option("--env-add", multiple=True, metavar="K=V", help="Add or change a variable."),
        click.option("--env-rm", multiple=True, metavar="K", help="Remove a variable."),
        click.option("--image", help="New image."),
        click.option("--args", "arguments", help="New arguments, as one shell-quoted text."),
        click.option("--force", is_flag=True, help="New tasks although nothing else changed."),
        click.option("--rollback", is_flag=True, help="Go back to the previous version."),
        click.option(
            "--to",
            "rollback_to",
            type=ServiceVersionRef(),
            metavar="VERSION",
            help="With --rollback: go back to this version.",
        ),
        pause_after_option,
    ]
    return decorated(function, decorators)


def decorated(function: F, decorators: Iterable[Callable[[Any], Any]]) -> F:
    """The command with the flags, in order of name."""
    for decorate in sorted(decorators, key=long_name, reverse=True):
        function = decorate(function)
    return function


def long_name(decorate: Callable[[Any], Any]) -> str:
    """The flag that a decorator adds: "--env"."""

    def probe() -> None:
        """Carries one option."""

    [option] = vars(decorate(probe))["__click_params__"]
    return str(next(name for name in option.opts if name.startswith("--")))
