"""The flags that ask for GPUs: `--gpus`, `--gpu-model`, `--gpu-memory`, `--gpu-fraction`,
`--gpu-capability`. Shared by `service create`, `service update` and `job run`.

`--gpus` is Docker's: a number, `all`, `device=ID,ID`, or its long form. The others become options
of the device request; alone they ask for one GPU. On an existing service `--gpus` replaces how many
are asked for and keeps the options, an empty option takes it away, and `--gpus 0` takes all away.
What is asked for is checked here by the same code as in the manager.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import msgspec

from cli.service_values import fail, unknown_key
from cli.spec_paths import at, put
from swarm import errors, gpus
from swarm.v1 import DeviceRequest, Resources, ServiceSpec

__all__ = ["devices_of_flags", "edit_gpus", "gpu_options", "parse_gpus"]

DEVICES = "task.resources.reservations.devices"
_KEYS = ("count", "device", "driver", "capabilities")
_FORM = "write a number, all, device=ID,ID, or 0 for none"
# Flag, option of the request, check, metavar, help.
_OPTIONS: tuple[tuple[str, str, Callable[[str], object], str, str], ...] = (
    (
        "gpu-model",
        "model",
        gpus.parse_models,
        "MODEL",
        "Only GPUs of this model: words of its name, A100 or A100|H100.",
    ),
    (
        "gpu-memory",
        "memory",
        gpus.parse_memory,
        "BYTES",
        "Memory each GPU has at least; with --gpu-fraction what the task takes of it.",
    ),
    (
        "gpu-fraction",
        "fraction",
        gpus.parse_share,
        "PART",
        "A part of one GPU, shared with other tasks: 0.5, 1/3 or 50%.",
    ),
    (
        "gpu-capability",
        "capability",
        gpus.parse_capability,
        "VERSION",
        "Only GPUs of this compute capability: >=8.0.",
    ),
)


def parse_gpus(text: str, *, option: str = "--gpus") -> DeviceRequest:
    """The request of `--gpus`; a count of 0 means none. Raises BadParameter."""
    # Shells keep quotes that Docker's users write: '"device=0,2"'.
    try:
        words = next(csv.reader([text.strip()], strict=True), [])
    except csv.Error as error:
        raise fail(option, text, f"{error}; {_FORM}") from None
    words = [part for word in words for part in ([word] if "=" not in word else word.split(","))]
    found: dict[str, list[str]] = {}
    last = ""
    for word in words:
        key, separator, value = (part.strip() for part in word.partition("="))
        if last == "device" and "/" in key:
            found[last].append(word.strip())  # a CDI name has an = of its own
        elif separator:
            last = key.lower()
            if last not in _KEYS:
                raise unknown_key(option, text, last, _KEYS)
            if last in found:
                raise fail(option, text, f"{last} is given twice; {_FORM}")
            found[last] = [value]
        elif last in ("device", "capabilities") and key:
            found[last].append(key)
        elif "count" not in found:
            found["count"] = [key]
        else:
            raise fail(option, text, _FORM)
    if not all(value for values in found.values() for value in values) or not found:
        raise fail(option, text, _FORM)
    if "count" in found and "device" in found:
        raise fail(option, text, "a number and names exclude each other")
    ids = tuple(found.get("device", ()))
    if len(set(ids)) < len(ids):
        raise fail(option, text, "a GPU is named twice")
    return DeviceRequest(
        driver=found.get("driver", [""])[0],
        count=None if ids else _count(option, text, found.get("count", ["1"])[0]),
        device_ids=ids,
        capabilities=tuple(dict.fromkeys(("gpu", *found.get("capabilities", ())))),
    )


def _count(option: str, text: str, value: str) -> int:
    if value == "none":
        return 0
    if value in ("all", "-1"):
        return -1
    if not (value.isascii() and value.isdecimal()) or len(value) > 9:
        raise fail(option, text, _FORM)
    return int(value)


def gpu_options() -> list[Callable[[Any], Any]]:
    """click's decorators, one a flag; their values belong to `edit_gpus`."""
    decorators: list[Callable[[Any], Any]] = [
        click.option(
            "--gpus",
            callback=_read_gpus,
            metavar="GPUS",
            help="GPUs set aside for a task: 2, all, device=ID,ID, or 0 for none.",
        )
    ]
    for flag, _, check, metavar, text in _OPTIONS:
        decorators.append(
            click.option(f"--{flag}", callback=_checked(check), metavar=metavar, help=text)
        )
    return decorators


def _read_gpus(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> DeviceRequest | None:
    return None if text is None else parse_gpus(text)


def _checked(
    check: Callable[[str], object],
) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    def read(ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
        if text:
            try:
                check(text)
            except errors.Invalid as error:
                raise click.BadParameter(f"{error.message}.", ctx, param) from None
        return text

    return read


def edit_gpus(spec: ServiceSpec, flags: Mapping[str, Any]) -> ServiceSpec:
    """The spec with the flags applied; without any it stays as it is. Raises UsageError for flags
    that do not go together.
    """
    before: tuple[DeviceRequest, ...] = at(spec, DEVICES)
    after = devices_of_flags(flags, before)
    if after == before:
        return spec
    spec = put(spec, DEVICES, after)
    try:
        gpus.ask_of(
            Resources(devices=after, generic=at(spec, DEVICES.replace("devices", "generic")))
        )
    except errors.Invalid as error:
        raise click.UsageError(f"{error.message}.") from None
    return spec


def devices_of_flags(
    flags: Mapping[str, Any], before: Sequence[DeviceRequest] = ()
) -> tuple[DeviceRequest, ...]:
    """Device requests with the flags applied; requests that are not for GPUs stay."""
    asked: DeviceRequest | None = flags.get("gpus")
    options = {
        name: value
        for flag, name, *_ in _OPTIONS
        if (value := flags.get(flag.replace("-", "_"))) is not None
    }
    if asked is None and not options:
        return tuple(before)
    others = tuple(r for r in before if not gpus.is_gpu_request(r))
    requests = [r for r in before if gpus.is_gpu_request(r)]
    if asked is not None:
        kept = requests[0].options if requests else {}
        requests = [msgspec.structs.replace(asked, options=kept)]
        if asked.count == 0:
            if any(options.values()):
                raise click.UsageError("--gpus 0 asks for no GPU; leave the other flags out.")
            return others
    elif not requests:
        requests = [DeviceRequest(count=1, capabilities=("gpu",))]
    made = []
    for request in requests:
        merged = {k: v for k, v in (request.options | options).items() if v}
        made.append(msgspec.structs.replace(request, options=merged))
    return (*others, *made)
