"""Log-probabilities from hidden states: the LM head and token_logprobs together, never the full [T, V] logits.

logits = hidden @ weight.T + bias, in float32 and never rounded: rounding them to bfloat16 costs about 0.06 nat per
token, which scrambles the ranking of interference scores while the policy is close to the reference. Rows go through in
chunks of fixed size; use the same chunk_rows for policy and reference, since a GEMM's rounding depends on its shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._checks import (
    check_chunk_rows,
    check_device,
    check_matrix,
    check_rows,
    check_temperature,
    check_tensor,
    check_token_ids,
    check_valid_vocab_size,
    require,
)
from lens_kernels._vocab_parallel import RowTotals, Shard, locate_shard, merge_statistics, reduce_hidden_gradient
from lens_kernels.logprobs import row_statistics_reference, write_dlogits_reference

WEIGHT_BLOCK_ELEMENTS = 1 << 22  # float32 elements of a half-precision weight upcast at a time: 16 MiB


class Head(NamedTuple):
    """The LM head's operands and how its rows are cut, checked."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    rows: Tensor | None  # [T] indices into N; None: all, T = N
    token_ids: Tensor  # [T]
    tau: Tensor | None  # [T]
    shard: Shard
    chunk_rows: int

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of the T rows, their hidden states as float32 [n, H])."""
        for start in range(0, len(self.token_ids), self.chunk_rows):
            part = slice(start, min(start + self.chunk_rows, len(self.token_ids)))
            hidden = self.hidden[part] if self.rows is None else self.hidden[self.rows[part]]
            # Ignored rows may hold anything, NaN too: 0 * NaN would reach the weight's gradient.
            yield part, hidden.float().masked_fill((self.token_ids[part] < 0)[:, None], 0)

    def at(self, part: slice) -> tuple[Tensor, Tensor | None]:
        return self.token_ids[part], None if self.tau is None else self.tau[part]

    def empty_logits(self) -> Tensor:
        """One buffer for all chunks, float32 [chunk_rows, V]."""
        count = min(self.chunk_rows, len(self.token_ids))
        return torch.empty(count, len(self.weight), dtype=torch.float32, device=self.weight.device)

    def scatter(self, d_hidden: Tensor, part: slice, d_chunk: Tensor) -> None:
        if self.rows is None:
            d_hidden[part] = d_chunk
        else:
            d_hidden.index_add_(0, self.rows[part], d_chunk)  # adds, because `rows` may name a row twice


def _weight_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (columns of the logits, float32 [n, H]); a float32 weight comes whole and uncopied."""
    step = len(weight) if weight.dtype == torch.float32 else max(1, WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight))), weight[start : start + step].float()


