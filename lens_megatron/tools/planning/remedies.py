"""Finds a change with which a configuration fits: computes the plan with each, and names the first that fits."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from lens_megatron.tools.planning import engine_memory, memory
from lens_megatron.tools.planning.hardware import Cluster
from lens_megatron.tools.planning.host_memory import host_bytes
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.model_shape import ModelShape

LARGEST_SHARE = 0.95
"""The largest vllm.gpu_memory_utilization that a remedy names."""


@dataclass(frozen=True, slots=True)
class Change:
    """Options to set, as one writes them, with the layout and workload that follow."""

    options: str
    layout: ParallelLayout
    work: Workload


def for_gpu(phase: str, shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    """Says what to do about a phase that needs more memory than a GPU has."""
    changes: list[Change] = []
    if layout.dp * layout.cp > 1 and not layout.distributed_optimizer:
        distributed = replace(layout, distributed_optimizer=True)
        changes.append(Change("megatron.use_distributed_optimizer=true", distributed, work))
    if phase == "rollout":
        changes += _smaller_engines(layout, work)
    if phase == "weight sync":
        changes += _engines_of_more_gpus(shape, layout, work, cluster)
    changes += _smaller_updates(shape, layout, work, cluster)
    return _first_that_fits(changes, shape, cluster) or (
        "no layout on this cluster makes it fit; take more GPUs, a shorter rollout.max_response_length, or an engine "
        "that is cut (rollout.engine=vllm)"
    )


def for_cache(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    """Says what to do about a KV cache that holds fewer sequences than may run, or not one of the longest."""
    changes: list[Change] = []
    share = layout.engine_share
    if layout.engine_cache_bytes:
        needed = engine_memory.sequences_at_once(layout, work) * engine_memory.cache_bytes(
            shape, layout, work.sequence_tokens
        )
        larger = replace(layout, engine_cache_bytes=needed)
        changes.append(Change(f"vllm.kv_cache_memory_bytes={needed}", larger, work))
    else:
        while (share := round(share + 0.05, 2)) <= LARGEST_SHARE:
            changes.append(Change(f"vllm.gpu_memory_utilization={share}", replace(layout, engine_share=share), work))
    held = engine_memory.engine_bytes(shape, layout, work, cluster)
    if fitting := engine_memory.sequences_in_cache(held.kv_cache, shape, layout, work):
        fewer = replace(work, running=fitting)
        changes.append(Change(f"rollout.max_running_sequences={fitting}", layout, fewer))
    shorter = replace(work, engine_context=work.sequence_tokens)
    changes.append(Change(f"vllm.max_model_len={work.sequence_tokens}", layout, shorter))
    changes += _engines_of_more_gpus(shape, layout, work, cluster)
    return _first_that_fits(changes, shape, cluster) or (
        "no single change makes it fit; raise vllm.tensor_parallel_size, or lower rollout.max_running_sequences or "
        "rollout.max_response_length"
    )


def for_host(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    """Says what to do about a node with too little host memory."""
    changes: list[Change] = []
    if layout.dp * layout.cp > 1 and not layout.distributed_optimizer:
        distributed = replace(layout, distributed_optimizer=True)
        changes.append(Change("megatron.use_distributed_optimizer=true", distributed, work))
    if work.updates > 1:
        changes.append(Change("train.updates_per_batch=1", layout, replace(work, updates=1)))
    if layout.offload:
        changes.append(Change("rollout.offload_trainer=false", replace(layout, offload=False), work))
    return _first_that_fits(changes, shape, cluster) or (
        "no single change makes it fit; take nodes with more memory, or raise megatron.tensor_model_parallel_size or "
        "cluster.nodes"
    )


def _first_that_fits(changes: Iterable[Change], shape: ModelShape, cluster: Cluster) -> str | None:
    for change in changes:
        if _fits(shape, change.layout, change.work, cluster):
            return f"it fits with {change.options}"
    return None


def _fits(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> bool:
    """Returns whether all fits on GPUs, in the engine's cache, and in host memory."""
    phases = memory.phases(shape, layout, work, cluster)
    return (
        all(phase.total <= cluster.memory_bytes for phase in phases)
        and engine_memory.cache_suffices(shape, layout, work, cluster)
        and host_bytes(shape, layout, work, cluster).total <= cluster.host_bytes
    )


