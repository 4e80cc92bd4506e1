"""Root CA, join tokens, certificates, sealing of secrets."""

from manager.ca.authority import Authority, NewCluster, manager_addrs, new_cluster, objects
from manager.ca.seal import Sealer, load_or_make_key

__all__ = [
    "Authority",
    "NewCluster",
    "Sealer",
    "load_or_make_key",
    "manager_addrs",
    "new_cluster",
    "objects",
]
