"""Starts vLLM's servers as processes of this one: their options, environment, sockets, logs and end.

They listen on Unix sockets in folders that nobody else may enter, and on no port.

python -m lens_megatron.rollout.servers.process --config run.yaml --host 10.0.0.7 --port 8000

starts one by hand on another machine, for `rollout.servers=[http://10.0.0.7:8000]`, with the options that the trainer
would start it with. Its key is read from LENS_VLLM_API_KEY, there and at the trainer.
"""

import json
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from lens_megatron import command_line
from lens_megatron import config as configuration
from lens_megatron.config import Config, ConfigError
from lens_megatron.data.model_files import ModelError
from lens_megatron.data.model_hub import with_local_models
from lens_megatron.errors import ExitCode
from lens_megatron.rollout.servers import weight_transfer
from lens_megatron.rollout.vllm import options as vllm_options

logger = logging.getLogger(__name__)

KEY_VARIABLE = "LENS_VLLM_API_KEY"
"""Environment variable with the key of servers that the trainer did not start."""

_LONGEST_SOCKET_PATH = 107
"""Linux's limit, in bytes."""


def check_plugin() -> None:
    """Raises ConfigError where vLLM's processes would not find this project's plug-in, which receives weights."""
    if weight_transfer.PLUGIN not in entry_points(group="vllm.general_plugins").names:
        raise ConfigError(
            "rollout.engine=vllm_server: the installed lens-megatron does not announce its plug-in for vLLM, so that "
            "servers could not receive weights; install it again: pip install --no-deps -e ."
        )


def devices(config: Config, place: int, servers: int) -> str | None:
    """Returns CUDA_VISIBLE_DEVICES for one of this machine's `servers`: GPUs after those of the trainer's processes.

    None without CUDA. Raises ConfigError where there are not enough.
    """
    if not torch.cuda.is_available():
        return None
    found = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    trainers, size = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), config.vllm.tensor_parallel_size
    needed = trainers + servers * size
    if needed > len(found):
        raise ConfigError(
            f"rollout.servers: {servers} on this machine, with vllm.tensor_parallel_size ({size}) GPUs each, and "
            f"{trainers} GPUs for the trainer's processes are {needed}; the machine shows {len(found)}; start fewer"
        )
    first = trainers + place * size
    return ",".join(found[first : first + size])


def server_options(config: Config, hf_config: PretrainedConfig) -> dict[str, Any]:
    """Options of vLLM's engine for a server: those of the colocated engine, less what a server decides itself."""
    options = vllm_options.engine_options(config, hf_config)
    del options["distributed_executor_backend"]  # only the server starts its workers
    del options["disable_log_stats"]  # the statistics show that it makes progress
    given = config.vllm.model_dump()
    return options | {
        "enable_sleep_mode": given.get("enable_sleep_mode", False),  # nothing else needs its memory
        "generation_config": "vllm",
        "weight_transfer_config": {"backend": weight_transfer.backend()},
    }


