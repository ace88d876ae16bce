"""Evaluates a loss on merged statistics: the fused CRPO loss, or an objective of the caller's own under autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lens_kernels._checks import check_tensor, require
from lens_kernels._crpo import LossTerms, TokenLosses, merge_and_evaluate
from lens_kernels._vocab_parallel import RowTotals, TokenRows, merge_statistics

Objective = Callable[[Tensor, Tensor, slice], Tensor]
"""Maps (log-probabilities [n], entropies [n], slice of the T rows) to losses [n], under autograd."""
Evaluator = Callable[[Tensor, TokenRows, slice], tuple[RowTotals, TokenLosses]]
"""Maps (statistics [D, 4, n], n rows, their slice of the T rows) to merged statistics, losses and derivatives."""


def crpo_evaluator(terms: LossTerms) -> Evaluator:
    """Returns the evaluator of the CRPO loss."""
    return lambda stats, rows, part: merge_and_evaluate(stats, rows, terms.at(part))


def objective_evaluator(objective: Objective) -> Evaluator:
    """Returns the evaluator of the caller's objective."""

    def evaluate(stats: Tensor, rows: TokenRows, part: slice) -> tuple[RowTotals, TokenLosses]:
        totals = merge_statistics(stats, rows)
        return totals, differentiate_objective(objective, totals.logprobs, totals.asked_entropy(), rows.token_ids, part)

    return evaluate


def differentiate_objective(
    objective: Objective, logprobs: Tensor, entropy: Tensor, token_ids: Tensor, part: slice
) -> TokenLosses:
    """Evaluates the caller's objective on the statistics of some rows and differentiates it by them."""
    with torch.enable_grad():
        logprobs, entropy = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
        losses = objective(logprobs, entropy, part)
        check_tensor("objective", losses)
        same = losses.shape == logprobs.shape
        require(same, "objective", f"losses of shape {tuple(losses.shape)}", f"{tuple(logprobs.shape)}")
        ignored = token_ids < 0
        d_logprobs = d_entropy = None
        if losses.requires_grad:
            total = losses.masked_fill(ignored, 0).sum()
            d_logprobs, d_entropy = torch.autograd.grad(total, (logprobs, entropy), allow_unused=True)
    d_logprobs = torch.zeros_like(logprobs) if d_logprobs is None else d_logprobs.masked_fill(ignored, 0)
    d_entropy = None if d_entropy is None else d_entropy.masked_fill(ignored, 0)
    losses = losses.detach().float().masked_fill(ignored, 0)
    return TokenLosses(losses, None, None, None, d_logprobs, d_entropy)


def refuse_loss_arguments(**arguments: Tensor | float | None) -> None:
    """Raises ValueError if an argument of the CRPO loss is given beside an objective."""
    given = [name for name, value in arguments.items() if value is not None]
    require(not given, ", ".join(given), "a value next to objective", "None: the objective replaces the CRPO loss")
