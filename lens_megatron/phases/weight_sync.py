"""Sends the policy's weights to the engine, as one stream of (Hugging Face name, tensor) that the engine checks.

Every tenth version a checksum of each tensor is compared among all ranks: replicas of the model must be equal.
"""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lens_megatron.errors import UserError
from lens_megatron.results import SyncStats
from lens_megatron.rollout.engine import RolloutEngine

CHECKSUM_EVERY = 10
"""Number of versions from one comparison of checksums to the next: on a CPU they cost a large part of a transfer, see
benchmarks/TRAINER_NOTES.md."""


class WeightSyncError(UserError):
    """The engine does not hold the trainer's weights, or ranks hold different ones; the message gives the evidence."""


def push(
    weights: Iterable[tuple[str, Tensor]], engine: RolloutEngine, version: int, received_bytes: int = 0
) -> SyncStats:
    """Loads `weights`, of which other ranks send `received_bytes`, into `engine`. A collective over the world.

    Raises WeightManifestError unless every name comes exactly once; WeightSyncError if ranks gave different weights.
    """
    size, sums = 0, {}
    alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
    checked = version % CHECKSUM_EVERY == 0 and not alone
    names: list[str] = []

    def counted() -> Iterator[tuple[str, Tensor]]:
        nonlocal size
        for name, tensor in weights:
            names.append(name)
            size += tensor.numel() * tensor.element_size()
            if checked:
                sums[name] = checksum(tensor)
            yield name, tensor

    start = time.perf_counter()
    engine.load_weights(counted(), version)
    if checked:
        compare_replicas(list(sums), torch.stack(list(sums.values())), version)
    return SyncStats(len(names), size, time.perf_counter() - start, received_bytes)


def checksum(tensor: Tensor) -> Tensor:
    """Returns [] int64: the sum of the tensor's bits, in words of eight bytes, modulo 2^64."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    missing = -len(data) % 8
    if missing or data.storage_offset() % 8:
        data = pad(data, (0, missing))
    return data.view(torch.int64).sum()


def compare_replicas(names: Sequence[str], sums: Tensor, version: int) -> None:
    """Raises WeightSyncError, on every rank, unless all ranks have the same [tensors] checksums. A collective."""
    extremes = torch.stack([sums, ~sums])  # ~x falls as x rises, and unlike -x always fits
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
    different = (extremes[0] != ~extremes[1]).nonzero()[:, 0].tolist()
    if not different:
        return
    one = sums[different[0]].view(1)
    found = one.new_empty(torch.distributed.get_world_size())
    torch.distributed.all_gather_into_tensor(found, one)
    usual = found.mode().values
    ranks = {same: ((found == usual) == same).nonzero()[:, 0].tolist() for same in (True, False)}
    raise WeightSyncError(
        f"weights of version {version}: ranks do not train the same model. {len(different)} of {len(names)} tensors "
        f"differ, the first {names[different[0]]}: rank(s) {ranks[False]} have other bits than rank(s) {ranks[True]}. "
        f"Check that model.path is the same on all nodes, and the memory of the GPUs; the same command goes on from "
        f"the last checkpoint, where there is one copy"
    )
