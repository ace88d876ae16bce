"""Defines the loss of a token with a given ratio: one file per method, which `algorithm.objective` chooses by its name.

A file NAME.py of this folder holds a function of the type `Surrogate` and, as ENTRY, what it declares: see sapo.py.
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
    """1.0 where the method holds the ratio back, else 0. `actor/pg_clipfrac` is its mean. clip: where the clip or the
    dual clip takes the gradient away. cispo: where the ratio is out of its bounds. sapo: nowhere."""


Surrogate = Callable[[Tensor, Tensor, TokenTerms, AlgorithmConfig, Any], SurrogateResult]
"""A pure function of (log-ratio [T], log-probabilities [T], terms, shared options, own options); tensors are float32.

The log-ratio is log pi - log pi_old in nats, of each token or, if `algorithm.ratio` says so, of its whole response: all
tokens of a response then have the same one. It carries the gradient of the log-probabilities it was made of, and so do
the log-probabilities. It is not bounded: clamp it to +-`lens_kernels.kl.LOG_RATIO_LIMIT` before exp, as the others do,
and keep the losses of a token finite, or its update is skipped. An on-policy token has the log-ratio 0.

The T tokens may be a part of a micro-batch, so that a token's loss must not depend on other tokens; `terms` are those
of the same tokens, of which a surrogate mostly needs `advantages`. A method whose loss of a token depends on other
tokens of its response declares `needs=frozenset({Evidence.WHOLE_RESPONSES})`; it then gets whole responses, whose
tokens share an entry of `terms.first`.

The result is differentiated by autograd; detach what is to be a constant. Weights, corrections and denominators come
later: do not apply `terms.policy_weights`.
"""
