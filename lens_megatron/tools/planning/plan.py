"""Makes a `Plan` of a configuration: everything that can be said before a GPU is taken."""

from dataclasses import dataclass

from lens_megatron.config import Config
from lens_megatron.errors import UserError
from lens_megatron.tools.planning import checks, memory
from lens_megatron.tools.planning.activations import FLOAT32
from lens_megatron.tools.planning.hardware import Cluster, cluster_of
from lens_megatron.tools.planning.host_memory import HostBytes, host_bytes
from lens_megatron.tools.planning.layout import LayerSpec, ParallelLayout, Workload, layout_of, workload_of
from lens_megatron.tools.planning.memory import PhaseBytes
from lens_megatron.tools.planning.model_shape import ModelShape, read_shape
from lens_megatron.tools.planning.step_time import Assumptions, PhaseTime, WeightSync, step_times, weight_sync


class LayoutError(UserError):
    """This configuration cannot run on its cluster; the message says why, one reason per line."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Says what a configuration will take on its cluster."""

    shape: ModelShape
    layout: ParallelLayout
    work: Workload
    cluster: Cluster
    assumed: Assumptions
    phases: tuple[PhaseBytes, ...]
    times: tuple[PhaseTime, ...]
    sync: WeightSync
    running: int
    """Sequences of full length that one engine decodes at once."""
    host: HostBytes
    """Host memory of one node."""
    checkpoint_bytes: int
    steps: int
    keep: int
    """Checkpoints kept."""
    mistakes: tuple[str, ...]
    """The reasons why it does not fit; empty if it does."""


def make_plan(
    config: Config, spec: LayerSpec = LayerSpec.TRANSFORMER_ENGINE, assumed: Assumptions | None = None
) -> Plan:
    """Plans `config` on `config.cluster`.

    Raises:
        ConfigError: the model's shape is not known. LayoutError: the model or batch cannot be cut as asked.
    """
    assumed = assumed or Assumptions()
    shape, cluster = read_shape(config.model.path), cluster_of(config.cluster)
    if mistakes := checks.layout_mistakes(config, shape, cluster):
        raise LayoutError("\n".join(mistakes))
    layout, work = layout_of(config, cluster.gpus, spec), workload_of(config)
    phases = memory.phases(shape, layout, work, cluster)
    running = checks.running_sequences(shape, layout, work, cluster)
    host = host_bytes(shape, layout, work, cluster)
    return Plan(
        shape=shape,
        layout=layout,
        work=work,
        cluster=cluster,
        assumed=assumed,
        phases=tuple(phases),
        times=tuple(step_times(shape, layout, work, cluster, assumed, running)),
        sync=weight_sync(shape, layout, cluster, assumed),
        running=running,
        host=host,
        checkpoint_bytes=checkpoint_bytes(shape, layout),
        steps=config.train.steps,
        keep=config.train.save_total_limit + config.train.save_best_limit,
        mistakes=tuple(checks.memory_mistakes(phases, host, shape, layout, work, cluster)),
    )


def checkpoint_bytes(shape: ModelShape, layout: ParallelLayout) -> int:
    """Bytes of one checkpoint as `policy.checkpoint` writes it, each tensor once.

    It holds the weights, Adam's moments, in bfloat16 the float32 copy of the weights, and the Hugging Face directory.
    """
    parameters = layout.tp * sum(shape.stage_parameters(layout.tp, layout.pp, stage) for stage in range(layout.pp))
    state = 2 * FLOAT32 + (FLOAT32 if layout.element_bytes < FLOAT32 else 0)
    return parameters * (layout.element_bytes + state) + shape.parameters * layout.element_bytes
