"""Ports for servers that tests start."""

import errno
import itertools
import os
import socket

# Below those that the system gives out by itself, so that no connection and no listener of port 0
# takes one before its server does. Runs beside each other begin at different ones.
_PORTS = itertools.cycle(range(20_000 + os.getpid() % 97 * 120, 32_000))


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, and that was not given out lately."""
    while True:
        port = next(_PORTS)
        try:
            socket.create_server((address, port)).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return port


def free_ports(count: int) -> list[int]:
    """Several, on 127.0.0.1."""
    return [free_port() for _ in range(count)]
