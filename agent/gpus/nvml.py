"""NVIDIA's GPUs, asked of NVML through nvidia-ml-py.

Every call blocks, some for seconds, so all of this is for the one thread of agent/gpus/watch.py.
`open_driver` raises Absent where there is no driver, which is the usual case and no trouble.
`Driver.scan` gives all GPUs and MIG instances as they are now; what one of them cannot tell
(`not supported`) is left at its default, and one that is lost keeps what was known of it.
Names of calls and their meaning: NVML API reference, r580.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pynvml
from msgspec import structs

from agent.gpus.device import NVIDIA, Device, Use, called
from agent.gpus.health import Signs
from swarm.v1 import Gpu, GpuLink, GpuProcess, GpuProximity

GIB = 1 << 30
NVLINKS_MAX = 18  # NVML_NVLINK_MAX_LINKS
NO_INSTANCE = 0xFFFFFFFF
MIG_MINORS = Path("/proc/driver/nvidia-caps/mig-minors")
_NO_DRIVER = frozenset(
    {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_UNINITIALIZED,
    }
)
_LOST = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU does not answer its driver; reboot the node",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the driver asks for a reset of the GPU",
    pynvml.NVML_ERROR_IRQ_ISSUE: "the driver gets no interrupts from the GPU",
    pynvml.NVML_ERROR_UNKNOWN: "the driver fails with an unknown error",
}
_RECOVERY = {
    pynvml.NVML_GPU_RECOVERY_ACTION_NONE: "",
    pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "a reset of the GPU",
    pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "a reboot of the node",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: "an end of its peer-to-peer traffic",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "an end of its work and a reset",
}
_PROXIMITY = {
    pynvml.NVML_TOPOLOGY_INTERNAL: GpuProximity.BOARD,
    pynvml.NVML_TOPOLOGY_SINGLE: GpuProximity.ONE_SWITCH,
    pynvml.NVML_TOPOLOGY_MULTIPLE: GpuProximity.SEVERAL_SWITCHES,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: GpuProximity.HOST_BRIDGE,
    pynvml.NVML_TOPOLOGY_NODE: GpuProximity.NUMA_NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: GpuProximity.SYSTEM,
}
_PROFILE = re.compile(r"\bMIG (\S+)$")


class Absent(Exception):
    """There is no driver, or it is gone."""


class Trouble(Exception):
    """There is a driver, and it cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One GPU or MIG instance, its health not judged yet."""

    device: Device
    signs: Signs = field(default_factory=Signs)
    use: Use = field(default_factory=Use)


@dataclass(frozen=True, slots=True)
class Xid:
    """The driver's numbered error. No UUIDs: it does not say of which GPU, so any may be meant."""

    number: int
    uuids: tuple[str, ...]


@dataclass(slots=True)
class _Part:
    """A GPU with its handle; what does not change is asked for once."""

    handle: Any
    gpu: Gpu
    nodes: tuple[str, ...]
    # Of a MIG instance; else NO_INSTANCE.
    instance: int = NO_INSTANCE
    compute_instance: int = NO_INSTANCE


@dataclass(slots=True)
class _Whole(_Part):
    signs: Signs = field(default_factory=Signs)


