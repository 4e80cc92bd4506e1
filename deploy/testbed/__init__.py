"""The multi-host test bed: network namespaces on one bridge, each with its own Docker Engine and
swarmd.
"""

from deploy.testbed.bed import Bed, default_root, sweep, trouble
from deploy.testbed.host import Host
from deploy.testbed.images import BASE, WEB
from deploy.testbed.processes import TestbedError
from deploy.testbed.registry import Registry

__all__ = [
    "BASE",
    "WEB",
    "Bed",
    "Host",
    "Registry",
    "TestbedError",
    "default_root",
    "sweep",
    "trouble",
]
