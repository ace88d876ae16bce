"""Purifies prompts by the interference scores of their tokens (LENS, Algorithm 1, lines 10-12)."""

import random
from collections.abc import Callable, Sequence

import torch
from lens_kernels import select_interference_tokens
from torch import Tensor

from lens_megatron.config import LensConfig
from lens_megatron.types import Prompt, PurifiedPrompt

Retokenize = Callable[[tuple[int, ...]], tuple[int, ...]]
"""Turns token ids into text and back into token ids, for `lens.deletion=text`."""


def purify_prompts(
    prompts: Sequence[Prompt],
    scores: Sequence[Tensor],
    lens: LensConfig,
    *,
    seeds: Sequence[int],
    retokenize: Retokenize | None = None,
) -> list[PurifiedPrompt | None]:
    """Deletes from every prompt the ceil(gamma * n) eligible tokens with the highest scores, all at once.

    Args:
        scores: [L] float32 per prompt. seeds: per prompt, for `tie_break=random`.

    Returns:
        One purified prompt per prompt; None where no score reaches the noise floor or nothing may be deleted.
    """
    return [
        _purify(prompt, score, lens, seed, retokenize)
        for prompt, score, seed in zip(prompts, scores, seeds, strict=True)
    ]


def _purify(
    prompt: Prompt, scores: Tensor, lens: LensConfig, seed: int, retokenize: Retokenize | None
) -> PurifiedPrompt | None:
    keep = select(scores, torch.tensor(prompt.eligible), lens, seed)
    if bool(keep.all()) or not bool(keep.any()):
        return None
    kept = tuple(token for token, stays in zip(prompt.token_ids, keep.tolist(), strict=True) if stays)
    if lens.deletion == "text" and retokenize is not None:
        kept = retokenize(kept)
    deleted = tuple((~keep).nonzero().flatten().tolist())
    return PurifiedPrompt(kept, deleted, tuple(scores.tolist()))


def select(scores: Tensor, eligible: Tensor, lens: LensConfig, seed: int) -> Tensor:
    """Returns [L] bool, False at the tokens to delete."""
    count, length = int(eligible.sum()), len(scores)
    if count == 0:
        return torch.ones(length, dtype=torch.bool)
    ratio = lens.deletion_ratio
    if lens.ratio_base == "full":
        ratio = min(1.0, ratio * length / count)
    order = list(range(length))
    if lens.tie_break == "random":
        random.Random(seed).shuffle(order)
    permutation = torch.tensor(order)
    keep, _, _ = select_interference_tokens(
        scores[permutation],
        torch.tensor([0, length], dtype=torch.int32),
        ratio=ratio,
        eligible=eligible[permutation],
        min_score=lens.min_score,
    )
    result = torch.empty_like(keep)
    result[permutation] = keep
    return result
