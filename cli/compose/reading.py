"""Reading: from a file's name to its tree, with its variables filled in.

`Reading` is the state of one load: what it was called with, the report, and the trees read so far.
A file that is used twice (extends, include) is read once for each folder its paths start from. What
the tree means is decided elsewhere; here only the top level's keys are checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cli.compose import envfile, keys
from cli.compose.at import At
from cli.compose.interpolate import interpolate, keep_literal
from cli.compose.problems import Mark, Report, Source, nearest
from cli.compose.shorts import Context
from cli.compose.tree import Node, parse
from swarm.errors import Invalid

STDIN = "-"
STDIN_NAME = "stdin"
SECTIONS = ("services", "networks", "volumes", "secrets", "configs")
_VERSION = re.compile(r"(2(\.\d+)?|3(\.\d+)?)")
_REMOTE = re.compile(r"(https?|git|ssh|oci|s3)://|git@|github\.com[/:]")


@dataclass(slots=True)
class Reading:
    """The state of one load."""

    report: Report
    environment: Mapping[str, str]
    stack: str
    stdin: str | None
    interpolates: bool = True
    sources: int = 0
    roots: dict[tuple[str, str], Node] = field(default_factory=dict)
    services: dict[tuple[str, str, str], Node | None] = field(default_factory=dict)

    def source(self, name: str, text: str) -> Source:
        self.sources += 1
        return Source(name, text, order=self.sources)

    def fail_file(self, name: str, message: str, hint: str = "") -> None:
        """A problem of a file as a whole."""
        self.report.error(Mark(self.source(name, ""), 1, 1), message, hint)

    def variables(self, folder: Path, files: Iterable[Path]) -> dict[str, str]:
        """The environment, with the given files of variables below it, or .env of the folder where
        none are given; a later file stands above an earlier one.
        """
        found: dict[str, str] = {"COMPOSE_PROJECT_NAME": self.stack}
        given = list(files)
        for path in given or [folder / ".env"]:
            try:
                text = envfile.read_text(path)
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                if given:
                    self.fail_file(str(path), f"no such file: {path}", "correct --env-file")
                continue
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                self.fail_file(str(path), f"{path}: {reason}")
                continue
            source = self.source(str(path), text)
            found |= envfile.parse_dotenv(source, {**found, **self.environment}, self.report)
        return {**found, **self.environment}

    # ------------------------------------------------------------------ one file

    def tree(self, name: str, context: Context) -> Node | None:
        """The file's tree with its variables filled in; None if it cannot be used."""
        key = (name, str(context.base))
        if key in self.roots:
            return self.roots[key]
        text = self._text(name)
        if text is None:
            return None
        source = self.source(STDIN_NAME if name == STDIN else name, text)
        failures = self.report.count
        root = parse(source, self.report)
        if root is None or root.value is None:
            if failures == self.report.count:
                self.report.error(
                    Mark(source, 1, 1),
                    "the file is empty",
                    "add services: and one service below it",
                )
            return None
        if not isinstance(root.value, dict):
            self.report.error(
                root.mark,
                "the file is not a mapping",
                "it begins with services: and one service below it",
            )
            return None
        if self.interpolates:
            # The whole at once: aliases share nodes between sections, and each is filled in once.
            interpolate(root, context.variables, self.report)
        else:
            keep_literal(root)
        self.roots[key] = root
        return root

    def _text(self, name: str) -> str | None:
        if name == STDIN:
            if self.stdin is None:
                raise Invalid("standard input was not read; give its text")
            return self.stdin
        try:
            data = Path(name).read_bytes()
        except FileNotFoundError:
            self.fail_file(name, f"no such file: {name}", "name an existing file with -c")
        except IsADirectoryError:
            self.fail_file(name, f"{name} is a folder", "name the file in it")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            self.fail_file(name, f"{name} cannot be read: {reason}")
        else:
            return self._decoded(name, data)
        return None

    def _decoded(self, name: str, data: bytes) -> str | None:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            before = data[: error.start].decode(encoding, errors="replace")
            source = self.source(name, data.decode(encoding, errors="replace"))
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            self.report.error(
                Mark(source, line, column),
                f"the byte 0x{data[error.start]:02x} is not valid UTF-8",
                "save the file as UTF-8",
            )
            return None


def refuse_remote(at: At, path: str) -> bool:
    """Reports a path that names something on the network."""
    if _REMOTE.match(path) is None:
        return False
    at.fail(f'"{path}": files are not fetched from the network', "fetch it and name the local file")
    return True


def check_root(at: At) -> None:
    """Reports unknown keys of the top level, and versions that are none."""
    assert isinstance(at.node.value, dict)
    values = at.node.value
    if values and "services" not in values and not set(values) & set(keys.ROOT):
        first = next(iter(values.values())).value
        if isinstance(first, dict) and set(first) & {"image", "build", "command", "ports"}:
            at.fail_key(
                next(iter(values)),
                "this looks like a version 1 file, whose services stand at the top level",
                "add a line services: at the top and indent the rest below it",
            )
            return
    for name in values:
        key = keys.ROOT.get(name)
        if key is None and not name.startswith("x-"):
            near = nearest(name, keys.ROOT)
            hint = f'did you mean "{near}"?' if near else ""
            if not near and name in keys.SERVICE:
                hint = f'"{name}" belongs under a service'
            at.fail_key(
                name,
                f'unknown key "{name}" at the top level',
                hint or f"known here: {', '.join(keys.ROOT)}, and names that begin with x-",
            )
        elif key is not None and key.support is keys.Support.REFUSED:
            at.refuse_key(name, f'"{name}" is not supported: {key.reason}', key.instead)
    version = at.set_at("version")
    if version is not None:
        text = version.node.text or version.shown()
        if version.node.value != "" and not _VERSION.fullmatch(text):
            version.fail(
                f'"{text}" is not a version of compose files',
                "remove the line: versions 2 to 3.13 mean the same here",
            )
    name_at = at.set_at("name")
    if name_at is not None:
        name_at.text()
