"""The proxy's metrics. Bytes are counted in plain integers on the way and handed over now and then,
because a counter's lock on every chunk would be felt.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

OPEN = Gauge("swarm_proxy_connections_open", "Connections and UDP sessions that are open", ["via"])
CONNECTIONS = Counter(
    "swarm_proxy_connections_total",
    "Connections and UDP sessions taken on published ports and on the relay",
    ["via", "result"],
)
BYTES = Counter("swarm_proxy_bytes_total", "Bytes moved for clients", ["direction"])
REFUSED = Counter("swarm_proxy_relay_refused_total", "What the relay refused", ["reason"])
LISTENERS = Gauge("swarm_proxy_listeners", "Published ports that are open, one per address")
PROBLEMS = Gauge("swarm_proxy_listeners_failed", "Published ports that could not be opened")


class Traffic:
    """Bytes since the last `hand_over`."""

    __slots__ = ("received", "sent")

    def __init__(self) -> None:
        self.received = 0  # from clients
        self.sent = 0  # to clients

    def hand_over(self) -> None:
        """Adds what has come up to the counters."""
        BYTES.labels("in").inc(self.received)
        BYTES.labels("out").inc(self.sent)
        self.received = self.sent = 0
