"""Templates in tasks: what `{{.Task.Slot}}` and the like stand for, and where they may be written.

Two places: a container's environment, hostname and mounts; and secrets and configs whose template
driver is `golang`, which have three functions more (secret, config, env). The node expands them for
each task; managers look for what is wrong in them beforehand. Source: Docker's "Create services
using templates" and SwarmKit's package `template`.

As there, a key that a map does not have is an error, a task of a global service has its node for a
slot, and what `secret` and `config` give is not expanded in turn. Departures: `secret` and `config`
know what they give by target and, where no target fits, by name; `env` gives the variable as the
container sees it, expanded; the name of an unset label is told with those that are set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import structs

from swarm.gotemplate import (
    BUILTINS,
    Fault,
    Limits,
    Struct,
    Template,
    TemplateError,
)
from swarm.v1 import ContainerSpec, Mount, Platform, Task

__all__ = [
    "CONFIG_BYTES_MAX",
    "DRIVERS",
    "SECRET_BYTES_MAX",
    "container_problems",
    "expand_container",
    "expand_payload",
    "in_use",
    "payload_problem",
    "task_values",
]

DRIVERS = ("golang",)  # template drivers of secrets and configs
SECRET_BYTES_MAX = 512_000  # as SwarmKit
CONFIG_BYTES_MAX = 1_024_000  # as SwarmKit
# One word of a program's environment on Linux; nothing in a spec's fields is longer.
_FIELD_LIMITS = Limits(output_chars=128 << 10, steps=50_000)
# Thousands of placeholders in a file are within it; the slowest template takes about two seconds.
_PAYLOAD_STEPS = 100_000
# Managers look for unknown fields this far into a file, on their event loop: some 20 ms at worst.
_CHECK_STEPS = 1_000

Values = Struct
Getter = Callable[[str], str]


def _join(separator: str, *parts: str) -> str:
    return separator.join(parts)


# SwarmKit's own addition: the separator comes first.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {**BUILTINS, "join": _join}


def task_values(
    task: Task,
    *,
    service_name: str,
    service_labels: Mapping[str, str],
    task_name: str,
    hostname: str,
    platform: Platform,
) -> Values:
    """What a template sees of one task."""
    return Struct(
        Service=Struct(ID=task.service_id, Name=service_name, Labels=dict(service_labels)),
        Node=Struct(
            ID=task.node_id,
            Hostname=hostname,
            Platform=Struct(Architecture=platform.architecture, OS=platform.os),
        ),
        # In a global service the node is the slot.
        Task=Struct(ID=task.id, Name=task_name, Slot=str(task.slot or task.node_id)),
    )


def _no_such_key(mapping: Mapping[str, Any], name: str) -> Any:
    known = ", ".join(sorted(mapping)) or "none"
    raise Fault(
        f"there is no label {name!r} (set: {known}); where it may be missing, write "
        f'{{{{index .Service.Labels "{name}"}}}}'
    )


# ------------------------------------------------------------------ fields of a container


def expand_container(container: ContainerSpec, values: Values) -> ContainerSpec:
    """The container with all templates expanded. Raises TemplateError naming the field."""

    def expand(text: str, where: str) -> str:
        if "{{" not in text:
            return text
        template = Template(
            text, name=where, functions=_FUNCTIONS, missing=_no_such_key, limits=_FIELD_LIMITS
        )
        return template.render(values)

    return _each_field(container, expand)


def in_use(container: ContainerSpec) -> bool:
    """Whether the container has any template."""
    found: list[str] = []

    def look(text: str, where: str) -> str:
        if "{{" in text:
            found.append(where)
        return text

    _each_field(container, look)
    return bool(found)


def container_problems(container: ContainerSpec) -> list[TemplateError]:
    """What no task could make of the container's templates: all errors of syntax, and fields that
    do not exist. What depends on the task is not looked at.
    """
    found: list[TemplateError] = []

    def check(text: str, where: str) -> str:
        if "{{" not in text:
            return text
        try:
            template = Template(
                text,
                name=where,
                functions=_FUNCTIONS,
                missing=lambda mapping, name: "",
                limits=_FIELD_LIMITS,
            )
        except TemplateError as error:
            found.append(error)
            return text
        try:
            template.render(_SAMPLE)
        except TemplateError as error:
            if error.unknown_field:
                found.append(error)
        return text

    _each_field(container, check)
    return found


_SAMPLE = task_values(
    Task(id="t" * 25, service_id="s" * 25, node_id="n" * 25, slot=1),
    service_name="service",
    service_labels={},
    task_name="service.1." + "t" * 25,
    hostname="node",
    platform=Platform(architecture="x86_64", os="linux"),
)


def _each_field(container: ContainerSpec, expand: Callable[[str, str], str]) -> ContainerSpec:
    return structs.replace(
        container,
        hostname=expand(container.hostname, "hostname"),
        env=tuple(_env(line, expand) for line in container.env),
        mounts=tuple(_mount(mount, expand) for mount in container.mounts),
    )


def _env(line: str, expand: Callable[[str, str], str]) -> str:
    name, equals, value = line.partition("=")
    return f"{name}={expand(value, f'environment {name}')}" if equals else line


def _mount(mount: Mount, expand: Callable[[str, str], str]) -> Mount:
    where = f"mount {mount.target}"

    def each(values: Mapping[str, str], what: str) -> dict[str, str]:
        return {k: expand(v, f"{where}: {what} {k}") for k, v in values.items()}

    options = mount.volume_options
    if options is not None:
        driver = options.driver_config
        if driver is not None:
            driver = structs.replace(driver, options=each(driver.options, "driver option"))
        options = structs.replace(
            options, labels=each(options.labels, "volume label"), driver_config=driver
        )
    return structs.replace(
        mount,
        source=expand(mount.source, f"{where}: source"),
        target=expand(mount.target, f"{where}: target"),
        volume_options=options,
    )


# ------------------------------------------------------------------ secrets and configs


def expand_payload(
    data: bytes,
    values: Values,
    *,
    name: str,
    bytes_max: int,
    secret: Getter,
    config: Getter,
    env: Getter,
) -> bytes:
    """The content of a file for one task. The getters raise Fault. Raises TemplateError beginning
    with `name`. Bytes that are no UTF-8 pass through.
    """
    template = _payload(
        data, name=name, bytes_max=bytes_max, more={"secret": secret, "config": config, "env": env}
    )
    text = template.render(values)
    out = text.encode(errors="surrogateescape")
    if len(out) > bytes_max:
        raise TemplateError(
            f"it becomes {len(out)} bytes, {bytes_max} are allowed", name=name, line=1, column=1
        )
    return out


def payload_problem(data: bytes, *, name: str) -> TemplateError | None:
    """What is wrong with a templated secret or config whatever the task: its syntax, or the first
    field that does not exist; None: nothing is. What depends on the task is not looked at.
    """

    def get(key: str) -> str:
        return ""

    try:
        template = _payload(
            data,
            name=name,
            bytes_max=CONFIG_BYTES_MAX,
            more={"secret": get, "config": get, "env": get},
            steps=_CHECK_STEPS,
        )
    except TemplateError as error:
        return error
    try:
        template.render(_SAMPLE)
    except TemplateError as error:
        return error if error.unknown_field else None
    return None


def _payload(
    data: bytes,
    *,
    name: str,
    bytes_max: int,
    more: Mapping[str, Getter],
    steps: int = _PAYLOAD_STEPS,
) -> Template:
    return Template(
        data.decode(errors="surrogateescape"),
        name=name,
        functions={**_FUNCTIONS, **more},
        missing=_no_such_key,
        limits=Limits(output_chars=bytes_max, steps=steps),
    )
