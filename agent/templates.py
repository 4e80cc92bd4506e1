"""Templates of one task, expanded on its node. The language and the values are the leaf's
(swarm.placeholders); a template that does not fit rejects the task.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.runtime.base import UNSUPPORTED, Rejected
from swarm import placeholders
from swarm.gotemplate import TemplateError
from swarm.placeholders import Values
from swarm.v1 import Assignment, ConfigData, ContainerSpec, Platform, SecretData

__all__ = ["Values", "expand", "in_use", "values_of"]


def values_of(assignment: Assignment, *, hostname: str, platform: Platform) -> Values:
    """What the task's templates see."""
    task = assignment.task
    assert task is not None
    return placeholders.task_values(
        task,
        service_name=assignment.service_name,
        service_labels=assignment.service_labels,
        task_name=assignment.name,
        hostname=hostname,
        platform=platform,
    )


def expand(container: ContainerSpec, values: Values) -> ContainerSpec:
    """The container with all templates expanded. Raises Rejected naming field, line and column."""
    try:
        return placeholders.expand_container(container, values)
    except TemplateError as error:
        raise Rejected(error.message, cause=UNSUPPORTED) from None


def in_use(
    container: ContainerSpec, secrets: Mapping[str, SecretData], configs: Mapping[str, ConfigData]
) -> bool:
    """Whether anything of the task has to be expanded."""
    payloads = (
        *(secrets.get(reference.secret_id) for reference in container.secrets),
        *(configs.get(reference.config_id) for reference in container.configs),
    )
    return placeholders.in_use(container) or any(p and p.templating for p in payloads)
