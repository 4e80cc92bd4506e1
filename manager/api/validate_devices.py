"""What a spec may ask of a node's devices. Only GPUs can be asked for: what else a request names,
no node has. GPUs themselves are read by swarm/gpus.py, which the scheduler and the nodes use too.
"""

from __future__ import annotations

from manager.api.problems import Finder
from swarm import errors, gpus
from swarm.v1 import DeviceRequest, Resources

__all__ = ["check_devices"]


def check_devices(find: Finder, reservations: Resources) -> None:
    """Notes what is wrong with the device requests and with GPUs asked for as generic resources."""
    sound = True
    for i, request in enumerate(reservations.devices):
        sound &= _check_request(find.at(f"devices[{i}]"), request)
    if not sound:
        return  # each has its own line
    try:
        gpus.ask_of(reservations)
    except errors.Invalid as error:
        find.add("devices", error.message)


def _check_request(find: Finder, request: DeviceRequest) -> bool:
    """Whether the request is sound by itself."""
    before = len(find.problems.found)
    if request.count is not None and request.count < 1 and request.count != -1:
        find.add("count", f"{request.count} devices are no reservation; at least 1, or -1 for all")
    if request.count is not None and request.device_ids:
        find.add("device_ids", "count and device_ids exclude each other; give one of them")
    if not all(request.device_ids):
        find.add("device_ids", "a name is empty; give UUIDs, indices or CDI names")
    if len(set(request.device_ids)) != len(request.device_ids):
        find.add("device_ids", "a device is named twice")
    if not gpus.is_gpu_request(request):
        _not_a_gpu(find, request)
    elif len(find.problems.found) == before:
        try:
            gpus.ask_of(Resources(devices=(request,)))
        except errors.Invalid as error:
            find.add("options" if request.options else "count", error.message)
    return len(find.problems.found) == before


def _not_a_gpu(find: Finder, request: DeviceRequest) -> None:
    if not request.capabilities and not request.driver:
        find.add("capabilities", "say which devices are wanted: [gpu]")
        return
    what = ", ".join(request.capabilities) or f"driver {request.driver}"
    find.add(
        "capabilities",
        f"no node offers devices of {what}; GPUs are asked for with [gpu]. A device of the node by "
        "its path or CDI name stands in devices of the service, and counted ones in "
        "generic_resources",
    )
