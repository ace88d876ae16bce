"""Derives `ParallelLayout`, who holds what, and `Workload`, the size of a step, from a configuration."""

from dataclasses import dataclass
from enum import StrEnum

from lens_megatron.algorithms.entry import Evidence
from lens_megatron.algorithms.methods import load_methods
from lens_megatron.config import Config

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_ROWS = 4096
CHUNK_ROWS_CPU = 256
"""Rows of logits at a time, as lens_kernels._head cuts them on a GPU and on a CPU."""


class LayerSpec(StrEnum):
    """Says which implementation of a layer Megatron-Core runs; they keep different tensors for the backward pass."""

    TRANSFORMER_ENGINE = "transformer_engine"
    """Used where Transformer Engine and a GPU are: flash attention, norms fused into the linear layers."""
    LOCAL = "local"
    """A GPU without it, in bfloat16: lens_megatron.policy.layers, flash attention too; CP gathers keys."""
    LOCAL_CPU = "local_cpu"
    """The same on a CPU: PyTorch's fused attention, one sequence at a time; the norms compute in float32 copies."""


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """Says how model, optimizer and engine are cut, and how a layer computes."""

    world: int
    tp: int
    pp: int
    vp: int
    """Model chunks per pipeline stage."""
    cp: int
    sequence_parallel: bool
    distributed_optimizer: bool
    element_bytes: int
    """Bytes of an element of weights and activations: 2 for bfloat16, 4 for float32."""
    gradient_bytes: int
    """Bytes of an element of Megatron's gradient buffer."""
    spec: LayerSpec
    recompute: str
    """What is computed again: none, selective (core attention) or full (whole layers)."""
    recompute_layers: int
    """Layers per checkpoint with recompute=full."""
    fused_swiglu: bool
    head_sums_gradient: bool
    """True if the head keeps a float32 sum of its weight's gradient; else it adds to Megatron's buffer at once."""
    engine: str
    engines: int
    """Engines of the whole job."""
    engine_tp: int
    engine_share: float
    """vLLM's gpu_memory_utilization."""
    engine_cache_bytes: int | None
    """vLLM's kv_cache_memory_bytes, which replaces what the share leaves for the KV cache; None: not set."""
    reference: bool
    """True if there is a frozen reference policy, kept on the host and swapped in for a pass."""
    offload: bool
    """True if the trainer's state is on the host while the engine samples."""

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def optimizer_shards(self) -> int:
        """The distributed optimizer cuts over data- and context-parallel ranks alike."""
        return self.dp * self.cp if self.distributed_optimizer else 1

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS_CPU if self.spec is LayerSpec.LOCAL_CPU else CHUNK_ROWS

    def chunks_in_flight(self, stage: int, micro_batches: int) -> int:
        """Model chunks' micro-batches whose activations a rank of `stage` holds at most: warm-up + 1.

        As in megatron.core.pipeline_parallel.schedules.get_pp_rank_microbatches. Interleaved, a stage warms up with
        2 (p - 1 - stage) + (v - 1) p of them, and takes micro-batches in multiples of p.
        """
        if self.vp == 1:
            return min(self.pp - stage, micro_batches)
        warm_up = 2 * (self.pp - 1 - stage) + (self.vp - 1) * self.pp
        return min(warm_up + 1, -(-micro_batches // self.pp) * self.pp * self.vp)


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of one step. Lengths are the configured limits, which memory must hold."""

    prompts: int
    rollouts_per_prompt: int
    prompt_tokens: int
    response_tokens: int
    max_tokens: int
    """Prompt and response tokens packed into one micro-batch, at most; a longer sample goes alone."""
    updates: int
    running: int
    """Sequences that one engine decodes at once, at most."""
    engine_context: int | None
    """vLLM's max_model_len: tokens of the longest sequence that the engine must have room for; None: the model's."""
    speculative: bool
    """True if second waves start before it is certain that their groups are hard."""
    lens: bool
    kl: bool
    old_log_probs: bool
    """True if old log-probabilities are computed for all samples, not only for those from purified prompts."""
    rescued_log_probs: bool
    """True if those from purified prompts need theirs, because their ratio is against the purified prompt."""

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def rollouts(self) -> int:
        return self.prompts * self.rollouts_per_prompt

    def sequences(self, length: float) -> int:
        """Sequences of this length that one micro-batch holds. Example: 9 of 512 tokens, 1 of 4608, in 4608."""
        return max(1, int(self.max_tokens // length))

    def most_tokens(self, length: int, sequences: int) -> int:
        """The fullest micro-batch of `sequences` up to `length` long: shorter ones fill the budget better than long."""
        return min(max(self.max_tokens, length), sequences * length)

    def micro_batches(self, dp: int, length: float) -> int:
        """Micro-batches of one data-parallel rank in one update, for rollouts of `length` tokens.

        Example: 1024 rollouts of 4608 tokens, dp 4, at most 9216 tokens in a micro-batch: 128.
        """
        return -(-self.rollouts // (dp * self.updates * self.sequences(length)))


def layout_of(config: Config, world: int, spec: LayerSpec) -> ParallelLayout:
    """The layout of `world` processes with one GPU each. Options under `megatron.transformer` and `megatron.ddp` that
    change memory are read."""
    megatron, transformer = config.megatron, config.megatron.transformer
    tp = megatron.tensor_model_parallel_size
    vllm, servers = config.rollout.engine == "vllm", config.rollout.servers
    servers = servers if isinstance(servers, int) else len(servers)
    return ParallelLayout(
        world=world,
        tp=tp,
        pp=megatron.pipeline_model_parallel_size,
        vp=megatron.virtual_pipeline_model_parallel_size or 1,
        cp=megatron.context_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        distributed_optimizer=megatron.use_distributed_optimizer,
        element_bytes=ELEMENT_BYTES[config.model.dtype],
        gradient_bytes=4 if megatron.ddp.get("grad_reduce_in_fp32", True) else ELEMENT_BYTES[config.model.dtype],
        spec=spec,
        recompute=transformer.get("recompute_granularity") or "none",
        recompute_layers=int(transformer.get("recompute_num_layers") or 1),
        fused_swiglu=bool(transformer.get("bias_activation_fusion", False)),
        head_sums_gradient=not megatron.ddp.get("grad_reduce_in_fp32", True) or _cuts_sequences(config),
        engine=config.rollout.engine,
        engines=servers if config.rollout.engine == "vllm_server" else world // config.ranks_per_engine,
        engine_tp=1 if config.rollout.engine == "local" else config.vllm.tensor_parallel_size,
        engine_share=config.vllm.gpu_memory_utilization if vllm else 0.0,
        engine_cache_bytes=_vllm_count(config, "kv_cache_memory_bytes"),
        reference=config.algorithm.kl_coef > 0 or load_methods(config).need(Evidence.PROMPT_SCORES),
        offload=vllm and spec is not LayerSpec.LOCAL_CPU
        if config.rollout.offload_trainer is None
        else config.rollout.offload_trainer,
    )


def _cuts_sequences(config: Config) -> bool:
    """Returns whether the loss needs whole responses that lie on several context-parallel ranks."""
    whole = config.algorithm.ratio != "token" or load_methods(config).need(Evidence.WHOLE_RESPONSES)
    return whole and config.megatron.context_parallel_size > 1


def workload_of(config: Config) -> Workload:
    """The step of this configuration."""
    rollout = config.rollout
    return Workload(
        prompts=rollout.prompts_per_step,
        rollouts_per_prompt=rollout.rollouts_per_prompt,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=rollout.max_response_length,
        max_tokens=config.train.max_tokens_per_micro_batch,
        updates=config.train.updates_per_batch,
        running=_vllm_count(config, "max_num_seqs") or rollout.max_running_sequences,
        engine_context=_vllm_count(config, "max_model_len"),
        speculative=rollout.schedule == "speculative",
        lens=config.lens.enabled,
        kl=config.algorithm.kl_coef > 0,
        old_log_probs=config.train.updates_per_batch > 1
        or config.algorithm.ratio_form == "acl"
        or config.algorithm.correction != "none",
        rescued_log_probs=config.lens.enabled and config.algorithm.rescued_ratio == "generation_prompt",
    )


def _vllm_count(config: Config, name: str) -> int | None:
    """An option of vLLM's that is a whole number from 1; None where it is not set or the engine is not in the trainer's
    processes. The trainer refuses other values before it builds the engine."""
    value = (config.vllm.model_extra or {}).get(name)
    return value if config.rollout.engine == "vllm" and type(value) is int and value >= 1 else None