def open_driver() -> Driver:
    """Raises Absent or Trouble."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value in _NO_DRIVER:
            raise Absent(str(error)) from None
        raise Trouble(f"NVML cannot be used: {_text(error)}") from None
    try:
        return Driver()
    except pynvml.NVMLError as error:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        if error.value in _NO_DRIVER:
            raise Absent(str(error)) from None
        raise Trouble(f"NVML cannot be used: {_text(error)}") from None


class Driver:
    """NVML, open. For one thread."""

    def __init__(self) -> None:
        self._version = str(_ask(pynvml.nvmlSystemGetDriverVersion, default=""))
        self._wholes: dict[int, _Whole] = {}  # by index
        self._parts: dict[str, list[_Part]] = {}  # MIG instances by their GPU's UUID
        self._joined: frozenset[str] = frozenset()  # the GPUs whose links are known
        self._events: Any = None
        self._watched: set[str] = set()  # UUIDs that events are asked of

    def close(self) -> None:
        with contextlib.suppress(pynvml.NVMLError):
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
            pynvml.nvmlShutdown()

    # -------------------------------------------------------------- what there is

    def scan(self) -> tuple[Reading, ...]:
        """Everything as it is now. Raises Absent when the driver is gone."""
        try:
            count = int(pynvml.nvmlDeviceGetCount())
            for index in range(count):
                self._find(index)
            for index in [i for i in self._wholes if i >= count]:
                del self._wholes[index]
            self._join()
            self._listen()
            readings: list[Reading] = []
            for index in sorted(self._wholes):
                readings += self._read(self._wholes[index])
            return tuple(readings)
        except pynvml.NVMLError as error:
            if error.value in _NO_DRIVER:
                raise Absent(str(error)) from None
            raise Trouble(f"NVML cannot be used: {_text(error)}") from None

    def _find(self, index: int) -> None:
        known = self._wholes.get(index)
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            if known is None or known.gpu.uuid != uuid:
                known = self._describe(index, handle, uuid)
            known.handle, known.signs = handle, Signs()
        except pynvml.NVMLError as error:
            if error.value not in _LOST:
                raise
            if known is None:
                # Lost before anything was known: it is told all the same, and given to nobody.
                gpu = Gpu(uuid=f"unknown-{index}", index=index, numa_node=-1, driver=NVIDIA)
                known = _Whole(None, gpu, ())
            known.signs = Signs(lost=_LOST[error.value])
        self._wholes[index] = known

    def _describe(self, index: int, handle: Any, uuid: str) -> _Whole:
        minor = _ask(pynvml.nvmlDeviceGetMinorNumber, handle, default=None)
        address = self._pci_address(handle)
        major_minor = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle, default=None)
        memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, default=None)
        gpu = Gpu(
            uuid=uuid,
            index=index,
            model=str(_ask(pynvml.nvmlDeviceGetName, handle, default="")),
            memory_bytes=int(memory.total) if memory else 0,
            compute_capability=f"{major_minor[0]}.{major_minor[1]}" if major_minor else "",
            numa_node=_numa_node(address, handle),
            driver=NVIDIA,
            cdi_name=f"nvidia.com/gpu={uuid}",
            pci_address=address,
            driver_version=self._version,
        )
        return _Whole(handle, gpu, () if minor is None else (f"/dev/nvidia{minor}",))

    def _pci_address(self, handle: Any) -> str:
        info = _ask(pynvml.nvmlDeviceGetPciInfo, handle, default=None)
        if info is None:
            return ""
        bus = info.busId
        text = (bus.decode() if isinstance(bus, bytes) else str(bus)).lower()
        domain, _, rest = text.partition(":")
        return f"{domain[-4:]}:{rest}" if len(domain) == 8 and domain[:4] == "0000" else text

    def _join(self) -> None:
        """NVLink peers and the way over PCIe; asked again only when other GPUs are there."""
        wholes = [w for w in self._wholes.values() if w.handle is not None and not w.signs.lost]
        uuids = frozenset(w.gpu.uuid for w in wholes)
        if uuids == self._joined:
            return
        links = {w.gpu.uuid: _nvlinks(w.handle) for w in wholes}
        for one in wholes:
            found, peers = [], []
            for other in wholes:
                if other is one:
                    continue
                nvlinks = _nvlinks_between(one, other, links[one.gpu.uuid])
                level = _ask(
                    pynvml.nvmlDeviceGetTopologyCommonAncestor,
                    one.handle,
                    other.handle,
                    default=None,
                )
                if nvlinks:
                    peers.append(other.gpu.uuid)
                found.append(
                    GpuLink(
                        uuid=other.gpu.uuid,
                        proximity=_PROXIMITY.get(level, GpuProximity.UNSPECIFIED),
                        nvlinks=nvlinks,
                    )
                )
            one.gpu = structs.replace(one.gpu, links=tuple(found), nvlink_peers=tuple(peers))
        self._joined = uuids

    # -------------------------------------------------------------- how it is

    def _read(self, whole: _Whole) -> list[Reading]:
        if whole.signs.lost or whole.handle is None:
            return self._lost(whole, whole.signs)
        try:
            signs = _signs(whole.handle)
            gpu = structs.replace(
                whole.gpu, processes=_processes(whole.handle), ecc_errors=signs.ecc_errors
            )
            readings = [Reading(Device(gpu, whole.nodes), signs, _use(whole.handle))]
            self._parts[gpu.uuid] = self._instances(whole)
            for part in self._parts[gpu.uuid]:
                instance = structs.replace(part.gpu, processes=_processes(part.handle))
                readings.append(Reading(Device(instance, part.nodes), signs, _use(part.handle)))
            return readings
        except pynvml.NVMLError as error:
            if error.value not in _LOST:
                raise
            whole.signs = Signs(lost=_LOST[error.value])
            return self._lost(whole, whole.signs)

    def _lost(self, whole: _Whole, signs: Signs) -> list[Reading]:
        parts = self._parts.get(whole.gpu.uuid, ())
        return [Reading(Device(p.gpu, p.nodes), signs) for p in (whole, *parts)]

    def _instances(self, whole: _Whole) -> list[_Part]:
        mode = _ask(pynvml.nvmlDeviceGetMigMode, whole.handle, default=(0, 0))
        if mode[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return []
        most = int(_ask(pynvml.nvmlDeviceGetMaxMigDeviceCount, whole.handle, default=0))
        minors = _mig_minors()
        parts = []
        for index in range(most):
            handle = _ask(
                pynvml.nvmlDeviceGetMigDeviceHandleByIndex, whole.handle, index, default=None
            )
            if handle is not None:
                parts.append(_instance(whole, index, handle, minors))
        return parts

    # -------------------------------------------------------------- events

    def _listen(self) -> None:
        wanted = pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeDoubleBitEccError
        for whole in self._wholes.values():
            if whole.handle is None or whole.signs.lost or whole.gpu.uuid in self._watched:
                continue
            self._watched.add(whole.gpu.uuid)
            offered = _ask(pynvml.nvmlDeviceGetSupportedEventTypes, whole.handle, default=0)
            if not offered & wanted:
                continue
            if self._events is None:
                self._events = pynvml.nvmlEventSetCreate()
            _ask(
                pynvml.nvmlDeviceRegisterEvents,
                whole.handle,
                offered & wanted,
                self._events,
                default=None,
            )

    @property
    def listens(self) -> bool:
        """Whether any GPU tells events, so that `wait` waits."""
        return self._events is not None

    def wait(self, timeout_ms: int) -> Xid | None:
        """The next event, or None when there is none in time. An event without XID (an error in
        memory) has number 0. Raises Absent, Trouble.
        """
        try:
            event = pynvml.nvmlEventSetWait_v2(self._events, timeout_ms)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                return None
            if error.value in _NO_DRIVER:
                raise Absent(str(error)) from None
            if error.value in _LOST:
                return Xid(0, ())  # the scan that follows finds out which
            raise Trouble(f"NVML tells no events: {_text(error)}") from None
        number = 0
        if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
            number = int(event.eventData)
        return Xid(number, self._meant(event))

    def _meant(self, event: Any) -> tuple[str, ...]:
        """The GPU with its instances, or the one instance that the event names."""
        at = _address(event.device)
        for whole in self._wholes.values():
            if whole.handle is None or _address(whole.handle) != at:
                continue
            parts = self._parts.get(whole.gpu.uuid, [])
            if event.gpuInstanceId != NO_INSTANCE:
                named = [p.gpu.uuid for p in parts if _is_of(p, event)]
                if named:
                    return tuple(named)
            return (whole.gpu.uuid, *(p.gpu.uuid for p in parts))
        return ()


# ------------------------------------------------------------------ single questions


def _ask(call: Callable[..., Any], *args: Any, default: Any) -> Any:
    """What a call answers; the default where the GPU or the driver cannot tell."""
    try:
        return call(*args)
    except pynvml.NVMLError as error:
        if error.value in _LOST or error.value in _NO_DRIVER:
            raise
        return default


def _text(error: Any) -> str:
    return str(error).strip() or f"error {error.value}"


def _address(handle: Any) -> int:
    return int(ctypes.cast(handle, ctypes.c_void_p).value or 0)


def _is_of(part: _Part, event: Any) -> bool:
    if part.instance != event.gpuInstanceId:
        return False
    return event.computeInstanceId in (NO_INSTANCE, part.compute_instance)


def _numa_node(address: str, handle: Any) -> int:
    """The kernel's word, then the driver's; -1: neither knows."""
    with contextlib.suppress(OSError, ValueError):
        node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
        if node >= 0:
            return node
    masks = _ask(
        pynvml.nvmlDeviceGetMemoryAffinity,
        handle,
        4,  # words of 64 nodes each
        pynvml.NVML_AFFINITY_SCOPE_NODE,
        default=(),
    )
    for word, mask in enumerate(masks):
        if mask:
            bits = int(mask)
            return word * 64 + (bits & -bits).bit_length() - 1
    return -1


def _nvlinks(handle: Any) -> dict[str, int]:
    """Active links by the PCI address at their other end."""
    found: dict[str, int] = {}
    for link in range(NVLINKS_MAX):
        state = _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link, default=None)
        if state != pynvml.NVML_FEATURE_ENABLED:
            continue
        remote = _ask(pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link, default=None)
        key = ""
        if remote is not None:
            key = f"{remote.domain:x}:{remote.bus:x}:{remote.device:x}"
        found[key] = found.get(key, 0) + 1
    return found


def _nvlinks_between(one: _Whole, other: _Whole, links: dict[str, int]) -> int:
    info = _ask(pynvml.nvmlDeviceGetPciInfo, other.handle, default=None)
    if info is not None:
        direct = links.get(f"{info.domain:x}:{info.bus:x}:{info.device:x}", 0)
        if direct:
            return direct
    status = _ask(
        pynvml.nvmlDeviceGetP2PStatus,
        one.handle,
        other.handle,
        pynvml.NVML_P2P_CAPS_INDEX_NVLINK,
        default=None,
    )
    # No link leads to the other GPU itself, and NVLink joins them: there is a switch between.
    return sum(links.values()) if status == pynvml.NVML_P2P_STATUS_OK else 0


def _signs(handle: Any) -> Signs:
    errors = _ask(
        pynvml.nvmlDeviceGetTotalEccErrors,
        handle,
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        pynvml.NVML_VOLATILE_ECC,
        default=0,
    )
    rows = _ask(pynvml.nvmlDeviceGetRemappedRows, handle, default=(0, 0, 0, 0))
    pending = _ask(pynvml.nvmlDeviceGetRetiredPagesPendingStatus, handle, default=0)
    return Signs(
        recovery=_recovery(handle),
        ecc_errors=int(errors),
        remap_failed=bool(rows[3]),
        retirement_pending=pending == pynvml.NVML_FEATURE_ENABLED,
    )


def _recovery(handle: Any) -> str | None:
    fields = [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
    values = _ask(pynvml.nvmlDeviceGetFieldValues, handle, fields, default=None)
    if values is None or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    action = int(values[0].value.uiVal)
    return _RECOVERY.get(action, f"recovery action {action}")


def _use(handle: Any) -> Use:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle, default=None)
    return Use(
        memory_bytes=None if memory is None else int(memory.used),
        ratio=None if rates is None else int(rates.gpu) / 100,
    )


def _processes(handle: Any) -> tuple[GpuProcess, ...]:
    held: dict[int, int] = {}
    for call in (
        # Without their version these raise what is no NVMLError where the driver is too old.
        pynvml.nvmlDeviceGetComputeRunningProcesses_v3,
        pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
    ):
        for process in _ask(call, handle, default=()):
            pid = int(process.pid)
            held[pid] = max(held.get(pid, 0), int(process.usedGpuMemory or 0))
    return tuple(
        GpuProcess(pid=pid, name=_name(pid), memory_bytes=-(-held[pid] // GIB) * GIB)
        for pid in sorted(held)
    )


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""  # it ended, or is out of sight


def _instance(whole: _Whole, index: int, handle: Any, minors: dict[str, int]) -> _Part:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle, default=None)
    name = str(_ask(pynvml.nvmlDeviceGetName, handle, default=""))
    profile = _PROFILE.search(name)
    instance = int(_ask(pynvml.nvmlDeviceGetGpuInstanceId, handle, default=NO_INSTANCE))
    compute = int(_ask(pynvml.nvmlDeviceGetComputeInstanceId, handle, default=NO_INSTANCE))
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    gpu = Gpu(
        uuid=uuid,
        index=index,
        model=called(whole.gpu.model, profile.group(1) if profile else ""),
        memory_bytes=int(memory.total) if memory else 0,
        compute_capability=whole.gpu.compute_capability,
        parent_uuid=whole.gpu.uuid,
        numa_node=whole.gpu.numa_node,
        driver=NVIDIA,
        cdi_name=f"nvidia.com/gpu={uuid}",
        pci_address=whole.gpu.pci_address,
        mig_profile=profile.group(1) if profile else "",
        driver_version=whole.gpu.driver_version,
    )
    return _Part(
        handle, gpu, (*whole.nodes, *_caps(whole, instance, compute, minors)), instance, compute
    )


def _caps(whole: _Whole, instance: int, compute: int, minors: dict[str, int]) -> Sequence[str]:
    """The device nodes that let a program use one instance of a GPU."""
    if not whole.nodes:
        return ()
    base = f"gpu{whole.nodes[0].removeprefix('/dev/nvidia')}/gi{instance}"
    found = (minors.get(f"{base}/access"), minors.get(f"{base}/ci{compute}/access"))
    return [f"/dev/nvidia-caps/nvidia-cap{minor}" for minor in found if minor is not None]


def _mig_minors() -> dict[str, int]:
    try:
        lines = MIG_MINORS.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
