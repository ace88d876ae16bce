"""Vocabulary shards: where a shard starts, and the one packed collective that merges the ranks' row statistics.

A shard's row statistics are float32 [K, T], K = 3 or 4, for raw logits z, temperature tau and x = (z - max z) / tau:
    0  max z    1  sum exp(x)    2  z of the target token, -inf if another shard holds it    3  sum exp(x) * x
Shifting by the maximum before dividing keeps logits of 1e4 as exact as logits of 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels._checks import checks_ids, require

LOWEST = torch.finfo(torch.float32).min


class Shard(NamedTuple):
    """This rank's columns of the vocabulary. Tensors are 0-d and stay on the device: no host synchronisation."""

    group: dist.ProcessGroup | None
    start: int | Tensor  # global id of local column 0
    valid: int | Tensor | None  # local columns from here on are padding; None: none is


class RowTotals(NamedTuple):
    """Statistics of whole rows, float32 [T], equal to the bit on every rank."""

    maximum: Tensor  # of the raw logits; 0 where every logit is -inf
    log_sum: Tensor  # log sum exp((z - maximum) / tau)
    logprobs: Tensor  # 0 on ignored rows
    entropy: Tensor | None  # 0 on ignored rows


def locate_shard(
    columns: int, token_ids: Tensor, valid_vocab_size: int | None, group: dist.ProcessGroup | None
) -> Shard:
    """Learns this rank's offset from all shards' sizes (they may differ): one gather of 8 bytes per rank.

    The sizes are not cached: a cache that hits on one rank and misses on another would deadlock.
    """
    start, vocabulary = 0, columns
    if group is not None and dist.get_world_size(group) > 1:
        size = torch.tensor([columns], dtype=torch.int64, device=token_ids.device)
        sizes = _all_gather(size, group).view(-1)
        start, vocabulary = sizes[: dist.get_rank(group)].sum(), sizes.sum()
    else:
        group = None
        fits = valid_vocab_size is None or valid_vocab_size <= columns
        require(fits, "valid_vocab_size", valid_vocab_size, f"at most the {columns} columns there are")
    if valid_vocab_size is not None:
        vocabulary = valid_vocab_size
    if checks_ids() and token_ids.numel():
        largest = int(token_ids.max())
        require(largest < int(vocabulary), "token_ids", f"id {largest}", f"ids below {int(vocabulary)}")
    return Shard(group, start, None if valid_vocab_size is None else valid_vocab_size - start)


def padding_mask(columns: int, shard: Shard, device: torch.device) -> Tensor | None:
    """bool [V], True on padding columns; None if there is none."""
    return None if shard.valid is None else torch.arange(columns, device=device) >= shard.valid


def local_targets(token_ids: Tensor, columns: int, shard: Shard) -> tuple[Tensor, Tensor]:
    """(column of each target, clamped into the shard; whether this shard holds it), both [T]."""
    local = token_ids - shard.start
    owned = (token_ids >= 0) & (local >= 0) & (local < columns)
    if shard.valid is not None:
        owned &= local < shard.valid
    return local.clamp(0, columns - 1), owned


def merge_statistics(
    stats: Tensor,  # [K, T] float32
    token_ids: Tensor,  # [T]
    tau: Tensor | None,  # [T]
    shard: Shard,
) -> RowTotals:
    """Merges the shards' statistics in rank order, with one all-gather of 4 * K bytes per row and rank."""
    parts = _all_gather(stats, shard.group)
    top, sums, targets = parts[:, 0], parts[:, 1], parts[:, 2]
    maximum = top.amax(0)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0)
    offset, target = top - maximum, targets.amax(0) - maximum
    if tau is not None:
        offset, target = offset / tau, target / tau
    scale = offset.exp()
    total = (scale * sums).sum(0)
    log_sum = total.log()
    ignored = token_ids < 0
    entropy = None
    if len(stats) == 4:
        # A shard without a finite logit has offset -inf and sum 0: LOWEST keeps the product 0 instead of NaN.
        moment = (scale * (parts[:, 3] + offset.clamp(min=LOWEST) * sums)).sum(0)
        entropy = (log_sum - moment / total).masked_fill(ignored, 0)
    return RowTotals(maximum, log_sum, (target - log_sum).masked_fill(ignored, 0), entropy)


def reduce_hidden_gradient(d_hidden: Tensor, shard: Shard) -> Tensor:
    """Sums the shards' parts of a replicated tensor's gradient, in place."""
    if shard.group is not None:
        dist.all_reduce(d_hidden, group=shard.group)
    return d_hidden


def _all_gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[...] -> [ranks, ...] in rank order."""
    if group is None or part.numel() == 0:
        return part.unsqueeze(0)
    gathered = part.new_empty((dist.get_world_size(group) * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
    return gathered.view(-1, *part.shape)
