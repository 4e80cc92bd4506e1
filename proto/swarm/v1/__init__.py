"""The contract, version 1: frozen structs, `encode` and `decode`. Services live in
swarm.v1.services.
"""

from swarm.v1.structs import *  # noqa: F403
from swarm.v1.structs import __all__ as __all__
