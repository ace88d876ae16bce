"""Purifies prompts: one file per method, which `lens.purifier` chooses by its name.

A method decides which tokens of a prompt are deleted before it is sampled a second time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt

__all__ = ["Deletion", "PromptEvidence", "Purifier"]


@dataclass(frozen=True, slots=True)
class PromptEvidence:
    """What the trainer has computed of one prompt; None where no method needs it (`Entry.needs`)."""

    scores: Tensor | None = None
    """[L] float32: |log pi_theta - log pi_ref| of every token given its prefix, in nats; 0 at position 0."""
    gradients: Tensor | None = None
    """[L] float32: the norm of the gradient of the answer's negative log-likelihood at every token's embedding."""


@dataclass(frozen=True, slots=True)
class Deletion:
    """The tokens of a prompt that leave."""

    positions: tuple[int, ...]
    """Ascending. Empty: the second wave is sampled from the prompt as it is."""
    scores: tuple[float, ...]
    """[L] the number of each token by which the method decided."""


Purifier = Callable[[Prompt, PromptEvidence, LensConfig, int, Any], Deletion | None]
"""A pure function of (prompt, evidence, shared options, seed, own options); None means no second wave."""
