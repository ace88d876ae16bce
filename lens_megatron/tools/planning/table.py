"""Renders a plan as text."""

from lens_megatron.tools.planning import memory
from lens_megatron.tools.planning.hardware import gib
from lens_megatron.tools.planning.host_memory import HOST_COMPONENTS
from lens_megatron.tools.planning.plan import Plan

LABELS = {
    "weights": "weights",
    "reference": "reference, swapped in",
    "gradients": "main gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "head": "LM head and loss",
    "engine": "engine weights",
    "kv_cache": "KV cache",
    "workspace": "workspace, buckets",
    "framework": "CUDA, NCCL (assumed)",
}
HOST_LABELS = {
    "reference": "reference policy",
    "offloaded": "trainer's state while the engine samples",
    "sent_weights": "weights for servers that start again",
    "before_updates": "state before the updates of a step",
    "checkpoint": "checkpoint being written",
}
WIDTH = 24


def render(plan: Plan) -> str:
    """The whole plan: model and layout, memory by phase and component, seconds by phase, weight sync, assumptions."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_times(plan), "", *_notes(plan)])


def _head(plan: Plan) -> list[str]:
    layout, work, shape = plan.layout, plan.work, plan.shape
    cuts = [
        f"TP{layout.tp}" + " with sequence parallelism" * layout.sequence_parallel,
        f"PP{layout.pp}" + f" of {layout.vp} interleaved chunks" * (layout.vp > 1),
    ]
    cuts += [f"CP{layout.cp}"] * (layout.cp > 1)
    cuts += [f"DP{layout.dp}" + " with the distributed optimizer" * layout.distributed_optimizer]
    engine = f"{layout.engine}, {layout.engines} engines of {layout.engine_tp} GPU(s)"
    return [
        f"{shape.model_type}, {shape.parameters:,} parameters, {'bfloat16' if layout.element_bytes == 2 else 'float32'}"
        f", on {plan.cluster.name}",
        f"layout   {', '.join(cuts)}; {layout.spec} layers, recompute {layout.recompute}",
        f"step     {work.prompts} prompts x {work.rollouts_per_prompt} rollouts, up to {work.prompt_tokens} + "
        f"{work.response_tokens} tokens; {work.max_tokens} tokens per micro-batch; "
        f"{'LENS' if work.lens else 'no purification'}",
        f"engine   {engine}, {plan.running} sequences of full length at once",
    ]


def _memory(plan: Plan) -> list[str]:
    phases = plan.phases
    lines = ["GiB per GPU".ljust(WIDTH) + "".join(f"{phase.phase:>12}" for phase in phases)]
    for name in memory.COMPONENTS:
        values = [getattr(phase, name) for phase in phases]
        if any(values):
            lines.append(LABELS[name].ljust(WIDTH) + "".join(f"{_cell(value):>12}" for value in values))
    total = [phase.total for phase in phases]
    lines.append("total".ljust(WIDTH) + "".join(f"{gib(value):>12}" for value in total))
    free = [plan.cluster.memory_bytes - value for value in total]
    lines.append(f"free of {gib(plan.cluster.memory_bytes)}".ljust(WIDTH) + "".join(f"{gib(v):>12}" for v in free))
    if plan.layout.pp > 1:
        lines.append("pipeline stage shown".ljust(WIDTH) + "".join(f"{phase.stage:>12}" for phase in phases))
    parts = [(HOST_LABELS[name], getattr(plan.host, name)) for name in HOST_COMPONENTS]
    lines.append(
        f"host memory per node: {gib(plan.host.total)} of {gib(plan.cluster.host_bytes)} GiB: "
        + ", ".join(f"{label} {gib(size)}" for label, size in parts if size)
    )
    return lines


def _cell(value: int) -> str:
    return gib(value) if value else "-"


def _times(plan: Plan) -> list[str]:
    total = sum(time.seconds for time in plan.times)
    lines = ["seconds per step (estimate)"]
    lines += [f"  {time.phase:<14}{time.seconds:>8.1f}  {time.how}" for time in plan.times]
    lines.append(f"  {'total':<14}{total:>8.1f}  {plan.steps} steps: {plan.steps * total / 3600:.0f} hours")
    sync, received = plan.sync.bytes_per_engine / 1e9, plan.sync.bytes_received / 1e9
    lines.append(f"weight sync: {sync:.2f} GB into every engine, {received:.2f} GB of it from other GPUs")
    lines.append(f"checkpoint: {plan.checkpoint_bytes / 1e9:.0f} GB, {plan.keep} kept")
    return lines


def _notes(plan: Plan) -> list[str]:
    assumed = plan.assumed
    lines = [
        f"assumed: MFU {assumed.update_mfu:.0%} in the update, {assumed.forward_mfu:.0%} without gradients; "
        f"decoding at {assumed.memory_efficiency:.0%} of the memory bandwidth; links at {assumed.link_efficiency:.0%};",
        f"  mean lengths {assumed.mean_length_share:.0%} of the limits; {assumed.hard_share:.0%} of the prompts hard "
        f"and {assumed.rescued_share:.0%} of the rollouts rescued (LENS), {assumed.discarded_share:.0%} of the sampled "
        "tokens taken back (speculative).",
        "Memory of the local layers agrees with CPU allocations (table in configs/README.md). Transformer Engine's,",
        "the engines, the assumed CUDA part and all seconds have not been measured on a GPU.",
    ]
    return lines
