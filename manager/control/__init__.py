"""The leader's control loop and its pure stages; and how far services have come."""

from manager.control.controller import Controller
from manager.control.loop import ControlLoop
from manager.control.rehearse import Rehearsal, rehearse
from manager.control.status import Causes, service_status, up_to_date
from manager.control.template import Templates
from manager.control.tick import Tick

__all__ = [
    "Causes",
    "ControlLoop",
    "Controller",
    "Rehearsal",
    "Templates",
    "Tick",
    "rehearse",
    "service_status",
    "up_to_date",
]
