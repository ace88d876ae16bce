"""Layouts that cannot be: every message names the two values that do not go together, and what to change."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lens_megatron.config import Config, ConfigError
from lens_megatron.config.layout_rules import model_mistakes
from lens_megatron.tools.planning import memory
from lens_megatron.tools.planning.hardware import GIB, Cluster
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.memory import PhaseBytes
from lens_megatron.tools.planning.model_shape import ModelShape


def layout_mistakes(config: Config, shape: ModelShape, cluster: Cluster) -> list[str]:
    """Why the model or the batch cannot be cut so; empty if it can."""
    try:
        config.check_world(cluster.gpus, cluster.gpus_per_node)
    except ConfigError as error:
        return [
            f"cluster.nodes ({cluster.nodes}) x cluster.gpus_per_node ({cluster.gpus_per_node}): {line}"
            for line in str(error).splitlines()
        ]
    return list(model_mistakes(config, shape))


def memory_mistakes(
    phases: Sequence[PhaseBytes], shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster
) -> list[str]:
    """Phases that need more than a GPU has, an engine without room for one sequence, too little host memory."""
    mistakes = []
    here = layout.engine != "vllm_server"
    for phase in phases:
        if here and phase.phase == "rollout" and phase.kv_cache < memory.kv_bytes_per_sequence(shape, layout, work):
            mistakes.append(_no_cache(phase, shape, layout, work))
        elif phase.total > cluster.memory_bytes:
            mistakes.append(_too_much(phase, shape, layout, work, cluster))
    ranks = min(cluster.gpus_per_node, cluster.gpus)
    host = ranks * max(memory.state_bytes(shape, layout, s).on_host for s in range(layout.pp))
    if host > cluster.host_bytes:
        mistakes.append(
            f"host memory for {memory.held_on_host(layout)} is {gib(host)} GiB per node, cluster.host_memory_gib is "
            f"{gib(cluster.host_bytes)}; raise megatron.tensor_model_parallel_size or set algorithm.kl_coef=0 with "
            "lens.enabled=false"
        )
    return mistakes


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def running_sequences(phases: Sequence[PhaseBytes], shape: ModelShape, layout: ParallelLayout, work: Workload) -> int:
    """Sequences of full length that one engine decodes at once."""
    if layout.engine == "vllm_server":
        return work.running  # what their GPUs can hold is not known here
    cache = next(phase.kv_cache for phase in phases if phase.phase == "rollout")
    return max(1, min(work.running, cache // memory.kv_bytes_per_sequence(shape, layout, work)))


def _no_cache(phase: PhaseBytes, shape: ModelShape, layout: ParallelLayout, work: Workload) -> str:
    return (
        f"rollout: the engine's {gib(phase.engine)} GiB of weights leave {gib(phase.kv_cache)} GiB of "
        f"vllm.gpu_memory_utilization ({layout.engine_share}) for the KV cache, one sequence of "
        f"{work.sequence_tokens} tokens needs {gib(memory.kv_bytes_per_sequence(shape, layout, work))} GiB; "
        f"raise vllm.tensor_parallel_size ({layout.engine_tp}) or vllm.gpu_memory_utilization"
    )


def _too_much(phase: PhaseBytes, shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    largest = max(memory.COMPONENTS, key=lambda name: getattr(phase, name))
    message = (
        f"{phase.phase}: needs {gib(phase.total)} GiB per GPU, a GPU of this cluster has {gib(cluster.memory_bytes)}; "
        f"the largest part is {largest.replace('_', ' ')} with {gib(getattr(phase, largest))} GiB"
    )
    return f"{message}; {_remedy(phase.phase, shape, layout, work, cluster)}"


def _remedy(name: str, shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    """The first single change, or layout with everything cheap switched on, with which all phases fit."""
    changes: list[tuple[str, ParallelLayout, Workload]] = []
    if layout.dp * layout.cp > 1 and not layout.distributed_optimizer:
        changes.append(("megatron.use_distributed_optimizer=true", replace(layout, distributed_optimizer=True), work))
    running = min(work.running, memory.sequences_per_engine(layout, work))
    while name == "rollout" and layout.engine == "local" and running > 8:
        running //= 2
        changes.append((f"rollout.max_running_sequences={running}", layout, replace(work, running=running)))
    if name == "rollout" and layout.engine == "vllm" and not layout.offload:
        changes.append(("rollout.offload_trainer=true", replace(layout, offload=True), work))
    share = layout.engine_share
    while name == "rollout" and layout.engine == "vllm" and share > 0.2:
        share = round(share - 0.05, 2)
        changes.append((f"vllm.gpu_memory_utilization={share}", replace(layout, engine_share=share), work))
    budget = f"train.max_tokens_per_micro_batch={work.sequence_tokens}"
    small = replace(work, max_tokens=work.sequence_tokens)
    if work.max_tokens > work.sequence_tokens:
        changes.append((budget, layout, small))
    if layout.tp > 1 and not layout.sequence_parallel:
        changes.append(("megatron.sequence_parallel=true", replace(layout, sequence_parallel=True), work))
    full = replace(layout, recompute="full", recompute_layers=1, distributed_optimizer=True)
    recompute = "{recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"
    if layout.recompute != "full":
        changes.append((f"megatron.transformer={recompute}", replace(layout, recompute="full"), work))
    changes += [
        (f"{text}, the distributed optimizer, full recomputation and {budget}", cut, small)
        for text, cut in _finer_cuts(shape, full, work, cluster)
    ]
    for text, cut, workload in changes:
        if all(p.total <= cluster.memory_bytes for p in memory.phases(shape, cut, workload, cluster)):
            return f"it fits with {text}"
    return (
        "no layout on this cluster makes it fit; take more GPUs, a shorter rollout.max_response_length, or an engine "
        "that is cut (rollout.engine=vllm)"
    )


def _finer_cuts(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster
) -> Iterator[tuple[str, ParallelLayout]]:
    """Layouts of at least as many cuts, fewest first; of as many, the fewest pipeline stages, then context ranks."""
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
