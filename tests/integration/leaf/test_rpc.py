"""What a caller is told, over a real connection."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from swarm import errors, rpc
from swarm.v1 import Caller, GetInfoRequest, GetInfoResponse
from swarm.v1.services import CONTROL_METHODS, ControlClient

GET_INFO = tuple(m for m in CONTROL_METHODS if m.name == "get_info")


class Info:
    """Answers with what it was told to raise."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def get_info(self, request: GetInfoRequest, context: rpc.Context) -> GetInfoResponse:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [grpc.aio.UsageError("Channel is closed."), grpc.aio.InternalError("lost"), KeyError("x")],
    ids=["a closed channel of its own", "a lost channel of its own", "a defect"],
)
async def test_a_method_that_fails_is_answered_with_an_error(
    tmp_path: Path, error: Exception
) -> None:
    local = rpc.Identity(Caller.LOCAL)
    server = rpc.server()
    server.add_generic_rpc_handlers((rpc.handler(GET_INFO, Info(error), lambda *_: local),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with rpc.Channel.unix(f"{tmp_path}/s") as channel:
            with pytest.raises(errors.Internal, match="internal error in get_info") as raised:
                await ControlClient(channel).get_info(GetInfoRequest(), timeout_s=10)
            assert str(error) in raised.value.message
    finally:
        await server.stop(None)