def _smaller_engines(layout: ParallelLayout, work: Workload) -> Iterator[Change]:
    """Yields engines of the same GPUs that need less memory while they sample."""
    running = engine_memory.sequences_at_once(layout, work)
    while layout.engine == "local" and running > 8:
        running //= 2
        yield Change(f"rollout.max_running_sequences={running}", layout, replace(work, running=running))
    if layout.engine == "vllm" and not layout.offload:
        yield Change("rollout.offload_trainer=true", replace(layout, offload=True), work)
    share = layout.engine_share
    while layout.engine == "vllm" and share > 0.2:
        share = round(share - 0.05, 2)
        yield Change(f"vllm.gpu_memory_utilization={share}", replace(layout, engine_share=share), work)


def _engines_of_more_gpus(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster
) -> Iterator[Change]:
    """Yields engines over more GPUs of a node, where the model's dimensions allow it."""
    size = 2 * layout.engine_tp
    while layout.engine == "vllm" and size <= cluster.gpus_per_node and cluster.gpus_per_node % size == 0:
        heads = shape.num_key_value_heads
        divided = not (shape.num_attention_heads % size or shape.intermediate_size % size)
        if divided and not (heads % size and size % heads):
            larger = replace(layout, engine_tp=size, engines=layout.world // size)
            yield Change(f"vllm.tensor_parallel_size={size}", larger, work)
        size *= 2


def _smaller_updates(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> Iterator[Change]:
    """Yields micro-batches of one sequence, layers computed again, finer cuts of the model with all that is cheap."""
    budget = f"train.max_tokens_per_micro_batch={work.sequence_tokens}"
    small = replace(work, max_tokens=work.sequence_tokens)
    if work.max_tokens > work.sequence_tokens:
        yield Change(budget, layout, small)
    if layout.tp > 1 and not layout.sequence_parallel:
        yield Change("megatron.sequence_parallel=true", replace(layout, sequence_parallel=True), work)
    full = replace(layout, recompute="full", recompute_layers=1, distributed_optimizer=True)
    recompute = "{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"
    if layout.recompute != "full":
        yield Change(f"megatron.transformer={recompute}", replace(layout, recompute="full"), work)
    for options, cut in _finer_cuts(shape, full, work, cluster):
        yield Change(f"{options}, the distributed optimizer, full recomputation and {budget}", cut, small)


def _finer_cuts(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster
) -> Iterator[tuple[str, ParallelLayout]]:
    """Layouts of at least as many cuts, fewest first; of equal ones, the fewest pipeline stages, then context ranks."""
    sizes = (1, 2, 4, 8, 16)
    triples = [(tp, pp, cp) for tp in sizes for pp in sizes for cp in sizes]
    for tp, pp, cp in sorted(triples, key=lambda t: (t[0] * t[1] * t[2], t[1], t[2])):
        cuts = tp * pp * cp
        whole = not (shape.num_key_value_heads % tp or shape.num_attention_heads % tp or shape.intermediate_size % tp)
        staged = not shape.num_hidden_layers % (pp * layout.vp) and (pp > 1 or layout.vp == 1)
        fits_world = tp <= cluster.gpus_per_node and not cluster.gpus % cuts
        coarser = cuts < layout.tp * layout.pp * layout.cp or (layout.sequence_parallel and tp == 1)
        if coarser or not (whole and staged and fits_world):
            continue
        if work.prompts % (cluster.gpus // cuts * work.updates) == 0:
            text = f"megatron.tensor_model_parallel_size={tp} megatron.pipeline_model_parallel_size={pp}"
            text += f" megatron.context_parallel_size={cp}" * (cp != layout.cp)
            text += " megatron.sequence_parallel=true" * (tp > 1 and not layout.sequence_parallel)
            yield text, replace(layout, tp=tp, pp=pp, cp=cp, sequence_parallel=tp > 1)
