"""Root CA and its rotation, join tokens, certificates, sealing of secrets, autolock."""

from manager.ca import autolock, data_keys, rotation
from manager.ca.authority import Authority, NewCluster, manager_addrs, new_cluster
from manager.ca.autolock import Autolock
from manager.ca.data_keys import DataKeys
from manager.ca.objects import objects, serving_role
from manager.ca.rotation import Rotations
from manager.ca.seal import KEY_BYTES, Sealer, load_key, load_or_make_key, write_key

__all__ = [
    "KEY_BYTES",
    "Authority",
    "Autolock",
    "DataKeys",
    "NewCluster",
    "Rotations",
    "Sealer",
    "autolock",
    "data_keys",
    "load_key",
    "load_or_make_key",
    "manager_addrs",
    "new_cluster",
    "objects",
    "rotation",
    "serving_role",
    "write_key",
]
