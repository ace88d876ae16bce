"""Selects the tokens of each packed prompt to delete: the ceil(ratio * eligible) highest interference scores."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from lens_kernels._checks import ID_DTYPES, check_device, check_tensor, may_read_values, require, shape_of

_FINEST_RATIO = 10**9  # largest denominator: numerator * tokens stays far below 2**63


@torch.no_grad()
def select_interference_tokens(
    scores: Tensor,  # [T] floating point
    cu_seqlens: Tensor,  # [P + 1] int32 or int64: prompt i is the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1
    *,
    ratio: float,  # 0 to 1
    eligible: Tensor | None = None,  # [T] bool; None: every token
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # keep_mask [T] bool, kept_per_prompt [P] int32, new_cu_seqlens [P + 1] int32
    """Deletes, in each prompt, the k = ceil(ratio * number of eligible tokens) eligible tokens with the highest scores.

    Among equal scores the earlier token goes first. A NaN score counts as eligible but is never deleted. A prompt whose
    highest eligible score is below `min_score` loses no token: a ranking below the noise is meaningless, and at step 0,
    where policy and reference are the same, all scores are 0. Order is kept; `tokens[keep_mask]` are the
    purified prompts, delimited by `new_cu_seqlens`. Tokens past cu_seqlens[-1] belong to no prompt and are not kept.
    It runs without host synchronisation. Source: LENS, arXiv 2601.21244, Algorithm 1.

    Raises ValueError for a wrong shape, dtype or device, a ratio outside [0, 1] or a NaN `min_score`.
    """
    _check(scores, cu_seqlens, ratio, eligible, min_score)
    tokens, prompts, device = len(scores), len(cu_seqlens) - 1, scores.device
    position = torch.arange(tokens, device=device)
    prompt = torch.searchsorted(cu_seqlens[1:].long().contiguous(), position, right=True)  # P past the last prompt
    if eligible is None:
        eligible = torch.ones_like(prompt, dtype=torch.bool)
    eligible = eligible & (prompt < prompts)

    wanted = _ceil_ratio(ratio, _count(eligible, prompt, prompts))
    candidate = eligible & ~scores.isnan()
    highest = torch.full((prompts + 1,), -torch.inf, dtype=scores.dtype, device=device)
    highest.scatter_reduce_(0, prompt, scores.masked_fill(~candidate, -torch.inf), "amax")
    wanted = wanted.masked_fill(highest < min_score, 0)

    # Two stable sorts give (prompt, -score, position); tokens that cannot be deleted sort behind the last prompt.
    by_score = torch.sort(scores, descending=True, stable=True).indices
    bucket = prompt.masked_fill(~candidate, prompts)
    order = by_score[torch.sort(bucket[by_score], stable=True).indices]
    candidates = _count(candidate, prompt, prompts)
    first = candidates.cumsum(0) - candidates  # where each prompt's candidates begin in `order`
    delete = torch.zeros_like(candidate)
    delete[order] = position - first[bucket[order]] < wanted[bucket[order]]

    keep_mask = ~delete & (prompt < prompts)
    kept_per_prompt = _count(keep_mask, prompt, prompts)[:prompts].int()
    new_cu_seqlens = torch.zeros(prompts + 1, dtype=torch.int32, device=device)
    new_cu_seqlens[1:] = kept_per_prompt.cumsum(0)
    return keep_mask, kept_per_prompt, new_cu_seqlens


def _count(mask: Tensor, prompt: Tensor, prompts: int) -> Tensor:
    """Returns [P + 1] int64: how many of each prompt's tokens are set; the last entry counts those of no prompt."""
    return torch.zeros(prompts + 1, dtype=torch.int64, device=mask.device).scatter_add_(0, prompt, mask.long())


def _ceil_ratio(ratio: float, count: Tensor) -> Tensor:
    """Computes ceil(ratio * count) of the decimal that the caller wrote: 0.07 * 100 is 7, but 8 in floating point."""
    numerator, denominator = _as_fraction(ratio)
    return (count * numerator + denominator - 1) // denominator


def _as_fraction(ratio: float) -> tuple[int, int]:
    exact = Fraction(repr(float(ratio))).limit_denominator(_FINEST_RATIO)
    if ratio > 0:
        exact = max(exact, Fraction(1, _FINEST_RATIO))
    return exact.numerator, exact.denominator


# torch.compile cannot trace Fraction. The mark is all that torch.compiler.assume_constant_result sets, but calling that
# would import torch._dynamo together with this package, which takes 1 to 2 seconds.
_as_fraction._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a function's own attribute


def _check(scores: Tensor, cu_seqlens: Tensor, ratio: float, eligible: Tensor | None, min_score: float) -> None:
    check_tensor("scores", scores)
    require(scores.dim() == 1, "scores", shape_of(scores), "one dimension: packed prompts")
    require(scores.is_floating_point(), "scores", str(scores.dtype), "a floating-point dtype")
    check_tensor("cu_seqlens", cu_seqlens)
    is_list = cu_seqlens.dim() == 1 and len(cu_seqlens) >= 1
    require(is_list, "cu_seqlens", shape_of(cu_seqlens), "[prompts + 1]")
    require(cu_seqlens.dtype in ID_DTYPES, "cu_seqlens", str(cu_seqlens.dtype), "int32 or int64")
    check_device("cu_seqlens", cu_seqlens, scores.device)
    require(0 <= ratio <= 1, "ratio", ratio, "a number from 0 to 1")
    require(min_score == min_score, "min_score", min_score, "a number")
    if eligible is not None:
        check_tensor("eligible", eligible)
        require(eligible.dtype == torch.bool, "eligible", str(eligible.dtype), "bool")
        same = eligible.shape == scores.shape
        require(same, "eligible", shape_of(eligible), lambda: f"{tuple(scores.shape)}")
        check_device("eligible", eligible, scores.device)
    if may_read_values(scores.device):
        bounds = cu_seqlens.tolist()
        rising = bounds[0] == 0 and all(a <= b for a, b in zip(bounds, bounds[1:], strict=False))
        require(rising, "cu_seqlens", bounds, "offsets that start at 0 and never fall")
        require(bounds[-1] <= len(scores), "cu_seqlens", f"last offset {bounds[-1]}", f"at most {len(scores)} tokens")
