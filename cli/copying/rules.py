"""What `docker cp` means by a source and a destination.

The rules are those of Docker's CLI (command/container/cp.go) and moby's archive package (copy.go:
PrepareArchiveCopy, CopyInfoSourcePath, CopyInfoDestinationPath, GetRebaseName), whose names stand
beside the functions here. In short, of a SOURCE and a DESTINATION:

- a file to what does not exist: it is made, unless the name ends with a slash: then that is wrong
- a file to a file: replaces it; a file to a folder: into it
- a folder to what does not exist: becomes it; to a folder: into it, or, written `folder/.`, only
  what it contains; to a file: wrong
- the parent folder of the destination must exist
- links are copied as links, unless -L follows the one that is named; links on the way are followed

Everything here works on paths as text, with `/` between names, as it is in tasks and on this
machine; nothing is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm.errors import Invalid

__all__ = ["Place", "Target", "base", "clean", "join", "rebased", "split", "split_entry", "target"]


@dataclass(frozen=True, slots=True)
class Place:
    """Docker's CopyInfo: a path and what is there."""

    path: str
    exists: bool = True
    is_dir: bool = False
    # What the archive is to call it, where that is not the path's last name.
    rebase_name: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where an archive is unpacked, and what of its names becomes what."""

    folder: str
    old: str = ""
    new: str = ""

    def named(self, name: str) -> str:
        """The name of an archive's entry as it is to be unpacked."""
        return rebased(name, self.old, self.new) if self.old != self.new else name


def split(argument: str) -> tuple[str, str]:
    """Task or service, empty for this machine, and path (splitCpArg)."""
    if argument.startswith("/"):
        return "", argument
    where, colon, path = argument.partition(":")
    if not colon or where.startswith("."):
        return "", argument  # also ./file:name
    return where, path


# ------------------------------------------------------------------ paths as Go has them


def clean(path: str) -> str:
    """Go's filepath.Clean: the shortest path that means the same."""
    rooted = path.startswith("/")
    parts: list[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".." or not rooted:
            parts.append(part)
    return ("/" if rooted else "") + "/".join(parts) or ("/" if rooted else ".")


def join(*parts: str) -> str:
    """Go's filepath.Join."""
    kept = [part for part in parts if part]
    return clean("/".join(kept)) if kept else ""


def base(path: str) -> str:
    """Go's filepath.Base: the last name, `.` and `..` as they are."""
    if not path:
        return "."
    return path.rstrip("/").rpartition("/")[2] or "/"


def parent(path: str) -> str:
    """Go's filepath.Dir."""
    return clean(path[: path.rfind("/") + 1])


def names_contents(path: str) -> bool:
    """Ends with `/.`, or is `.` (specifiesCurrentDir)."""
    return base(path) == "."


def ends_with_slash(path: str) -> bool:
    return path.endswith("/")


def asserts_dir(path: str) -> bool:
    """Says by its end that it is a folder (assertsDirectory)."""
    return ends_with_slash(path) or names_contents(path)


def keep_end(cleaned: str, original: str) -> str:
    """A cleaned path that ends as it was written (PreserveTrailingDotOrSeparator)."""
    if names_contents(original) and not names_contents(cleaned):
        cleaned = f"{cleaned.rstrip('/')}/."
    if ends_with_slash(original) and not ends_with_slash(cleaned):
        cleaned += "/"
    return cleaned


def split_entry(path: str) -> tuple[str, str]:
    """The folder and the name in it; of `a/.` they are `a` and `.` (SplitPathDirEntry)."""
    cleaned = clean(path)
    if names_contents(path):
        cleaned += "/."
    return parent(cleaned), base(cleaned)


def rebase(path: str, resolved: str) -> tuple[str, str]:
    """A path whose link was followed, ending as it was written, and what the archive is to call it
    (GetRebaseName).
    """
    if names_contents(path) and not names_contents(resolved):
        resolved += "/."
    if ends_with_slash(path) and not ends_with_slash(resolved):
        resolved += "/"
    return resolved, base(path) if base(path) != base(resolved) else ""


def rebased(name: str, old: str, new: str) -> str:
    """RebaseArchiveEntries."""
    return name.replace("" if old == "/" else old, new, 1)


# ------------------------------------------------------------------ the rules


def target(source: Place, destination: Place) -> Target:
    """PrepareArchiveCopy. Raises Invalid where the two do not go together."""
    folder, name = split_entry(destination.path)
    if destination.exists and destination.is_dir:
        return Target(destination.path)
    if destination.exists and source.is_dir:
        raise Invalid(
            f"{destination.path} is a file, and {source.path} a folder, which cannot be copied "
            "onto it"
        )
    if not destination.exists and not source.is_dir and asserts_dir(destination.path):
        raise Invalid(
            f"there is no folder {destination.path}; a file cannot become one. Make it, or leave "
            "the slash at the end out"
        )
    old = source.rebase_name or split_entry(source.path)[1]
    return Target(folder, old, name)
