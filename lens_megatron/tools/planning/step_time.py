"""Estimates seconds per phase of a step from arithmetic, bytes and assumptions; none is measured on a GPU yet."""

from dataclasses import dataclass

from lens_megatron.tools.planning import engine_memory, memory
from lens_megatron.tools.planning.hardware import Cluster
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.model_shape import ModelShape

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Numbers that no configuration says. Lengths are taken as uniform from 0 to the limit unless a mean is given."""

    update_mfu: float = 0.40
    """Model FLOPs of forward and backward / peak, recomputation not counted as work done."""
    forward_mfu: float = 0.45
    memory_efficiency: float = 0.7
    """Share of the GPU's memory bandwidth that decoding reaches."""
    link_efficiency: float = 0.7
    host_link_gb_s: float = 20.0
    """Gigabytes per second between pinned host memory and each GPU."""
    mean_length_share: float = 0.5
    """Mean length of prompts and of responses / their limits."""
    hard_share: float = 0.5
    """LENS: share of prompts below tau, which are sampled a second time."""
    discarded_share: float = 0.15
    """LENS with rollout.schedule=speculative: share of sampled tokens that are taken back. Simulated: 0.09 to 0.19,
    more where more sequences run at once (benchmarks/ROLLOUT_NOTES.md)."""
    rescued_share: float = 0.1
    """LENS: share of rollouts whose old log-probabilities must be computed."""
    local_layer_s: float = 1e-3
    """Seconds of a layer in the local engine, which launches its operators one by one from Python."""


