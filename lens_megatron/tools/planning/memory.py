"""Computes bytes per GPU, by phase of a step and by component."""

from dataclasses import dataclass, fields

from lens_megatron.tools.planning.activations import FLOAT32, Packed, micro_batch_bytes
from lens_megatron.tools.planning.engine_memory import VLLM_ASLEEP_BYTES, engine_bytes, weight_bytes
from lens_megatron.tools.planning.hardware import GIB, Cluster
from lens_megatron.tools.planning.layout import LayerSpec, ParallelLayout, Workload
from lens_megatron.tools.planning.model_shape import ModelShape

FRAMEWORK_BYTES = 3 * GIB
"""CUDA's context, buffers of NCCL and cuBLAS, and what the allocator cannot hand out again. This is an assumption."""
EXPORT_BUCKET_BYTES = 256 << 20
"""A bucket of gathered weights, as policy.export has it on a GPU. A larger tensor has a bucket of its own."""
WEIGHT_BLOCK_ELEMENTS = 1 << 22
"""Elements of a half-precision weight that lens_kernels._products turns to float32 at a time on a CPU."""
TILE_COLUMNS = 2048
"""Columns of the logits at a time, as lens_kernels._tiles has them where a half-precision head runs on a GPU."""
STATISTICS_ELEMENTS = 1 << 20
"""Logits that the plain PyTorch path of lens_kernels._rows works on at a time, in float32."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes that a rank holds on its GPU in every phase in which the trainer's state is there."""

    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True)
class Peaks:
    """The highest sums of what comes and goes. `saved` counts only tensors that are kept for the backward pass."""

    saved: int
    activations: int
    head: int
    """The bytes that the LM head holds at the moment when activations + head is highest."""


@dataclass(frozen=True, slots=True)
class PhaseBytes:
    """Bytes that one GPU holds in a phase of the step, by component."""

    phase: str
    stage: int
    """The pipeline stage that needs most in this phase."""
    weights: int = 0
    reference: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    head: int = 0
    engine: int = 0
    kv_cache: int = 0
    workspace: int = 0
    framework: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in COMPONENTS)


COMPONENTS = tuple(field.name for field in fields(PhaseBytes) if field.name not in ("phase", "stage"))


def state_bytes(shape: ModelShape, layout: ParallelLayout, stage: int) -> StateBytes:
    """Weights, gradient buffer and Adam's state of one rank.

    Adam keeps two float32 moments, and in bfloat16 a float32 copy of the weights; the distributed optimizer cuts them
    by dp x cp, not the gradient buffer. Example, Qwen2.5-7B, bf16, TP2, DP4, distributed: 7.6 + 15.2 + 11.4 GB.
    """
    parameters = shape.stage_parameters(layout.tp, layout.pp, stage)
    per_parameter = 2 * FLOAT32 + (FLOAT32 if layout.element_bytes < FLOAT32 else 0)
    weights = parameters * layout.element_bytes
    optimizer = parameters * per_parameter // layout.optimizer_shards
    return StateBytes(
        weights=weights,
        gradients=parameters * layout.gradient_bytes,
        optimizer=optimizer,
    )


def update_peaks(
    shape: ModelShape, layout: ParallelLayout, micro_batch: Packed, responses: int, micro_batches: int, stage: int
) -> Peaks:
    """The highest sums of forward and backward passes over all micro-batches. `responses`: tokens of the micro-batch
    that reach the head; all rows of a context-parallel rank may, since prompts lie in the first one's chunk.

    Two moments compete: the head's forward, when everything is kept and the head's gradients exist, and the first
    backward through a layer. Pipelines hold several micro-batches at once: `ParallelLayout.chunks_in_flight`.
    """
    micro = micro_batch_bytes(shape, layout, micro_batch)
    rows = micro_batch.rows(layout)
    kept = layout.chunks_in_flight(stage, micro_batches) * micro.kept
    in_flight = kept + (layout.chunks_in_flight(stage, micro_batches) * micro.sent if layout.pp > 1 else 0)
    inside_layer = in_flight + micro.buffer + micro.hidden + micro.layer + micro.backward_peak
    saved = kept + micro.kept_above
    if stage < layout.pp - 1:
        return Peaks(saved, inside_layer, 0)
    kept_by_head = _final_norm(shape, layout, rows)
    head = _head_update(shape, layout, rows, min(rows, responses))
    saved = kept + max(micro.kept_above, kept_by_head + _head_kept(shape, layout, rows))
    at_head = in_flight + micro.buffer + kept_by_head + micro.hidden
    if at_head + head > inside_layer:
        return Peaks(saved, at_head, head)
    return Peaks(saved, inside_layer, 0)


