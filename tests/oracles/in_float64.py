"""What the functions of both libraries share: lists of numbers in, lists of numbers out, float64 between."""

from collections.abc import Callable

import torch
from torch import Tensor


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_gradient(loss: Callable[[Tensor], Tensor], log_probs: list) -> dict[str, object]:
    """The loss and its gradient by the log-probabilities."""
    variable = tensor(log_probs).requires_grad_()
    value = loss(variable)
    (gradient,) = torch.autograd.grad(value, variable)
    return {"loss": value.item(), "gradient": gradient.tolist()}
