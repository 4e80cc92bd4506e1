"""GPUs that are declared in a file: other vendors', CDI names, and what the driver does not tell.

The file is JSON if its name ends so, else YAML. Everything in it is checked, all mistakes are told
at once with file and field, and nothing unknown is passed over. An entry whose UUID NVML finds as
well adds to what was found there. README.md lists the fields.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from msgspec import structs

from agent.gpus.device import CDI, DRIVERS, NODES, NVIDIA, Device, called
from swarm import errors
from swarm.quantities import parse_bytes
from swarm.v1 import Gpu, GpuLink, GpuProximity

FILE_BYTES_MAX = 1 << 20
GPUS_MAX = 1024
_CDI = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9_.-]+=[A-Za-z0-9_.:-]+")
_UUID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PCI = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_CAPABILITY = re.compile(r"\d{1,3}(\.\d{1,3})?")
_PROXIMITIES = {
    p.name.lower().replace("_", "-"): p for p in GpuProximity if p is not GpuProximity.UNSPECIFIED
}


@dataclass(frozen=True, slots=True)
class Inventory:
    """What one file says."""

    devices: tuple[Device, ...] = ()
    # Whether the driver is asked too.
    discovery: bool = True
    # Where MPS has its pipes; empty: where it has them by default.
    mps: str = ""


def read(path: Path) -> Inventory:
    """Raises Invalid with every mistake; Unavailable when the file cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise errors.Unavailable(
            f"GPU inventory {path}: cannot be read: {error.strerror}; name an existing file in "
            "--gpu-inventory"
        ) from None
    if len(data) > FILE_BYTES_MAX:
        raise errors.Invalid(f"GPU inventory {path}: longer than {FILE_BYTES_MAX} bytes")
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Inventory:
    """The inventory from a file's content. Raises Invalid with every mistake."""
    try:
        text = data.decode()
        content = json.loads(text) if name.endswith(".json") else yaml.load(text, _Loader)
    except UnicodeDecodeError:
        raise errors.Invalid(f"GPU inventory {name}: is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise errors.Invalid(f"GPU inventory {name}: {where}: {error.msg}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or "is no YAML"
        raise errors.Invalid(f"GPU inventory {name}: {where}{what}") from None
    reader = _Reader()
    inventory = reader.file(content)
    if reader.problems:
        said = [f"GPU inventory {name}: {problem}" for problem in reader.problems]
        raise errors.Invalid("\n".join(said))
    return inventory


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, and leaves dates as they are written."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"{key.value} is there twice", key.start_mark
            )
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Reader:
    """Reads values, collecting what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._fields: dict[str, Callable[[str, Any], Any]] = {
            "uuid": self._uuid,
            "index": lambda at, v: self._number(at, v, 0, 65_535),
            "model": self._text,
            "memory": self._memory,
            "driver": self._driver,
            "cdi": lambda at, v: self._matching(at, v, _CDI, "vendor.com/class=name"),
            "compute_capability": lambda at, v: self._matching(
                at, str(v) if isinstance(v, float) else v, _CAPABILITY, '"9.0"'
            ),
            "parent": self._uuid,
            "mig_profile": self._text,
            "numa_node": lambda at, v: self._number(at, v, -1, 4095),
            "pci_address": lambda at, v: self._matching(
                at, v.lower() if isinstance(v, str) else v, _PCI, '"0000:3b:00.0"'
            ),
            "nvlink_peers": lambda at, v: self._list(at, v, self._uuid),
            "links": self._links,
            "devices": lambda at, v: self._list(at, v, self._node),
            "env": self._env,
            "healthy": self._flag,
            "health_message": self._text,
        }

    def file(self, content: Any) -> Inventory:
        if not isinstance(content, dict):
            self._wrong("the file", content, "a mapping with the key gpus")
            return Inventory()
        self._known("", content, ("gpus", "discovery", "mps"))
        discovery = content.get("discovery", "nvml")
        if discovery not in ("nvml", "none"):
            self._wrong("discovery", discovery, "nvml or none")
        entries = content.get("gpus", [])
        if not isinstance(entries, list):
            self._wrong("gpus", entries, "a list")
            entries = []
        if len(entries) > GPUS_MAX:
            self.problems.append(f"gpus: {len(entries)} entries, at most {GPUS_MAX} are possible")
            entries = []
        devices = [self._device(f"gpus[{i}]", i, entry) for i, entry in enumerate(entries)]
        found = [d for d in devices if d is not None]
        self._check_names(found)
        mps = content.get("mps", "")
        if "mps" in content and not (isinstance(mps, str) and mps.startswith("/")):
            self._wrong("mps", mps, "the path of MPS's pipe directory")
            mps = ""
        return Inventory(tuple(found), discovery != "none", mps)

    # -------------------------------------------------------------- one GPU

    def _device(self, at: str, number: int, entry: Any) -> Device | None:
        if not isinstance(entry, dict):
            self._wrong(at, entry, "a mapping with the key uuid")
            return None
        self._known(at, entry, tuple(self._fields))
        before = len(self.problems)
        given = {
            key: self._fields[key](f"{at}.{key}", value)
            for key, value in entry.items()
            if key in self._fields
        }
        if "uuid" not in given:
            self.problems.append(f"{at}: uuid is missing")
        if len(self.problems) > before:
            return None
        driver = given.get("driver") or (
            CDI if "cdi" in given else NODES if "devices" in given else NVIDIA
        )
        if driver == CDI and "cdi" not in given:
            self.problems.append(f"{at}.driver: cdi needs the GPU's name; add cdi: vendor.com/...")
        if driver == NODES and "devices" not in given:
            self.problems.append(f"{at}.driver: none needs device nodes; add devices: [/dev/...]")
        healthy = given.get("healthy", True)
        message = given.get("health_message", "")
        if healthy and message:
            self.problems.append(f"{at}.health_message: only with healthy: false")
        return Device(
            Gpu(
                uuid=given["uuid"],
                index=given.get("index", number),
                model=called(given.get("model", ""), given.get("mig_profile", "")),
                memory_bytes=given.get("memory", 0),
                compute_capability=given.get("compute_capability", ""),
                parent_uuid=given.get("parent", ""),
                numa_node=given.get("numa_node", -1),
                nvlink_peers=tuple(given.get("nvlink_peers", ())),
                healthy=healthy,
                health_message=message or ("" if healthy else "declared so in the inventory"),
                driver=driver,
                cdi_name=given.get("cdi", ""),
                pci_address=given.get("pci_address", ""),
                links=given.get("links", ()),
                mig_profile=given.get("mig_profile", ""),
            ),
            nodes=tuple(given.get("devices", ())),
            env=given.get("env", {}),
        )

    def _check_names(self, devices: Sequence[Device]) -> None:
        """UUIDs are unique. What they refer to may be found by NVML, so it is not looked for."""
        seen: dict[str, int] = {}
        for number, device in enumerate(devices):
            uuid = device.gpu.uuid
            if uuid in seen:
                self.problems.append(
                    f"gpus[{number}].uuid: {uuid} is the UUID of gpus[{seen[uuid]}] too"
                )
            seen.setdefault(uuid, number)
            others = (
                device.gpu.parent_uuid,
                *device.gpu.nvlink_peers,
                *(link.uuid for link in device.gpu.links),
            )
            if uuid in others:
                self.problems.append(f"gpus[{number}]: refers to itself, {uuid}")

    # -------------------------------------------------------------- values

    def _wrong(self, at: str, value: Any, wanted: str) -> None:
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        self.problems.append(f"{at}: {shown} is not {wanted}")

    def _known(self, at: str, entry: Mapping[Any, Any], names: Sequence[str]) -> None:
        for key in entry:
            if key in names:
                continue
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names)}"
            place = f"{at}.{key}" if at else str(key)
            self.problems.append(f"{place}: no such field; {hint}")

    def _text(self, at: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isprintable() or len(value) > 256:
            self._wrong(at, value, "a text of at most 256 printable characters")
            return ""
        return value

    def _matching(self, at: str, value: Any, pattern: re.Pattern[str], wanted: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            self._wrong(at, value, f"of the form {wanted}")
            return ""
        return value

    def _uuid(self, at: str, value: Any) -> str:
        return self._matching(at, value, _UUID, "a GPU's UUID: letters, digits and _ . : / -")

    def _number(self, at: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self._wrong(at, value, f"a number from {least} to {most}")
            return 0
        return value

    def _flag(self, at: str, value: Any) -> bool:
        if not isinstance(value, bool):
            self._wrong(at, value, "true or false")
            return True
        return value

    def _memory(self, at: str, value: Any) -> int:
        try:
            bytes_ = value if type(value) is int else parse_bytes(value)
        except (errors.SwarmError, ValueError, TypeError, AttributeError):
            bytes_ = -1
        if not 0 <= bytes_ < 1 << 62:
            self._wrong(at, value, "an amount of memory, such as 80GiB")
            return 0
        return int(bytes_)

    def _driver(self, at: str, value: Any) -> str:
        if value not in DRIVERS:
            self._wrong(at, value, f"one of {', '.join(DRIVERS)}")
            return ""
        return str(value)

    def _node(self, at: str, value: Any) -> str:
        fits = isinstance(value, str) and value.startswith("/dev/") and ".." not in value
        if not fits:
            self._wrong(at, value, "the path of a device, /dev/...")
            return ""
        return str(value)

    def _list(self, at: str, value: Any, read: Callable[[str, Any], str]) -> tuple[str, ...]:
        if not isinstance(value, list):
            self._wrong(at, value, "a list")
            return ()
        return tuple(read(f"{at}[{i}]", each) for i, each in enumerate(value))

    def _env(self, at: str, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            self._wrong(at, value, "a mapping of variables")
            return {}
        found = {}
        for key, text in value.items():
            place = f"{at}.{key}"
            text = str(text) if type(text) is int else text
            found[self._matching(place, key, _VARIABLE, "a variable's name")] = self._text(
                place, text
            )
        return found

    def _links(self, at: str, value: Any) -> tuple[GpuLink, ...]:
        if not isinstance(value, dict):
            self._wrong(at, value, "a mapping of UUIDs")
            return ()
        links = []
        for uuid, how in value.items():
            proximity = _PROXIMITIES.get(how) if isinstance(how, str) else None
            if proximity is None:
                self._wrong(f"{at}.{uuid}", how, f"one of {', '.join(_PROXIMITIES)}")
                continue
            links.append(GpuLink(uuid=self._uuid(at, uuid), proximity=proximity))
        return tuple(links)


def merge(found: Sequence[Device], declared: Sequence[Device]) -> tuple[Device, ...]:
    """What the driver finds, with what the file says of it, then what only the file has."""
    said = {d.gpu.uuid: d for d in declared}
    merged = [_add(device, said.pop(device.gpu.uuid, None)) for device in found]
    taken = {d.gpu.index for d in merged if not d.gpu.parent_uuid}
    for device in said.values():
        if not device.gpu.parent_uuid:
            device = _with_free_index(device, taken)
            taken.add(device.gpu.index)
        merged.append(device)
    return tuple(merged)


def _with_free_index(device: Device, taken: Collection[int]) -> Device:
    """An index is a name that claims use, and the driver's own come first."""
    index = device.gpu.index
    while index in taken:
        index += 1
    return replace(device, gpu=structs.replace(device.gpu, index=index))


def _add(found: Device, said: Device | None) -> Device:
    if said is None:
        return found
    gpu, also = found.gpu, said.gpu
    reasons = [g.health_message for g in (also, gpu) if not g.healthy]
    return Device(
        structs.replace(
            gpu,
            model=also.model or gpu.model,
            driver=also.driver,
            cdi_name=also.cdi_name or gpu.cdi_name,
            numa_node=also.numa_node if also.numa_node >= 0 else gpu.numa_node,
            nvlink_peers=also.nvlink_peers or gpu.nvlink_peers,
            links=also.links or gpu.links,
            healthy=not reasons,
            health_message="; ".join(reasons),
        ),
        nodes=said.nodes or found.nodes,
        env=said.env or found.env,
    )
