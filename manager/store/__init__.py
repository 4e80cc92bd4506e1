"""The cluster's state: tables, drafts, commits, watches; engines beneath."""

from manager.store import sealed
from manager.store.engine import (
    TOUCH_S,
    Corrupt,
    Deposed,
    Engine,
    EngineFacts,
    Fence,
    Op,
    Row,
    Stale,
)
from manager.store.store import Store
from manager.store.tables import STACK_LABEL, Change, Draft, Frozen, Tables, View, slot_key
from manager.store.watch import Batch, Topic, Watch, WatchLost

__all__ = [
    "STACK_LABEL",
    "TOUCH_S",
    "Batch",
    "Change",
    "Corrupt",
    "Deposed",
    "Draft",
    "Engine",
    "EngineFacts",
    "Fence",
    "Frozen",
    "Op",
    "Row",
    "Stale",
    "Store",
    "Tables",
    "Topic",
    "View",
    "Watch",
    "WatchLost",
    "sealed",
    "slot_key",
]
