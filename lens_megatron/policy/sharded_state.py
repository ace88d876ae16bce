"""Turns Megatron's model and optimizer into pieces of global tensors and back, whatever the layout; and generators.

Megatron's `sharded_state_dict` says where each local parameter stands in its global tensor (layers are an axis of it,
gate and up projections of a SwiGLU are boxes of their own) and which rank holds the copy that counts. The optimizer's
tensors stand where their parameter stands; of the distributed optimizer this rank has a run of it.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from lens_megatron.policy.model import Policy
from lens_megatron.policy.shards import Piece, ShardError, ShardReader

_NOT_SHARDED = ("step",)


@dataclass(frozen=True, slots=True)
class LocalPiece:
    """A piece that this rank holds."""

    piece: Piece
    tensor: Tensor
    """1-D view of the live storage: writing to it changes the model or the optimizer."""
    is_main_replica: bool


@dataclass(frozen=True, slots=True)
class _Box:
    """A box of a parameter, cut along its first axis."""

    piece: Piece
    begin: int
    """Its first element in the flattened parameter."""
    replica: tuple[int, ...]
    """The copy's numbers along pipeline, tensor and data parallelism; all are 0 for the copy that counts."""


@dataclass(frozen=True, slots=True)
class _State:
    """The optimizer's tensors for the elements of a flattened parameter from `start` on."""

    parameter: Tensor
    start: int
    tensors: dict[str, Tensor]
    optimizer: MegatronOptimizer


def layout() -> dict[str, int]:
    """Returns the sizes that decide which rank holds what. Equal layouts hold equal pieces."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }


def local_pieces(policy: Policy) -> list[LocalPiece]:
    """Returns this rank's weights, buffers and optimizer tensors.

    Their keys begin with `model/`, `main/`, `exp_avg/` and `exp_avg_sq/`.
    """
    materialise(policy)
    model = list(_boxes(policy))
    boxes = {id(tensor): parts for tensor, parts in model}
    pieces: list[LocalPiece] = []
    for tensor, parts in model:
        pieces += _cut(parts, "model", tensor.detach().view(-1), 0)
    for state in _optimizer_states(policy):
        for kind, tensor in state.tensors.items():
            shares = tensor.untyped_storage().data_ptr() == state.parameter.untyped_storage().data_ptr()
            if kind in _NOT_SHARDED or (kind == "main" and shares):
                continue
            instance = getattr(state.optimizer, "distributed_optimizer_instance_id", None)
            pieces += _cut(boxes[id(state.parameter)], kind, tensor.detach().view(-1), state.start, instance)
    return pieces


def restore(policy: Policy, reader: ShardReader, optimizer_steps: int) -> None:
    """Fills weights and optimizer from any layout's files. Raises ShardError when they hold other tensors."""
    pieces = local_pieces(policy)
    here, there = ({key.split("/")[0] for key in keys} for keys in ((p.piece.key for p in pieces), reader.keys()))
    if len(here) > 1 and there - here:  # a rank of the distributed optimizer may hold no state at all
        raise ShardError(f"it holds {', '.join(sorted(there - here))}, which this run's optimizer does not have")
    with torch.no_grad():
        for local in pieces:
            local.tensor.copy_(reader.read(local.piece))
        for state in _optimizer_states(policy):
            if "step" in state.tensors:
                state.tensors["step"].fill_(optimizer_steps)
            if isinstance(state.optimizer, DistributedOptimizer):
                # The tensors may be unscaled copies of what a precision-aware optimizer keeps.
                tensors = {("param" if kind == "main" else kind): t for kind, t in state.tensors.items()}
                state.optimizer._set_main_param_and_optimizer_states(state.parameter, tensors)
    for optimizer in optimizers(policy):
        for group in optimizer.optimizer.param_groups:
            if "step" in group:
                group["step"] = optimizer_steps
        if hasattr(optimizer.optimizer, "_sync_hdo_state_to_sub_optimizers"):
            optimizer.optimizer._sync_hdo_state_to_sub_optimizers()


def optimizer_steps(policy: Policy) -> int:
    """Returns Adam's step count. Raises ShardError should parameters disagree: one number is stored for all."""
    counts = {int(s.tensors["step"]) for s in _optimizer_states(policy) if "step" in s.tensors}
    counts |= {int(g["step"]) for o in optimizers(policy) for g in o.optimizer.param_groups if "step" in g}
    if len(counts) > 1:
        raise ShardError(f"parameters have taken different numbers of optimizer steps: {sorted(counts)}")
    return counts.pop() if counts else policy.version


