"""Servers of small models, engines over them, and requests whose answers are compared with transformers."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from servers import GivenServer, announce_plugin
from toy_runs import Toy
from transformers import AutoModelForCausalLM
from vllm_models import LONG, SHORT, error_in_log_probs, other, save, weights

from lens_megatron.config import Config, from_tree
from lens_megatron.policy.hf_weights import read_hf_config
from lens_megatron.rollout.engine import Completion, Request
from lens_megatron.rollout.servers.engine import ServerEngine
from lens_megatron.rollout.servers.health import Limits, ServerState
from lens_megatron.rollout.servers.process import server_options

KEY = "the key of these tests"
PATIENT = Limits(probe_interval_s=0.2, answer_s=60.0, silent_probes=2, stuck_s=120.0, bucket_s=120.0, start_s=300.0)
"""Limits with which no server is taken for dead because the machine is busy."""
QUICK = Limits(probe_interval_s=0.2, answer_s=2.0, silent_probes=2, stuck_s=2.0, bucket_s=20.0, start_s=300.0)
"""Limits with which a server that hangs is found within seconds."""


class Messages(logging.Handler):
    """Keeps what is logged about servers. `on_message` is called with each line, in the thread that logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.on_message: Callable[[str], None] = lambda line: None
        self.logger = logging.getLogger("lens_megatron.rollout.servers")
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        self.on_message(record.getMessage())

    def close(self) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(logging.NOTSET)
        super().close()


class Fleet:
    """Two models of each of two shapes, running servers of the first shape, and engines that come and go."""

    def __init__(self, toy: Toy, folder: Path, servers: int):
        announce_plugin(folder / "plugin")
        self.folder = folder
        self.models = {}
        for name, tied in (("tied", True), ("untied", False)):
            (folder / name).mkdir()
            torch.manual_seed(0)
            save(toy, folder / name, tied=tied)
            base = AutoModelForCausalLM.from_pretrained(folder / name)
            self.models[name] = [other(base if seed == 2 else _copy(folder / name), seed) for seed in (1, 2)]
        options = self.options("tied")
        self.processes = [GivenServer(options, folder / f"given {i}.log", KEY) for i in range(servers)]
        self.messages = Messages()
        self.engines: list[ServerEngine] = []

    @property
    def said(self) -> list[str]:
        """What was logged about servers since the last engine was made."""
        return self.messages.said

    def config(self, model: str, **rollout: object) -> Config:
        return from_tree(
            {
                "run": {"directory": str(self.folder / "run")},
                "model": {"path": str(self.folder / model)},
                "data": {"train": "unused", "max_prompt_length": 300},
                "rollout": {
                    "engine": "vllm_server",
                    "max_response_length": 200,
                    "max_running_sequences": 16,
                    **rollout,
                },
                # Six blocks: most tests run short of keys and values.
                "vllm": {"kv_cache_memory_bytes": 6 * 2 * 2 * 2 * 32 * 4 * 128},
            }
        )

    def options(self, model: str) -> dict[str, Any]:
        config = self.config(model)
        return server_options(config, read_hf_config(config.model.path))

    def stop(self) -> None:
        self.messages.close()
        for process in self.processes:
            process.stop()

    def engine(
        self,
        addresses: Sequence[str] | None = None,
        *,
        load: int | None = 1,
        limits: Limits = PATIENT,
        **options: object,
    ) -> ServerEngine:
        """An engine over the servers at `addresses`, which holds the first tied model's weights as version `load`."""
        addresses = [process.address for process in self.processes] if addresses is None else addresses
        config = self.config("tied", servers=list(addresses))
        hf_config = read_hf_config(config.model.path)
        self.said.clear()
        self.messages.on_message = lambda line: None
        engine = ServerEngine(config, hf_config, (), addresses, limits=limits, **options)
        self.engines.append(engine)
        if load is not None:
            engine.load_weights(weights(self.models["tied"][0]), load)
        return engine


def _copy(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def requests_of(count: int, tokens: int = 24) -> list[Request]:
    return [
        Request(i, (SHORT, LONG)[i % 2], 1 + (tokens + 5 * i) % (2 * tokens), (1.0, 0.7, 0.0)[i % 3], 99 + i)
        for i in range(count)
    ]


def finish(
    engine: ServerEngine, count: int, meanwhile: Callable[[int], None] = lambda done: None, *, seconds: float = 300
) -> dict:
    """What `step` returns until there are `count` completions. Fails when it lasts, or when one comes twice."""
    done: dict[int, Completion] = {}
    until = time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < until, (len(done), engine.progress(), [m.health for m in engine.pool.members])
        for completion in engine.step():
            assert completion.request_id not in done
            done[completion.request_id] = completion
        meanwhile(len(done))
    assert not engine.pool.requests and not engine.pool.lost
    return done


def check(model: torch.nn.Module, requests: Sequence[Request], done: dict[int, Completion], version: int) -> None:
    """Nothing lost, nothing extra, everything from these weights."""
    assert sorted(done) == sorted(request.request_id for request in requests)
    for request in requests:
        completion = done[request.request_id]
        assert completion.weight_version == version
        assert completion.finished or len(completion.token_ids) == request.max_new_tokens
        assert error_in_log_probs(model, request, completion) < 3e-5


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def states(engine: ServerEngine) -> list[ServerState]:
    return [member.health.state for member in engine.pool.members]


def sync_both_ways(engine: ServerEngine, first: torch.nn.Module, second: torch.nn.Module) -> None:
    requests, seen = requests_of(12), []
    for version, (new, old) in enumerate([(first, second), (second, first), (first, second)]):
        engine.load_weights(iter(weights(new)), version)
        engine.submit(requests)
        done = finish(engine, len(requests))
        check(new, requests, done, version)
        long = max(requests, key=lambda request: len(done[request.request_id].token_ids))
        assert error_in_log_probs(old, long, done[long.request_id]) > 0.5
        seen.append({number: completion.token_ids for number, completion in done.items()})
    assert seen[0] == seen[2] != seen[1]
