"""Drives the servers of this rank as one engine: those that it has started, and those whose addresses it was given.

HTTP runs in a thread of its own. Weights are sent from the trainer's thread, since getting them is a collective.
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lens_megatron.config import Config, ConfigError
from lens_megatron.rollout.engine import (
    Completion,
    EngineProgress,
    EnginesLostError,
    Request,
    WeightManifest,
    check_request,
)
from lens_megatron.rollout.local import checkpoint_weights, end_tokens
from lens_megatron.rollout.servers import loading, weight_transfer
from lens_megatron.rollout.servers.client import Expected, ServerError
from lens_megatron.rollout.servers.health import Limits, ServerState
from lens_megatron.rollout.servers.pool import Member, ServerPool
from lens_megatron.rollout.servers.process import KEY_VARIABLE, ServerProcess, server_options, stop_all
from lens_megatron.rollout.servers.weight_transfer import KeptBucket

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.02
"""`step` waits no longer than this when nothing has finished."""

T = TypeVar("T")


class ServerEngine:
    """Implements `RolloutEngine`. Weights come by `load_weights` only.

    Args:
        processes: the servers that `process.start_servers` has started for this rank. This engine ends them.
        addresses: addresses of this rank's servers that somebody else has started.
        alone: whether no other rank's engine takes over, so that requests wait for servers that are started again.

    Raises:
        ConfigError: a server does not start, or was not started with this run's configuration.
    """

    def __init__(
        self,
        config: Config,
        hf_config: PretrainedConfig,
        processes: Sequence[ServerProcess],
        addresses: Sequence[str] = (),
        *,
        alone: bool = True,
        limits: Limits | None = None,
    ):
        self.config, self.processes, self.alone = config, list(processes), alone
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        self.shapes = {name: weight.shape for name, weight in checkpoint_weights(model).items()}
        self.options = server_options(config, hf_config)
        self.context = self.options.get("max_model_len") or hf_config.max_position_embeddings
        self.run_name = secrets.token_hex(4)  # another trainer's weights may have the same version
        self.ends, self.vocabulary = frozenset(end_tokens(config.model.path)), hf_config.vocab_size
        self.version: int | None = None
        self.offered_lost = False
        """True if there were lost requests after the last step, which `returned` offers to other engines."""
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(4 * (len(processes) + len(addresses)) + 4))
        self.thread = threading.Thread(target=self.loop.run_forever, name="servers", daemon=True)
        self.thread.start()
        self.limits = limits or Limits()
        self.pool = self._call(self._make_pool(addresses))
        try:
            self._wait_until_started()
            self._call(self._check_external())
        except BaseException:
            self.close()
            raise

    async def _make_pool(self, addresses: Sequence[str]) -> ServerPool:
        expected = Expected(self.vocabulary, self.ends, "", 0)
        per_server = self.config.rollout.max_running_sequences
        reload = loading.reload
        pool = ServerPool(per_server, expected, self.limits, reload, waits_for_restarts=self.alone)
        for process in self.processes:
            pool.add_process(process)
        for address in addresses:
            pool.add_external(address, os.environ.get(KEY_VARIABLE, ""))
        return pool

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._start(work).result()

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def _wait_until_started(self) -> None:
        begin = told = time.monotonic()
        while waiting := [m for m in self.pool.members if m.health.state is not ServerState.STALE]:
            for member in waiting:
                self._refuse_if_hopeless(member)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                names = ", ".join(member.name for member in waiting)
                logger.info(f"waiting for {names}: {told - begin:.0f} s so far")
            time.sleep(0.05)
        self.pool.restarts_dead = True

    def _refuse_if_hopeless(self, member: Member) -> None:
        if member.process is None and member.start_error and member.start_error.status is not None:
            raise ConfigError(
                f"rollout.servers: {member.start_error}; it must be started with this project's "
                "lens_megatron.rollout.servers.process, or with VLLM_SERVER_DEV_MODE=1 and --enable-scale-out, and "
                f"{KEY_VARIABLE} must be its key"
            )
        if member.health.state is not ServerState.DEAD:
            return
        tail = f"; the end of {member.process.log}:\n{member.process.tail()}" if member.process else ""
        raise ConfigError(f"rollout.engine=vllm_server: {member.name} did not start: {member.health.reason}{tail}")

    async def _check_external(self) -> None:
        """Raises ConfigError where a server that somebody else has started would not sample the trainer's policy."""
        for member in self.pool.members:
            if member.process is not None:
                continue
            try:
                info = await member.client.get("/server_info?config_format=json", self.limits.bucket_s)
            except ServerError as error:
                raise ConfigError(f"rollout.servers: {error}") from error
            self.context = min(self.context, _context_of(member.address, info, self.config))

    def phase(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        if self.version is None:
            raise RuntimeError("the engine has no whole set of weights; load_weights first")
        context = ("the servers' max_model_len", self.context)

        async def submit() -> None:
            in_flight = set(self.pool.requests)
            for request in requests:
                check_request(request, in_flight, context=context, vocabulary=self.vocabulary)
                in_flight.add(request.request_id)
            self.pool.submit(requests)

        self._call(submit())

    def step(self) -> list[Completion]:
        """Returns the completions that have come, after waiting a moment for the first. It decodes nothing itself.

        Raises EnginesLostError when no server is left and no other engine takes the requests.
        """
        finished = self._call(self._collect())
        if self.pool.failure is not None:
            raise RuntimeError("an unexpected exception ended a task of the servers' thread") from self.pool.failure
        if self.pool.lost and not finished and (self.alone or self.offered_lost):
            reasons = [f"{m.name} is {m.health.state}: {m.health.reason}" for m in self.pool.members]
            raise EnginesLostError("; ".join([f"no server is left for {len(self.pool.lost)} requests", *reasons]))
        self.offered_lost = bool(self.pool.lost)
        return finished

    async def _collect(self) -> list[Completion]:
        pool = self.pool
        if pool.requests and not (pool.finished or pool.lost or pool.failure):
            pool.changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(pool.changed.wait(), WAIT_SECONDS)
        finished, pool.finished = pool.finished, []
        return finished

    def cancel(self, request_ids: Collection[int]) -> int:
        """Returns 0, since servers do not say how many tokens a request had when it was cancelled."""

        async def cancel() -> None:
            self.pool.cancel(set(request_ids))

        self._call(cancel())
        return 0

    def returned(self) -> list[Request]:
        async def take() -> list[Request]:
            lost, self.pool.lost = self.pool.lost, []
            return lost

        return [] if self.alone else self._call(take())

    def capacity(self) -> int:
        return self.pool.capacity()

    def hopeless(self) -> bool:
        return self._call(self._hopeless())

    async def _hopeless(self) -> bool:
        return self.pool.hopeless()

    def progress(self) -> EngineProgress:
        return EngineProgress(len(self.pool.waiting), self.pool.running(), self.pool.generated)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends the weights to all servers at once. While a bucket travels, the next one is gathered and packed.

        A server with which that fails counts as dead, and nothing is raised for it.
        """
        if self.pool.requests:
            raise RuntimeError(f"cannot load weights with {len(self.pool.requests)} requests in flight")
        self.version, manifest = None, WeightManifest(self.shapes)
        self._call(loading.begin(self.pool))
        on_its_way: Future[None] | None = None
        kept: list[KeptBucket] = []
        try:
            accepted = ((name, tensor) for name, tensor in weights if manifest.accepts(name, tensor))
            for bucket in weight_transfer.cut_into_buckets(accepted):
                if self._call(self._hopeless()):
                    continue  # the other ranks need this one's part in the stream
                payload = weight_transfer.payload(bucket)
                kept.append(weight_transfer.keep(bucket, payload))
                if on_its_way:
                    on_its_way.result()
                on_its_way = self._start(loading.send(self.pool, bucket.update_info(), payload))
            if on_its_way:
                on_its_way.result()
            manifest.check(version)
        except BaseException:
            if on_its_way:
                on_its_way.exception()
            self._call(loading.abandon(self.pool))
            raise
        self._call(loading.finish(self.pool, version, f"{self.run_name}-{version}", kept))
        self.version = version

    def wake(self) -> None:
        """Does nothing: servers are never asleep."""

    def sleep(self) -> None:
        """Does nothing: the trainer has no use for the servers' memory."""

    def close(self) -> None:
        """Closes all connections, and ends the servers that this rank has started."""
        self._call(self.pool.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        stop_all(self.processes)


def connect(config: Config, hf_config: PretrainedConfig, processes: Sequence[ServerProcess]) -> ServerEngine:
    """Returns this rank's engine. torch.distributed must be up, and the run's folder must exist. Raises ConfigError."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for process in processes:
        process.move_log(Path(config.run.directory) / "servers")
    given = config.rollout.servers if isinstance(config.rollout.servers, tuple) else ()
    alone = world_size == 1 or config.rollout.share_work is False
    return ServerEngine(config, hf_config, processes, given[rank::world_size], alone=alone)


def _context_of(address: str, info: Mapping[str, Any], config: Config) -> int:
    """Returns the largest number of tokens of a sequence, from the /server_info of a server.

    Raises ConfigError where the server was not started with this run's configuration.
    """
    told = info.get("vllm_config")
    if not isinstance(told, Mapping):
        raise ConfigError(f"rollout.servers: {address} does not say how it is configured; is it vLLM 0.32?")
    wanted: dict[str, str | bool | None] = {
        "model_config.dtype": f"torch.{config.model.dtype}",
        "model_config.logprobs_mode": "processed_logprobs",
        "model_config.quantization": None,
        "speculative_config": None,
        "weight_transfer_config.backend": weight_transfer.backend(),
    }
    if not torch.cuda.is_available():
        wanted["scheduler_config.enable_chunked_prefill"] = False
    for name, value in wanted.items():
        found = _at(told, name)
        if found != value:
            raise ConfigError(
                f"rollout.servers: {address} has {name} {found}, this run needs {value}; start it with "
                "python -m lens_megatron.rollout.servers.process and this run's configuration"
            )
    context, longest = _at(told, "model_config.max_model_len"), config.data.max_prompt_length
    longest += config.rollout.max_response_length
    if not isinstance(context, int) or context < longest:
        raise ConfigError(
            f"rollout.servers: {address} has max_model_len {context}, below data.max_prompt_length + "
            f"rollout.max_response_length = {longest}; start it with this run's configuration"
        )
    return context


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the value at `path`, whose names are joined by dots; None where there is none."""
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
