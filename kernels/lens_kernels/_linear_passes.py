"""Runs the passes of the linear functions over all chunks, as pure functions of tensors and a `HeadPlan`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lens_kernels._chunk import allocate, logits_gradient, project
from lens_kernels._crpo import TokenLosses
from lens_kernels._head import HeadPlan, head_chunks, join_operands
from lens_kernels._head_gradient import GradientSums, HeadGradients, WeightTotal
from lens_kernels._objectives import Evaluator
from lens_kernels._products import exact_products
from lens_kernels._vocab_parallel import RowTotals, SoftmaxTotals, merge_statistics

Needs = tuple[bool, bool, bool]
"""Whether hidden states, weight and bias need a gradient."""


class HeadLoss(NamedTuple):
    """A loss and the gradients of its sum, float32; ignored rows are 0."""

    loss: Tensor  # scalar
    logprobs: Tensor  # [T], as are the next four
    ratio: Tensor | None
    clipped: Tensor | None
    kl: Tensor | None
    entropy: Tensor
    gradients: HeadGradients

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Returns the loss and what there is per row."""
        return self.loss, self.logprobs, self.ratio, self.clipped, self.kl, self.entropy


def logprobs_pass(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: HeadPlan, with_entropy: bool) -> RowTotals:
    """Returns the statistics of T rows. One collective for all chunks."""
    with exact_products(hidden.device):
        operands = join_operands(hidden, weight, bias, plan)
        kinds, count = 4 if with_entropy else 3, len(plan.tokens.token_ids)
        stats = torch.empty(1, kinds, count, dtype=torch.float32, device=hidden.device)
        buffers = allocate(plan, operands, with_gradient=False)
        for chunk in head_chunks(plan, operands):
            stats[:, :, chunk.part] = project(plan, operands, chunk, buffers, with_entropy=with_entropy).stats
    return merge_statistics(stats, plan.tokens)


def logprobs_gradient_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: HeadPlan,
    totals: SoftmaxTotals,
    d_logprobs: Tensor,  # [T]
    d_entropy: Tensor | None,  # [T]
    needs: Needs,
) -> HeadGradients:
    """Forms each chunk's logits again, and returns the gradients of the operands."""
    with exact_products(hidden.device):
        operands = join_operands(hidden, weight, bias, plan)
        sums = GradientSums(plan, operands, needs)
        buffers = allocate(plan, operands, with_gradient=True)
        for chunk in head_chunks(plan, operands):
            part = chunk.part
            projection = project(plan, operands, chunk, buffers, with_entropy=False)
            chunk_d_entropy = None if d_entropy is None else d_entropy[part]
            gradient = logits_gradient(
                plan, projection, operands.columns, chunk, totals.at(part), d_logprobs[part], chunk_d_entropy
            )
            sums.add(chunk, gradient)
        return sums.finish()


def loss_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: HeadPlan,
    evaluate: Evaluator,
    needs: Needs,
    into: WeightTotal | None = None,
) -> HeadLoss:
    """Returns the loss and the gradients of the operands. Each chunk takes two collectives.

    With `into` the weight's gradient is added there, and the result has none.
    """
    results: list[tuple[RowTotals, TokenLosses]] = []
    with exact_products(hidden.device):
        operands = join_operands(hidden, weight, bias, plan)
        sums = GradientSums(plan, operands, needs, into)
        buffers = allocate(plan, operands, with_gradient=any(needs))
        for chunk in head_chunks(plan, operands):
            projection = project(plan, operands, chunk, buffers, with_entropy=True)
            totals, tokens = evaluate(projection.stats, chunk.tokens, chunk.part)
            results.append((totals, tokens))
            if any(needs):
                gradient = logits_gradient(
                    plan,
                    projection,
                    operands.columns,
                    chunk,
                    totals.softmax,
                    tokens.d_logprobs,
                    tokens.d_entropy,
                )
                sums.add(chunk, gradient)
        gradients = sums.finish()
    none = torch.zeros(0, dtype=torch.float32, device=hidden.device)
    return HeadLoss(
        torch.cat([none, *(tokens.losses for _, tokens in results)]).sum(),
        torch.cat([none, *(totals.logprobs for totals, _ in results)]),
        _join([tokens.ratio for _, tokens in results], none),
        _join([tokens.clipped for _, tokens in results], none),
        _join([tokens.kl for _, tokens in results], none),
        torch.cat([none, *(totals.asked_entropy() for totals, _ in results)]),
        gradients,
    )


def _join(parts: list[Tensor | None], none: Tensor) -> Tensor | None:
    """Joins the chunks' tensors into [T]; a tensor that the chunks do not have stays None."""
    present = [part for part in parts if part is not None]
    return None if len(present) < len(parts) else torch.cat([none, *present])
