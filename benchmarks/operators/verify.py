"""Lets no wrong answer be timed: ours must agree with float64, and peers with ours on the tensors that are timed.

It compares the whole value and rows spread over each gradient, the last included: an overflowing index shows there.
Bounds follow from the dtype. Peers that round logits to bfloat16 are off by up to half a unit in the last place of a
logit, 0.06 at 16, and by 3 % of a probability; that is their known behaviour, which the results state as `difference`,
and not an error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.operators.catalog import Operator, evaluate
from benchmarks.operators.inputs import Inputs, LinearInputs
from benchmarks.operators.peers import Peer
from benchmarks.operators.shapes import CHECKED

SAMPLED_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The distance of a peer from ours, or of ours from float64."""

    value: float
    """The largest difference, divided by the larger of 1 and the largest value."""
    gradient: float
    """The norm of the difference divided by the norm, for the worst of the gradients; 0 without a backward pass."""

    def exceeds(self, bound: Difference) -> bool:
        # This form makes NaN exceed.
        return not (self.value <= bound.value and self.gradient <= bound.gradient)

    def __str__(self) -> str:
        return " ".join(f"{name} {size:.2g}" for name, size in asdict(self).items())


FLOAT32 = Difference(value=1e-4, gradient=1e-4)
BFLOAT16_LOGITS = Difference(value=1e-3, gradient=1e-2)
BFLOAT16_LINEAR = Difference(value=1e-2, gradient=5e-2)


@dataclass(frozen=True, slots=True)
class Answer:
    """The part of a peer's result that is kept, in float32."""

    value: Tensor
    gradients: tuple[Tensor, ...]
    """At most SAMPLED_ROWS rows of each gradient."""


def bound(operator: Operator, dtype: torch.dtype, peer: Peer | None = None) -> Difference:
    """Returns how far an answer may be off. A peer that rounds each row's value may be off by half a unit of that."""
    if dtype == torch.float32:
        return FLOAT32
    allowed = BFLOAT16_LINEAR if operator.linear else BFLOAT16_LOGITS
    if peer is not None and peer.rounds_rows:
        return replace(allowed, value=max(allowed.value, torch.finfo(dtype).eps / 2))
    return allowed


def answer(operator: Operator, peer: Peer, inputs: Inputs) -> Answer:
    return _sampled(*operator.call(peer, inputs))


def _sampled(value: Tensor, gradients: tuple[Tensor, ...]) -> Answer:
    return Answer(value.float().clone(), tuple(_rows(x).float() for x in gradients))


def _rows(x: Tensor) -> Tensor:
    x = x.flatten(0, -2)
    return x[torch.linspace(0, len(x) - 1, min(len(x), SAMPLED_ROWS), device=x.device).round().long()]


def difference(got: Answer, want: Answer) -> Difference:
    if got.value.shape != want.value.shape:
        raise ValueError(f"value: got shape {tuple(got.value.shape)}, need {tuple(want.value.shape)}")
    value = (got.value - want.value).abs().max() / want.value.abs().max().clamp(min=1)
    off = [(a - b).norm() / b.norm() for a, b in zip(got.gradients, want.gradients, strict=True)]
    return Difference(value=value.item(), gradient=max((x.item() for x in off), default=0.0))


def check_ours(operator: Operator, dtype: torch.dtype, device: torch.device) -> Difference:
    """Compares ours with float64 on a small irregular shape. Raises AssertionError where it is off."""
    inputs = operator.inputs(CHECKED["linear" if operator.linear else "logits"], dtype, device)
    want = _sampled(*evaluate(operator.truth, inputs, operator.backward))
    off = difference(answer(operator, operator.peers[0], _copy(inputs)), want)
    if off.exceeds(bound(operator, dtype)):
        raise AssertionError(f"{operator.name} of lens_kernels is off from float64: {off}; nothing is timed")
    return off


def _copy(inputs: Inputs) -> Inputs:
    """Returns inputs with copies of the leaves, since an in-place backward pass overwrites them."""
    names = ("hidden", "weight") if isinstance(inputs, LinearInputs) else ("logits",)
    leaves = {name: getattr(inputs, name) for name in names}
    return replace(inputs, **{k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in leaves.items()})
