"""Computes log-probabilities from hidden states: LM head and token_logprobs together, without the full [T, V] logits.

logits = hidden @ weight.T + bias, in float32 and never rounded: rounding them to bfloat16 adds an error of about 0.06
nat per token, which changes the ranking of interference scores while the policy is close to the reference. Rows are
computed in chunks of fixed size; use the same chunk_rows for policy and reference, since a GEMM's rounding depends on
its shape.

Operands of bfloat16 on a GPU are multiplied as they are by cuBLAS, with float32 sums and results; the gradient of the
logits is then rounded to bfloat16, as every half-precision backward does, in place of the logits. All other operands
(float32, float16, whose range the unscaled gradients would exceed, and those on the CPU) are multiplied in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lens_kernels._backend import uses_triton
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
from lens_kernels._dlogits import write_dlogits
from lens_kernels._statistics import row_statistics
from lens_kernels._vocab_parallel import (
    SoftmaxTotals,
    TokenRows,
    gather_rows,
    merge_statistics,
    reduce_hidden_gradient,
    resolve_shard,
    scatter_hidden_gradient,
)
from lens_kernels.logprobs import shape_results, zeros_for_none
from lens_kernels.shard import VocabShard

# Each chunk reads the weight and updates its gradient, of twice the width; more rows per chunk hide this better.
CHUNK_ROWS = 2048
CHUNK_ROWS_CPU = 256
WEIGHT_BLOCK_ELEMENTS = 1 << 22  # float32 elements of a half-precision weight upcast at a time: 16 MiB
GRADIENT_BLOCK_ROWS = 1 << 13  # rows of the weight whose gradient is formed apart where cuBLAS cannot add in place


class HeadRows(NamedTuple):
    """The checked rows that go through the LM head, and how they are cut into chunks."""

    tokens: TokenRows
    rows: Tensor | None  # [T] indices into the N rows of the hidden states; None: all, T = N
    chunk_rows: int
    sequence_parallel: bool  # `hidden` was cut along its first axis: gathered forward, its gradient reduce-scattered

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
        """Joins the rows to the operands, which autograd must see as arguments of their own and not in a record."""
        if self.sequence_parallel:
            hidden = gather_rows(hidden, self.tokens.shard)
        return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias, self)

    def reduce(self, d_hidden: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Sums the shards' parts [N, H] of the gradient, and returns it in the shape and dtype of the hidden states."""
        if d_hidden is None:
            return None
        scatter = scatter_hidden_gradient if self.sequence_parallel else reduce_hidden_gradient
        return scatter(d_hidden, self.tokens.shard).to(dtype).view(shape)


class Head(NamedTuple):
    """The LM head's operands and the rows that go through it."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    rows: HeadRows

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of the T rows, their hidden states [n, H], of the dtype they are multiplied in)."""
        dtype = torch.bfloat16 if multiplies_bfloat16(self) else torch.float32
        rows, token_ids, step = self.rows.rows, self.rows.tokens.token_ids, self.rows.chunk_rows
        for start in range(0, len(token_ids), step):
            part = slice(start, min(start + step, len(token_ids)))
            hidden = self.hidden[part] if rows is None else self.hidden[rows[part]]
            # Ignored rows may hold any values, also NaN: 0 * NaN would reach the weight's gradient.
            yield part, hidden.to(dtype).masked_fill((token_ids[part] < 0)[:, None], 0)

    def empty_logits(self) -> Tensor:
        """Allocates one buffer for all chunks, float32 [chunk_rows, V]."""
        count = min(self.rows.chunk_rows, len(self.rows.tokens.token_ids))
        return torch.empty(count, len(self.weight), dtype=torch.float32, device=self.weight.device)

    def scatter(self, d_hidden: Tensor | None, part: slice, d_chunk: Tensor | None) -> None:
        """Writes a chunk's gradient [n, H] into its rows of that of all hidden states [N, H]; does nothing for None."""
        if d_hidden is None or d_chunk is None:
            return
        if self.rows.rows is None:
            d_hidden[part] = d_chunk
        else:
            d_hidden.index_add_(0, self.rows.rows[part], d_chunk)  # adds, because `rows` may name a row twice


