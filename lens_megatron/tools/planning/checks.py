"""Finds layouts that are impossible: every message names the two values that do not go together, and what to change."""

from collections.abc import Sequence

from lens_megatron.config import Config, ConfigError, check_world
from lens_megatron.config.layout_rules import model_mistakes
from lens_megatron.tools.planning import memory, remedies
from lens_megatron.tools.planning.engine_memory import (
    cache_bytes,
    engine_bytes,
    longest_sequence,
    sequences_at_once,
    sequences_in_cache,
)
from lens_megatron.tools.planning.hardware import Cluster, gib
from lens_megatron.tools.planning.host_memory import HOST_COMPONENTS, HostBytes
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.memory import PhaseBytes
from lens_megatron.tools.planning.model_shape import ModelShape


def layout_mistakes(config: Config, shape: ModelShape, cluster: Cluster) -> list[str]:
    """Returns why the model or the batch cannot be cut so; empty if it can."""
    try:
        check_world(config, cluster.gpus, cluster.gpus_per_node)
    except ConfigError as error:
        return [
            f"cluster.nodes ({cluster.nodes}) x cluster.gpus_per_node ({cluster.gpus_per_node}): {line}"
            for line in str(error).splitlines()
        ]
    return list(model_mistakes(config, shape))


def memory_mistakes(
    phases: Sequence[PhaseBytes],
    host: HostBytes,
    shape: ModelShape,
    layout: ParallelLayout,
    work: Workload,
    cluster: Cluster,
) -> list[str]:
    """Returns phases that need more than a GPU has, an engine whose KV cache is too small, too little host memory."""
    mistakes = [
        _too_much(phase, shape, layout, work, cluster) for phase in phases if phase.total > cluster.memory_bytes
    ]
    if mistake := _cache_mistake(shape, layout, work, cluster):
        mistakes.append(mistake)
    if host.total > cluster.host_bytes:
        mistakes.append(_too_much_on_host(host, shape, layout, work, cluster))
    return mistakes


def running_sequences(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> int:
    """Sequences of full length that one engine decodes at once."""
    running = sequences_at_once(layout, work)
    if layout.engine != "vllm":
        return running  # the local engine's cache grows as needed; what servers' GPUs can hold is not known here
    cache = engine_bytes(shape, layout, work, cluster).kv_cache
    return max(1, min(running, sequences_in_cache(cache, shape, layout, work)))


def _cache_mistake(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str | None:
    if layout.engine != "vllm":
        return None
    held = engine_bytes(shape, layout, work, cluster)
    longest, wanted = longest_sequence(shape, work), sequences_at_once(layout, work)
    needed_to_start = cache_bytes(shape, layout, longest)
    fitting = sequences_in_cache(held.kv_cache, shape, layout, work)
    left = f"rollout: {_cache_source(layout)} leaves {gib(held.kv_cache)} GiB per GPU for the KV cache"
    if held.kv_cache < needed_to_start:
        problem = (
            f"{left}, beside {gib(held.weights)} GiB of weights and {gib(held.workspace)} GiB of workspace; vLLM does "
            f"not start without room for its longest sequence, whose {longest} tokens (vllm.max_model_len) need "
            f"{gib(needed_to_start)} GiB"
        )
    elif fitting < wanted:
        problem = (
            f"{left}, which holds {fitting} sequences of {work.sequence_tokens} tokens; "
            f"rollout.max_running_sequences ({work.running}) lets {wanted} run at once, which need "
            f"{gib(wanted * cache_bytes(shape, layout, work.sequence_tokens))} GiB"
        )
    else:
        return None
    return f"{problem}; {remedies.for_cache(shape, layout, work, cluster)}"


def _cache_source(layout: ParallelLayout) -> str:
    if layout.engine_cache_bytes:
        return f"vllm.kv_cache_memory_bytes ({layout.engine_cache_bytes})"
    return f"vllm.gpu_memory_utilization ({layout.engine_share})"


def _too_much(phase: PhaseBytes, shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> str:
    largest = max(memory.COMPONENTS, key=lambda name: getattr(phase, name))
    message = (
        f"{phase.phase}: needs {gib(phase.total)} GiB per GPU, a GPU of this cluster has {gib(cluster.memory_bytes)}; "
        f"the largest part is {largest.replace('_', ' ')} with {gib(getattr(phase, largest))} GiB"
    )
    return f"{message}; {remedies.for_gpu(phase.phase, shape, layout, work, cluster)}"


def _too_much_on_host(
    host: HostBytes, shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster
) -> str:
    largest = max(HOST_COMPONENTS, key=lambda name: getattr(host, name))
    message = (
        f"host memory: needs {gib(host.total)} GiB per node, cluster.host_memory_gib is {gib(cluster.host_bytes)}; "
        f"the largest part is {largest.replace('_', ' ')} with {gib(getattr(host, largest))} GiB"
    )
    return f"{message}; {remedies.for_host(shape, layout, work, cluster)}"