def materialise(policy: Policy) -> None:
    """Makes Adam's state, which Adam makes at its first step: saving and loading need it before."""
    for optimizer in optimizers(policy):
        if optimizer.init_state_fn is None:
            raise ShardError("megatron.optimizer.optimizer: only adam can be saved; unset it")
        fresh = [p for g in optimizer.optimizer.param_groups for p in g["params"] if not optimizer.optimizer.state[p]]
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
        if isinstance(optimizer.optimizer, torch.optim.Adam):
            for parameter in fresh:
                optimizer.optimizer.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)


def generator_states(policy: Policy) -> dict[str, Tensor]:
    """Returns the states of this process's generators as tensors: torch, the device's, Megatron's trackers, Python,
    numpy."""
    _, python, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    states = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": torch.tensor(python),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng/numpy": torch.tensor([*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]]),
        "rng/numpy_gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
    }
    states |= {f"rng/megatron.{name}": state.cpu() for name, state in get_cuda_rng_tracker().get_states().items()}
    if policy.mesh.device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state()
    return {name: state.clone() for name, state in states.items()}


def restore_generators(states: dict[str, Tensor]) -> None:
    """Puts every generator of this process into the state that `generator_states` returned."""
    gauss = states["rng/python_gauss"].tolist()
    random.setstate((3, tuple(states["rng/python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["rng/numpy"].tolist()
    cached = states["rng/numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    prefix = "rng/megatron."
    trackers = {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}
    get_cuda_rng_tracker().set_states(trackers)
    if "rng/cuda" in states:
        torch.cuda.set_rng_state(states["rng/cuda"])
    torch.set_rng_state(states["rng/torch"])


def _boxes(policy: Policy) -> Iterator[tuple[Tensor, list[_Box]]]:
    """Yields each parameter or buffer with its boxes.

    Sharded objects are left out: they are Transformer Engine's FP8 scales, pickled, and nothing here trains in FP8.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    for model in policy.models():
        for entry in nested_values(model.sharded_state_dict(metadata=metadata)):
            if isinstance(entry, ShardedTensor | ShardedTensorFactory):
                parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
                yield entry.data, [_box(part, entry.data) for part in parts]


def _box(part: ShardedTensor, whole: Tensor) -> _Box:
    if not (part.data.is_contiguous() and whole.is_contiguous()):
        raise ShardError(f"{part.key} is not laid out in one run, so it cannot be saved; unset moe_grouped_gemm")
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    piece = Piece(
        part.key,
        tuple(part.global_shape),
        tuple(part.global_offset),
        shape,
        0,
        part.data.numel(),
        part.allow_shape_mismatch,
    )
    return _Box(piece, part.data.storage_offset() - whole.storage_offset(), part.replica_id)


def _cut(boxes: list[_Box], kind: str, flat: Tensor, start: int, instance: int | None = None) -> Iterator[LocalPiece]:
    """Cuts `flat`, which holds the elements from `start` on of a parameter that consists of `boxes`, into pieces.

    `instance`: the copy of the distributed optimizer, whose runs are not copied among its data-parallel ranks.
    """
    for box in boxes:
        low, high = max(start, box.begin), min(start + len(flat), box.begin + box.piece.stop)
        replica = box.replica if instance is None else (*box.replica[:2], instance)
        if low < high:
            key = f"{kind}/{box.piece.key}"
            piece = replace(box.piece, key=key, start=low - box.begin, stop=high - box.begin)
            yield LocalPiece(piece, flat[low - start : high - start], is_main_replica(replica))


def optimizers(policy: Policy) -> list[MegatronOptimizer]:
    chained = policy.optimizer.chained_optimizers if isinstance(policy.optimizer, ChainedOptimizer) else None
    return [o for o in chained or [policy.optimizer] if o.optimizer is not None]


def _optimizer_states(policy: Policy) -> Iterator[_State]:
    for optimizer in optimizers(policy):
        if isinstance(optimizer, DistributedOptimizer):
            for parameter in optimizer.model_param_group_index_map:
                run = optimizer._get_model_param_range_map(parameter)["param"]
                tensors = dict(optimizer._get_main_param_and_optimizer_states(parameter))
                tensors["main"] = tensors.pop("param")
                yield _State(parameter, run.start, tensors, optimizer)
            continue
        mains = {id(p.main_param): p for m in policy.models() for p in m.parameters() if hasattr(p, "main_param")}
        for group in optimizer.optimizer.param_groups:
            for main in group["params"]:
                tensors = {"main": main, **optimizer.optimizer.state[main]}
                yield _State(mains.get(id(main), main), 0, tensors, optimizer)