def forward_peaks(shape: ModelShape, layout: ParallelLayout, micro_batch: Packed, responses: int, stage: int) -> Peaks:
    """The highest sums of a pass without gradients: one layer at a time, then the head."""
    micro, rows = micro_batch_bytes(shape, layout, micro_batch), micro_batch.rows(layout)
    if stage < layout.pp - 1:
        return Peaks(0, micro.forward_peak + micro.buffer, 0)
    head = _logits_chunk(shape, layout, min(rows, responses), gradient=False) + _gathered(shape, layout, rows)
    if 2 * micro.hidden + head > micro.forward_peak:
        return Peaks(0, 2 * micro.hidden + micro.buffer, head)
    return Peaks(0, micro.forward_peak + micro.buffer, 0)


def phases(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> list[PhaseBytes]:
    """The phases that this configuration has, in their order; of each, the stage that needs most."""
    result = []
    if work.lens:
        result.append(_forward_phase("scores", shape, layout, work, work.prompt_tokens, work.prompt_tokens))
    stages = range(layout.pp)
    result.append(max((_weight_sync(shape, layout, stage) for stage in stages), key=_total))
    result.append(max((_rollout(shape, layout, work, cluster, stage) for stage in stages), key=_total))
    if work.lens or work.kl or work.old_log_probs:
        tokens = work.sequence_tokens
        result.append(_forward_phase("log-probs", shape, layout, work, tokens, work.response_tokens))
    result.append(_update_phase(shape, layout, work))
    return result


def _total(phase: PhaseBytes) -> int:
    return phase.total


def _base(phase: str, shape: ModelShape, layout: ParallelLayout, stage: int, **more: int) -> PhaseBytes:
    state = state_bytes(shape, layout, stage)
    engine = {"local": weight_bytes(shape, layout), "vllm": VLLM_ASLEEP_BYTES, "vllm_server": 0}[layout.engine]
    framework = 0 if layout.spec is LayerSpec.LOCAL_CPU else FRAMEWORK_BYTES
    values = {"engine": engine, "framework": framework, **more}
    if phase == "rollout" and layout.offload:
        return PhaseBytes(phase, stage, **values)
    return PhaseBytes(
        phase, stage, weights=state.weights, gradients=state.gradients, optimizer=state.optimizer, **values
    )


def _forward_phase(
    phase: str, shape: ModelShape, layout: ParallelLayout, work: Workload, length: int, responses: int
) -> PhaseBytes:
    uses_reference = work.lens if phase == "scores" else work.kl
    rows = work.prompts if phase == "scores" else work.rollouts
    packed = _fullest(layout, work, length, rows)
    candidates = []
    for stage in range(layout.pp):
        peaks = forward_peaks(shape, layout, packed, packed.tokens * responses // length, stage)
        more = {"activations": peaks.activations, "head": peaks.head}
        if uses_reference:
            more["reference"] = state_bytes(shape, layout, stage).weights
        candidates.append(_base(phase, shape, layout, stage, **more))
    return max(candidates, key=_total)


def _update_phase(shape: ModelShape, layout: ParallelLayout, work: Workload) -> PhaseBytes:
    length = work.sequence_tokens
    packed = _fullest(layout, work, length, work.rollouts // work.updates)
    responses, micro_batches = packed.tokens * work.response_tokens // length, work.micro_batches(layout.dp, length)
    candidates = []
    for stage in range(layout.pp):
        peaks = update_peaks(shape, layout, packed, responses, micro_batches, stage)
        candidates.append(_base("update", shape, layout, stage, activations=peaks.activations, head=peaks.head))
    return max(candidates, key=_total)


def _fullest(layout: ParallelLayout, work: Workload, length: int, rows: int) -> Packed:
    return Packed(work.most_tokens(length, -(-rows // layout.dp)), length)


def _weight_sync(shape: ModelShape, layout: ParallelLayout, stage: int) -> PhaseBytes:
    """The engine receives the weights while all of the trainer's state is on the GPU, beside it.

    Where the model is cut, two buckets are on their way at a time, and the largest tensor may have one of its own.
    """
    phase = "weight sync"
    buckets = 0
    if layout.tp * layout.pp > 1:
        embedding = shape.padded_vocab_size(layout.tp) * shape.hidden_size * layout.element_bytes
        buckets = EXPORT_BUCKET_BYTES + max(embedding, EXPORT_BUCKET_BYTES)
    if layout.engine == "vllm":
        return _base(
            phase, shape, layout, stage, engine=VLLM_ASLEEP_BYTES + weight_bytes(shape, layout), workspace=buckets
        )
    return _base(phase, shape, layout, stage, workspace=buckets)


def _rollout(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster, stage: int) -> PhaseBytes:
    held = engine_bytes(shape, layout, work, cluster)
    return _base("rollout", shape, layout, stage, engine=held.weights, kv_cache=held.kv_cache, workspace=held.workspace)


def _final_norm(shape: ModelShape, layout: ParallelLayout, rows: int) -> int:
    rows //= layout.tp if layout.sequence_parallel else 1
    if layout.spec is LayerSpec.LOCAL_CPU:
        return rows * (2 * shape.hidden_size + 1) * FLOAT32
    return rows * (shape.hidden_size * layout.element_bytes + FLOAT32)


def _head_kept(shape: ModelShape, layout: ParallelLayout, rows: int) -> int:
    """linear_policy_loss forms its gradients in the forward pass and keeps them, in float32, for the backward.

    The weight's is in Megatron's buffer by then, where that has float32.
    """
    vocabulary = shape.padded_vocab_size(layout.tp) // layout.tp if layout.head_sums_gradient else 0
    return (rows + vocabulary) * shape.hidden_size * FLOAT32


def _head_update(shape: ModelShape, layout: ParallelLayout, rows: int, responses: int) -> int:
    chunk_rows = min(layout.chunk_rows, responses)
    chunk = _logits_chunk(shape, layout, responses, gradient=True) + chunk_rows * shape.hidden_size * FLOAT32
    # The weight's gradient in its own dtype, or the placeholder for it once it is in Megatron's buffer.
    placeholder = shape.padded_vocab_size(layout.tp) // layout.tp * shape.hidden_size * layout.element_bytes
    backward = rows * shape.hidden_size * layout.element_bytes + placeholder
    return _head_kept(shape, layout, rows) + max(chunk + _gathered(shape, layout, rows), backward)


def _gathered(shape: ModelShape, layout: ParallelLayout, rows: int) -> int:
    """Bytes of the whole group's hidden states, which the head gathers under sequence parallelism."""
    return rows * shape.hidden_size * layout.element_bytes if layout.sequence_parallel else 0


def _logits_chunk(shape: ModelShape, layout: ParallelLayout, responses: int, *, gradient: bool) -> int:
    """What one chunk of chunk_rows holds besides gradients of weight and hidden states.

    A GPU in half precision: a tile of float32 logits, for a gradient the exponentials of V / tp columns in whole
    tiles, and the chunk's hidden states. Otherwise chunk_rows x V / tp float32 logits and the hidden states; on a CPU
    the plain path's temporaries too.
    """
    rows, vocabulary = min(layout.chunk_rows, responses), shape.padded_vocab_size(layout.tp) // layout.tp
    if layout.spec is not LayerSpec.LOCAL_CPU and layout.element_bytes < FLOAT32:
        whole_tiles = -(-vocabulary // TILE_COLUMNS) * TILE_COLUMNS if gradient else 0
        held = TILE_COLUMNS * FLOAT32 + whole_tiles * layout.element_bytes
        return rows * (held + shape.hidden_size * layout.element_bytes)
    logits = rows * vocabulary * FLOAT32
    if layout.spec is not LayerSpec.LOCAL_CPU:
        return logits + rows * shape.hidden_size * layout.element_bytes
    step = min(rows, max(1, STATISTICS_ELEMENTS // vocabulary))
    # Three tensors of a step; in the second step two of the first are still there.
    statistics = max(3 * step, 2 * step + 2 * min(step, rows - step)) * vocabulary * FLOAT32
    blocks = 0
    if layout.element_bytes < FLOAT32:  # the block at hand and the one before it
        blocks = min(2 * WEIGHT_BLOCK_ELEMENTS, vocabulary * shape.hidden_size) * FLOAT32
    return logits + rows * shape.hidden_size * FLOAT32 + max(statistics, blocks)
