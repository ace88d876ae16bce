"""Lists the operators that are measured: their peers, their truth in float64, and the least work they could take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.operators import peers_linear, peers_logits, shapes
from benchmarks.operators.inputs import Inputs, make_linear, make_logits
from benchmarks.operators.peers import Peer
from benchmarks.operators.shapes import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    name: str
    peers: tuple[Peer, ...]
    truth: Callable[[Inputs], Tensor]
    """`Peer.forward` in float64."""
    passes: int
    """The least number of times the logits cross the memory bus, or of GEMMs over them."""
    backward: bool = False
    pair: bool = False
    """True if it takes the logits of two models."""
    linear: bool = False
    """True if it starts from hidden states."""

    def shapes(self, which: str) -> list[Shape]:
        return (shapes.LINEAR if self.linear else shapes.LOGITS)[which]

    def inputs(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        if self.linear:
            return make_linear(shape, dtype, device, self.backward)
        return make_logits(shape, dtype, device, self.backward, self.pair)

    def work(self, shape: Shape, dtype: torch.dtype) -> int:
        """Counts the bytes from and to memory, or the floating-point operations of the GEMMs."""
        elements = shape.rows * shape.vocab
        return self.passes * elements * (2 * shape.hidden if self.linear else dtype.itemsize)

    def call(self, peer: Peer, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Returns (value, gradients of the inputs' leaves); this call is timed."""
        return evaluate(peer.forward, inputs, self.backward)


def evaluate(forward: Callable[[Inputs], Tensor], inputs: Inputs, backward: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    if not backward:
        with torch.no_grad():
            return forward(inputs), ()
    value = forward(inputs)
    return value.detach(), torch.autograd.grad(value, inputs.leaves)


OPERATORS = (
    Operator(
        name="linear_policy_loss",
        peers=peers_linear.LINEAR_POLICY_LOSS,
        truth=peers_linear.true_loss,
        passes=3,
        backward=True,
        linear=True,
    ),
    Operator(
        name="policy_loss",
        peers=peers_logits.POLICY_LOSS,
        truth=peers_logits.true_loss,
        passes=3,  # read, read again, write
        backward=True,
    ),
    Operator(
        name="linear_token_logprobs",
        peers=peers_linear.LINEAR_TOKEN_LOGPROBS,
        truth=peers_linear.true_logprobs,
        passes=1,
        linear=True,
    ),
    Operator(
        name="token_logprobs",
        peers=peers_logits.TOKEN_LOGPROBS,
        truth=peers_logits.true_logprobs,
        passes=1,
    ),
    Operator(
        name="linear_cross_entropy",
        peers=peers_linear.LINEAR_CROSS_ENTROPY,
        truth=peers_linear.true_cross_entropy,
        passes=3,
        backward=True,
        linear=True,
    ),
    Operator(
        name="token_logprobs_backward",
        peers=peers_logits.TOKEN_LOGPROBS_BACKWARD,
        truth=peers_logits.true_weighted_logprobs,
        passes=3,
        backward=True,
    ),
    Operator(
        name="interference_scores",
        peers=peers_logits.INTERFERENCE_SCORES,
        truth=peers_logits.true_scores,
        passes=2,  # two models
        pair=True,
    ),
)
"""The operators, those whose figures matter most first: a run with a budget may end before the last."""