def command(options: Mapping[str, Any], listen: Sequence[str]) -> list[str]:
    """Returns the server's command line. It holds no key, since others can read command lines.

    Args:
        options: options of vLLM's engine.
        listen: vLLM's options for the address at which it listens.
    """
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` needs a package of that name
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{flag}", *map(str, value)]
        elif value is not None:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    guard = "lens_megatron.rollout.servers.auth.RequireKey"
    return [*words, *listen, "--enable-scale-out", "--middleware", guard]


def environment(key: str, visible_devices: str | None) -> dict[str, str]:
    """The environment of a server: that of this process without torchrun's variables, and with what a server needs."""
    foreign = re.compile("(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME|ROLE_.*)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
    kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    own = {
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",  # without it there is no way to give it weights
        "VLLM_PLUGINS": weight_transfer.PLUGIN,
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    if not torch.cuda.is_available():
        own["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process less to start; the engine has its own all the same
        own["TORCHDYNAMO_DISABLE"] = "1"  # it would compile ten lines of its sampler, for seconds, and need a compiler
    if visible_devices is not None:
        own["CUDA_VISIBLE_DEVICES"] = visible_devices
    return kept | own


def private_folder() -> Path:
    """Makes a folder that only this user may enter, with a path short enough for sockets in it. Raises OSError."""
    example = f"/lens_server_{'x' * 8}/{'x' * 36}"  # vLLM names its own sockets by UUIDs
    base = tempfile.gettempdir()
    if len(os.fsencode(base + example)) > _LONGEST_SOCKET_PATH:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="lens_server_", dir=base))


class ServerProcess:
    """One server on this machine, which does not outlive this process. Every start has its own key and folder.

    Args:
        name: what messages call it.
        options: options of vLLM's engine.
        log: the file to which the server's output is appended.
        visible_devices: CUDA_VISIBLE_DEVICES of the server; None without CUDA.
    """

    def __init__(self, name: str, options: Mapping[str, Any], log: Path, *, visible_devices: str | None = None):
        self.name, self.options, self.log, self.visible = name, dict(options), log, visible_devices
        self.key, self.log_start = "", 0
        self.folder: Path | None = None
        self.kept_log: Path | None = None
        self.process: subprocess.Popen | None = None

    @property
    def socket_path(self) -> str:
        """The Unix socket at which it listens. Raises RuntimeError while it is not started."""
        return self.path_in_folder("http")

    def path_in_folder(self, name: str) -> str:
        """A path in the server's private folder. Raises RuntimeError while it is not started."""
        if self.folder is None:
            raise RuntimeError(f"{self.name} is not started, and has no folder for {name}; start it first")
        return str(self.folder / name)

    def start(self) -> None:
        """Ends it if it runs, then starts it without waiting for its answer. Raises OSError."""
        self.stop()
        self.key, self.folder = secrets.token_urlsafe(32), private_folder()
        guardian = [
            sys.executable,
            "-m",
            "lens_megatron.rollout.servers.end_with_parent",
            "--remove",
            str(self.folder),
            str(os.getpid()),
        ]
        own = {"VLLM_RPC_BASE_PATH": str(self.folder)}
        with self.log.open("ab") as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            output.flush()
            self.log_start = output.tell()
            self.process = subprocess.Popen(
                [*guardian, *command(self.options, ["--uds", self.socket_path])],
                env=environment(self.key, self.visible) | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def status(self) -> int | None:
        """The exit status; None while it runs, and before it is started."""
        return self.process.poll() if self.process else None

    def tail(self, lines: int = 15) -> str:
        """The last lines of what it has written since its last start."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])

    def move_log(self, folder: Path) -> None:
        """Moves the log into `folder`, where the process goes on writing to it.

        A log cannot be moved to another file system while it is written; `keep_log` copies it after the server's end.
        """
        self.kept_log = folder / f"{self.name.replace(' ', '_')}.log"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self.log = self.log.rename(self.kept_log)

    def keep_log(self) -> None:
        """Moves a log that still lies beside the run's folder into it. To be called after the server's end."""
        if self.log == self.kept_log or not self.log.name.startswith("."):
            return
        try:
            if self.kept_log is not None:
                self.kept_log.write_bytes(self.log.read_bytes())
            self.log.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{self.name}: its log stays in {self.log}: {error}")

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """Ends it and all its processes, suspended ones too. Takes seconds if it does not end by itself."""
        if self.process is not None:
            self.ask_to_stop()
            self.process.wait()
            self.process = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # the process that removes it may have been killed
            self.folder = None


def start_servers(config: Config, hf_config: PretrainedConfig, rank: int, world_size: int) -> list[ServerProcess]:
    """Starts the servers of `rank`, which has every server whose number modulo `world_size` is `rank`.

    Their logs lie beside the run's folder until that exists. There are none with another engine, and where
    `rollout.servers` names addresses. Raises ConfigError, after ending those that it has started.
    """
    folder, count = Path(config.run.directory), config.rollout.servers
    if config.rollout.engine != "vllm_server" or isinstance(count, tuple):
        return []
    check_plugin()
    options, started = server_options(config, hf_config), []
    first = rank - int(os.environ.get("LOCAL_RANK", 0))
    machine = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    here = [index for index in range(count) if index % world_size in machine]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for index in range(rank, count, world_size):
            log = folder.parent / f".{folder.name}_server_{index}.log"
            visible = devices(config, here.index(index), len(here))
            started.append(ServerProcess(f"server {index}", options, log, visible_devices=visible))
            started[-1].start()
    except OSError as error:
        stop_all(started)
        raise ConfigError(f"rollout.engine=vllm_server: a server could not be started: {error}") from error
    except ConfigError:
        stop_all(started)
        raise
    return started


def stop_all(servers: Sequence[ServerProcess]) -> None:
    """Ends the servers, all at once, and keeps their logs."""
    for server in servers:
        server.ask_to_stop()
    for server in servers:
        server.stop()
        server.keep_log()


def main(arguments: Sequence[str] | None = None) -> int:
    """Becomes the server, or returns an exit code."""
    parser = ArgumentParser(prog="python -m lens_megatron.rollout.servers.process", description="Start one server.")
    parser.add_argument("--config", required=True, nargs="+", action="extend", metavar="FILE")
    parser.add_argument("--host", default="127.0.0.1", help="the cluster's private interface; never a public one")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("overrides", nargs="*", metavar="section.option=value")
    parsed = parser.parse_args(arguments)
    given = command_line.split(parsed.config)
    try:
        config = with_local_models(configuration.load(given.files, [*parsed.overrides, *given.overrides]))
        hf_config = AutoConfig.from_pretrained(config.model.path, trust_remote_code=False)
        vllm_options.check(config, hf_config)
        check_plugin()
        if not (key := os.environ.get(KEY_VARIABLE)):
            raise ConfigError(f"{KEY_VARIABLE} is not set; set it to one secret, here and where the trainer runs")
        socket.create_server((parsed.host, parsed.port)).close()
    except (ConfigError, ModelError, OSError) as error:
        taken = f"--host {parsed.host} --port {parsed.port}: " * isinstance(error, OSError)
        print(f"error: {taken}{error}", file=sys.stderr)
        return ExitCode.MISTAKE
    words = command(server_options(config, hf_config), ["--host", parsed.host, "--port", str(parsed.port)])
    os.execve(words[0], words, environment(key, os.environ.get("CUDA_VISIBLE_DEVICES")))


if __name__ == "__main__":
    sys.exit(main())
