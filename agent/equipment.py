"""The files that a task gets from its secrets and configs.

Targets are Docker's: a secret's relative name lies in /run/secrets, a config's in the root folder.
Those with the template driver `golang` are expanded for the task; a config that shows a secret is
then a secret itself.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass

from agent.runtime.base import UNSUPPORTED, Rejected, TaskFile
from swarm.gotemplate import Fault, TemplateError
from swarm.placeholders import (
    CONFIG_BYTES_MAX,
    DRIVERS,
    SECRET_BYTES_MAX,
    Values,
    expand_payload,
)
from swarm.v1 import ConfigData, ContainerSpec, Driver, FileTarget, SecretData

SECRETS_FOLDER = "/run/secrets"
CONFIGS_FOLDER = "/"
MODE_DEFAULT = 0o444  # Docker's
_MODE_BITS = 0o777


@dataclass(frozen=True, slots=True)
class _Item:
    """One secret or config of the task."""

    kind: str
    name: str
    file: FileTarget | None
    data: bytes
    templating: Driver | None

    @property
    def target(self) -> str:
        """As the reference says it; Docker's default is the name."""
        return (self.file.name if self.file else "") or self.name


def files(
    container: ContainerSpec,
    secrets: Mapping[str, SecretData],
    configs: Mapping[str, ConfigData],
    values: Values,
) -> tuple[TaskFile, ...]:
    """All files of a task. `container` is the expanded one. Raises Rejected for what is missing,
    cannot be a file, or cannot be expanded.
    """
    secret_items, config_items = _items(container, secrets, configs)
    rendering = _Rendering(container, secret_items, config_items, values)
    out = [_file(item, rendering.data(item), SECRETS_FOLDER, secret=True) for item in secret_items]
    for item in config_items:
        data = rendering.data(item)
        out.append(_file(item, data, CONFIGS_FOLDER, secret=rendering.showed_secret))
    targets = [f.target for f in out]
    for target in targets:
        if targets.count(target) > 1:
            raise Rejected(
                f"two secrets or configs have the target {target}; give each its own target"
            )
    return tuple(out)


def _items(
    container: ContainerSpec,
    secrets: Mapping[str, SecretData],
    configs: Mapping[str, ConfigData],
) -> tuple[list[_Item], list[_Item]]:
    """The secrets and configs that the task refers to, and no others."""
    found: tuple[list[_Item], list[_Item]] = ([], [])
    for reference in container.secrets:
        secret = secrets.get(reference.secret_id)
        name = reference.secret_name
        if secret is None:
            raise Rejected(f"secret {name!r} is not in the cluster any more; create it again")
        found[0].append(_Item("secret", name, reference.file, secret.data, secret.templating))
    for config_reference in container.configs:
        if config_reference.runtime:
            continue
        config = configs.get(config_reference.config_id)
        name = config_reference.config_name
        if config is None:
            raise Rejected(f"config {name!r} is not in the cluster any more; create it again")
        file = config_reference.file
        found[1].append(_Item("config", name, file, config.data, config.templating))
    return found


class _Rendering:
    """Expands the items of one task, which see each other as they are stored."""

    def __init__(
        self,
        container: ContainerSpec,
        secrets: list[_Item],
        configs: list[_Item],
        values: Values,
    ) -> None:
        self._values = values
        self._secrets = secrets
        self._configs = configs
        self._env = dict(line.split("=", 1) for line in container.env if "=" in line)
        # Of the last item: its text may hold a secret.
        self.showed_secret = False

    def data(self, item: _Item) -> bytes:
        """The item's content for this task. Raises Rejected with its name, line and column."""
        self.showed_secret = False
        driver = item.templating.name if item.templating else ""
        if not driver:
            return item.data
        if driver not in DRIVERS:
            raise Rejected(
                f"{item.kind} {item.name!r} uses the template driver {driver!r}, which this agent "
                f"does not have; it has: {', '.join(DRIVERS)}",
                cause=UNSUPPORTED,
            )
        try:
            return expand_payload(
                item.data,
                self._values,
                name=f"{item.kind} {item.name!r}",
                bytes_max=SECRET_BYTES_MAX if item.kind == "secret" else CONFIG_BYTES_MAX,
                secret=self._secret,
                config=self._config,
                env=self._variable,
            )
        except TemplateError as error:
            raise Rejected(error.message, cause=UNSUPPORTED) from None

    def _secret(self, target: str) -> str:
        text = _find(self._secrets, target, "secret")
        self.showed_secret = True
        return text

    def _config(self, target: str) -> str:
        return _find(self._configs, target, "config")

    def _variable(self, name: str) -> str:
        """A variable of the task's environment; one that is not set is empty, as in SwarmKit."""
        return self._env.get(name, "")


def _find(items: list[_Item], wanted: str, kind: str) -> str:
    found = next((i for i in items if i.target == wanted), None)
    found = found or next((i for i in items if i.name == wanted), None)
    if found is None:
        known = ", ".join(item.target for item in items) or "none"
        raise Fault(
            f"the service has no {kind} with the target or name {wanted!r} (targets: {known})"
        )
    return found.data.decode(errors="surrogateescape")


def _file(item: _Item, data: bytes, folder: str, *, secret: bool) -> TaskFile:
    kind, name, wanted = item.kind, item.name, item.target
    target = item.file or FileTarget()
    path = posixpath.normpath(posixpath.join(folder, wanted))
    # POSIX lets two leading slashes mean something of their own.
    path = "/" + path.lstrip("/")
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
        secret=secret,
    )


def _number(kind: str, name: str, field: str, text: str) -> int:
    if not text:
        return 0
    if not text.isascii() or not text.isdigit():
        raise Rejected(f"{field} {text!r} of {kind} {name!r} is not a number")
    return int(text)
