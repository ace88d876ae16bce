"""LENS: deletes the tokens with the highest interference scores (Algorithm 1, lines 10-12), or by another score."""

import math
import random
from typing import Literal

import torch
from lens_kernels import select_interference_tokens
from pydantic import Field, field_validator
from torch import Tensor

from lens_megatron.algorithms.entry import Entry, Evidence
from lens_megatron.algorithms.purification import Deletion, PromptEvidence, deletion_count
from lens_megatron.config import LensConfig, Section
from lens_megatron.types import Prompt


class InterferenceOptions(Section):
    """The number of each token by which the deletion goes. All need the same two passes."""

    score: Literal["interference", "signed", "surprisal", "smoothed"] = "interference"
    """interference: |log pi_theta - log pi_ref| (LENS, eq. 1). signed: log pi_theta - log pi_ref, so that tokens go
    which training has made more likely. surprisal: -log pi_theta. smoothed: the mean of interference over a window."""
    window: int = Field(3, ge=1, le=99)
    """The tokens of the window of `smoothed`, an odd number: each token and as many on either side. Only those that may
    be deleted count in the mean, so that a template's scores do not spread into the problem."""

    @field_validator("window")
    @classmethod
    def refuse_even_windows(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("expected an odd number, so that the token is in the middle of its window")
        return value


def interference(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: InterferenceOptions
) -> Deletion | None:
    """Deletes the k = ceil(gamma * n) eligible tokens with the highest scores, all at once.

    The numbers of the deletion are those of `options.score`, in nats. Returns None where no eligible token's reaches
    the noise floor `lens.min_score`. `seed` is for `lens.tie_break=random`.

    Raises:
        ValueError: the evidence lacks what the score is made of.
    """
    eligible = torch.tensor(prompt.eligible)
    scores = token_scores(evidence, eligible, options)
    keep = select(scores, eligible, lens, seed, floor=lens.min_score)
    if bool(keep.all()):
        return None
    return Deletion(tuple((~keep).nonzero().flatten().tolist()), tuple(scores.tolist()))


def token_scores(evidence: PromptEvidence, eligible: Tensor, options: InterferenceOptions) -> Tensor:
    """Returns the number [L] float32 of every token by `options.score`, in nats.

    Position 0, which has no prefix and so no score of its own, is never eligible.

    Args:
        eligible: [L] bool, the tokens that may be deleted.

    Raises:
        ValueError: the evidence lacks what the score is made of.
    """
    if options.score in ("interference", "smoothed"):
        scores = _present(evidence.scores, "scores")
        return scores if options.score == "interference" else smoothed(scores, eligible, options.window)
    log_probs = _present(evidence.log_probs, "log_probs")
    if options.score == "surprisal":
        return -log_probs
    return log_probs - _present(evidence.reference_log_probs, "reference_log_probs")


def smoothed(scores: Tensor, counted: Tensor, window: int) -> Tensor:
    """Returns the mean of the counted scores within `window` tokens around each token, [L] float32; 0 if there is none.

    Args:
        scores: [L] float32. counted: [L] bool.
        window: odd; at the ends of the prompt fewer tokens lie within.
    """
    ones = torch.ones(1, 1, window, dtype=torch.float64)
    rows = torch.stack([torch.where(counted, scores, 0.0).double(), counted.double()])
    sums, counts = torch.nn.functional.conv1d(rows[:, None], ones, padding=window // 2)[:, 0]
    return (sums / counts.clamp(min=1)).float()


def _present(found: Tensor | None, name: str) -> Tensor:
    if found is None:
        raise ValueError(f"the purifier interference needs the prompt's {name}, got None")
    return found


def select(scores: Tensor, eligible: Tensor, lens: LensConfig, seed: int, *, floor: float = -math.inf) -> Tensor:
    """Returns [L] bool, False at the `deletion_count` eligible tokens with the highest of `scores` [L].

    No token is deleted where the highest score of an eligible token is below `floor`.
    """
    count, length = int(eligible.sum()), len(scores)
    if count == 0:
        return torch.ones(length, dtype=torch.bool)
    order = list(range(length))
    if lens.tie_break == "random":
        random.Random(seed).shuffle(order)
    permutation = torch.tensor(order)
    keep, _, _ = select_interference_tokens(
        scores[permutation],
        torch.tensor([0, length], dtype=torch.int32),
        ratio=deletion_count(eligible.tolist(), lens) / count,
        eligible=eligible[permutation],
        min_score=floor,
    )
    result = torch.empty_like(keep)
    result[permutation] = keep
    return result


ENTRY = Entry(
    interference,
    paper="LENS, arXiv 2601.21244",
    options=InterferenceOptions,
    needs=frozenset({Evidence.PROMPT_SCORES}),
)
