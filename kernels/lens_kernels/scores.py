"""Computes interference scores, which measure how far policy and reference differ on each token of a prompt.

score_t = | log pi_theta(x_t | x_<t) - log pi_ref(x_t | x_<t) |          LENS, arXiv 2601.21244, eq. 1
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_kernels._checks import check_device, check_matrix, per_row, require, shape_of
from lens_kernels._statistics import row_statistics
from lens_kernels._vocab_parallel import merge_statistics
from lens_kernels.logprobs import check_logits_arguments
from lens_kernels.shard import VocabShard


@torch.no_grad()
def interference_scores(
    policy_logits: Tensor,  # [..., V] float32, bfloat16 or float16
    token_ids: Tensor,  # [...] int64 or int32, global ids; negative: ignore the row
    *,
    reference_logits: Tensor | None = None,  # [..., V] like policy_logits
    reference_logprobs: Tensor | None = None,  # [...] float
    signed: bool = False,
    temperature: Tensor | float = 1.0,
    logit_softcap: float | None = None,  # > 0, of both models
    valid_vocab_size: int | None = None,
    shard: VocabShard | None = None,
) -> Tensor:  # [...] float32
    """Returns |log-probability under policy - under reference| of each row's token; `signed` keeps the sign.

    Give either the reference's logits or its log-probabilities (from token_logprobs with the same settings). Ignored
    rows give 0. There is no gradient. One collective gathers both models' statistics when the vocabulary is sharded.

    Logits rounded to bfloat16 carry about 0.06 nat of noise, which changes the ranking while policy and reference are
    close: pass float32 logits that were never rounded, or score with linear_token_logprobs.

    Raises ValueError for a wrong shape, dtype, device, temperature or soft cap, or unless exactly one kind of reference
    is given.
    """
    rows = check_logits_arguments(policy_logits, token_ids, temperature, valid_vocab_size, shard, False, logit_softcap)
    ids = rows.token_ids
    got = "neither" if reference_logits is None else "both"
    one = (reference_logits is None) != (reference_logprobs is None)
    require(one, "reference_logits, reference_logprobs", got, "exactly one of the two")
    stats = row_statistics(policy_logits, rows, with_entropy=False)
    if reference_logprobs is not None:
        reference = per_row("reference_logprobs", reference_logprobs, token_ids.shape, policy_logits.device)
        difference = merge_statistics(stats, rows).logprobs - reference
    elif reference_logits is not None:
        check_matrix("reference_logits", reference_logits, "V")
        same = reference_logits.shape == policy_logits.shape
        require(same, "reference_logits", shape_of(reference_logits), lambda: f"{tuple(policy_logits.shape)}")
        check_device("reference_logits", reference_logits, policy_logits.device)
        other = row_statistics(reference_logits, rows, with_entropy=False)
        twice = rows._replace(token_ids=ids.repeat(2), tau=None if rows.tau is None else rows.tau.repeat(2))
        both = merge_statistics(torch.cat([stats, other], dim=2), twice).logprobs
        difference = both[: len(ids)] - both[len(ids) :]
    scores = difference if signed else difference.abs()
    return scores.masked_fill(ids < 0, 0).view(token_ids.shape)
