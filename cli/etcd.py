"""`swarm init` on an etcd that somebody else runs: how it is reached."""

from __future__ import annotations

from typing import Any

import click

from cli.options import read_input
from swarm.errors import Invalid
from swarm.v1 import EtcdAccess

__all__ = ["etcd_access", "etcd_options"]

_PEM = {
    "ca": ("root certificate", "-----BEGIN CERTIFICATE-----"),
    "cert": ("certificate", "-----BEGIN CERTIFICATE-----"),
    "key": ("private key", "PRIVATE KEY-----"),
}


def etcd_options(function: Any) -> Any:
    """The options that `etcd_access` reads."""
    for decorate in (
        click.option("--etcd-key", default="", metavar="FILE", help="Key of --etcd-cert, PEM."),
        click.option(
            "--etcd-cert",
            default="",
            metavar="FILE",
            help="Certificate that etcd asks for, PEM.",
        ),
        click.option(
            "--etcd-ca", default="", metavar="FILE", help="Root of etcd's certificate, PEM."
        ),
        click.option(
            "--etcd-prefix",
            default="",
            metavar="PREFIX",
            help="What this cluster's keys begin with (/swarm/CLUSTER-ID).",
        ),
        click.option(
            "--etcd-endpoints",
            multiple=True,
            metavar="HOST:PORT[,…]",
            help="Use this etcd instead of one of our own (implies --store etcd).",
        ),
    ):
        function = decorate(function)
    return function


def etcd_access(given: dict[str, Any]) -> EtcdAccess | None:
    """How somebody else's etcd is reached; None: there is none. Raises Invalid, NotFound."""
    texts = [part for text in given["etcd_endpoints"] for part in text.split(",") if part]
    if not texts:
        for name in ("prefix", "ca", "cert", "key"):
            if given[f"etcd_{name}"]:
                raise Invalid(f"--etcd-{name} needs --etcd-endpoints, the etcd that it is about")
        return None
    if given["store"] == "embedded":
        raise Invalid("--etcd-endpoints and --store embedded exclude each other; give one of them")
    prefix = given["etcd_prefix"].rstrip("/")
    if given["etcd_prefix"] and not prefix.startswith("/"):
        raise Invalid(f"--etcd-prefix: {given['etcd_prefix']!r} must begin with / and not be /")
    pems = {name: _pem(name, given[f"etcd_{name}"]) for name in _PEM}
    if bool(pems["cert"]) != bool(pems["key"]):
        raise Invalid("--etcd-cert and --etcd-key go together")
    if pems["cert"] and not pems["ca"]:
        raise Invalid("--etcd-cert needs --etcd-ca, the root of the certificate that etcd shows")
    return EtcdAccess(
        endpoints=tuple(_endpoint(text, tls=bool(pems["ca"])) for text in texts),
        prefix=prefix,
        ca_pem=pems["ca"],
        certificate_pem=pems["cert"],
        key_pem=pems["key"],
    )


def _endpoint(text: str, *, tls: bool) -> str:
    """host:port. A URL, as etcd itself writes them, is taken where it says the same."""
    scheme, separator, rest = text.partition("://")
    address = (rest if separator else text).rstrip("/")
    if separator and scheme not in ("http", "https"):
        raise Invalid(f"--etcd-endpoints: {text!r} is not an address; write host:port")
    if separator and (scheme == "https") != tls:
        raise Invalid(
            f"--etcd-endpoints: {text} is reached with TLS, and --etcd-ca is missing"
            if scheme == "https"
            else f"--etcd-endpoints: {text} is reached without TLS, and --etcd-ca is given"
        )
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Invalid(f"--etcd-endpoints: {text!r} is not an address; write host:port (etcd: 2379)")
    return address


def _pem(name: str, path: str) -> str:
    if not path:
        return ""
    what, mark = _PEM[name]
    text = read_input(path, what=f"etcd {what}").decode(errors="replace")
    if mark not in text:
        raise Invalid(f"--etcd-{name}: {path} holds no {what} in PEM")
    return text
