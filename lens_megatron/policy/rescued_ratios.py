"""Gathers how the ratios of rescued responses stand under the original prompt, response by response, over all ranks.

Under context parallelism a response lies on several ranks, so its least ratio and its product are reduced over these,
and then all ranks get the values of all responses: a median, unlike a mean, is not made of sums.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from lens_kernels.kl import LOG_RATIO_LIMIT
from torch import Tensor

from lens_megatron.policy.parallel import Mesh
from lens_megatron.types import MicroBatch


class ResponseRatios(NamedTuple):
    """Log-ratios of the B responses of a micro-batch, of the tokens that this rank computes, in nats."""

    least: Tensor
    """[B] float64; infinity for a response without a token here."""
    total: Tensor
    """[B] float64, the sums over tokens."""
    rescued: Tensor
    """[B] bool"""


def response_ratios(log_ratio: Tensor, batch: MicroBatch) -> ResponseRatios:
    """Reduces the log-ratios [t] of this rank's tokens over each response of the micro-batch, native ones too."""
    lengths, terms, own = batch.sequences.lengths, batch.terms, batch.own_terms.first
    count, log_ratio = len(terms.first), log_ratio.double()
    starts = [start for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False) if length]
    first = torch.tensor(starts, dtype=torch.int64, device=log_ratio.device)
    infinite, zero = log_ratio.new_full((count,), math.inf), log_ratio.new_zeros(count)
    least = infinite.scatter_reduce(0, own, log_ratio, "amin")
    return ResponseRatios(least[first], zero.index_add(0, own, log_ratio)[first], terms.rescued[first])


def gather_rescued(
    mesh: Mesh, parts: Sequence[ResponseRatios], count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the least ratio and the product of ratios of every rescued response, each ascending. A collective.

    Ratios are within exp(+-LOG_RATIO_LIMIT). The order is that of the values, so that no layout changes it.

    Args:
        parts: those of this rank's micro-batches on the last pipeline stage; nothing is read elsewhere.
        count: the number of rescued responses of all data-parallel ranks.
    """
    if not count:
        return (), ()
    every = torch.zeros(2, count, dtype=torch.float64, device=mesh.device)
    if mesh.is_last_stage:
        chosen = torch.cat([part.rescued for part in parts])
        least, total = (torch.cat([part[row] for part in parts])[chosen] for row in (0, 1))
        counts = torch.zeros(mesh.dp_size, dtype=torch.int64, device=mesh.device)
        counts[mesh.dp_rank] = len(least)
        torch.distributed.all_reduce(counts, group=mesh.dp_group)
        own = slice(int(counts[: mesh.dp_rank].sum()), int(counts[: mesh.dp_rank + 1].sum()))
        every[0], every[0, own], every[1, own] = math.inf, least, total
        torch.distributed.all_reduce(every[0], op=torch.distributed.ReduceOp.MIN, group=mesh.dp_cp_group)
        torch.distributed.all_reduce(every[1], group=mesh.dp_cp_group)
    if mesh.pp_size > 1:
        torch.distributed.broadcast(every, src=mesh.last_stage_rank, group=mesh.pp_group)
    ratios = every.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().sort(dim=1).values.cpu()
    return tuple(ratios[0].tolist()), tuple(ratios[1].tolist())
