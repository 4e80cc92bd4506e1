"""Agent sessions, heartbeats, assignments, status intake, relays."""

from manager.dispatcher.dispatcher import Dispatcher
from manager.dispatcher.relays import Relay, Relays

__all__ = ["Dispatcher", "Relay", "Relays"]
