"""Defines what every objective takes and returns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from torch import Tensor

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms


class ObjectiveResult(NamedTuple):
    """Losses of T tokens and what the metrics need; all are [T] float32."""

    losses: Tensor
    """Their sum is the micro-batch's loss; they carry a gradient."""
    ratio: Tensor
    clipped: Tensor
    """1.0 where a clip holds, else 0."""
    kl: Tensor
    """The k3 estimate in nats, at most `algorithm.kl_limit`; 0 without a KL term."""


class FusedLossArguments(TypedDict):
    """Arguments of `lens_kernels.linear_policy_loss`, under their names there; the tensors are [T] float32."""

    old_logprobs: Tensor
    advantages: Tensor
    reference_logprobs: Tensor | None
    policy_weights: Tensor
    kl_weights: Tensor | None
    entropy_weights: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_limit: float | None


LossFunction = Callable[[Tensor, Tensor, TokenTerms, AlgorithmConfig], ObjectiveResult]
"""It takes (log-probabilities [T], entropies [T], terms of the T tokens, algorithm); all tensors are float32."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss and how the LM head computes it: by `fused` if that gives arguments, else by `losses`."""

    losses: LossFunction
    whole_sequences: bool = False
    """True: a token's loss depends on other tokens of its response, so the T tokens cannot be cut into chunks."""
    fused: Callable[[TokenTerms, AlgorithmConfig], FusedLossArguments | None] | None = None
    """Returns the arguments with which lens_kernels' own loss equals `losses`, or None where it cannot."""
