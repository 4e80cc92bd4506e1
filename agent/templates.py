"""Placeholders in a container's environment, hostname and mounts: `{{.Node.Hostname}}` and the
like.

Swarm takes Go templates here; people use them to name things by slot or node, which is what this
covers: fields with dots, and `index` for labels whose names are no words. Anything else between the
braces is refused with what may be written, rather than passed on as it stands. The names follow
SwarmKit's template.Context.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import structs

from agent.runtime.base import Rejected
from swarm.v1 import Assignment, ContainerSpec, Mount, Platform

_PLACE = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.DOTALL)
_LABEL = re.compile(r"\.Service\.Labels\.(\w+)")
_INDEX = re.compile(r'index\s+\.Service\.Labels\s+(?:"([^"\\]*)"|`([^`]*)`)')


@dataclass(frozen=True, slots=True)
class Names:
    """What placeholders stand for in one task."""

    fields: Mapping[str, str]
    labels: Mapping[str, str]

    @classmethod
    def of(cls, assignment: Assignment, *, hostname: str, platform: Platform) -> Names:
        task = assignment.task
        assert task is not None
        return cls(
            {
                ".Service.ID": task.service_id,
                ".Service.Name": assignment.service_name,
                ".Node.ID": task.node_id,
                ".Node.Hostname": hostname,
                ".Node.Platform.Architecture": platform.architecture,
                ".Node.Platform.OS": platform.os,
                ".Task.ID": task.id,
                ".Task.Name": assignment.name,
                # In a global service the node is the slot.
                ".Task.Slot": str(task.slot or task.node_id),
            },
            assignment.service_labels,
        )

    def expand(self, text: str, where: str) -> str:
        """The text with its placeholders filled in. Raises Rejected naming `where`."""
        if "{{" not in text:
            return text
        return _PLACE.sub(lambda match: self._value(match[1], where), text)

    def _value(self, expression: str, where: str) -> str:
        if (known := self.fields.get(expression)) is not None:
            return known
        if (label := _LABEL.fullmatch(expression)) and label[1] in self.labels:
            return self.labels[label[1]]
        if index := _INDEX.fullmatch(expression):
            return self.labels.get(index[1] if index[1] is not None else index[2], "")
        raise Rejected(
            f"{where}: the placeholder {{{{{expression}}}}} is not known here; write one of "
            f"{', '.join(f'{{{{{name}}}}}' for name in self.fields)}, "
            '{{.Service.Labels.NAME}} of a label that is set, or {{index .Service.Labels "NAME"}}'
        )


def expand(container: ContainerSpec, names: Names) -> ContainerSpec:
    """The container with all placeholders filled in. Raises Rejected."""
    return structs.replace(
        container,
        hostname=names.expand(container.hostname, "hostname"),
        env=tuple(names.expand(e, f"env {e.partition('=')[0]}") for e in container.env),
        mounts=tuple(_mount(m, names) for m in container.mounts),
    )


def _mount(mount: Mount, names: Names) -> Mount:
    where = f"mount {mount.target}"
    options = mount.volume_options
    if options is not None:
        driver = options.driver_config
        options = structs.replace(
            options,
            labels={k: names.expand(v, where) for k, v in options.labels.items()},
            driver_config=driver
            and structs.replace(
                driver, options={k: names.expand(v, where) for k, v in driver.options.items()}
            ),
        )
    return structs.replace(
        mount,
        source=names.expand(mount.source, where),
        target=names.expand(mount.target, where),
        volume_options=options,
    )
