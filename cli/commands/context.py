"""`swarmctl context`: named connections to clusters, with a client certificate each."""

from __future__ import annotations

import os
import sys

import click

from cli.connection import Connection, call, parse_host, resolve
from cli.contexts import Context, Contexts, Credentials
from cli.format import Record, print_inspected, print_rows
from cli.lazy import Group
from cli.options import format_option, quiet_option, read_input
from cli.settings import settings
from swarm.errors import Conflict, Invalid, SwarmError
from swarm.v1 import GetInfoRequest, IssueClientCertificateRequest

COLUMNS = (
    ("NAME", "Name"),
    ("DESCRIPTION", "Description"),
    ("ENDPOINT", "Endpoint"),
    ("ERROR", "Error"),
)


@click.group(cls=Group)
def group() -> None:
    """Manage connections to other clusters.

    A context holds the addresses of a cluster's managers and a client certificate. Any manager that
    answers will do; where no --host was given, managers that come and go are kept up with. Make a
    context on a manager, export it, and import it where you work:

    \b
      swarmctl context create prod
      swarmctl context export prod prod.json
      swarmctl context import prod prod.json && swarmctl context use prod
    """


def _contexts() -> Contexts:
    return Contexts(settings().config_dir)


@group.command()
@click.argument("name")
@click.option("--description", default="", help="For people.")
@click.option(
    "--host",
    default="",
    metavar="HOST",
    help="Address to store: tcp://host:port[,host:port], or unix:///path for a daemon of this "
    "machine. Without it: the cluster's managers.",
)
def create(name: str, description: str, host: str) -> None:
    """Make a context with a fresh client certificate.

    The certificate comes from the manager that this command talks to, which must be reached through
    its unix socket or with an administrator's certificate.
    """
    contexts = _contexts()
    if contexts.exists(name) or name == "default":
        raise Conflict(f"there is a context {name!r} already; choose another name")
    if host.startswith(("unix://", "/")):
        socket = parse_host(host, settings(), origin="--host").socket
        contexts.add(Context(name=name, description=description, socket=socket))
        click.echo(name)
        return
    addresses = _addresses(host)

    async def work(connection: Connection) -> Context:
        from swarm import tls

        key_pem = tls.new_key_pem()
        issued = await connection.certificates.issue_client_certificate(
            IssueClientCertificateRequest(csr_pem=tls.csr_pem(key_pem), name=name)
        )
        info = await connection.control.get_info(GetInfoRequest())
        found = addresses or info.manager_addrs or connection.target.addresses
        if not found:
            raise Invalid("the cluster names no manager's address; give one with --host tcp://…")
        return Context(
            name=name,
            description=description,
            addresses=tuple(found),
            credentials=Credentials(issued.root_ca_pem, issued.certificate_pem, key_pem),
            follows=not addresses,
        )

    contexts.add(call(work))
    click.echo(name)


def _addresses(host: str) -> tuple[str, ...]:
    if not host:
        return ()
    scheme, separator, rest = host.partition("://")
    if scheme != "tcp" or not separator or not rest:
        raise Invalid(f"--host: {host!r} is not an address; write tcp://host:port or unix:///path")
    from swarm.tls import join_address, split_address

    return tuple(join_address(*split_address(part)) for part in rest.split(","))


@group.command("ls")
@format_option
@quiet_option
def ls(form: str, *, quiet: bool) -> None:
    """List contexts; * marks the current one."""
    contexts = _contexts()
    here = settings()
    chosen = here.context_name or here.environment.get("SWARM_CONTEXT") or contexts.current()
    if here.host or here.environment.get("SWARM_HOST"):
        chosen = ""
    rows = [_default_row(current=chosen == "default")]
    for context in contexts.all():
        rows.append(
            Record(
                ID=context.name,
                Name=f"{context.name} *" if context.name == chosen else context.name,
                Current=context.name == chosen,
                Description=context.description,
                Endpoint=context.endpoint,
                Error="",
            )
        )
    print_rows(rows, COLUMNS, form=form, quiet=quiet, terminal=here.terminal())
    if not chosen:
        click.echo("Warning: --host or SWARM_HOST overrides the current context.", err=True)


def _default_row(*, current: bool) -> Record:
    from cli.connection import default_socket

    path = default_socket(settings(), root=os.geteuid() == 0)
    return Record(
        ID="default",
        Name="default *" if current else "default",
        Current=current,
        Description="The daemon of this machine",
        Endpoint=f"unix://{path}",
        Error="",
    )


@group.command()
@click.argument("name")
def use(name: str) -> None:
    """Choose the context of later commands; `default` is this machine's daemon."""
    _contexts().use(name)
    click.echo(name)
    if settings().environment.get("SWARM_HOST"):
        click.echo("Warning: SWARM_HOST is set and overrides it.", err=True)


@group.command()
def show() -> None:
    """Print the current context's name."""
    target = resolve(settings())
    click.echo(target.context or "default")


@group.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-f", "--force", is_flag=True, help="Although it is the current one.")
def rm(names: tuple[str, ...], *, force: bool) -> None:
    """Remove contexts with their keys."""
    problems: list[SwarmError] = []
    for name in names:
        try:
            _contexts().remove(name, force=force)
        except SwarmError as error:
            problems.append(error)
        else:
            click.echo(name)
    from cli.objects import raise_all

    raise_all(problems)


@group.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@format_option
def inspect(names: tuple[str, ...], form: str) -> None:
    """Show contexts, without their keys."""
    contexts = _contexts()
    documents = []
    for name in names or (contexts.current(),):
        if name == "default":
            row = _default_row(current=False)
            documents.append({"Name": name, "Description": "", "Endpoint": row["Endpoint"]})
            continue
        context = contexts.get(name)
        documents.append(
            {
                "Name": context.name,
                "Description": context.description,
                "Endpoint": context.endpoint,
                "HasCertificate": context.credentials is not None,
            }
        )
    print_inspected(documents, form=form, known=frozenset())


@group.command()
@click.argument("name")
@click.argument("file", required=False, metavar="[FILE|-]")
def export(name: str, file: str | None) -> None:
    """Write a context with its key to a file (NAME.json), or to standard output (-).

    Whoever has the file may administer the cluster: keep it as you keep keys.
    """
    context = _contexts().get(name)
    if file == "-":
        if sys.stdout.isatty():
            raise Invalid("the context holds a private key; it is not printed to a terminal")
        click.echo(context.to_json(), nl=False)
        return
    path = file or f"{name}.json"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Conflict(f"{path} exists already; remove it or name another file") from None
    except OSError as error:
        raise Invalid(f"{path}: {(error.strerror or str(error)).lower()}") from None
    with os.fdopen(descriptor, "w") as out:
        out.write(context.to_json())
    click.echo(f"Written file {path!r}")


@group.command("import")
@click.argument("name")
@click.argument("file", metavar="FILE|-", type=click.Path(allow_dash=True))
def import_(name: str, file: str) -> None:
    """Take a context from a file that `context export` wrote."""
    import dataclasses

    text = read_input(file, what="context").decode(errors="replace")
    context = Context.from_json(text, where=file)
    _contexts().add(dataclasses.replace(context, name=name))
    click.echo(name)
