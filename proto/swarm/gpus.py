"""What a task asks of a node's GPUs: read from its reservations in one place, so that what the API
accepts, the scheduler places and the agent hands over is the same.

A task has one ask. It is written as device requests (compose's `devices`, `gpus`, the CLI's
`--gpus`), or in Swarm's older spelling as generic resources of the kinds `gpu` and `NVIDIA-GPU`.
Several requests add up; a GPU must then meet what all of them say. Everything is an integer: shares
in millionths of one GPU, memory in bytes.

Generic kinds: a node that declares such a kind by hand serves it by its generic account, as Docker
does, and its GPUs are not touched; `GpuAsk.served_by` says what is left for GPUs there.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Final

from swarm import errors
from swarm.quantities import format_bytes, parse_bytes
from swarm.v1 import DeviceRequest, Gpu, Resources

WHOLE: Final = 1_000_000  # shares of one GPU; a third of a GPU is 333_333
GPUS_MAX: Final = 64  # of one node that are placed on; MIG instances count

# Kinds of generic resources that mean GPUs, and whose; compared without case.
GENERIC_KINDS: Final[Mapping[str, str]] = {"gpu": "", "nvidia-gpu": "nvidia"}
CAPABILITIES: Final = frozenset({"gpu", "nvidia", "compute", "utility", "graphics", "video"})
# Drivers of device requests that mean GPUs, and whose; cdi: anybody's.
DRIVERS: Final[Mapping[str, str]] = {"nvidia": "nvidia", "amd": "amd", "cdi": ""}
# Options and the forms they take.
OPTIONS: Final[Mapping[str, str]] = {
    "model": 'whole words of a model\'s name, more of them separated by |, such as "A100|H100"',
    "memory": 'a size of each GPU\'s memory, such as "40GiB"',
    "fraction": 'a part of one GPU above 0 and at most 1, such as "0.5", "1/3" or "50%"',
    "capability": 'a compute capability with >=, >, <=, < or ==, such as ">=8.0"',
}

_CAPABILITY = re.compile(r"(>=|<=|==|>|<|)\s*(\d{1,3})(?:\.(\d{1,3}))?", re.ASCII)
_VERSION = re.compile(r"(\d{1,3})(?:\.(\d{1,3}))?", re.ASCII)
_WORD = re.compile(r"[a-z0-9.]+")


@dataclass(frozen=True, slots=True)
class GpuAsk:
    """What one task asks for. `count` GPUs of any name, those in `ids` (UUID, index or CDI name),
    or `all` of a node's. Below WHOLE, `share` is a part of the only GPU; `memory_bytes` is then
    taken of the shared GPU, and otherwise what each GPU must have at least.
    """

    count: int = 0
    ids: tuple[str, ...] = ()
    all: bool = False
    # Any of these; empty: any model.
    models: tuple[str, ...] = ()
    memory_bytes: int = 0
    share: int = WHOLE
    # As ">=8.0"; empty: any.
    capability: str = ""
    # nvidia, amd; empty: any.
    vendor: str = ""
    # Of `count` and `ids`, what was asked for as generic resources, by kind as written.
    generic: tuple[tuple[str, int], ...] = ()
    generic_named: tuple[tuple[str, str], ...] = ()

    @property
    def wanted(self) -> int:
        """Pieces, for people; `all` asks for one at least."""
        return max(1, self.count + len(self.ids)) if self.all else self.count + len(self.ids)

    @property
    def shared(self) -> bool:
        """Whether the GPU is not the task's alone."""
        return self.share < WHOLE

    def served_by(self, declared: Collection[str]) -> GpuAsk | None:
        """What a node's GPUs have to serve where the node declares these generic kinds itself."""
        if not any(kind in declared for kind, _ in (*self.generic, *self.generic_named)):
            return self
        names = {name for kind, name in self.generic_named if kind in declared}
        left = replace(
            self,
            count=self.count - sum(count for kind, count in self.generic if kind in declared),
            ids=tuple(name for name in self.ids if name not in names),
            generic=tuple(g for g in self.generic if g[0] not in declared),
            generic_named=tuple(g for g in self.generic_named if g[0] not in declared),
        )
        return left if left.all or left.wanted else None

    def __str__(self) -> str:
        """For people: "2 GPUs of model A100 or H100 with 40 GiB each"."""
        if self.shared:
            part = format_share(self.share)
            text = f"{part} of GPU {self.ids[0]}" if self.ids else f"{part} of a GPU"
        elif self.all:
            text = "all GPUs of a node"
        else:
            names = f" {', '.join(self.ids)}" if self.ids and not self.count else ""
            text = f"{self.wanted} GPU{'s' if self.wanted != 1 else ''}{names}"
            if self.ids and self.count:
                text += f" (among them {', '.join(self.ids)})"
        if self.vendor:
            text += f" of {self.vendor}"
        if self.models:
            text += f" of model {' or '.join(self.models)}"
        if self.memory_bytes:
            each = " each" if not self.shared and (self.all or self.wanted > 1) else ""
            text += f" with {format_bytes(self.memory_bytes)}{each}"
        return text + (f", compute capability {self.capability}" if self.capability else "")


