"""Merges the row statistics of a vocabulary's shards in one packed collective.

A shard's row statistics are float32 [D, K, T]: D pieces the shard was cut into (1, or more where there are too few rows
to fill an accelerator), K = 3 or 4. With logits z (after a soft cap), temperature tau and x = (z - max z) / tau, each
piece has:
    0  max z    1  sum exp(x)    2  z of the target token, -inf if another piece holds it    3  sum exp(x) * x
Shifting by the maximum before dividing keeps logits of 1e4 as exact as logits of 1.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels._backend import jit, launch, tl, uses_triton
from lens_kernels._checks import checks_ids, require
from lens_kernels._kernel_parts import exp_accurate
from lens_kernels.shard import VocabShard

LOWEST = torch.finfo(torch.float32).min
MERGE_ROWS = 128  # rows per program of the kernels that merge
ENTROPY_MISSING = "entropy: got statistics without it, need row_statistics(..., with_entropy=True)"


class TokenRows(NamedTuple):
    """What is asked of T rows of logits: a token of each, and how logits become log-probabilities."""

    token_ids: Tensor  # [T] int64, global ids; negative: the row is ignored
    tau: Tensor | None  # [T] float32 temperatures; None: 1
    softcap: float | None  # logits become softcap * tanh(logits / softcap) before all else; None: they stay
    shard: VocabShard

    def at(self, part: slice) -> TokenRows:
        """Returns some of the rows."""
        return self._replace(token_ids=self.token_ids[part], tau=None if self.tau is None else self.tau[part])


class SoftmaxTotals(NamedTuple):
    """The values of whole rows' softmax that the gradient needs, float32 [T], equal to the bit on every rank."""

    maximum: Tensor  # of the logits, after a soft cap; some finite number where every logit is -inf
    log_sum: Tensor  # log sum exp((z - maximum) / tau)
    entropy: Tensor | None  # 0 on ignored rows; None if it was not asked for

    def at(self, rows: slice) -> SoftmaxTotals:
        return SoftmaxTotals(
            self.maximum[rows], self.log_sum[rows], None if self.entropy is None else self.entropy[rows]
        )

    def asked_entropy(self) -> Tensor:
        """Returns the entropy [T]; the statistics must have been made with it."""
        if self.entropy is None:
            raise RuntimeError(ENTROPY_MISSING)
        return self.entropy


class RowTotals(NamedTuple):
    """Statistics of whole rows, equal to the bit on every rank.

    Log-probabilities and entropy are for the caller, who may edit them: no other tensor shares their memory.
    """

    softmax: SoftmaxTotals  # what backward saves
    logprobs: Tensor  # [T] float32, 0 on ignored rows
    entropy: Tensor | None  # equal to softmax.entropy

    def asked_entropy(self) -> Tensor:
        """Returns the caller's entropy [T]; the statistics must have been made with it."""
        if self.entropy is None:
            raise RuntimeError(ENTROPY_MISSING)
        return self.entropy


def resolve_shard(
    columns: int, token_ids: Tensor, valid_vocab_size: int | None, shard: VocabShard | None
) -> VocabShard:
    """Returns the caller's shard, or one of all columns. Raises ValueError unless it fits the columns there are."""
    if shard is None:
        total = columns if valid_vocab_size is None else valid_vocab_size
        require(total <= columns, "valid_vocab_size", total, f"at most the {columns} columns there are")
        shard = VocabShard(0, columns, total)
    else:
        need = "None beside a shard, whose `total` says where padding begins"
        require(valid_vocab_size is None, "valid_vocab_size", valid_vocab_size, need)
        require(shard.size == columns, "shard", f"a shard of {shard.size} columns", f"one of the {columns} there are")
    if checks_ids() and token_ids.numel():
        largest = int(token_ids.max())
        require(largest < shard.total, "token_ids", f"id {largest}", f"ids below {shard.total}")
    return shard


