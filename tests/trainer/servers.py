"""What tests of servers share: the plug-in's metadata, servers that somebody else has started, and a proxy that does to
HTTP what networks do."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from lens_megatron.rollout.servers.process import command, environment, private_folder

Rewrite = Callable[[str, bytes], bytes]


def announce_plugin(folder: Path) -> None:
    """Lets this process and those that it starts find the entry point of setup.py, whatever is installed here."""
    info = folder / "lens_megatron-0.1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lens-megatron\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nlens_megatron = lens_megatron.rollout.servers.weight_transfer:register\n"
    )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


class GivenServer:
    """A server on a port of loopback, as `python -m lens_megatron.rollout.servers.process` starts it."""

    def __init__(self, options: Mapping[str, Any], log: Path, key: str):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        words = command(options, ["--host", "127.0.0.1", "--port", str(self.port)])
        folder = str(private_folder())
        guardian = [
            sys.executable,
            "-m",
            "lens_megatron.rollout.servers.end_with_parent",
            "--remove",
            folder,
            str(os.getpid()),
        ]
        own = {"VLLM_RPC_BASE_PATH": folder}
        with log.open("w") as output:
            kept = {"env": environment(key, None) | own, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen([*guardian, *words], **kept)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def api(self) -> psutil.Process:
        """vLLM's process that answers requests."""
        (api,) = psutil.Process(self.process.pid).children()
        return api

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class Proxy:
    """Stands before a server. `rewrite` changes what it answers; `cut` drops every connection until `mend`."""

    def __init__(self, target: str):
        self.target, self.rewrite = target, None
        self.is_cut = self.was_cut = False
        self.connections: set[asyncio.Transport] = set()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _start(self) -> int:
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self.runner = web.ServerRunner(web.Server(self._handle))
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        self.connections.add(request.transport)
        if self.is_cut:
            request.transport.abort()
        headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
        target, body = self.target + request.path_qs, await request.read()
        try:
            async with self.session.request(request.method, target, headers=headers, data=body) as reply:
                content = await reply.read()
        except aiohttp.ClientConnectionError:  # the server does not listen yet: neither does this one
            request.transport.abort()
            return web.Response()
        if self.rewrite:
            content = self.rewrite(request.path, content)
        return web.Response(status=reply.status, body=content, content_type=reply.content_type)

    def cut(self) -> None:
        self.is_cut = self.was_cut = True

        def abort() -> None:
            for transport in self.connections:
                transport.abort()
            self.connections.clear()

        self.loop.call_soon_threadsafe(abort)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        async def close() -> None:
            await self.runner.cleanup()
            await self.session.close()

        asyncio.run_coroutine_threadsafe(close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