def is_gpu_request(request: DeviceRequest) -> bool:
    """Whether a device request is for GPUs."""
    return (
        any(c.lower() in CAPABILITIES for c in request.capabilities)
        or request.driver.lower() in DRIVERS
    )


def is_gpu_kind(kind: str) -> bool:
    """Whether a kind of generic resources means GPUs."""
    return kind.lower() in GENERIC_KINDS


def ask_of(resources: Resources | None) -> GpuAsk | None:
    """The ask of these reservations; None: no GPUs. Raises Invalid, which names the option and the
    forms it takes. Device requests that are not for GPUs are left out.
    """
    if resources is None or not (resources.devices or resources.generic):
        return None
    asks = [_ask_of_request(r) for r in resources.devices if is_gpu_request(r)]
    for g in resources.generic:
        if not is_gpu_kind(g.kind):
            continue
        vendor = GENERIC_KINDS[g.kind.lower()]
        if g.name:
            asks.append(GpuAsk(ids=(g.name,), vendor=vendor, generic_named=((g.kind, g.name),)))
        elif count := 1 if g.count is None else g.count:
            asks.append(GpuAsk(count=count, vendor=vendor, generic=((g.kind, count),)))
    return _together(asks) if asks else None


def _ask_of_request(request: DeviceRequest) -> GpuAsk:
    count, ids = request.count, request.device_ids
    ask = GpuAsk(
        count=0 if ids else 1 if count is None else max(0, count),
        ids=tuple(dict.fromkeys(ids)),
        all=not ids and count is not None and count < 0,
        vendor=DRIVERS.get(request.driver.lower(), ""),
    )
    for name, value in sorted(request.options.items()):
        ask = _with_option(ask, name, value)
    if ask.shared and (ask.all or ask.wanted != 1):
        asked = "all GPUs" if ask.all else f"{ask.wanted} GPUs"
        raise errors.Invalid(
            f"{asked} and fraction {request.options['fraction']!r} are asked for: only one GPU can "
            "be shared; ask for whole GPUs, or for a fraction of one"
        )
    return ask


