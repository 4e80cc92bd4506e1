"""The published services as the session's manager has told them: whole ones, or what has changed.

Owns what the node knows of them between two messages; what listens is the Ingress's.
"""

from __future__ import annotations

import zlib

from google.protobuf.message import DecodeError
from msgspec import structs

from swarm import errors
from swarm.limits import MESSAGE_BYTES_MAX
from swarm.v1 import (
    Assignments,
    Backend,
    IngressChange,
    IngressService,
    IngressUpdate,
    decode,
)


class Published:
    """Takes messages in order; `services` is what they come to."""

    def __init__(self) -> None:
        self._services: dict[str, IngressService] = {}
        # Of those of which changes came: their backends by task.
        self._backends: dict[str, dict[str, Backend]] = {}

    def take(self, message: Assignments) -> bool:
        """Whether anything may have changed. Raises Unavailable for what does not fit to what came
        before: a new session begins with all of it.
        """
        if message.full:
            self._services, self._backends = {}, {}
        elif not (message.ingress or message.removed_ingress or message.packed_ingress):
            return False
        update = IngressUpdate(services=message.ingress, removed=message.removed_ingress)
        self._apply(update)
        if message.packed_ingress:
            self._apply(unpacked(message.packed_ingress))
        return True

    def services(self) -> list[IngressService]:
        """All of them, in order."""
        for service_id, backends in self._backends.items():
            self._services[service_id] = structs.replace(
                self._services[service_id], backends=tuple(backends.values())
            )
        self._backends = {}
        return [self._services[i] for i in sorted(self._services)]

    def _apply(self, update: IngressUpdate) -> None:
        for service_id in update.removed:
            self._services.pop(service_id, None)
            self._backends.pop(service_id, None)
        for service in update.services:
            self._services[service.service_id] = service
            self._backends.pop(service.service_id, None)
        for change in update.changes:
            self._change(change)

    def _change(self, change: IngressChange) -> None:
        service = self._services.get(change.service_id)
        if service is None:
            raise errors.Unavailable(
                f"the manager changed the backends of service {change.service_id}, which it has "
                "not named; starting a new session"
            )
        backends = self._backends.get(change.service_id)
        if backends is None:
            backends = {b.task_id: b for b in service.backends}
            self._backends[change.service_id] = backends
        for task_id in change.removed:
            backends.pop(task_id, None)
        backends.update((b.task_id, b) for b in change.backends)


def unpacked(packed: bytes) -> IngressUpdate:
    """What a message says packed. Raises Unavailable."""
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(packed, MESSAGE_BYTES_MAX)
        if reader.unconsumed_tail or not reader.eof:
            raise errors.Unavailable(
                "the manager's list of published services is cut off, or larger than "
                f"{MESSAGE_BYTES_MAX:,} bytes; starting a new session"
            )
        return decode(IngressUpdate, data)
    except (zlib.error, DecodeError) as error:
        raise errors.Unavailable(
            f"the manager's list of published services is damaged ({error}); starting a new session"
        ) from None
