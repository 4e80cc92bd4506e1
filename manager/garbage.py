"""How often the interpreter looks for garbage in cycles, in a process that holds a cluster's state.

Objects of the contract are left out of that search (msgspec, gc=False), but the dictionaries of the
tables are not: with 50,000 tasks a full search takes 100 ms, in which the event loop stands still,
and with CPython's thresholds (700, 10, 10) it came for every 2,000 tasks that finished, a fifth of
all the leader's time. Almost nothing of the manager's is in cycles, so it is looked for a tenth as
often; what was loaded at the start is not looked through at all.
"""

from __future__ import annotations

import gc
from typing import Final

# Containers made and not freed before the youngest are searched; how many searches of one
# generation go before one of the next.
THRESHOLDS: Final = (10_000, 20, 20)


def settle() -> None:
    """The state has been loaded: it stays, and is not searched again. Takes one full search."""
    gc.set_threshold(*THRESHOLDS)
    gc.collect()
    gc.freeze()
