"""Sockets on published ports: opened with clear reasons when they cannot be."""

from __future__ import annotations

import errno
import socket

from swarm import errors

BACKLOG = 1024


def name(protocol: str, host: str, port: int) -> str:
    """For people: "tcp 127.0.0.1:80"."""
    return f"{protocol} {f'[{host}]' if ':' in host else host}:{port}"


def open_socket(protocol: str, host: str, port: int) -> socket.socket | None:
    """A bound socket, listening where the protocol does. None: the host has no IPv6 to listen on.
    Raises Conflict when the port is taken, Unavailable for other reasons.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        if family == socket.AF_INET6 and error.errno == errno.EAFNOSUPPORT:
            return None
        raise errors.Unavailable(f"cannot make a socket: {error.strerror}") from None
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        what = name(protocol, host, port)
        if family == socket.AF_INET6 and host == "::" and error.errno == errno.EADDRNOTAVAIL:
            return None
        if error.errno == errno.EADDRINUSE:
            raise errors.Conflict(
                f"{what} is taken by another program on this node; stop it or publish another port"
            ) from None
        hint = "; ports below 1024 need root" if error.errno == errno.EACCES else ""
        raise errors.Unavailable(f"cannot listen on {what}: {error.strerror}{hint}") from None
    return sock


def open_everywhere(
    protocol: str, hosts: tuple[str, ...], port: int
) -> tuple[list[socket.socket], int]:
    """One socket per host, all or none; port 0 is chosen once for all. Raises as `open_socket`."""
    opened: list[socket.socket] = []
    try:
        for host in hosts:
            sock = open_socket(protocol, host, port)
            if sock is not None:
                opened.append(sock)
                port = port or sock.getsockname()[1]
    except errors.SwarmError:
        for sock in opened:
            sock.close()
        raise
    if not opened:
        raise errors.Unavailable(f"no address to listen on among {', '.join(hosts)}")
    return opened, port
