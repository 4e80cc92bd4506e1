"""What the commands of secrets and configs share: making one from a file, and showing one to
people.
"""

from __future__ import annotations

import click

from cli.connection import Connection, call
from cli.options import key_values, read_input
from cli.times import rfc3339
from swarm.errors import Invalid
from swarm.v1 import (
    Config,
    ConfigSpec,
    CreateRequest,
    CreateResponse,
    Driver,
    GetResponse,
    Kind,
    Object,
    Secret,
    SecretSpec,
    Spec,
)

__all__ = ["create_blob", "create_object", "describe_blob"]


def create_blob(
    kind: Kind,
    name: str,
    file: str | None,
    *,
    labels: tuple[str, ...],
    driver: str = "",
    template_driver: str,
) -> None:
    """Makes a secret or config and prints its id."""
    what = kind.name.lower()
    if (file is None) != bool(driver):
        raise Invalid(
            f"give a file with the {what}'s data, or - for standard input"
            + (", or --driver, and not both" if kind is Kind.SECRET else "")
        )
    data = read_input(file, what=what) if file is not None else b""
    found = key_values(labels, option="--label")
    templating = Driver(name=template_driver) if template_driver else None
    if kind is Kind.SECRET:
        holder = Driver(name=driver) if driver else None
        spec = Spec(
            secret=SecretSpec(
                name=name, labels=found, data=data, driver=holder, templating=templating
            )
        )
    else:
        spec = Spec(config=ConfigSpec(name=name, labels=found, data=data, templating=templating))
    create_object(spec)


def create_object(spec: Spec) -> None:
    """Creates what the spec says and prints its id."""

    async def work(connection: Connection) -> CreateResponse:
        return await connection.control.create(CreateRequest(spec=spec))

    answer = call(work)
    for warning in answer.warnings:
        click.echo(f"Warning: {warning}", err=True)
    click.echo(answer.id)


def describe_blob(answer: GetResponse) -> str:
    """A secret or config as `inspect --pretty` shows it."""
    held = answer.object or Object()
    item: Secret | Config | None = held.secret or held.config
    assert item is not None and item.spec is not None and item.meta is not None
    lines = [f"ID:              {item.id}", f"Name:            {item.spec.name}"]
    if item.spec.labels:
        lines.append("Labels:")
        lines += [f" - {key}={value}" for key, value in sorted(item.spec.labels.items())]
    if isinstance(item, Secret):
        driver = item.spec.driver.name if item.spec.driver else ""
        lines.append(f"Driver:          {driver}")
    lines.append(f"Created at:      {rfc3339(item.meta.created_at_ns)}")
    lines.append(f"Updated at:      {rfc3339(item.meta.updated_at_ns)}")
    if isinstance(item, Config):
        lines += ["Data:", item.spec.data.decode(errors="replace")]
    return "\n".join(lines)
