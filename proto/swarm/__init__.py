"""The shared leaf: what managers, agents and the CLI must agree on. Imports nothing of ours but
swarm.v1.
"""

__version__ = "0.1.0"
