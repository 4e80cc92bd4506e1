"""The node's GPUs: found, watched, and given to tasks. See README.md."""

from agent.gpus.device import Device
from agent.gpus.handover import HandOver, Handover, as_claimed, hand_over
from agent.gpus.sharing import given_to, limited, unlimited
from agent.gpus.watch import Gpus

__all__ = [
    "Device",
    "Gpus",
    "HandOver",
    "Handover",
    "as_claimed",
    "given_to",
    "hand_over",
    "limited",
    "unlimited",
]
