"""Runs vLLM in the trainer's processes: an engine of this rank alone, or this rank's part of an engine that consecutive
ranks share (see `tensor_parallel`). It is stepped token by token, and its weights come from the trainer.

vllm is imported only when a run asks for it. `VllmEngine.load_weights` renews what vLLM wrongly keeps over an update:
cached keys and values, and on a CPU the packed copy of a tied head.
"""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from lens_megatron.config import Config, ConfigError
from lens_megatron.rollout.engine import Completion, EngineProgress, Request, WeightManifest, check_request
from lens_megatron.rollout.local import checkpoint_weights, end_tokens
from lens_megatron.rollout.vllm.options import engine_options, own_generators, settings, undisturbed
from lens_megatron.rollout.vllm.tied_head import pack_tied_head


class VllmEngine:
    """Implements `RolloutEngine`. Its weights come by `load_weights` only.

    Building one is a collective of all ranks, after torch.distributed is up. It is asleep when it is built.

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
        self.awake = False
        self.requests: dict[int, Request] = {}
        self.generated = 0
        options = engine_options(config, hf_config)
        self.compiles = self.cuda or not options["enforce_eager"]
        with undisturbed(settings()):
            from vllm import EngineArgs, SamplingParams
            from vllm.distributed.parallel_state import get_tp_group
            from vllm.sampling_params import RequestOutputKind
            from vllm.v1.engine.llm_engine import LLMEngine

            self.sampling_class, self.only_final = SamplingParams, RequestOutputKind.FINAL_ONLY
            free = self._free_memory()
            try:
                self.llm = LLMEngine.from_engine_args(EngineArgs(**options))
            except ValueError as error:  # pydantic's errors too
                raise ConfigError(f"vLLM cannot be built from the options under `vllm:`: {error}") from error
        if get_tp_group().ranks != (ranks := _consecutive_ranks(config.ranks_per_engine)):
            raise RuntimeError(f"vLLM has put ranks {get_tp_group().ranks} together, not {ranks}, as the trainer does")
        self.llm.sleep(level=2)
        left = self._free_memory()
        self.bytes_while_asleep = None if free is None or left is None else free - left
        """Bytes of the GPU that it takes while it sleeps: CUDA graphs, workspace, communicators. None on a CPU."""
        self.context, self.sequences = self.llm.model_config.max_model_len, options["max_num_seqs"]

    def _free_memory(self) -> int | None:
        """Bytes of the GPU that are free when torch keeps none in reserve. None on a CPU."""
        if not self.cuda:
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def phase(self) -> AbstractContextManager[None]:
        return nullcontext()

    def submit(self, requests: Iterable[Request]) -> None:
        requests = list(requests)
        self._check_weights()
        if not self.awake:
            raise RuntimeError("the engine is asleep; wake it first")
        in_flight, context = set(self.requests), ("the engine's max_model_len", self.context)
        for request in requests:
            check_request(request, in_flight, context=context, vocabulary=self.vocabulary)
            in_flight.add(request.request_id)
        for request in requests:
            prompt = {"prompt_token_ids": list(request.prompt)}
            self.llm.add_request(str(request.request_id), prompt, self._sampling(request))
            self.requests[request.request_id] = request

    def _check_weights(self) -> int:
        """Returns the version of the weights. Raises RuntimeError while there are none."""
        if self.version is None:
            raise RuntimeError("the engine has no whole set of weights; load_weights first")
        return self.version

    def _sampling(self, request: Request) -> Any:
        return self.sampling_class(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            max_tokens=request.max_new_tokens,
            logprobs=0,  # the sampled token's alone
            flat_logprobs=True,
            stop_token_ids=sorted({*self.eos, *request.stop}),
            ignore_eos=True,  # vLLM knows only those of config.json; the project's are in stop_token_ids
            detokenize=False,
            output_kind=self.only_final,
        )

    def capacity(self) -> int:
        return self.sequences

    def hopeless(self) -> bool:
        return False

    def returned(self) -> list[Request]:
        return []

    def progress(self) -> EngineProgress:
        running, waiting = self.llm.engine_core.engine_core.scheduler.get_request_counts()
        return EngineProgress(waiting, running, self.generated)

    def step(self) -> list[Completion]:
        if not self.requests:
            return []
        with own_generators(), self._eager():
            outputs = self.llm.step()
        return [self._completion(output) for output in outputs if output.finished]

    def _eager(self) -> AbstractContextManager[None]:
        """Keeps torch from compiling a ten-line function of vLLM's sampler, which takes 10 s and a C++ compiler."""
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
        return Completion(request.request_id, tuple(sample.token_ids), log_probs, finished, self._check_weights())

    def cancel(self, request_ids: Collection[int]) -> int:
        gone = sorted(self.requests.keys() & set(request_ids))  # in one order on all ranks of an engine
        for number in gone:
            del self.requests[number]
        states = self.llm.output_processor
        vllm_ids = [name for number in gone for name in states.external_req_ids.get(str(number), ())]
        tokens = sum(states.request_states[name].detokenizer.num_output_tokens() for name in vllm_ids)
        self.llm.abort_request(vllm_ids, internal=True)
        self.generated += tokens
        return tokens

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self.requests:
            raise RuntimeError(f"cannot load weights with {len(self.requests)} requests in flight")
        self.version, self.awake = None, False  # until every tensor is there the model is a mixture
        manifest = WeightManifest(self.shapes)
        expected = ((name, tensor) for name, tensor in weights if manifest.accepts(name, tensor))
        with undisturbed({}), torch.no_grad():
            if self.llm.is_sleeping():
                self.llm.wake_up(["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": expected})
            manifest.check(version)
            if self.tied and not self.cuda:
                self.llm.apply_model(pack_tied_head)
        self.version = version

    def wake(self) -> None:
        self._check_weights()
        if self.awake:
            return
        if self.llm.is_sleeping():
            self.llm.wake_up(["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM would not drop the keys and values of the old weights")
        self.awake = True

    def sleep(self) -> None:
        if self.requests or self.version is None:
            return
        self.version, self.awake = None, False
        self.llm.sleep(level=2)

    def close(self) -> None:
        """Ends the engine and vLLM's process groups, and with them every other VllmEngine of this process."""
        self.cancel(list(self.requests))
        self.llm.engine_core.shutdown()


def _consecutive_ranks(size: int) -> list[int]:
    first = torch.distributed.get_rank() // size * size
    return list(range(first, first + size))
