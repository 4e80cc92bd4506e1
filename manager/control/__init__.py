"""The leader's control loop and its pure stages; and how far services have come."""

from manager.control.controller import Controller
from manager.control.loop import ControlLoop
from manager.control.queues import Standing, standing, usage
from manager.control.rebalance import Move, can_move, plan_moves
from manager.control.rehearse import Rehearsal, rehearse
from manager.control.status import Causes, service_status, up_to_date
from manager.control.tally import Tally
from manager.control.template import Templates
from manager.control.tick import Tick

__all__ = [
    "Causes",
    "ControlLoop",
    "Controller",
    "Move",
    "Rehearsal",
    "Standing",
    "Tally",
    "Templates",
    "Tick",
    "can_move",
    "plan_moves",
    "rehearse",
    "service_status",
    "standing",
    "up_to_date",
    "usage",
]
