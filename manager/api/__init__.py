"""The control API over the store."""

from manager.api.relays import Relay, Relays
from manager.api.service import ControlService, NodeFacts, Tokens

__all__ = ["ControlService", "NodeFacts", "Relay", "Relays", "Tokens"]
