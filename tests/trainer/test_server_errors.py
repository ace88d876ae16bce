"""What is asked of servers and engines too early, or at a wrong address, is refused with a message that says why."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from lens_megatron.rollout.servers.client import Client, ServerError
from lens_megatron.rollout.servers.process import ServerProcess
from lens_megatron.rollout.vllm.tensor_parallel import EngineGroup, TensorParallelEngine


def test_a_server_that_is_not_started_has_no_socket(tmp_path: Path):
    process = ServerProcess("server 3", {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="server 3 is not started, and has no folder for http; start it first"):
        _ = process.socket_path


def test_an_address_without_a_port_is_named():
    async def check() -> None:
        async with aiohttp.ClientSession() as session:
            assert Client("http://10.0.0.7:8000", session).host_and_port == ("10.0.0.7", 8000)
            with pytest.raises(ServerError, match="http://10.0.0.7 is not http://host:port; correct rollout.servers"):
                _ = Client("http://10.0.0.7", session).host_and_port

    asyncio.run(check())


def test_one_rank_holds_no_engine_together():
    alone = EngineGroup(rank=0, size=1, number=0, engines=1, group=None)
    with pytest.raises(ValueError, match="got an engine group of one rank"):
        TensorParallelEngine(None, alone)
