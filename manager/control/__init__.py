"""The leader's control loop and its pure stages; and how far services have come."""

from manager.control import versions
from manager.control.controller import Controller
from manager.control.loop import ControlLoop
from manager.control.queues import Standing, standing, usage
from manager.control.rebalance import Move, can_move, plan_moves
from manager.control.rehearse import Rehearsal, rehearse
from manager.control.status import Causes, service_status, up_to_date
from manager.control.tally import Tally
from manager.control.template import Templates, needs_new_tasks
from manager.control.tick import Tick
from manager.control.uses import ids_used, rely_on, rely_on_uses

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
    "ids_used",
    "needs_new_tasks",
    "plan_moves",
    "rehearse",
    "rely_on",
    "rely_on_uses",
    "service_status",
    "standing",
    "up_to_date",
    "usage",
    "versions",
]
