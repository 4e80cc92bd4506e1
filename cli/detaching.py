"""The keys that leave a command without ending it, as `docker exec --detach-keys` has them.

Keys that begin the sequence are held back until it is clear that they do not; then they are handed
on. Source: moby/term, ascii.go and proxy.go.
"""

from __future__ import annotations

from swarm.errors import Invalid

__all__ = ["DEFAULT", "DetachKeys"]

DEFAULT = "ctrl-p,ctrl-q"
_CONTROL = "@abcdefghijklmnopqrstuvwxyz[\\]^_"


class DetachKeys:
    """Looks for the sequence in what is typed."""

    def __init__(self, text: str) -> None:
        """Raises Invalid. Without any key nothing is ever found."""
        self._keys = bytes(_key(part, text) for part in text.split(",")) if text else b""
        self._held = b""

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What is to be handed on, and whether the sequence was typed; what follows it is not
        handed on.
        """
        if not self._keys:
            return data, False
        out = bytearray()
        for number in data:
            self._held += bytes((number,))
            while self._held and not self._keys.startswith(self._held):
                out.append(self._held[0])
                self._held = self._held[1:]
            if self._held == self._keys:
                self._held = b""
                return bytes(out), True
        return bytes(out), False


def _key(part: str, text: str) -> int:
    if len(part) == 1 and part.isascii():
        return ord(part)
    control = part.removeprefix("ctrl-").lower()
    if part.startswith("ctrl-") and len(control) == 1 and control in _CONTROL:
        return _CONTROL.index(control)
    raise Invalid(
        f"--detach-keys {text!r}: write keys with commas between, each a letter, or ctrl- and "
        "one of a-z @ [ \\ ] ^ _"
    )
