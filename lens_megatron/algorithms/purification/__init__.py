"""Purifies prompts: one file per method, which `lens.purifier` chooses by its name.

A method decides which tokens of a prompt are deleted before it is sampled a second time. What the numbers mean by which
it decides, `Deletion.scores`, stands in its docstring.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from torch import Tensor

from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt

__all__ = ["Deletion", "PromptEvidence", "Purifier", "deletion_count"]


@dataclass(frozen=True, slots=True)
class PromptEvidence:
    """What the trainer has computed of one prompt; None where no method needs it (`Entry.needs`)."""

    scores: Tensor | None = None
    """[L] float32: |log pi_theta - log pi_ref| of every token given its prefix, in nats; 0 at position 0."""
    gradients: Tensor | None = None
    """[L] float32: the norm of the gradient of the answer's negative log-likelihood at every token's embedding, in nats
    per unit of the embedding."""
    log_probs: Tensor | None = None
    """[L] float32: log pi_theta of every token given its prefix, in nats; 0 at position 0. Known where `scores` are."""
    reference_log_probs: Tensor | None = None
    """[L] float32: log pi_ref likewise."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """The tokens of a prompt that leave."""

    positions: tuple[int, ...]
    """Ascending. Empty: the second wave is sampled from the prompt as it is."""
    scores: tuple[float, ...]
    """[L] the number of each token by which the method decided."""


Purifier = Callable[[Prompt, PromptEvidence, LensConfig, int, Any], Deletion | None]
"""A pure function of (prompt, evidence, shared options, seed, own options); None means no second wave."""


def deletion_count(eligible: Sequence[bool], lens: LensConfig) -> int:
    """Returns k = ceil(gamma * n) (LENS, Algorithm 1), the same for all methods that delete a share of a prompt.

    n is the number of eligible tokens, or of all tokens with `lens.ratio_base=full`; k is no more than the number of
    eligible tokens. gamma is the decimal that the user wrote: 0.07 * 100 is 7, but a little more in floating point.

    Args:
        eligible: [L] True where the token may be deleted.
    """
    count = sum(eligible)
    base = len(eligible) if lens.ratio_base == "full" else count
    return min(count, ceil(Fraction(repr(lens.deletion_ratio)) * base))