def project_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits of a chunk: hidden float32 [n, H], out float32 [n, V]."""
    for columns, block in _weight_blocks(weight):
        torch.mm(hidden, block.T, out=out[:, columns])
    if bias is not None:
        out += bias
    return out


def backproject_reference(
    d_logits: Tensor,  # [n, V] float32
    hidden: Tensor,  # [n, H] float32
    weight: Tensor,  # [V, H]
    d_weight: Tensor | None,  # [V, H] float32, added to
    d_bias: Tensor | None,  # [V] float32, added to
) -> Tensor:  # [n, H] float32, this shard's part of the hidden states' gradient
    d_hidden = torch.zeros_like(hidden)
    for columns, block in _weight_blocks(weight):
        d_hidden.addmm_(d_logits[:, columns], block)
    if d_weight is not None:
        d_weight.addmm_(d_logits.T, hidden)
    if d_bias is not None:
        d_bias += d_logits.sum(0)
    return d_hidden


def full_precision(device: torch.device) -> torch.autocast:
    """Keeps an outer autocast from turning the float32 GEMMs into half precision."""
    return torch.autocast(device.type, enabled=False)


def zeros_float32(like: Tensor | None, needed: bool) -> Tensor | None:
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device) if needed else None


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, return_entropy):
        head = head._replace(hidden=hidden, weight=weight, bias=bias)
        stats = hidden.new_empty((4 if return_entropy else 3, len(head.token_ids)), dtype=torch.float32)
        buffer = head.empty_logits()
        with full_precision(hidden.device):
            for part, chunk in head.chunks():
                logits = project_reference(chunk, weight, bias, buffer[: len(chunk)])
                stats[:, part] = row_statistics_reference(logits, *head.at(part), head.shard, return_entropy)
        totals = merge_statistics(stats, head.token_ids, head.tau, head.shard)
        ctx.save_for_backward(hidden, weight, bias, *totals)
        ctx.head = head._replace(hidden=None, weight=None, bias=None)
        ctx.set_materialize_grads(False)
        return totals.logprobs.clone(), None if totals.entropy is None else totals.entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        hidden, weight, bias, *totals = ctx.saved_tensors
        head = ctx.head._replace(hidden=hidden, weight=weight, bias=bias)
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(d_entropy)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        d_weight, d_bias = zeros_float32(weight, needs_weight), zeros_float32(bias, needs_bias)
        buffer = head.empty_logits()
        with full_precision(hidden.device):
            for part, chunk in head.chunks():
                logits = project_reference(chunk, weight, bias, buffer[: len(chunk)])
                chunk_totals = RowTotals(*(None if x is None else x[part] for x in totals))
                chunk_d_entropy = None if d_entropy is None else d_entropy[part]
                write_dlogits_reference(
                    logits, logits, *head.at(part), head.shard, chunk_totals, d_logprobs[part], chunk_d_entropy
                )
                head.scatter(d_hidden, part, backproject_reference(logits, chunk, weight, d_weight, d_bias))
        d_hidden = reduce_hidden_gradient(d_hidden, head.shard).to(hidden.dtype) if needs_hidden else None
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None, None


def check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | float,
    valid_vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    chunk_rows: int | None,
) -> Head:
    """Checks what the two linear functions share. Collective: learns the shards' sizes."""
    check_matrix("hidden", hidden, "H")
    check_matrix("weight", weight, "H")
    width = hidden.shape[-1]
    fits = weight.dim() == 2 and weight.shape[1] == width and len(weight) >= 1
    require(fits, "weight", f"shape {tuple(weight.shape)}", f"[V, {width}] to match hidden {tuple(hidden.shape)}")
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_tensor("bias", bias)
        require(bias.shape == weight.shape[:1], "bias", f"shape {tuple(bias.shape)}", f"[{len(weight)}]")
        require(bias.is_floating_point(), "bias", str(bias.dtype), "a floating-point dtype")
        check_device("bias", bias, hidden.device)
    flat = hidden.reshape(hidden.shape[:-1].numel(), width)
    check_rows(rows, len(flat), hidden.device)
    shape = hidden.shape[:-1] if rows is None else rows.shape
    ids = check_token_ids(token_ids, shape, hidden.device)
    tau = check_temperature(temperature, shape, hidden.device)
    check_valid_vocab_size(valid_vocab_size)
    check_chunk_rows(chunk_rows)
    if chunk_rows is None:
        # Each chunk passes once over the weight (and its gradient): 4096 rows hide that on an H100, 256 on a CPU.
        chunk_rows = 256 if hidden.device.type == "cpu" else 4096
    shard = locate_shard(len(weight), ids, valid_vocab_size, tp_group)
    return Head(flat, weight, bias, rows, ids, tau, shard, chunk_rows)


def linear_token_logprobs(
    hidden: Tensor,  # [..., H] float32, bfloat16 or float16; the same on all ranks of tp_group
    weight: Tensor,  # [V, H]; this rank's rows of the LM head if tp_group is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row. [T] if `rows` is given
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # [T] int64: the flattened rows of `hidden` that need a head at all
    temperature: Tensor | float = 1.0,
    return_entropy: bool = False,
    valid_vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # float32, shaped like token_ids, or (logprobs, entropy)
    """token_logprobs(hidden.float() @ weight.float().T + bias, ...) without ever holding more than a chunk of logits.

    With `rows`, only those rows are computed and token_ids, temperature and the result have one entry per index.
    The backward computes each chunk's logits again (four GEMMs in all), accumulates the weight's gradient in float32
    and sums the gradient of `hidden` over tp_group, so do not sum it a second time in the layer before.
    One collective forward for all chunks. Extra memory: chunk_rows * V * 4 bytes, and the weight's gradient.

    Raises ValueError for a wrong shape, dtype, device, temperature, vocabulary size, chunk or row index.
    """
    head = check_head(hidden, weight, token_ids, bias, rows, temperature, valid_vocab_size, tp_group, chunk_rows)
    operands = head.hidden, weight, bias
    # The tensors under autograd travel as arguments of their own; a tuple would hide them from it.
    head = head._replace(hidden=None, weight=None, bias=None)
    logprobs, entropy = _LinearTokenLogprobs.apply(*operands, head, return_entropy)
    logprobs = logprobs.view(token_ids.shape)
    return (logprobs, entropy.view(token_ids.shape)) if return_entropy else logprobs
