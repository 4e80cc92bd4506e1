"""Placement of tasks on GPUs: what is free, how fragmented it is, and the best place.

Pure: nodes and claims in, decisions out. See ../README.md, "GPUs".
"""

from manager.scheduler.gpus.account import DIMENSIONS, GpuAccount, GpuDecision, GpuHold
from manager.scheduler.gpus.fragmentation import Models, Valuation
from manager.scheduler.gpus.needs import GPUS_MAX, WHOLE, GpuDevice, GpuNeed, GpuNode, largest_first
from manager.scheduler.gpus.policies import FGD, FGD_PAPER, POLICIES
from manager.scheduler.gpus.workload import Workload

__all__ = [
    "DIMENSIONS",
    "FGD",
    "FGD_PAPER",
    "GPUS_MAX",
    "POLICIES",
    "WHOLE",
    "GpuAccount",
    "GpuDecision",
    "GpuDevice",
    "GpuHold",
    "GpuNeed",
    "GpuNode",
    "Models",
    "Valuation",
    "Workload",
    "largest_first",
]