@dataclass(frozen=True, slots=True)
class PhaseTime:
    """Says how long a phase takes, and how that time arises, in words."""

    phase: str
    seconds: float
    how: str


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Says how the weights reach an engine after every step."""

    bytes_per_engine: int
    """The value that `perf/weight_sync_bytes` will have: every weight once, whole."""
    bytes_received: int
    """Bytes of these that a GPU gets from others: all but its own shard."""
    seconds: float


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of the time that a pipeline stage waits: (p - 1) / (v m + p - 1), v the model chunks per stage."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def step_times(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, assumed: Assumptions, running: int
) -> list[PhaseTime]:
    """Returns the phases in the order of the step. `running`: sequences that one engine decodes at once."""
    times = []
    if work.lens:
        times.append(_scores(shape, layout, work, cluster, assumed))
    times.append(_rollout(shape, layout, work, cluster, assumed, running))
    if layout.offload:
        times.append(_offload(shape, layout, assumed))
    if (log_probs := _log_probs(shape, layout, work, cluster, assumed)).seconds:
        times.append(log_probs)
    times.append(_update(shape, layout, work, cluster, assumed))
    sync = weight_sync(shape, layout, cluster, assumed)
    times.append(PhaseTime("weight sync", sync.seconds, f"{sync.bytes_per_engine / GIGA:.1f} GB into each engine"))
    return times


def weight_sync(shape: ModelShape, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> WeightSync:
    """Times the sync: every rank of a model-parallel group gathers every weight whole, and then loads its engine."""
    size = shape.parameters * layout.element_bytes
    received = size - size // (layout.tp * layout.pp)
    # Megatron numbers ranks tp, cp, dp, pp: the stages of one pipeline are the farthest apart.
    one_node = cluster.nodes == 1 or (layout.pp == 1 and layout.tp <= cluster.gpus_per_node)
    link = cluster.gpu.link_gb_s if one_node else cluster.slowest_link_gb_s
    loading = size / layout.engine_tp / (cluster.gpu.memory_gb_s * GIGA * assumed.memory_efficiency)
    return WeightSync(size, received, received / (link * GIGA * assumed.link_efficiency) + 2 * loading)


def _scores(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, assumed: Assumptions
) -> PhaseTime:
    length = work.prompt_tokens * assumed.mean_length_share
    flops = 2 * work.prompts * _sequence_flops(shape, length, length)
    seconds = _forward_seconds(flops, work, layout, cluster, assumed, work.prompts, length)
    swap = _swap_seconds(shape, layout, assumed)
    return PhaseTime(
        "scores", seconds + swap, f"policy and reference over {work.prompts} prompts; {swap:.1f} s reference swapped in"
    )


def _rollout(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, assumed: Assumptions, running: int
) -> PhaseTime:
    """Decoding reads the engine's weights once per step and every running sequence's keys and values.

    Steps: total tokens / running sequences while the batch is full, then the tail of the longest response. Second waves
    have a tail of their own after it, unless they are speculative: those end with the first ones, and some are sampled
    for nothing.
    """
    waves = 1 + assumed.hard_share * work.lens
    tails = 2 if work.lens and not work.speculative else 1
    kept = 1 - assumed.discarded_share if work.lens and work.speculative else 1
    sequences = engine_memory.sequences_per_engine(layout, work) * waves / kept
    mean, longest = work.response_tokens * assumed.mean_length_share, work.response_tokens
    batch = min(running, sequences)
    steps = sequences * mean / batch + tails * (longest - mean)
    context = work.prompt_tokens * assumed.mean_length_share + mean / 2
    kv = engine_memory.cache_bytes(shape, layout, 1)
    # The local engine makes its cache anew at every token, padded to the longest: read, write, read again.
    passes, context = (3, work.prompt_tokens + mean) if layout.engine == "local" else (1, context)
    bandwidth = cluster.gpu.memory_gb_s * GIGA * assumed.memory_efficiency
    weights_s = steps * engine_memory.weight_bytes(shape, layout) / bandwidth
    cache_s = sequences * mean * context * kv * passes / bandwidth
    launch_s = steps * shape.num_hidden_layers * assumed.local_layer_s if layout.engine == "local" else 0.0
    how = (
        f"{sequences:.0f} sequences per engine, {batch:.0f} at once, {steps:.0f} decoding steps: weights "
        f"{weights_s:.0f} s, cache {cache_s:.0f} s" + (f", launching {launch_s:.0f} s" if launch_s else "")
    )
    return PhaseTime("rollout", weights_s + cache_s + launch_s, how)


def _offload(shape: ModelShape, layout: ParallelLayout, assumed: Assumptions) -> PhaseTime:
    """Weights and optimizer state go to host memory and come back; gradients are not copied."""
    state = memory.state_bytes(shape, layout, 0)
    moved = state.weights + state.optimizer
    how = f"{moved / GIGA:.1f} GB of every trainer's state to host memory while the engine samples, and back"
    return PhaseTime("offload", 2 * moved / (assumed.host_link_gb_s * GIGA), how)


def _log_probs(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, assumed: Assumptions
) -> PhaseTime:
    old = 1.0 if work.old_log_probs else assumed.rescued_share * work.rescued_log_probs
    passes = old + work.kl
    response = work.response_tokens * assumed.mean_length_share
    length = response + work.prompt_tokens * assumed.mean_length_share
    flops = passes * work.rollouts * _sequence_flops(shape, length, response)
    swap = _swap_seconds(shape, layout, assumed) * work.kl
    seconds = _forward_seconds(flops, work, layout, cluster, assumed, work.rollouts, length) if passes else 0.0
    parts = [f"old for {old:.0%} of the rollouts"] * bool(old) + [
        f"reference for all; {swap:.1f} s swapped in"
    ] * work.kl
    return PhaseTime("log-probs", seconds + swap, ", ".join(parts))


def _update(
    shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, assumed: Assumptions
) -> PhaseTime:
    response = work.response_tokens * assumed.mean_length_share
    length = response + work.prompt_tokens * assumed.mean_length_share
    # The head's operator runs three matrix products and never recomputes; full recomputation repeats the layers.
    factor = 4 if layout.recompute == "full" else 3
    head = work.rollouts * response * 2 * shape.vocab_size * shape.hidden_size
    flops = work.rollouts * _sequence_flops(shape, length, response) * factor - (factor - 3) * head
    micro_batches = work.micro_batches(layout.dp, length)
    idle = bubble(layout.pp, micro_batches, layout.vp)
    compute = flops / (_peak(layout, cluster) * assumed.update_mfu) / (1 - idle)
    reduce = work.updates * _reduce_seconds(shape, layout, cluster, assumed)
    twice = ", layers computed twice" if layout.recompute == "full" else ""
    how = (
        f"{micro_batches} micro-batches per rank and update; bubble {idle:.1%}{twice}; "
        f"{reduce:.1f} s gradients over {layout.dp * layout.cp} ranks"
    )
    return PhaseTime("update", compute + reduce, how)


def _reduce_seconds(shape: ModelShape, layout: ParallelLayout, cluster: Cluster, assumed: Assumptions) -> float:
    """Gradients reduced (twice their bytes without the distributed optimizer), then weights gathered."""
    parameters = shape.stage_parameters(layout.tp, layout.pp, 0)
    moved = layout.gradient_bytes * (1 if layout.distributed_optimizer else 2)
    moved += layout.element_bytes if layout.distributed_optimizer else 0
    ranks = layout.dp * layout.cp
    share = (ranks - 1) / ranks
    return parameters * moved * share / (cluster.slowest_link_gb_s * GIGA * assumed.link_efficiency)


def _sequence_flops(shape: ModelShape, tokens: float, heads: float) -> float:
    """Forward FLOPs of one sequence: every token sees half of the sequence on average."""
    return shape.forward_flops(tokens, tokens / 2, heads)


def _forward_seconds(
    flops: float,
    work: Workload,
    layout: ParallelLayout,
    cluster: Cluster,
    assumed: Assumptions,
    rows: int,
    length: float,
) -> float:
    micro_batches = -(-rows // (layout.dp * work.sequences(length)))
    seconds = flops / (_peak(layout, cluster) * assumed.forward_mfu)
    return seconds / (1 - bubble(layout.pp, micro_batches, layout.vp))


def _peak(layout: ParallelLayout, cluster: Cluster) -> float:
    """FLOP/s of all GPUs. float32 is done outside the tensor cores, at about a sixteenth of bfloat16."""
    return cluster.gpus * cluster.gpu.bfloat16_tflops * TERA / (16 if layout.element_bytes == 4 else 1)


def _swap_seconds(shape: ModelShape, layout: ParallelLayout, assumed: Assumptions) -> float:
    return memory.state_bytes(shape, layout, 0).weights / (assumed.host_link_gb_s * GIGA)
