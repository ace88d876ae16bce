"""LENS: deletes the tokens with the highest interference scores (Algorithm 1, lines 10-12)."""

import math
import random

import torch
from lens_kernels import select_interference_tokens
from torch import Tensor

from lens_megatron.algorithms.entry import Entry, Evidence, NoOptions
from lens_megatron.algorithms.purification import Deletion, PromptEvidence, deletion_count
from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt


def interference(
    prompt: Prompt, evidence: PromptEvidence, lens: LensConfig, seed: int, options: NoOptions
) -> Deletion | None:
    """Deletes the k = ceil(gamma * n) eligible tokens with the highest scores, all at once.

    The numbers of the deletion are the interference scores in nats. Returns None where no score reaches the noise floor
    `lens.min_score`. `seed` is for `lens.tie_break=random`.
    """
    if evidence.scores is None:
        raise ValueError("the purifier interference needs the prompt's scores, got None")
    keep = select(evidence.scores, torch.tensor(prompt.eligible), lens, seed, floor=lens.min_score)
    if bool(keep.all()):
        return None
    return Deletion(tuple((~keep).nonzero().flatten().tolist()), tuple(evidence.scores.tolist()))


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


ENTRY = Entry(interference, paper="LENS, arXiv 2601.21244", needs=frozenset({Evidence.PROMPT_SCORES}))
