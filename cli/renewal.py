"""Keeps the client certificates of contexts good: beside each command on a remote cluster.

A context holds a certificate of the cluster's root as it was when the context was made. It is
renewed, with a fresh key, when another root signs by now and when half of its life is over, and the
roots it trusts and the managers' addresses are brought up to date. What cannot be renewed any more
is explained.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cli.contexts import Contexts, Credentials
from swarm import tls
from swarm.clock import SystemClock
from swarm.errors import SwarmError, Unavailable
from swarm.v1 import GetInfoRequest, GetRequest, IssueClientCertificateRequest, Kind

if TYPE_CHECKING:
    from swarm.v1.services import CertificatesClient, ControlClient

__all__ = ["keep_good", "why_refused"]

CALL_S = 10.0
PROBE_S = 3.0
# How old what a context knows of the managers' addresses may be: managers come and go seldom, and a
# context with one address is of no use once that manager is gone.
ADDRESSES_S = 600.0


async def keep_good(
    mine: Credentials,
    *,
    context: str,
    contexts: Contexts,
    control: ControlClient,
    certificates: CertificatesClient,
) -> Credentials:
    """The credentials to use from now on; new ones are in the context's file already. A failure is
    a warning: the certificate in use has just served.
    """
    try:
        answer = await control.get(GetRequest(kind=Kind.CLUSTER), timeout_s=CALL_S)
        found = answer.object.cluster if answer.object else None
        if found is None:
            return mine
        new = mine
        if _outdated(mine, found.root_ca_pem):
            if not context:
                click.echo(
                    "Warning: the cluster's root CA was changed, or this certificate is old. Make "
                    "a new one with `swarmctl context create` on a manager, before this one is "
                    "refused.",
                    err=True,
                )
                return mine
            new = await _issued(mine, certificates)
        elif found.root_ca_pem != mine.root_ca_pem:
            new = replace(mine, root_ca_pem=found.root_ca_pem)
        addresses = await _addresses(control, contexts, context)
        if context and (new != mine or addresses):
            contexts.change(context, new, addresses)
        return new
    except Unavailable:
        return mine  # the command beside it says so, and the next one tries again
    except (SwarmError, OSError) as error:
        what = f"context {context!r}" if context else "this client"
        click.echo(f"Warning: the certificate of {what} was not renewed: {error}", err=True)
        return mine


async def _addresses(control: ControlClient, contexts: Contexts, context: str) -> tuple[str, ...]:
    """Where the managers are now, if it is time to note that in the context."""
    if not context or not contexts.get(context).follows or contexts.age_s(context) < ADDRESSES_S:
        return ()
    info = await control.get_info(GetInfoRequest(), timeout_s=CALL_S)
    return info.manager_addrs


def _outdated(mine: Credentials, roots_pem: str) -> bool:
    certificate = tls.load_certificates(mine.certificate_pem)[0]
    facts = tls.facts(certificate)
    half_ns = (facts.not_before_ns + facts.not_after_ns) // 2
    signing = tls.load_certificates(roots_pem)[0]
    return not tls.issued_by(certificate, signing) or SystemClock().now_ns() > half_ns


async def _issued(mine: Credentials, certificates: CertificatesClient) -> Credentials:
    key_pem = tls.new_key_pem()
    name = tls.facts(tls.load_certificates(mine.certificate_pem)[0]).common_name
    issued = await certificates.issue_client_certificate(
        IssueClientCertificateRequest(csr_pem=tls.csr_pem(key_pem), name=name), timeout_s=CALL_S
    )
    return Credentials(issued.root_ca_pem, issued.certificate_pem, key_pem)


async def why_refused(mine: Credentials, address: str, *, context: str) -> str:
    """Why a manager that listens does not take the certificate, as far as can be seen without
    trusting it; empty: nothing can be said.
    """
    again = (
        f"on a manager run `swarmctl context create {context or 'NAME'}` and `swarmctl context "
        f"export {context or 'NAME'}`, here `swarmctl context rm {context or 'NAME'}` and "
        f"`swarmctl context import {context or 'NAME'} FILE`"
    )
    own = tls.facts(tls.load_certificates(mine.certificate_pem)[0])
    if own.not_after_ns <= SystemClock().now_ns():
        return f"this client's certificate has expired; {again}"
    why = await asyncio.to_thread(
        tls.why_strangers, address, mine.certificate_pem, mine.root_ca_pem, timeout_s=PROBE_S
    )
    return why and f"{why}, so this client's certificate is of no use there; {again}"
