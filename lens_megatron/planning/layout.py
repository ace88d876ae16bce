"""Configuration -> `Layout`, who holds what, and `Workload`, how much of it a step makes."""

from dataclasses import dataclass
from enum import StrEnum

from lens_megatron.config import Config

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
CHUNK_ROWS = 2048
CHUNK_ROWS_CPU = 256
"""Rows of logits at a time, as lens_kernels.linear_logprobs cuts them on a GPU and on a CPU."""


class LayerSpec(StrEnum):
    """Which implementation of a layer Megatron-Core runs; they keep different tensors for the backward pass."""

    TRANSFORMER_ENGINE = "transformer_engine"
    """Where Transformer Engine and a GPU are: flash attention, norms fused into the linear layers."""
    LOCAL = "local"
    """A GPU without it: attention keeps its [heads, S, S] probabilities."""
    LOCAL_CPU = "local_cpu"
    """The same on a CPU, where the norms compute in float32 copies."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How model, optimizer and engine are cut, and how a layer computes."""

    world: int
    tp: int
    pp: int
    sequence_parallel: bool
    distributed_optimizer: bool
    element_bytes: int
    """Of weights and activations: 2 for bfloat16, 4 for float32."""
    gradient_bytes: int
    """Of an element of Megatron's gradient buffer."""
    spec: LayerSpec
    recompute: str
    """none, selective (core attention) or full (whole layers)."""
    recompute_layers: int
    """full: layers per checkpoint."""
    fused_swiglu: bool
    fused_head_gradient: bool
    """The head adds its weight's gradient to Megatron's buffer; else a second tensor of it is made."""
    engine: str
    engine_tp: int
    engine_share: float
    """vLLM's gpu_memory_utilization."""
    reference: bool
    """A frozen reference policy, kept on the host and swapped in for a pass."""

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def chunk_rows(self) -> int:
        return CHUNK_ROWS_CPU if self.spec is LayerSpec.LOCAL_CPU else CHUNK_ROWS


@dataclass(frozen=True, slots=True)
class Workload:
    """One step. Lengths are the configured limits, which memory must hold."""

    prompts: int
    rollouts_per_prompt: int
    prompt_tokens: int
    response_tokens: int
    sequences: int
    """Per micro-batch."""
    updates: int
    running: int
    """Sequences that one engine decodes at once, at most."""
    lens: bool
    kl: bool
    old_log_probs: bool
    """Computed for all samples, not only for the rescued ones."""

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens

    @property
    def rollouts(self) -> int:
        return self.prompts * self.rollouts_per_prompt

    def micro_batches(self, dp: int) -> int:
        """Of one data-parallel rank in one update. Example: 1024 rollouts, dp 4, 2 sequences: 128."""
        return -(-self.rollouts // (dp * self.updates * self.sequences))


def layout_of(config: Config, world: int, spec: LayerSpec) -> Layout:
    """`world` processes, one GPU each. Options of `megatron.transformer` and `megatron.ddp` that matter are read."""
    megatron, transformer = config.megatron, config.megatron.transformer
    tp = megatron.tensor_model_parallel_size
    te = spec is LayerSpec.TRANSFORMER_ENGINE
    vllm = config.rollout.engine == "vllm"
    return Layout(
        world=world,
        tp=tp,
        pp=megatron.pipeline_model_parallel_size,
        # mbridge switches it on with Transformer Engine; the local norms cannot do it.
        sequence_parallel=tp > 1 and bool(transformer.get("sequence_parallel", te)),
        distributed_optimizer=megatron.use_distributed_optimizer,
        element_bytes=ELEMENT_BYTES[config.model.dtype],
        gradient_bytes=4 if megatron.ddp.get("grad_reduce_in_fp32", True) else ELEMENT_BYTES[config.model.dtype],
        spec=spec,
        recompute=transformer.get("recompute_granularity") or "none",
        recompute_layers=int(transformer.get("recompute_num_layers") or 1),
        fused_swiglu=bool(transformer.get("bias_activation_fusion", False)),
        fused_head_gradient=megatron.ddp.get("grad_reduce_in_fp32", True)
        and not megatron.ddp.get("overlap_grad_reduce", False),
        engine=config.rollout.engine,
        engine_tp=config.vllm.tensor_parallel_size if vllm else 1,
        engine_share=config.vllm.gpu_memory_utilization if vllm else 0.0,
        reference=config.algorithm.kl_coef > 0 or config.lens.enabled,
    )


def workload_of(config: Config) -> Workload:
    rollout = config.rollout
    running = rollout.max_running_sequences
    if rollout.engine == "vllm":
        running = int(config.vllm.model_dump().get("max_num_seqs", running))
    return Workload(
        prompts=rollout.prompts_per_step,
        rollouts_per_prompt=rollout.rollouts_per_prompt,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=rollout.max_response_length,
        sequences=config.train.micro_batch_size,
        updates=config.train.updates_per_batch,
        running=running,
        lens=config.lens.enabled,
        kl=config.algorithm.kl_coef > 0,
        old_log_probs=config.train.updates_per_batch > 1 or config.algorithm.ratio_form == "acl",
    )
