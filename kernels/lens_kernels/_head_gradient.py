"""Sums the gradients of the LM head's operands over chunks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lens_kernels._head import Chunk, HeadPlan, Operands
from lens_kernels._products import Parts, multiply_d_hidden, multiply_d_weight, split, split_gradient
from lens_kernels._tile_gradient import ScaledGradient
from lens_kernels._vocab_parallel import scatter_hidden_gradient


class HeadGradients(NamedTuple):
    """Gradients of the operands, float32; None for one that is not needed."""

    hidden: Tensor | None  # [N, H], summed over the shard's group; [N / ranks, H] under sequence parallelism
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


class WeightTotal(NamedTuple):
    """A buffer to which the weight's gradient is added at once, times what the loss's gradient is going to be."""

    buffer: Tensor  # [V, H] float32
    loss_gradient: float


class _Reduction(NamedTuple):
    """A chunk's gradient that is on its way between the ranks."""

    work: dist.Work
    d_hidden: Tensor  # [n, H]
    part: slice


class GradientSums:
    """Takes the gradient of one chunk's logits after the other, and sums those of the operands in float32.

    The hidden states' gradient of a chunk is summed over the ranks while the next products run.
    """

    def __init__(
        self,
        plan: HeadPlan,
        operands: Operands,
        needs: tuple[bool, bool, bool],
        into: WeightTotal | None = None,
    ):
        """Allocates the sums; `needs` says whether hidden states, weight and bias need a gradient.

        With `into` the weight's gradient has no sum here, and `finish` returns None for it.
        """
        self._plan, self._operands, self._into = plan, operands, into
        self._empty = True
        self._reduction: _Reduction | None = None
        device = operands.hidden.device
        needs_hidden, needs_weight, needs_bias = needs
        # Without `rows` every row of the gradient is written; with it, some may be added to and others never named.
        allocate = torch.empty if plan.rows is None else torch.zeros
        self._hidden = allocate(operands.hidden.shape, dtype=torch.float32, device=device) if needs_hidden else None
        own_sum = needs_weight and into is None
        shape = operands.weight[0].shape
        self._weight = torch.empty(shape, dtype=torch.float32, device=device) if own_sum else None
        self._bias = torch.empty(operands.columns, dtype=torch.float32, device=device) if needs_bias else None

    def add(self, chunk: Chunk, d_logits: ScaledGradient) -> None:
        """Adds the share of a chunk whose logits have this gradient."""
        matrix, factor = split_gradient(d_logits.matrix, self._plan.precision), d_logits.factor
        if self._hidden is not None:
            d_hidden = torch.empty(chunk.hidden.shape, dtype=torch.float32, device=chunk.hidden.device)
            multiply_d_hidden(matrix, self._operands.weight, d_hidden)
            if factor is not None:
                d_hidden *= factor[:, None]
            self._reduce(d_hidden, chunk.part)
        if self._weight is not None:
            multiply_d_weight(matrix, self._scaled_factors(chunk, factor, 1.0), self._weight, self._empty)
        if self._into is not None:
            buffer, loss_gradient = self._into
            multiply_d_weight(matrix, self._scaled_factors(chunk, factor, loss_gradient), buffer, first=False)
        if self._bias is not None:
            ones = torch.ones(len(chunk.hidden), dtype=torch.float32, device=self._bias.device)
            multiply_d_weight(
                matrix, self._split((ones if factor is None else factor)[:, None]), self._bias[:, None], self._empty
            )
        self._empty = False

    def finish(self) -> HeadGradients:
        """Returns the sums over all chunks, after the last sum over the ranks."""
        self._settle()
        if self._empty:
            for total in (self._hidden, self._weight, self._bias):
                if total is not None:
                    total.zero_()
        hidden = self._hidden
        if hidden is not None and self._plan.sequence_parallel:
            hidden = scatter_hidden_gradient(hidden, self._plan.tokens.shard)
        return HeadGradients(hidden, self._weight, self._bias)

    def _scaled_factors(self, chunk: Chunk, factor: Tensor | None, loss_gradient: float) -> Parts:
        """Returns the hidden states times what the gradient of the logits leaves to multiply by."""
        if factor is None:
            return chunk.factors if loss_gradient == 1 else self._split(chunk.hidden.float() * loss_gradient)
        return self._split(chunk.hidden * (factor if loss_gradient == 1 else factor * loss_gradient)[:, None])

    def _split(self, factor: Tensor) -> Parts:
        """Returns the parts of a float32 factor of the weight's gradient, whose range float16 would not hold."""
        precision = self._plan.precision
        return (factor.bfloat16(),) if precision.is_half else split(factor, precision)

    def _reduce(self, d_hidden: Tensor, part: slice) -> None:
        """Starts the sum of a chunk's gradient over the ranks, and takes that of the chunk before."""
        group = self._plan.tokens.shard.group
        if group is None or self._plan.sequence_parallel or dist.get_world_size(group) == 1:
            self._place(d_hidden, part)
            return
        if self._plan.path == "tiles":
            d_hidden = d_hidden.to(self._operands.hidden.dtype)  # half the bytes, as Megatron sums them
        self._settle()
        self._reduction = _Reduction(dist.all_reduce(d_hidden, group=group, async_op=True), d_hidden, part)

    def _settle(self) -> None:
        if self._reduction is not None:
            work, d_hidden, part = self._reduction
            work.wait()
            self._place(d_hidden.float(), part)
            self._reduction = None

    def _place(self, d_hidden: Tensor, part: slice) -> None:
        """Writes a chunk's gradient [n, H] into its rows of that of all hidden states."""
        if self._hidden is None:
            return
        if self._plan.rows is None:
            self._hidden[part] = d_hidden
        else:
            self._hidden.index_add_(0, self._plan.rows[part], d_hidden)  # adds, as `rows` may name a row twice
