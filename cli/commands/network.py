"""`swarmctl network`: networks that tasks attach to."""

from __future__ import annotations

import ipaddress

import click

from cli.commands.common import create_object
from cli.connection import Connection, call
from cli.format import Record, print_rows, short_id
from cli.lazy import Group
from cli.objects import inspect_all, list_objects, remove_all
from cli.options import Ref, format_option, key_values, list_options, make_filters, no_trunc_option
from cli.settings import settings
from cli.times import rfc3339
from swarm.v1 import Driver, IpamConfig, IpamOptions, Kind, Network, NetworkSpec, Spec

COLUMNS = (("NETWORK ID", "ID"), ("NAME", "Name"), ("DRIVER", "Driver"), ("SCOPE", "Scope"))


@click.group(cls=Group)
def group() -> None:
    """Manage networks."""


@group.command()
@click.argument("name")
@click.option("-d", "--driver", default="overlay", show_default=True, help="Network driver.")
@click.option("-o", "--opt", "options", multiple=True, metavar="KEY=VALUE", help="Driver option.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label.")
@click.option("--attachable", is_flag=True, help="Let plain containers attach.")
@click.option("--internal", is_flag=True, help="No way out of the network.")
@click.option("--ingress", is_flag=True, help="Make it the routing mesh's network.")
@click.option("--ipv6", is_flag=True, help="Addresses of IPv6 as well.")
@click.option("--ipam-driver", default="", help="Driver that gives addresses.")
@click.option("--ipam-opt", "ipam_options", multiple=True, metavar="KEY=VALUE", help="Its option.")
@click.option("--subnet", "subnets", multiple=True, metavar="CIDR", help="Subnet.")
@click.option("--ip-range", "ranges", multiple=True, metavar="CIDR", help="Part of it to use.")
@click.option("--gateway", "gateways", multiple=True, metavar="IP", help="Gateway of a subnet.")
@click.option("--aux-address", "aux", multiple=True, metavar="NAME=IP", help="Address kept free.")
@click.option("--scope", default="", hidden=True, help="Scope; swarm is the only one.")
def create(
    *,
    name: str,
    driver: str,
    options: tuple[str, ...],
    labels: tuple[str, ...],
    attachable: bool,
    internal: bool,
    ingress: bool,
    ipv6: bool,
    ipam_driver: str,
    ipam_options: tuple[str, ...],
    subnets: tuple[str, ...],
    ranges: tuple[str, ...],
    gateways: tuple[str, ...],
    aux: tuple[str, ...],
    scope: str,
) -> None:
    """Make a network. Prints its id."""
    if scope not in ("", "swarm"):
        raise click.BadParameter(f"{scope!r}: networks of the cluster have scope swarm.")
    configs = ipam_configs(subnets, ranges, gateways, key_values(aux, option="--aux-address"))
    holder = None
    if ipam_driver or ipam_options:
        holder = Driver(
            name=ipam_driver or "default", options=key_values(ipam_options, option="--ipam-opt")
        )
    create_object(
        Spec(
            network=NetworkSpec(
                name=name,
                labels=key_values(labels, option="--label"),
                driver=Driver(name=driver, options=key_values(options, option="--opt")),
                ipv6=ipv6,
                internal=internal,
                attachable=attachable,
                ingress=ingress,
                ipam=IpamOptions(driver=holder, configs=configs) if configs or holder else None,
                scope="swarm",
            )
        )
    )


def ipam_configs(
    subnets: tuple[str, ...],
    ranges: tuple[str, ...],
    gateways: tuple[str, ...],
    aux: dict[str, str],
) -> tuple[IpamConfig, ...]:
    """One configuration per subnet; ranges, gateways and addresses go to the subnet they lie in.
    Raises BadParameter.
    """
    nets = [_network(text, "--subnet") for text in subnets]
    for i, one in enumerate(nets):
        for other in nets[:i]:
            if one.version == other.version and one.overlaps(other):
                raise click.BadParameter(f"--subnet: {one} and {other} overlap.")
    found = [IpamConfig(subnet=str(net)) for net in nets]

    def place(text: str, option: str, first: str) -> int:
        try:
            address = ipaddress.ip_address(first)
        except ValueError:
            raise click.BadParameter(f"{option}: {text!r} is not an address.") from None
        for i, net in enumerate(nets):
            if address in net:
                return i
        raise click.BadParameter(f"{option}: {text!r} lies in no --subnet; give its subnet.")

    import msgspec

    for text in ranges:
        net = _network(text, "--ip-range")
        i = place(text, "--ip-range", str(net.network_address))
        found[i] = msgspec.structs.replace(found[i], range=str(net))
    for text in gateways:
        i = place(text, "--gateway", text)
        found[i] = msgspec.structs.replace(found[i], gateway=text)
    for name, text in aux.items():
        i = place(text, "--aux-address", text)
        merged = {**found[i].aux_addresses, name: text}
        found[i] = msgspec.structs.replace(found[i], aux_addresses=merged)
    return tuple(found)


def _network(text: str, option: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{option}: {error}; write a network such as 10.10.0.0/24."
        ) from None


@group.command("ls")
@list_options("id", "name", "driver", "scope", "type", "label", "dangling")
@no_trunc_option
def ls(filters: tuple[tuple[str, str], ...], form: str, *, quiet: bool, no_trunc: bool) -> None:
    """List networks."""

    async def work(connection: Connection) -> list[Network]:
        return await list_objects(connection, Kind.NETWORK, filters=make_filters(filters))

    rows = [_row(network, no_trunc=no_trunc) for network in call(work)]
    print_rows(rows, COLUMNS, form=form, quiet=quiet, terminal=settings().terminal())


def _row(network: Network, *, no_trunc: bool) -> Record:
    spec = network.spec
    assert spec is not None and network.meta is not None
    return Record(
        ID=short_id(network.id, whole=no_trunc),
        Name=spec.name,
        Driver=(spec.driver.name if spec.driver else "") or "overlay",
        Scope=spec.scope or "swarm",
        IPv6=spec.ipv6,
        Internal=spec.internal,
        CreatedAt=rfc3339(network.meta.created_at_ns),
        Labels=",".join(f"{k}={v}" for k, v in sorted(spec.labels.items())),
        Label=spec.labels.get,
    )


@group.command()
@click.argument("networks", nargs=-1, required=True, type=Ref("network"), metavar="NETWORK...")
@format_option
@click.option("-v", "--verbose", is_flag=True, hidden=True, help="Accepted; all is shown anyway.")
def inspect(networks: tuple[str, ...], form: str, *, verbose: bool) -> None:
    """Show networks."""
    inspect_all(Kind.NETWORK, networks, form=form)


@group.command()
@click.argument("networks", nargs=-1, required=True, type=Ref("network"), metavar="NETWORK...")
def rm(networks: tuple[str, ...]) -> None:
    """Remove networks that no service uses."""
    remove_all(Kind.NETWORK, networks)
