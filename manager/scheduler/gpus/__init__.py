"""Placement of tasks on GPUs: what is free, how fragmented it is, and the best place.

Pure: nodes and claims in, decisions out. See ../README.md, "GPUs".
"""

from manager.scheduler.gpus.account import GpuAccount, GpuHold
from manager.scheduler.gpus.board import DIMENSIONS, FAR, GpuBoard, GpuDecision
from manager.scheduler.gpus.fragmentation import Models, Valuation
from manager.scheduler.gpus.links import links_of
from manager.scheduler.gpus.needs import GpuDevice, GpuNeed, GpuNode, largest_first
from manager.scheduler.gpus.policies import FGD, FGD_PAPER, POLICIES
from manager.scheduler.gpus.workload import Workload
from swarm.gpus import GPUS_MAX, WHOLE

__all__ = [
    "DIMENSIONS",
    "FAR",
    "FGD",
    "FGD_PAPER",
    "GPUS_MAX",
    "POLICIES",
    "WHOLE",
    "GpuAccount",
    "GpuBoard",
    "GpuDecision",
    "GpuDevice",
    "GpuHold",
    "GpuNeed",
    "GpuNode",
    "Models",
    "Valuation",
    "Workload",
    "largest_first",
    "links_of",
]