def local_targets(token_ids: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Returns (column of each target, clamped to those before the padding; whether this shard holds it), both [T]."""
    local = token_ids - shard.start
    owned = (token_ids >= 0) & (local >= 0) & (local < shard.valid)
    return local.clamp(0, shard.valid - 1), owned


def merge_statistics(
    stats: Tensor,  # [D, K, T] float32
    rows: TokenRows,
) -> RowTotals:
    """Merges all pieces of all shards in rank order, with one all-gather of 4 * D * K bytes per row and rank."""
    parts = gather_statistics(stats, rows.shard)
    merge = merge_triton if uses_triton(stats.device) else merge_reference
    return merge(parts, rows.token_ids, rows.tau)


def gather_statistics(stats: Tensor, shard: VocabShard) -> Tensor:
    """Gathers [D, K, T] of every rank into [ranks * D, K, T] in rank order."""
    return _all_gather(stats, shard.group).flatten(0, 1)


def merge_reference(
    parts: Tensor,  # [pieces, K, T]
    token_ids: Tensor,  # [T]
    tau: Tensor | None,  # [T]
) -> RowTotals:
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
    logprobs = (target - log_sum).masked_fill(ignored, 0)
    if parts.shape[1] == 3:
        return RowTotals(SoftmaxTotals(maximum, log_sum, None), logprobs, None)
    # A piece without a finite logit has offset -inf and sum 0: LOWEST makes the product 0 instead of NaN.
    moment = (scale * (parts[:, 3] + offset.clamp(min=LOWEST) * sums)).sum(0)
    entropy = (log_sum - moment / total).masked_fill(ignored, 0)
    return RowTotals(SoftmaxTotals(maximum, log_sum, entropy), logprobs, entropy.clone())


@jit
@no_type_check
def merge_rows(
    parts_ptr,  # [pieces, K, T]
    row,  # [BLOCK]
    inside,  # [BLOCK]
    inverse_tau,
    rows,
    pieces,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Returns (maximum, log_sum, logprobs, entropy) of the rows, each [BLOCK]; the entropy is void unless K == 4."""
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    target = tl.full((BLOCK,), -float("inf"), tl.float32)
    part = parts_ptr + row
    for _ in range(pieces):
        top = tl.maximum(top, tl.load(part, mask=inside, other=0.0))
        target = tl.maximum(target, tl.load(part + 2 * rows, mask=inside, other=0.0))
        part += K * rows
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    part = parts_ptr + row
    for _ in range(pieces):
        # A piece without a finite logit has maximum -inf and sum 0: the bound makes their product 0 instead of NaN.
        offset = tl.maximum((tl.load(part, mask=inside, other=0.0) - top) * inverse_tau, -1e30)
        sums = tl.load(part + rows, mask=inside, other=1.0)
        scale = tl.exp2(offset * 1.4426950408889634)
        total += scale * sums
        if K == 4:
            moment += scale * (tl.load(part + 3 * rows, mask=inside, other=0.0) + offset * sums)
        part += K * rows
    log_sum = tl.log2(total) * 0.6931471805599453
    log_sum += total * exp_accurate(-log_sum) - 1.0  # one Newton step: the hardware's log2 is accurate to 2**-22 only
    return top, log_sum, (target - top) * inverse_tau - log_sum, log_sum - moment / total


@jit
@no_type_check
def _merge_kernel(
    # inputs
    parts_ptr,  # [pieces, K, T]
    ids_ptr,  # [T]
    tau_ptr,  # [T] or None
    # outputs, [T]
    maximum_ptr,
    log_sum_ptr,
    saved_entropy_ptr,  # or None
    logprobs_ptr,
    entropy_ptr,  # or None
    # shapes
    rows,
    pieces,
    # tunables
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    ignored = tl.load(ids_ptr + row, mask=inside, other=-1) < 0
    inverse_tau = 1.0
    if tau_ptr is not None:
        inverse_tau = 1.0 / tl.load(tau_ptr + row, mask=inside, other=1.0)
    maximum, log_sum, logprobs, entropy = merge_rows(parts_ptr, row, inside, inverse_tau, rows, pieces, K, BLOCK)
    tl.store(maximum_ptr + row, tl.where(ignored, 0.0, maximum), mask=inside)
    tl.store(log_sum_ptr + row, tl.where(ignored, 0.0, log_sum), mask=inside)
    tl.store(logprobs_ptr + row, tl.where(ignored, 0.0, logprobs), mask=inside)
    if K == 4:
        entropy = tl.where(ignored, 0.0, entropy)
        tl.store(saved_entropy_ptr + row, entropy, mask=inside)
        tl.store(entropy_ptr + row, entropy, mask=inside)


def empty_totals(rows: int, with_entropy: bool, device: torch.device) -> RowTotals:
    """Allocates the results of a merge kernel."""
    maximum, log_sum, logprobs = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    saved, entropy = (torch.empty_like(logprobs) if with_entropy else None for _ in range(2))
    return RowTotals(SoftmaxTotals(maximum, log_sum, saved), logprobs, entropy)


def merge_triton(parts: Tensor, token_ids: Tensor, tau: Tensor | None) -> RowTotals:
    pieces, kinds, rows = parts.shape
    totals = empty_totals(rows, kinds == 4, parts.device)
    launch(
        *(_merge_kernel, -(-rows // MERGE_ROWS), parts.device),
        *(parts, token_ids, tau, *totals.softmax, totals.logprobs, totals.entropy),
        *(rows, pieces, kinds, MERGE_ROWS),
    )
    return totals


def reduce_hidden_gradient(d_hidden: Tensor, shard: VocabShard) -> Tensor:
    """Sums the shards' parts of a replicated tensor's gradient in place."""
    if shard.group is not None:
        dist.all_reduce(d_hidden, group=shard.group)
    return d_hidden


def gather_rows(hidden: Tensor, shard: VocabShard) -> Tensor:
    """Gathers [S / ranks, ..., H] of every rank into [S, ..., H]."""
    return _all_gather(hidden, shard.group).flatten(0, 1)


def scatter_hidden_gradient(d_hidden: Tensor, shard: VocabShard) -> Tensor:
    """Sums the shards' parts [N, H] and returns this rank's [N / ranks, H]."""
    part = d_hidden.new_empty(len(d_hidden) // dist.get_world_size(shard.group), d_hidden.shape[1])
    dist.reduce_scatter_tensor(part, d_hidden, group=shard.group)
    return part


def _all_gather(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gathers [...] of every rank into [ranks, ...] in rank order."""
    if group is None or dist.get_world_size(group) == 1 or part.numel() == 0:
        return part.unsqueeze(0)
    gathered = part.new_empty((dist.get_world_size(group) * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(gathered, part.contiguous(), group=group)
    return gathered.view(-1, *part.shape)
