"""Contexts: named connections, kept in files that only their owner reads.

`<config>/contexts/NAME.json` holds one context with its key (0600), `<config>/config.json` the name
of the current one. Files are replaced whole, never half written. Used by cli/connection.py and
`swarmctl context`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from swarm.clock import SECOND_NS, SystemClock
from swarm.errors import Conflict, Invalid, NotFound

__all__ = ["Context", "Contexts", "Credentials"]

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.+-]{0,62}")
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Credentials:
    """A client's certificate with its key, and the root it trusts; all PEM."""

    root_ca_pem: str
    certificate_pem: str
    key_pem: str

    @classmethod
    def from_folder(cls, folder: Path) -> Credentials:
        """ca.pem, cert.pem and key.pem, as Docker names them. Raises NotFound."""
        texts = []
        for name in ("ca.pem", "cert.pem", "key.pem"):
            try:
                texts.append((folder / name).read_text())
            except OSError as error:
                raise NotFound(
                    f"SWARM_CERT_PATH: {folder / name}: {(error.strerror or '').lower()}; the "
                    "folder must "
                    "hold ca.pem, cert.pem and key.pem"
                ) from None
        return cls(*texts)


@dataclass(frozen=True, slots=True)
class Context:
    """A named connection: a socket, or addresses with credentials."""

    name: str
    description: str = ""
    socket: str = ""
    addresses: tuple[str, ...] = ()
    credentials: Credentials | None = None
    # The addresses are those that the managers give themselves, and are kept up with them.
    follows: bool = False

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}" if self.socket else f"tcp://{','.join(self.addresses)}"

    def to_json(self) -> str:
        data = asdict(self)
        if not self.follows:
            del data["follows"]  # earlier versions do not know it
        return json.dumps({"version": FORMAT_VERSION, **data}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> Context:
        """Raises Invalid."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("version") != FORMAT_VERSION:
                raise ValueError("another version wrote it")
            mine = data.pop("credentials")
            data["addresses"] = tuple(data["addresses"])
            return cls(**data, credentials=Credentials(**mine) if mine else None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Invalid(
                f"{where} is not a context ({error}); make it again with `swarmctl context export`"
            ) from None


class Contexts:
    """The contexts of one configuration folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "contexts"
        self._config = folder / "config.json"

    def all(self) -> list[Context]:
        """In order of name."""
        return [self.get(path.stem) for path in sorted(self._folder.glob("*.json"))]

    def get(self, name: str) -> Context:
        """Raises NotFound, Invalid."""
        path = self._path(name)
        try:
            text = path.read_text()
        except FileNotFoundError:
            known = ", ".join(["default", *(p.stem for p in sorted(self._folder.glob("*.json")))])
            raise NotFound(f"there is no context {name!r} (contexts: {known})") from None
        return Context.from_json(text, where=str(path))

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def add(self, context: Context) -> None:
        """Raises Conflict when the name is taken."""
        if self.exists(context.name) or context.name == "default":
            raise Conflict(
                f"there is a context {context.name!r} already; choose another name, or remove it "
                "with "
                f"`swarmctl context rm {context.name}`"
            )
        _write(self._path(context.name), context.to_json())

    def change(self, name: str, credentials: Credentials, addresses: tuple[str, ...] = ()) -> None:
        """Gives a context other credentials, and addresses if it follows them. Raises NotFound."""
        old = self.get(name)
        if not (old.follows and addresses):
            addresses = old.addresses
        new = replace(old, credentials=credentials, addresses=addresses)
        _write(self._path(name), new.to_json())

    def age_s(self, name: str) -> float:
        """How long ago the context was written. Raises NotFound."""
        self.get(name)
        return max(0.0, SystemClock().now_ns() / SECOND_NS - self._path(name).stat().st_mtime)

    def remove(self, name: str, *, force: bool) -> None:
        """Raises NotFound, or Conflict when it is the current one and `force` is not set."""
        self.get(name)
        if self.current() == name:
            if not force:
                raise Conflict(
                    f"context {name!r} is in use; choose another with `swarmctl context use "
                    "default`, "
                    "or give --force"
                )
            self.use("default")
        self._path(name).unlink()

    def current(self) -> str:
        """The chosen context's name; "default": the local daemon."""
        try:
            text = self._config.read_text()
        except FileNotFoundError:
            return "default"
        try:
            return str(json.loads(text)["current_context"])
        except (ValueError, KeyError, TypeError):
            raise Invalid(
                f"{self._config} cannot be read; remove it, then choose a context with "
                "`swarmctl context use NAME`"
            ) from None

    def use(self, name: str) -> None:
        """Raises NotFound."""
        if name != "default":
            self.get(name)
        _write(self._config, json.dumps({"current_context": name}) + "\n")

    def _path(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise Invalid(
                f"{name!r} is not a context's name; use letters, digits and _ . + -, at most 63, "
                "the "
                "first a letter or digit"
            )
        return self._folder / f"{name}.json"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