def multiplies_bfloat16(head: Head) -> bool:
    """Returns whether the products take bfloat16 operands as they are."""
    both = head.hidden.dtype == head.weight.dtype == torch.bfloat16
    return both and uses_triton(head.hidden.device) and head.hidden.device.type == "cuda"


def _weight_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields (columns of the logits, float32 [n, H]); a float32 weight is yielded whole and without a copy."""
    step = len(weight) if weight.dtype == torch.float32 else max(1, WEIGHT_BLOCK_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight))), weight[start : start + step].float()


def project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """Writes the logits of a chunk into `out`, float32 [n, V]; hidden is [n, H]."""
    if hidden.dtype == torch.bfloat16:
        torch.mm(hidden, head.weight.T, out_dtype=torch.float32, out=out)
    else:
        for columns, block in _weight_blocks(head.weight):
            torch.mm(hidden, block.T, out=out[:, columns])
    if head.bias is not None:
        out += head.bias
    return out


def gradient_buffer(logits: Tensor, hidden: Tensor) -> Tensor:
    """Returns [n, V] in the storage of float32 `logits`, of the dtype of its GEMMs: bfloat16 rows fill half of it."""
    return logits if hidden.dtype == torch.float32 else logits.view(hidden.dtype)[:, : logits.shape[1]]


def backproject(
    d_logits: Tensor,  # [n, V]
    hidden: Tensor,  # [n, H] of the same dtype
    head: Head,
    d_weight: Tensor | None,  # [V, H] float32, added to
    d_bias: Tensor | None,  # [V] float32, added to
    needs_hidden: bool,
) -> Tensor | None:  # [n, H] float32, this shard's part of the hidden states' gradient
    if d_bias is not None:
        d_bias += d_logits.sum(0, dtype=torch.float32)
    if d_weight is not None:
        _add_product(d_weight, d_logits.T, hidden)
    if not needs_hidden:
        return None
    if hidden.dtype == torch.bfloat16:
        return torch.mm(d_logits, head.weight, out_dtype=torch.float32)
    d_hidden = torch.zeros_like(hidden)
    for columns, block in _weight_blocks(head.weight):
        d_hidden.addmm_(d_logits[:, columns], block)
    return d_hidden


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Computes total += a @ b with a float32 total."""
    if b.dtype == torch.float32:
        total.addmm_(a, b)
        return
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        # PyTorch 2.8 refuses a float32 total of bfloat16 factors.
        for start in range(0, len(total), GRADIENT_BLOCK_ROWS):
            block = slice(start, start + GRADIENT_BLOCK_ROWS)
            total[block] += torch.mm(a[block], b, out_dtype=torch.float32)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Prevents an outer autocast from running the float32 GEMMs in half precision."""
    has_autocast = torch.amp.is_autocast_available(device.type)  # False for the meta device
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


def zeros_float32(like: Tensor | None, needed: bool) -> Tensor | None:
    """Returns a float32 gradient of `like` to add to; None if there is no operand or its gradient is not needed."""
    if like is None or not needed:
        return None
    return torch.zeros(like.shape, dtype=torch.float32, device=like.device)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: HeadRows, return_entropy: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        head = rows.head(hidden, weight, bias)
        stats = hidden.new_empty((1, 4 if return_entropy else 3, len(rows.tokens.token_ids)), dtype=torch.float32)
        buffer = head.empty_logits()
        with full_precision(hidden.device):
            for part, chunk in head.chunks():
                logits = project(chunk, head, buffer[: len(chunk)])
                stats[:, :, part] = row_statistics(
                    logits, rows.tokens.at(part), with_entropy=return_entropy, split_rows=False
                )
        totals = merge_statistics(stats, rows.tokens)
        ctx.save_for_backward(hidden, weight, bias, *totals.softmax)
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return (totals.logprobs, totals.softmax.asked_entropy().clone()) if return_entropy else totals.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *saved = ctx.saved_tensors
        rows, totals = ctx.rows, SoftmaxTotals(*saved)
        head = rows.head(hidden, weight, bias)
        d_logprobs = zeros_for_none(d_logprobs, d_entropy)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = zeros_float32(head.hidden, needs_hidden)
        d_weight, d_bias = zeros_float32(weight, needs_weight), zeros_float32(bias, needs_bias)
        buffer = head.empty_logits()
        with full_precision(hidden.device):
            for part, chunk in head.chunks():
                logits = project(chunk, head, buffer[: len(chunk)])
                d_logits = gradient_buffer(logits, chunk)
                chunk_d_entropy = None if d_entropy is None else d_entropy[part]
                tokens = rows.tokens.at(part)
                write_dlogits(d_logits, logits, tokens, totals.at(part), d_logprobs[part], chunk_d_entropy)
                head.scatter(d_hidden, part, backproject(d_logits, chunk, head, d_weight, d_bias, needs_hidden))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return rows.reduce(d_hidden, hidden.shape, hidden.dtype), d_weight, d_bias, None, None


def check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: Tensor | float,
    valid_vocab_size: int | None,
    shard: VocabShard | None,
    chunk_rows: int | None,
    sequence_parallel: bool,
) -> HeadRows:
    """Checks the arguments that the two linear functions share."""
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
    leading = hidden.shape[:-1]
    if sequence_parallel:
        if shard is None or shard.group is None:
            raise ValueError("sequence_parallel: got True, need a shard with a group to gather the hidden states over")
        require(len(leading) >= 1, "hidden", f"shape {tuple(hidden.shape)}", "a sequence axis before H")
        leading = torch.Size([leading[0] * dist.get_world_size(shard.group), *leading[1:]])
    check_rows(rows, leading.numel(), hidden.device)
    shape = leading if rows is None else rows.shape
    ids = check_token_ids(token_ids, shape, hidden.device)
    tau = check_temperature(temperature, shape, hidden.device)
    check_valid_vocab_size(valid_vocab_size)
    check_chunk_rows(chunk_rows)
    if chunk_rows is None:
        chunk_rows = CHUNK_ROWS_CPU if hidden.device.type == "cpu" else CHUNK_ROWS
    tokens = TokenRows(ids, tau, None, resolve_shard(len(weight), ids, valid_vocab_size, shard))
    return HeadRows(tokens, rows, chunk_rows, sequence_parallel)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    rows: Tensor | None = ...,
    temperature: Tensor | float = ...,
    return_entropy: Literal[False] = ...,
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    chunk_rows: int | None = ...,
    sequence_parallel: bool = ...,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    rows: Tensor | None = ...,
    temperature: Tensor | float = ...,
    return_entropy: Literal[True],
    valid_vocab_size: int | None = ...,
    shard: VocabShard | None = ...,
    chunk_rows: int | None = ...,
    sequence_parallel: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,  # [..., H] float32, bfloat16 or float16; the same on all ranks of `shard`
    weight: Tensor,  # [V, H]; this rank's rows of the LM head if `shard` is given
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row. [T] if `rows` is given
    *,
    bias: Tensor | None = None,  # [V]
    rows: Tensor | None = None,  # [T] int64: the flattened rows of `hidden` that need a head at all
    temperature: Tensor | float = 1.0,
    return_entropy: bool = False,
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
    chunk_rows: int | None = None,
    sequence_parallel: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # float32, shaped like token_ids, or (logprobs, entropy)
    """Returns token_logprobs(hidden.float() @ weight.float().T + bias, ...) with at most a chunk of logits in memory.

    With `rows`, only those rows are computed and token_ids, temperature and the result have one entry per index.
    The backward computes each chunk's logits again (four GEMMs in all), accumulates the weight's gradient in float32
    and sums the gradient of `hidden` over the shard's group, so do not sum it a second time in the layer before.
    With `sequence_parallel`, each rank holds an equal part of `hidden` along its first axis: the parts are gathered
    here and the gradient is reduce-scattered; token_ids and `rows` refer to the gathered rows.
    Forward takes one collective for all chunks. Extra memory is chunk_rows * V * 4 bytes, and the weight's gradient.

    Raises ValueError for a wrong shape, dtype, device, temperature, vocabulary size, chunk or row index.
    """
    head_rows = check_head(
        hidden, weight, token_ids, bias, rows, temperature, valid_vocab_size, shard, chunk_rows, sequence_parallel
    )
    results = _LinearTokenLogprobs.apply(hidden, weight, bias, head_rows, return_entropy)
    return shape_results(results, token_ids.shape)
