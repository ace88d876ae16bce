"""The mesh of ranks: sizes, coordinates and groups, read once from Megatron's parallel state."""

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from lens_megatron.config import MegatronConfig


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where this rank stands. Model-parallel group: the ranks that together hold one copy of the policy."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    model_rank: int
    """Rank within the model-parallel group."""
    model_size: int
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    model_group: ProcessGroup
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last pipeline stage at this tensor- and data-parallel coordinate."""
        return torch.distributed.get_global_rank(self.pp_group, self.pp_size - 1)


def build_mesh(layout: MegatronConfig, seed: int, device: torch.device, timeout_minutes: float = 30) -> Mesh:
    """Creates Megatron's groups for `layout` over the initialised world, and seeds its generators.

    A collective that takes longer than `timeout_minutes` fails.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        distributed_timeout_minutes=math.ceil(timeout_minutes),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    model_group = parallel_state.get_model_parallel_group()
    return Mesh(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        model_rank=torch.distributed.get_rank(model_group),
        model_size=torch.distributed.get_world_size(model_group),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_group=model_group,
        device=device,
    )


def shut_down() -> None:
    """Leaves Megatron's groups and the world, so that the process can exit, or build another mesh."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
