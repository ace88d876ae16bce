"""Computes bytes of host memory that the training processes of one node hold beside their GPUs."""

from dataclasses import dataclass, fields

from lens_megatron.tools.planning import memory
from lens_megatron.tools.planning.hardware import Cluster
from lens_megatron.tools.planning.layout import ParallelLayout, Workload
from lens_megatron.tools.planning.model_shape import ModelShape

EXPORT_SHARD_BYTES = 2 << 30
"""Bytes of one file of the exported policy, as policy.hf_export cuts it: the files go around the ranks."""


@dataclass(frozen=True, slots=True)
class HostBytes:
    """Host memory of the node that needs most. All parts can be there at one time."""

    reference: int
    """The reference policy, in pinned memory; every pass of it copies it to the GPU."""
    offloaded: int
    """Weights and optimizer state while the engine samples, in pinned memory that is kept for the next time."""
    sent_weights: int
    """The weights that were last sent to servers, kept by each rank that drives some, for servers that start again."""
    before_updates: int
    """The state before a step of several updates, kept so that a stop in the middle can save it."""
    checkpoint: int
    """The copy from which a checkpoint is written in the background, and the exported policy."""

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in HOST_COMPONENTS)


HOST_COMPONENTS = tuple(field.name for field in fields(HostBytes))


def host_bytes(shape: ModelShape, layout: ParallelLayout, work: Workload, cluster: Cluster) -> HostBytes:
    """Host memory of one node, every rank taken to hold what the largest pipeline stage needs.

    Copies of the state hold each tensor once: weights on the first data-parallel rank alone, optimizer state on all of
    them only if it is divided among them.
    """
    states = [memory.state_bytes(shape, layout, stage) for stage in range(layout.pp)]
    weights, optimizer = max(state.weights for state in states), max(state.optimizer for state in states)
    ranks, model = cluster.gpus_per_node, shape.parameters * layout.element_bytes
    first_replicas = min(ranks, layout.tp * layout.pp)
    state_once = weights * first_replicas + optimizer * (ranks if layout.distributed_optimizer else first_replicas)
    return HostBytes(
        reference=weights * ranks * layout.reference,
        offloaded=(weights + optimizer) * ranks * layout.offload,
        sent_weights=model * min(ranks, layout.engines) if layout.engine == "vllm_server" else 0,
        before_updates=state_once if work.updates > 1 else 0,
        checkpoint=state_once + _exported(model, ranks, cluster.gpus),
    )


def _exported(model: int, ranks: int, world: int) -> int:
    """The files of the exported policy that the ranks of one node hold before they are written."""
    files = -(-model // EXPORT_SHARD_BYTES)
    return min(model, -(-files // world) * ranks * EXPORT_SHARD_BYTES)
