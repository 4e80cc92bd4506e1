"""The files that a task gets from its secrets and configs.

Targets are Docker's: a secret's relative name lies in /run/secrets, a config's in the root folder.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping

from agent.runtime.base import Rejected, TaskFile
from swarm.v1 import ConfigData, ContainerSpec, Driver, FileTarget, SecretData

SECRETS_FOLDER = "/run/secrets"
CONFIGS_FOLDER = "/"
MODE_DEFAULT = 0o444  # Docker's
_MODE_BITS = 0o777


def files(
    container: ContainerSpec,
    secrets: Mapping[str, SecretData],
    configs: Mapping[str, ConfigData],
) -> tuple[TaskFile, ...]:
    """All files of a task. Raises Rejected for what is missing or cannot be a file."""
    out: list[TaskFile] = []
    for reference in container.secrets:
        secret = secrets.get(reference.secret_id)
        name = reference.secret_name
        if secret is None:
            raise Rejected(f"secret {name!r} is not in the cluster any more; create it again")
        _check_plain("secret", name, secret.templating)
        out.append(_file("secret", name, reference.file, secret.data, SECRETS_FOLDER))
    for config_reference in container.configs:
        if config_reference.runtime:
            continue
        config = configs.get(config_reference.config_id)
        name = config_reference.config_name
        if config is None:
            raise Rejected(f"config {name!r} is not in the cluster any more; create it again")
        _check_plain("config", name, config.templating)
        out.append(_file("config", name, config_reference.file, config.data, CONFIGS_FOLDER))
    targets = [f.target for f in out]
    for target in targets:
        if targets.count(target) > 1:
            raise Rejected(
                f"two secrets or configs have the target {target}; give each its own target"
            )
    return tuple(out)


def _check_plain(kind: str, name: str, templating: Driver | None) -> None:
    if templating is not None and templating.name:
        raise Rejected(
            f"{kind} {name!r} uses the template driver {templating.name!r}, which this agent does "
            "not have; store the finished text instead"
        )


def _file(kind: str, name: str, target: FileTarget | None, data: bytes, folder: str) -> TaskFile:
    target = target or FileTarget()
    wanted = target.name or name
    path = posixpath.normpath(posixpath.join(folder, wanted))
    if not wanted.startswith("/") and posixpath.relpath(path, folder).startswith(".."):
        raise Rejected(f"the target {wanted!r} of {kind} {name!r} lies outside of {folder}")
    if path == "/":
        raise Rejected(f"the target {wanted!r} of {kind} {name!r} names no file")
    return TaskFile(
        target=path,
        data=data,
        uid=_number(kind, name, "uid", target.uid),
        gid=_number(kind, name, "gid", target.gid),
        mode=target.mode & _MODE_BITS or MODE_DEFAULT,
        secret=kind == "secret",
    )


def _number(kind: str, name: str, field: str, text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise Rejected(f"{field} {text!r} of {kind} {name!r} is not a number")
    return int(text)
