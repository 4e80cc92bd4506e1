"""Several managers of one cluster as one channel.

A call goes to the manager that answered last, and to the next one where that one cannot be reached
or says that it does not serve now. A call that may have been done is not made a second time: a
write goes on to another manager only when none of it was sent, or when the manager itself said
that it has done nothing. A stream goes on elsewhere until its first message has come; what follows
is its reader's to take up again, whose next call goes to the next manager.

Made by cli/connection.py; imports grpc.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from swarm.errors import Unavailable
from swarm.rpc import Channel, Method, NoAnswer
from swarm.v1 import Message

__all__ = ["Managers"]

Resp = TypeVar("Resp", bound=Message)
T = TypeVar("T")

# How long one address is waited for where there are others. Connecting goes on meanwhile, so a
# manager that is merely slow is found ready in the next round.
NEXT_S = 1.0
PAUSE_S = 0.1  # between two rounds in which nobody could be reached


class Managers(Channel):
    """See swarm.rpc.Channel."""

    def __init__(
        self, addresses: Sequence[str], make: Callable[[str], Channel], *, connect_s: float
    ) -> None:
        """`make` opens a channel to one address, at which a call waits at most `connect_s` for a
        manager to be reached.
        """
        self.target = " or ".join(addresses)
        self._made = {address: make(address) for address in dict.fromkeys(addresses)}
        # The one to ask first comes first.
        self._order = list(self._made)
        self._connect_s = connect_s

    @property
    def current(self) -> str:
        """The address that is asked first."""
        return self._order[0]

    async def ready(self, *, timeout_s: float, once: bool = False) -> None:
        """Waits until one of them is connected to."""
        await self._connected(self._order, timeout_s)

    async def unary_unary(
        self, method: Method, response: type[Resp], request: Message, timeout_s: float | None
    ) -> Resp:
        async def ask(channel: Channel) -> Resp:
            return await channel.unary_unary(method, response, request, timeout_s)

        return await self._somewhere(method, ask)

    def unary_stream(
        self, method: Method, response: type[Resp], request: Message, timeout_s: float | None
    ) -> AsyncIterator[Resp]:
        return self._stream(
            method, lambda channel: channel.unary_stream(method, response, request, timeout_s)
        )

    def stream_stream(
        self,
        method: Method,
        response: type[Resp],
        request: AsyncIterable[Any],
        timeout_s: float | None,
    ) -> AsyncIterator[Resp]:
        """What is sent cannot be taken back: only the connection is looked for elsewhere."""

        async def responses() -> AsyncIterator[Resp]:
            channel = self._made[await self._connected(self._order, self._connect_s)]
            async for answer in channel.stream_stream(method, response, request, timeout_s):
                yield answer

        return responses()

    async def _stream(
        self, method: Method, start: Callable[[Channel], AsyncIterator[Resp]]
    ) -> AsyncIterator[Resp]:
        async def begin(channel: Channel) -> tuple[AsyncIterator[Resp], list[Resp]]:
            responses = start(channel)
            try:
                return responses, [await anext(responses)]
            except StopAsyncIteration:
                return responses, []

        responses, first = await self._somewhere(method, begin)
        async with aclosing(responses):  # type: ignore[type-var]  # a generator
            for response in first:
                yield response
            try:
                async for response in responses:
                    yield response
            except Unavailable:
                self._ask_next(self.current)
                raise

    async def _somewhere(self, method: Method, ask: Callable[[Channel], Awaitable[T]]) -> T:
        """The answer of the first manager that gives one."""
        left = list(self._order)
        said: Unavailable | None = None
        while True:
            try:
                address = await self._connected(left, NEXT_S if said else self._connect_s)
            except NoAnswer:
                if said is not None:
                    raise said from None  # says more than that others are gone
                raise
            try:
                return await ask(self._made[address])
            except Unavailable as error:
                self._ask_next(address)
                left.remove(address)
                if not left or (method.audited and isinstance(error, NoAnswer)):
                    raise
                said = said if isinstance(error, NoAnswer) else error
                left = [a for a in self._order if a in left]

    async def _connected(self, addresses: Sequence[str], timeout_s: float) -> str:
        """The first of the addresses that is connected to; it is asked first from now on. Raises
        NoAnswer.
        """
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        each_s = NEXT_S if len(addresses) > 1 else timeout_s
        while True:
            for address in addresses:
                left_s = until_s - loop.time()
                try:
                    await self._made[address].ready(
                        timeout_s=max(0.01, min(each_s, left_s)), once=True
                    )
                except NoAnswer:
                    continue
                while self.current != address:
                    self._order.append(self._order.pop(0))
                return address
            if loop.time() + PAUSE_S > until_s:
                raise NoAnswer(
                    f"no manager answers at {' or '.join(addresses)} within {timeout_s:g} s"
                )
            await asyncio.sleep(PAUSE_S)

    def _ask_next(self, failed: str) -> None:
        """Lets another one be asked first, unless that is so already."""
        if self.current == failed:
            self._order.append(self._order.pop(0))

    async def close(self) -> None:
        for channel in self._made.values():
            await channel.close()
