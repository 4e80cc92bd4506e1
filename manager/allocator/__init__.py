"""Published ports and subnets: what the cluster gives out, so that nothing is given twice."""

from manager.allocator.ports import (
    DYNAMIC_FIRST,
    DYNAMIC_LAST,
    Clash,
    PortLedger,
    Taken,
    allocate_ports,
    ports_taken,
)
from manager.allocator.subnets import (
    DEFAULT_POOL,
    DEFAULT_SUBNET_SIZE,
    allocate_ipam,
    driver_state,
    free_subnet,
    give_subnets,
    hosts_in_use,
    overlap,
    subnets_in_use,
)

__all__ = [
    "DEFAULT_POOL",
    "DEFAULT_SUBNET_SIZE",
    "DYNAMIC_FIRST",
    "DYNAMIC_LAST",
    "Clash",
    "PortLedger",
    "Taken",
    "allocate_ipam",
    "allocate_ports",
    "driver_state",
    "free_subnet",
    "give_subnets",
    "hosts_in_use",
    "overlap",
    "ports_taken",
    "subnets_in_use",
]