def _with_option(ask: GpuAsk, name: str, value: str) -> GpuAsk:
    match name:
        case "model":
            return replace(ask, models=parse_models(value))
        case "memory":
            return replace(ask, memory_bytes=parse_memory(value))
        case "fraction":
            return replace(ask, share=parse_share(value))
        case "capability":
            return replace(ask, capability=parse_capability(value))
    near = difflib.get_close_matches(name, OPTIONS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise errors.Invalid(f"GPUs have no option {name!r}: use {', '.join(OPTIONS)}{hint}")


def _wrong(option: str, value: str, why: str = "") -> errors.Invalid:
    return errors.Invalid(
        f"GPU option {option}: {value!r} {why or 'is not understood'}; write {OPTIONS[option]}"
    )


def parse_models(text: str) -> tuple[str, ...]:
    """Models from "A100|H100", in order and each once."""
    models = tuple(" ".join(part.split()) for part in text.split("|"))
    if any(not _WORD.search(model.lower()) for model in models):
        raise _wrong("model", text, "leaves a name empty")
    return tuple(sorted(set(models)))


def parse_memory(text: str) -> int:
    """Bytes from "40GiB", above 0."""
    try:
        value = parse_bytes(text)
    except ValueError:
        raise _wrong("memory", text) from None
    if not value:
        raise _wrong("memory", text, "is nothing")
    return value


def parse_share(text: str) -> int:
    """Shares from "0.5", "1/3" or "50%"; finer than a millionth is cut off."""
    stripped = text.strip()
    try:
        if "/" in stripped:
            value = Fraction(stripped)
        elif stripped.endswith("%"):
            value = Fraction(Decimal(stripped[:-1])) / 100
        else:
            value = Fraction(Decimal(stripped))
    except (ValueError, ArithmeticError, InvalidOperation):
        raise _wrong("fraction", text) from None
    if not 0 < value <= 1:
        raise _wrong("fraction", text, "is not a part of one GPU")
    share = int(value * WHOLE)
    if not share:
        raise _wrong("fraction", text, "is less than a millionth of a GPU")
    return share


def parse_capability(text: str) -> str:
    """The condition in its normal form; a version alone means at least that."""
    match = _CAPABILITY.fullmatch(text.strip())
    if match is None:
        raise _wrong("capability", text)
    return f"{match[1] or '>='}{int(match[2])}.{int(match[3] or 0)}"


def _together(asks: list[GpuAsk]) -> GpuAsk:
    """Requests of one task added up; each GPU has to meet what any of them says."""
    first = asks[0]
    for other in asks[1:]:
        for name, old, new in (
            ("model", first.models, other.models),
            ("memory", first.memory_bytes, other.memory_bytes),
            ("fraction", first.share, other.share),
            ("capability", first.capability, other.capability),
        ):
            if old != new:
                raise errors.Invalid(
                    f"GPU option {name}: the task's requests for GPUs say different things; give "
                    "all of them the same options, or ask for all GPUs in one request"
                )
        if first.vendor and other.vendor and first.vendor != other.vendor:
            raise errors.Invalid(
                f"GPUs of {first.vendor} and of {other.vendor} are asked for; a task can have GPUs "
                "of one vendor only"
            )
        if first.shared:
            raise errors.Invalid(
                "fractions of several GPUs are asked for: a task can have a fraction of one only"
            )
        first = replace(
            first,
            count=first.count + other.count,
            ids=tuple(dict.fromkeys((*first.ids, *other.ids))),
            all=first.all or other.all,
            vendor=first.vendor or other.vendor,
            generic=(*first.generic, *other.generic),
            generic_named=(*first.generic_named, *other.generic_named),
        )
    if first.all:
        # All of them: a number beside it says nothing more.
        first = replace(first, count=0)
    if first.wanted > GPUS_MAX:
        raise errors.Invalid(
            f"{first.wanted} GPUs are asked for: a task can have at most {GPUS_MAX}, all of one "
            "node"
        )
    return replace(
        first,
        ids=tuple(sorted(first.ids)),
        generic=_sums(first.generic),
        generic_named=tuple(sorted(set(first.generic_named))),
    )


def _sums(counts: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    sums: dict[str, int] = {}
    for kind, count in counts:
        sums[kind] = sums.get(kind, 0) + count
    return tuple(sorted(sums.items()))


# ------------------------------------------------------------------ one GPU


def misfit(ask: GpuAsk, gpu: Gpu) -> str:
    """What of the GPU itself is not as asked: "model", "gpu_memory", "capability" or "vendor";
    empty: nothing. How much of it is free is not looked at.
    """
    if ask.vendor and vendor_of(gpu) != ask.vendor:
        return "vendor"
    if ask.models and not any(model_matches(model, gpu.model) for model in ask.models):
        return "model"
    if ask.memory_bytes > gpu.memory_bytes:
        return "gpu_memory"
    if ask.capability and not capability_holds(ask.capability, gpu.compute_capability):
        return "capability"
    return ""


def is_named(name: str, gpu: Gpu) -> bool:
    """Whether an id of a request means this GPU: by UUID, CDI name, or index of a whole GPU."""
    if name in (gpu.uuid, gpu.cdi_name):
        return bool(name)
    return not gpu.parent_uuid and name == str(gpu.index)


@functools.lru_cache(maxsize=4096)  # few models, asked of every GPU
def model_matches(asked: str, model: str) -> bool:
    """Whether the asked words stand in the model's name one after another, without case: "A100"
    matches "NVIDIA A100-SXM4-40GB", "A10" does not.
    """
    want, have = _words(asked), _words(model)
    return bool(want) and any(
        have[i : i + len(want)] == want for i in range(len(have) - len(want) + 1)
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@functools.lru_cache(maxsize=4096)
def capability_holds(asked: str, capability: str) -> bool:
    """Whether a compute capability ("9.0") meets the condition; one that is not known never."""
    condition, found = _CAPABILITY.fullmatch(asked), _VERSION.fullmatch(capability)
    if condition is None or found is None:
        return False
    want = (int(condition[2]), int(condition[3] or 0))
    have = (int(found[1]), int(found[2] or 0))
    match condition[1]:
        case ">":
            return have > want
        case "<":
            return have < want
        case "<=":
            return have <= want
        case "==":
            return have == want
        case _:
            return have >= want


def vendor_of(gpu: Gpu) -> str:
    """nvidia, amd, intel; empty: not known."""
    if gpu.driver == "nvidia":
        return "nvidia"
    cdi = gpu.cdi_name.partition(".")[0].lower()
    if cdi in ("nvidia", "amd", "intel"):
        return cdi
    words = _words(gpu.model)
    return next((vendor for vendor in ("nvidia", "amd", "intel") if vendor in words), "")


def format_share(share: int) -> str:
    """A share for people: "0.5", "1", "0.333333"."""
    return f"{Decimal(share) / WHOLE:.6f}".rstrip("0").rstrip(".") or "0"
