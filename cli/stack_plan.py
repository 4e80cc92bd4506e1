"""Asking the manager for a plan and showing it: `stack diff`, and `--dry-run` of what deploys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cli import plan_view
from cli.connection import Connection
from cli.format import Record, print_inspected, print_rows, to_yaml
from cli.services import warn
from cli.settings import settings
from swarm.errors import EXIT_DIFFERENT
from swarm.v1 import DeployStackRequest, GetStackHistoryRequest, PlanStackResponse, StackSpec

__all__ = ["plan_and_show", "plan_options"]

F = TypeVar("F", bound=Callable[..., Any])
COLUMNS = (
    ("ACTION", "Action"),
    ("KIND", "Kind"),
    ("NAME", "Name"),
    ("EFFECT", "Effect"),
)


def plan_options(function: F) -> F:
    """How a plan is shown, and whether the exit code tells of a difference."""
    for decorate in (
        click.option(
            "--exit-code",
            is_flag=True,
            help="End with 3 when something would change, with 0 when nothing would.",
        ),
        click.option(
            "-q", "--quiet", is_flag=True, help="Print no plan and no progress, only warnings."
        ),
        click.option(
            "--format",
            "form",
            default="",
            metavar="FORMAT",
            help="json, yaml, a Go template over the plan, or `table TEMPLATE` over its changes.",
        ),
    ):
        function = decorate(function)
    return function


async def plan_and_show(
    connection: Connection,
    request: DeployStackRequest,
    *,
    name: str,
    form: str,
    quiet: bool,
    exit_code: bool,
) -> int:
    """Prints what the request would do to the stack `name`; 3 where that is asked for and something
    would change, else 0.
    """
    plan = await connection.control.plan_stack(request)
    warn(plan.warnings)
    if not quiet:
        spec = request.spec or await _revision(connection, request, plan)
        show(plan, name=name, spec=spec, form=form)
    return EXIT_DIFFERENT if exit_code and plan.differs else 0


async def _revision(
    connection: Connection, request: DeployStackRequest, plan: PlanStackResponse
) -> StackSpec | None:
    """The spec that a rollback goes back to."""
    if request.rollback is None or not plan.stack_id:
        return None
    history = await connection.control.get_stack_history(
        GetStackHistoryRequest(stack=plan.stack_id)
    )
    number = request.rollback.revision
    for revision in history.revisions:
        if revision.revision == number or (not number and revision.revision < plan.revision):
            return revision.spec
    return None


def show(plan: PlanStackResponse, *, name: str, spec: StackSpec | None, form: str) -> None:
    """The plan on stdout, as the format says."""
    if form in ("", "table"):
        for line in plan_view.view(plan, name=name, spec=spec, terminal=settings().terminal()):
            click.echo(line)
        return
    document = plan_view.document(plan, name=name)
    if form == "json":
        click.echo(json.dumps(document, separators=(",", ":"), ensure_ascii=False))
    elif form == "yaml":
        click.echo(to_yaml(document), nl=False)
    elif form.startswith("table "):
        rows = [Record(change) for change in document["Changes"]]
        print_rows(rows, COLUMNS, form=form, terminal=settings().terminal())
    else:
        print_inspected([document], form=form, known=plan_view.KNOWN)
