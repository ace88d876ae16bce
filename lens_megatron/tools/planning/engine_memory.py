"""Computes bytes of an engine in the trainer's processes, on each of its GPUs: weights, KV cache and workspace."""

from dataclasses import dataclass

from lens_megatron.tools.planning.hardware import GIB, Cluster
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.model_shape import ModelShape

VLLM_WORKSPACE_BYTES = 3 * GIB
"""Activations of a prefill chunk and CUDA graphs. This is an assumption."""
VLLM_ASLEEP_BYTES = 1 * GIB
"""What vLLM holds when it sleeps at level 2, having given up weights and KV cache: CUDA graphs and communicators. This
is an assumption; the trainer prints the measured number (`VllmEngine.bytes_while_asleep`) when it starts."""
FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True, slots=True)
class EngineBytes:
    """Bytes that an engine holds on one GPU while it samples."""

    weights: int
    kv_cache: int
    """Bytes of the KV cache; negative where vLLM's share of the GPU is smaller than weights and workspace."""
    workspace: int


def engine_bytes(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> EngineBytes:
    """Computes bytes: vLLM's KV cache has all that its share leaves; the local engine's grows with its sequences."""
    weights = weight_bytes(shape, layout)
    if layout.engine == "vllm_server":
        return EngineBytes(0, 0, 0)  # servers have GPUs of their own
    if layout.engine == "vllm":
        left = int(cluster.memory_bytes * layout.engine_share) - weights - VLLM_WORKSPACE_BYTES
        return EngineBytes(weights, layout.engine_cache_bytes or left, VLLM_WORKSPACE_BYTES)
    running = sequences_at_once(layout, work)
    cache = running * cache_bytes(shape, layout, work.sequence_tokens)
    # To lengthen its cache the local engine makes a layer's anew; it draws from [running, V] probabilities in float64.
    draws = running * shape.vocab_size * (layout.element_bytes + 2 * FLOAT32 + 2 * FLOAT64)
    return EngineBytes(weights, cache, cache // shape.num_hidden_layers + draws)


def weight_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    """Weights that one GPU of an engine holds. A tied head is there once, norms are whole on every GPU."""
    return shape.stage_parameters(layout.engine_tp, 1, 0) * layout.element_bytes


def cache_bytes(shape: ModelShape, layout: ParallelLayout, tokens: int) -> int:
    """Keys and values of one sequence of `tokens` tokens, on one GPU of an engine.

    A GPU has at least one key-value head: an engine of more GPUs than heads keeps copies.
    """
    per_token = shape.kv_bytes_per_token(layout.element_bytes)
    return per_token * tokens // min(layout.engine_tp, shape.num_key_value_heads)


def sequences_per_engine(layout: ParallelLayout, work: Workload) -> int:
    """Rollouts of the first wave that one engine gets: prompts are dealt to the engines in turn."""
    return -(-work.prompts // layout.engines) * work.rollouts_per_prompt


def sequences_at_once(layout: ParallelLayout, work: Workload) -> int:
    """The most sequences that one engine decodes at once. With LENS second waves run beside first ones."""
    return min(work.running, sequences_per_engine(layout, work) * (2 if work.lens else 1))


def longest_sequence(shape: ModelShape, work: Workload) -> int:
    """Tokens of the sequence for which vLLM wants room before it starts at all."""
    return work.engine_context or shape.max_position_embeddings


def sequences_in_cache(cache: int, shape: ModelShape, layout: ParallelLayout, work: Workload) -> int:
    """Sequences of full length (prompt and response) for which a KV cache of `cache` bytes has room."""
    return max(0, cache // cache_bytes(shape, layout, work.sequence_tokens))


def cache_suffices(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> bool:
    """Returns whether vLLM starts, and never has to take a running sequence back because its cache is full."""
    if layout.engine != "vllm":
        return True
    cache = engine_bytes(shape, layout, work, cluster).kv_cache
    enough_to_start = cache >= cache_bytes(shape, layout, longest_sequence(shape, work))
    return enough_to_start and sequences_in_cache(cache, shape, layout, work) >= sequences_at_once(layout, work)
