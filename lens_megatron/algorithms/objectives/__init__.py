"""Defines the loss of a token with a given ratio: one file per method, which `algorithm.objective` chooses by its name.

`algorithm.ratio` says what the ratio is, and algorithms/policy_objective.py puts weights, KL, entropy and imitation
around the surrogate. A surrogate sees one log-probability per token: `lens_kernels` computes all that has vocabulary
size, such as the LM head, and differentiates these losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from lens_megatron.config import AlgorithmConfig
from lens_megatron.types import TokenTerms

__all__ = ["Surrogate", "SurrogateResult"]


class SurrogateResult(NamedTuple):
    """The policy's loss of T tokens; both are [T] float32."""

    losses: Tensor
    """The losses before weights and denominators; they carry a gradient."""
    clipped: Tensor
    """1.0 where the method holds the ratio back, else 0."""


Surrogate = Callable[[Tensor, Tensor, TokenTerms, AlgorithmConfig, Any], SurrogateResult]
"""A pure function of (log-ratio [T], log-probabilities [T], terms, shared options, own options); tensors are float32.

The log-ratio is log pi - log pi_old of each token or of its whole response, as `algorithm.ratio` says. A method whose
loss of a token depends on other tokens of its response needs `Evidence.WHOLE_RESPONSES`.
"""
