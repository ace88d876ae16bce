"""Plans which rank holds what of every exported tensor; a pipeline's stages agree on it once, when a policy is built.

Only names, shapes and types are exchanged. From then on every rank knows what comes next, from whom, and how large it
is, so that `policy.export` need not ask.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

import torch
from mbridge.core.bridge import Bridge
from megatron.core import parallel_state
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from lens_megatron.policy.hf_weights import GroupedNames
from lens_megatron.policy.parallel import Mesh
from lens_megatron.records import between_ranks

_EXPERTS = ".mlp.experts."


class Cut(StrEnum):
    """Says among which ranks of a pipeline stage a tensor is divided."""

    WHOLE = "whole"
    TENSOR = "tensor"
    """Every tensor-parallel rank has a shard."""
    EXPERTS = "experts"
    """Experts are divided over expert-parallel ranks, and each expert over expert-tensor-parallel ranks."""


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Says what a rank of the owning stage holds of a tensor, or, with `Cut.EXPERTS`, of one per expert-parallel
    rank."""

    stage: int
    name: str
    """Megatron's name with the layer's number in the whole model; an expert's number is that on its own rank."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut
    dim: int
    """The dimension along which the ranks' shards join."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Description:
    """Describes what the other stages must know of one parameter of a stage; the fields are those of `TensorShard`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """torch's name of the type, such as "bfloat16"."""
    cut: Cut
    dim: int


@dataclass(frozen=True, slots=True)
class Gathering:
    """The ranks of a stage among which a tensor is divided."""

    group: ProcessGroup | None
    """The group of these ranks; None where there is one such rank."""
    rank: int
    experts: tuple[int, ...]
    """The expert-parallel rank of each rank of the group; all are 0 where no experts are divided."""

    @property
    def size(self) -> int:
        return len(self.experts)


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """Holds what every rank that shares a copy of the model knows; `shards` is the same on all of them."""

    mesh: Mesh
    bridge: Bridge
    shards: tuple[TensorShard, ...]
    own: Mapping[str, Parameter]
    """The parameters of this rank's stage, by the names of `shards`."""
    gatherings: Mapping[Cut, Gathering]
    local_experts: int
    """Number of experts of one expert-parallel rank."""


@dataclass(frozen=True, slots=True)
class ExportBucket:
    """Shards of one stage, type and cut, to be laid end to end."""

    shards: tuple[TensorShard, ...]
    dtype: torch.dtype
    """The type in which they travel."""

    @property
    def stage(self) -> int:
        return self.shards[0].stage

    @property
    def cut(self) -> Cut:
        return self.shards[0].cut

    @property
    def elements(self) -> int:
        return sum(shard.elements for shard in self.shards)


def plan_export(bridge: Bridge, models: Sequence[torch.nn.Module], mesh: Mesh) -> ExportPlan:
    """Agrees on the plan. A collective over the ranks that share a copy of the model."""
    own: dict[str, Parameter] = {}
    described: list[_Description] = []
    for model in map(GroupedNames, models):
        names = bridge._weight_name_mapping_mcore_local_to_global(model, consider_ep=False)
        for local, parameter in model.named_parameters():
            if local == "output_layer.weight" and bridge.hf_config.tie_word_embeddings:
                continue  # the last stage's copy of the embedding, which the first stage sends
            own[names[local]] = parameter
            described.append(_describe(names[local], parameter))
    shards = tuple(
        TensorShard(stage, found.name, found.shape, getattr(torch, found.dtype), found.cut, found.dim)
        for stage, of_stage in enumerate(between_ranks.all_gather(_Description, described, mesh.pp_group))
        for found in of_stage
    )
    if len({shard.name for shard in shards}) < len(shards):
        raise RuntimeError("two pipeline stages hold a parameter of the same name, and only one may send it")
    alone, tensor_parallel = Gathering(None, 0, (0,)), Gathering(mesh.tp_group, mesh.tp_rank, (0,) * mesh.tp_size)
    gatherings = {Cut.WHOLE: alone, Cut.TENSOR: tensor_parallel if mesh.tp_size > 1 else alone}
    local_experts = 0
    if experts := bridge.config.num_moe_experts:
        gatherings[Cut.EXPERTS] = _expert_gathering(mesh.device)
        local_experts = experts // bridge.mpu.ep_size
    return ExportPlan(mesh, bridge, shards, own, gatherings, local_experts)


def cut_into_buckets(plan: ExportPlan, dtype: torch.dtype | None, bucket_bytes: int) -> list[ExportBucket]:
    """Cuts buckets of at most `bucket_bytes` once gathered, a larger tensor alone; stages take turns, so that all send.

    Args:
        dtype: the type in which the tensors travel. None: the parameters' own.
    """
    stages: list[list[ExportBucket]] = []
    for stage in range(plan.mesh.pp_size):
        done: list[ExportBucket] = []
        filling: dict[tuple[Cut, torch.dtype], ExportBucket] = {}
        for shard in (shard for shard in plan.shards if shard.stage == stage):
            kind = (shard.cut, dtype or shard.dtype)
            limit = bucket_bytes // (kind[1].itemsize * plan.gatherings[shard.cut].size)
            bucket = filling.get(kind)
            if bucket and bucket.elements + shard.elements <= limit:
                filling[kind] = ExportBucket((*bucket.shards, shard), kind[1])
                continue
            done += [bucket] if bucket else []
            filling[kind] = ExportBucket((shard,), kind[1])
        stages.append(done + list(filling.values()))
    return [bucket for turn in zip_longest(*stages) for bucket in turn if bucket]


def _describe(name: str, parameter: Parameter) -> _Description:
    if _EXPERTS in name:
        cut = Cut.EXPERTS
    else:
        cut = Cut.TENSOR if getattr(parameter, "tensor_model_parallel", False) else Cut.WHOLE
    dtype = str(parameter.dtype).removeprefix("torch.")
    return _Description(name, tuple(parameter.shape), dtype, cut, getattr(parameter, "partition_dim", 0))


def _expert_gathering(device: torch.device) -> Gathering:
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    number = torch.tensor([parallel_state.get_expert_model_parallel_rank()], device=device)
    numbers = number.new_empty(group.size())
    torch.distributed.all_gather_into_tensor(numbers, number, group=group)
    return Gathering(group if len(numbers) > 1 else None, group.rank(), tuple(numbers.tolist()))
